"""What a person at a terminal sees of a conversation."""

from __future__ import annotations

import io
import os
import pty
import select
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from outlier_mlx.cli import markdown
from outlier_mlx.cli.markdown import renders_markdown, reply_writer, without_controls
from tests.damage import edit_json
from tests.folders import copy_writable
from tests.library import Library
from tests.program import start_program
from tests.screen import highest_jump, screen, terminal_variables

REPLY = """# Ducks

A *short* list:

1. mallard
   - green head

   loud
2. teal

| name | size |
|------|------|
| teal | 38 cm |

```python
def quack():

    return "quack"
```
Last line, which is longer than the forty columns that there are.
"""
SHOWN = """                 Ducks

A short list:

 1 mallard
    • green head
   loud
 2 teal

 name  size
 ───────────
 teal  38 cm


 def quack():

     return "quack"


Last line, which is longer than the
forty columns that there are."""


def shown(pieces: list[str], height: int = 24) -> tuple[list[str], str]:
    """What a terminal of 40 columns shows in the end of a reply in these pieces, and was sent."""
    sent = io.StringIO()
    console = Console(
        file=sent, force_terminal=True, color_system=None, width=40, height=height, _environ={}
    )
    with reply_writer(console, markdown=True) as writer:
        for piece in pieces:
            writer.write(piece)
    return screen(sent.getvalue()), sent.getvalue()


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw at each piece."""
    monkeypatch.setattr(markdown, "INTERVAL", 0.0)


@given(cuts=st.sets(st.integers(1, len(REPLY) - 1), max_size=30), eager=st.booleans())
@settings(max_examples=15, deadline=None)
def test_however_a_reply_comes_it_ends_the_same(cuts: set[int], eager: bool):
    places = [0, *sorted(cuts), len(REPLY)]
    pieces = [REPLY[a:b] for a, b in pairwise(places)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(markdown, "INTERVAL", 0.0 if eager else 10.0)
        assert shown(pieces)[0] == SHOWN.split("\n")


@pytest.mark.usefixtures("eager")
def test_a_block_higher_than_the_terminal():
    """Is drawn as it grows, in the room there is, and is whole in the end."""
    lines, sent = shown([f"- number {n}\n" for n in range(30)], height=10)
    assert lines == [f" • number {n}" for n in range(30)]
    assert 0 < highest_jump(sent) < 10


@pytest.mark.usefixtures("eager")
def test_control_characters_are_not_sent():
    lines, sent = shown(["\x1b]0;evil\x07 and \x1b[2J\x9b1m", "\r\n\nend"])
    assert lines == ["␛]0;evil␇ and ␛[2J�1m", "", "end"]
    assert "\x1b]" not in sent and "\x07" not in sent and "\x9b" not in sent
    assert without_controls("a\tb\nc é 漢") == "a\tb\nc é 漢"


def test_nothing_and_spaces_are_shown_too():
    assert shown([])[0] == shown([" \n", "\n"])[0] == [""]


@pytest.mark.parametrize(
    ("terminal", "variables", "rendered"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_where_markdown_is_rendered(terminal: bool, variables: dict[str, str], rendered: bool):
    sent = io.StringIO()
    console = Console(file=sent, force_terminal=terminal, width=40, _environ=variables)
    assert renders_markdown(console) == rendered
    text = "*a* \x1b[2J"
    if not rendered:
        with reply_writer(console, markdown=False) as writer:
            writer.write(text)
        assert sent.getvalue() == ("*a* ␛[2J" if terminal else text)


@pytest.fixture(scope="module")
def tier(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = library.tier(library.overlay(layers=2, moe_layers=(1,), seed=8))
    tier = copy_writable(made, tmp_path_factory.mktemp("chat") / "tier")
    # No token ends a reply: a fast machine would be done before Ctrl-C comes.
    edit_json(tier / "generation_config.json", eos_token_id=[])
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    edit_json(tier / "tokenizer_config.json", eos_token=None, chat_template=template)
    edit_json(tier / "config.json", max_position_embeddings=100_000, eos_token_id=[])
    return tier


class Terminal:
    """A chat on a terminal of 80 columns."""

    def __init__(self, tier: Path, **variables: str) -> None:
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 80))
        command = ["chat", "--model", tier, "--temp", 0, "--max-tokens", 50_000]
        self.process = start_program(
            *command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=terminal_variables(**variables),
            preexec_fn=lambda: os.login_tty(slave),  # Ctrl-C becomes a signal
        )
        self.slave = slave
        self.seen = ""

    def expect(self, words: str, seconds: float = 40) -> str:
        """Read until some words come; what came until then."""
        deadline = time.monotonic() + seconds
        while words not in self.seen:
            assert time.monotonic() < deadline, self.seen
            assert self.process.poll() is None or select.select([self.master], [], [], 0)[0]
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 1 << 16).decode(errors="replace")
        before, _, self.seen = self.seen.partition(words)
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def type_until(self, text: str, words: str) -> None:
        """Type something again and again until some words come."""
        for _ in range(20):
            self.type(text)
            with suppress(AssertionError):
                self.expect(words, 2)
                return
        raise AssertionError(self.seen)

    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.slave)[3] & termios.ECHO)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(tier: Path) -> Iterator[Terminal]:
    terminal = Terminal(tier)
    yield terminal
    terminal.close()


@pytest.mark.slow
def test_a_session(terminal: Terminal):
    """Ctrl-C ends a reply, then a line; Ctrl-D ends the program."""
    terminal.expect("/help lists the commands; Ctrl-D ends the program")
    terminal.expect(">>> ")
    terminal.type("/hlep\n")
    terminal.expect("unknown command /hlep; did you mean '/help'?")
    terminal.expect(">>> ")
    terminal.type("/te\t0.0\n")
    terminal.expect("temperature: 0")
    terminal.expect(">>> ")
    terminal.type("Hello there\n")
    terminal.expect("\x1b[?25l")  # the live display begins
    assert not terminal.echoes()
    time.sleep(0.5)
    terminal.type("\x03")
    assert "^C" not in terminal.expect("interrupted")
    terminal.expect("tokens/s")
    terminal.expect(">>> ")
    terminal.type("half a line")
    terminal.expect("half a line")
    # Python's readline misses a signal that comes while it is busy with a key.
    terminal.type_until("\x03", "Ctrl-D or /exit ends the program")
    terminal.expect(">>> ")
    terminal.type('"""two\n')
    terminal.expect("... ")
    terminal.type('lines"""\n')
    terminal.expect("\x1b[?25l")
    terminal.type("\x03")
    terminal.expect("interrupted")
    terminal.expect(">>> ")
    terminal.type("\x04")
    assert terminal.process.wait(20) == 0
    assert "Traceback" not in terminal.seen
