"""Signs of life on a terminal, and what narrow, plain and closed ones get."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import outlier_mlx
from outlier_mlx import terminal
from outlier_mlx.screen import folded
from outlier_mlx.terminal import after_reading, print_columns, progress_bar, working
from tests.builders import write_overlay
from tests.program import run, run_program
from tests.screen import ESCAPE, fits, lines_shown, on_terminal, screen


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `overlay` of 8 experts, its `tier`, and a `text.txt`."""
    folder = tmp_path_factory.mktemp("feel")
    write_overlay(folder / "overlay", layers=2, moe_layers=(0, 1), experts=8)
    outlier_mlx.convert(folder / "overlay", out=folder / "tier")
    (folder / "text.txt").write_text("the cat sat on the mat, and the dog on the log; " * 8)
    return folder


# Signs of life


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What stderr gets, as a terminal of 40 columns."""
    return _terminal(monkeypatch)


@pytest.fixture
def plainly_sent(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Likewise, where NO_COLOR is set."""
    return _terminal(monkeypatch, no_color=True)


def _terminal(monkeypatch: pytest.MonkeyPatch, **options: Any) -> io.StringIO:
    sent = io.StringIO()
    console = Console(file=sent, force_terminal=True, width=40, _environ={}, **options)
    monkeypatch.setattr(terminal, "stderr", lambda: console)
    return sent


def wait_for(text: str, sent: io.StringIO) -> None:
    deadline = time.monotonic() + 30
    while text not in sent.getvalue():
        assert time.monotonic() < deadline, sent.getvalue()
        time.sleep(0.01)


def test_a_moment_shows_nothing(sent: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "DELAY", 3600.0)
    with working("loading a tier") as show:
        show("still loading")
    assert sent.getvalue() == ""


def test_work_is_shown_and_leaves_nothing(
    sent: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "DELAY", 0.0)
    with working("loading [b]a tier whose name is longer than the terminal is wide") as show:
        wait_for("loading [b]a tier whose name is long", sent)
        show("reading: 1 of 2 tokens")
        wait_for("reading: 1 of 2 tokens", sent)
    assert screen(sent.getvalue()) == [""]
    assert sent.getvalue().count("\x1b[?25l") == sent.getvalue().count("\x1b[?25h") == 1


def test_without_escapes_a_line_is_written_over(
    plainly_sent: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "DELAY", 0.0)
    with working("loading") as show:
        wait_for("loading", plainly_sent)
        show("on")
    with progress_bar("converting", quiet=False) as advance:
        advance(1, 4)
    with progress_bar("measuring", "tokens", quiet=False) as advance:
        advance(1, 2)
    text = plainly_sent.getvalue()
    assert "\x1b" not in text and "converting 25%" in text and "measuring 50%" in text
    assert screen(text) == [""]


def test_errors_take_the_sign_away(sent: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "DELAY", 0.0)
    with pytest.raises(ZeroDivisionError), working("loading"):
        wait_for("loading", sent)
        raise ZeroDivisionError
    assert screen(sent.getvalue()) == [""]


def test_reading_is_shown_until_the_first_response(
    sent: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "DELAY", 0.0)

    def generate(progress: Any) -> Any:
        wait_for("reading", sent)
        progress(512, 2048)
        wait_for("reading: 512 of 2048 tokens", sent)
        yield "a"
        yield "b"

    responses = after_reading(generate)
    assert screen(sent.getvalue()) == [""]
    assert list(responses) == ["a", "b"]
    assert list(after_reading(lambda progress: iter(()), quiet=True)) == []


def test_a_long_prompt_is_counted_on_a_terminal(place: Path) -> None:
    """As mlx-lm reports it, a step of the prefill at a time."""
    told: list[tuple[int, int]] = []
    model, tokenizer = outlier_mlx.load(place / "tier")
    from outlier_mlx.engine.generate import Options, generate_text

    options = Options(max_tokens=1, prefill_step_size=16, ignore_chat_template=True)
    list(
        generate_text(model, tokenizer, "word " * 30, options, lambda *counts: told.append(counts))
    )
    assert len(told) > 2 and told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)


# Unusual terminals
TABLES = {
    "info": "info tier",
    "tiers": "tiers overlay --ram 16",
    "routing": "routing tier --text text.txt --window 32 --windows 2",
    "bench": "bench --model tier -p 8 -g 2 -n 1",
}


@pytest.mark.parametrize("command", TABLES)
def test_nothing_is_cut_at_40_columns(
    place: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    narrow, wide = (
        run(*TABLES[command].split(), env={"COLUMNS": columns}).out for columns in ("40", "400")
    )
    # Sentences are folded on a terminal only; tables have no comma but in headings.
    rows = [line for line in narrow.splitlines() if line.startswith(" ") or "  " in line.strip()]
    assert rows and not fits(40, [line.rstrip() for line in rows])
    assert "…" not in narrow
    if command in ("info", "tiers"):  # no measured figures
        numbers = re.compile(r"\d+\.\d+ [kMG]?B|\d+\.\d+")
        assert set(numbers.findall(wide)) == set(numbers.findall(narrow))


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one two three four five six", ["one two three four", "  five six"]),
        ("  a/path/longer/than/a/line is left", ["  a/path/longer/than/a/line", "    is left"]),
        ("with weights of 1234 MB", ["with weights of", "  1234 MB"]),
        ("try what helps: pip install 'a[b]'", ["try what helps:", "  pip install 'a[b]'"]),
        (
            "it does not fit (see `a b c`), sorry",
            ["it does not fit", "  (see `a b c`),", "  sorry"],
        ),
        ("first line\nand\n", ["first line", "and", ""]),
    ],
)
def test_long_lines_end_between_words(text: str, lines: list[str]) -> None:
    assert folded(text, 20).split("\n") == lines


@pytest.mark.slow
def test_what_is_said_on_a_terminal_ends_between_words(place: Path) -> None:
    line = ["generate", place / "tier", "--prompt", "x", "-m", "2", "--expert-memory", "50%"]
    whole = run_program(*line, "--ignore-chat-template").err
    shown = lines_shown(on_terminal(50, *line, "--ignore-chat-template"))
    plan = next(said for said in whole.splitlines() if said.startswith("memory: "))
    first = next(at for at, said in enumerate(shown) if said.startswith("memory: "))
    parts = [shown[first], *takewhile(lambda said: said.startswith("  "), shown[first + 1 :])]
    assert len(plan) > 100 and len(parts) > 2 and not fits(50, parts)
    assert len(" ".join(map(str.strip, parts)).split()) == len(plan.split())


def test_columns_that_do_not_fit_come_below() -> None:
    def printed(width: int) -> list[str]:
        console = Console(file=io.StringIO(), width=width)
        rows = [["one", "10", "200", "3000"], ["two", "1", "2", "3"]]
        print_columns(console, ["", "a\nb", "c", "d"], rows, title="Title")
        assert isinstance(console.file, io.StringIO)
        return [line.rstrip() for line in console.file.getvalue().splitlines()]

    assert printed(40) == [
        "Title",
        "      a",
        "      b    c     d",
        "──────────────────",
        "one  10  200  3000",
        "two   1    2     3",
    ]
    assert printed(17)[:6] == [
        "Title",
        "      a",
        "      b    c",
        "────────────",
        "one  10  200",
        "two   1    2",
    ]
    assert printed(17)[-2:] == ["one  3000", "two     3"]


@pytest.mark.parametrize(
    ("line", "variables"),
    [
        ("convert {}/overlay --out {}/no-colour", {"NO_COLOR": "1"}),
        ("routing {}/tier --text {}/text.txt --window 32", {"TERM": "dumb"}),
    ],
    ids=["NO_COLOR", "dumb"],
)
def test_no_escapes(place: Path, line: str, variables: dict[str, str]) -> None:
    written = on_terminal(
        40, *(word.replace("{}", str(place)) for word in line.split()), **variables
    )
    assert "\x1b" not in written
    shown = [line for line in lines_shown(written) if str(place) not in line]  # a long word
    assert any("100%" in line for line in shown) and not fits(40, shown)


def test_a_reader_that_left_is_not_complained_of(place: Path) -> None:
    """As in `outlier-mlx tiers overlay | true`."""
    for command in ("--help", "tiers overlay"):
        reader, writer = os.pipe()
        os.close(reader)
        done = run_program(*command.split(), code=1, cwd=place, stdout=writer)
        os.close(writer)
        assert done.err == ""


def test_a_model_does_not_command_the_terminal(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ESCAPE.search("\x1b[2J")
    with pytest.MonkeyPatch.context() as patch:
        console = Console(file=io.StringIO(), force_terminal=True, _environ={})
        patch.setattr(terminal, "stdout", lambda: console)
        written = run("generate", "--model", place / "tier", "-p", "the", "-m", 40, "--temp", 2)
        assert written.out == "\n"
        shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown and not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)


def test_what_ends_a_text_early_is_said_on_a_line_of_its_own(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate_text(*_: Any) -> Iterator[Any]:
        yield SimpleNamespace(text="Once upon")
        raise KeyboardInterrupt

    monkeypatch.setattr("outlier_mlx.engine.generate.generate_text", generate_text)
    result = run("generate", "--model", place / "tier", "-p", "the cat", code=130)
    assert (result.out, result.err) == ("Once upon\n", "interrupted\n")
