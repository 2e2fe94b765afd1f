"""How the program feels: completion, hints, signs of life, and what unusual terminals get."""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import outlier_mlx
from outlier_mlx import terminal
from outlier_mlx.checkpoints.export import export_tier
from outlier_mlx.errors import OutlierError
from outlier_mlx.terminal import after_reading, counting_bar, print_columns, progress_bar, working
from tests.builders import write_overlay
from tests.program import HEAVY, SCRIPT, run, run_command, run_program, run_python
from tests.screen import ESCAPE, fits, lines_shown, on_terminal, screen

COMPLETE = "_OUTLIER_MLX_COMPLETE"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `overlay` of 8 experts, its `tier`, and a `text.txt`."""
    folder = tmp_path_factory.mktemp("feel")
    write_overlay(folder / "overlay", layers=2, moe_layers=(0, 1), experts=8)
    outlier_mlx.convert(folder / "overlay", out=folder / "tier")
    (folder / "text.txt").write_text("the cat sat on the mat, and the dog on the log; " * 8)
    return folder


# -- completion -------------------------------------------------------------------------------


def in_bash(script: str, home: Path) -> str:
    variables = os.environ | {
        "HOME": str(home),
        "PATH": f"{SCRIPT.parent}{os.pathsep}{os.environ['PATH']}",
    }
    return run_command("bash", "--norc", "--noprofile", "-euc", script, env=variables).out


def test_bash_completes_after_installation(tmp_path: Path) -> None:
    """As typed into bash, whose completion then calls the program."""
    script = """
outlier-mlx --install-completion >&2
source ~/.bashrc
for words in "outlier-mlx conv" "outlier-mlx generate --mo" "outlier-mlx convert --tier q4"; do
    COMP_WORDS=($words); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    $(complete -p outlier-mlx | sed 's/.*-F \\([^ ]*\\).*/\\1/') outlier-mlx
    echo "${COMPREPLY[@]}"
done
"""
    assert in_bash(script, tmp_path).splitlines() == ["convert", "--model", "q4 q4-mixed"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_the_program(shell: str) -> None:
    shown = run(env={COMPLETE: f"source_{shell}"}).out
    assert "outlier-mlx" in shown and f"{COMPLETE}=complete_{shell}" in shown


def test_completion_is_shown_for_this_shell(tmp_path: Path) -> None:
    assert "complete -o default -F" in in_bash("outlier-mlx --show-completion; true", tmp_path)


def test_zsh_and_fish_get_commands_with_their_help() -> None:
    words = {"_TYPER_COMPLETE_ARGS": "outlier-mlx veri"}
    zsh = run(env=words | {COMPLETE: "complete_zsh"}).out
    assert '"verify":"Check every file' in zsh
    words["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    fish = run(env=words | {COMPLETE: "complete_fish"}).out
    assert fish.startswith("verify\tCheck every file")


def test_completion_imports_nothing_heavy() -> None:
    look = f"""
import atexit, sys
atexit.register(lambda: print([n for n in {HEAVY!r} if n in sys.modules], file=sys.stderr))
from outlier_mlx.cli import main
main()
"""
    words = {"COMP_WORDS": "outlier-mlx convert --tier q", "COMP_CWORD": "3"}
    done = run_python(look, env=os.environ | words | {COMPLETE: "complete_bash"})
    assert (done.out.split(), done.err) == (["q4", "q4-mixed", "q8"], "[]\n")


# -- hints ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("genrate", "Did you mean 'generate'?"),
        ("convert --bas x", "--base"),
        ("--versoin", "--version"),
        ("convert x --tier q4mixed", "Did you mean 'q4-mixed'?"),
        ("convert x --dtype bfloat", "Did you mean 'bfloat16'?"),
        ("export x --out y --format pakced", "Did you mean 'packed'?"),
        ("convert x --tier 4", "is not one of 'auto', 'q4', 'q4-mixed'"),
    ],
)
def test_what_was_likely_meant(line: str, hint: str) -> None:
    stderr = run(*line.split(), code=2, env={"COLUMNS": "300", "TERM": "dumb"}).err
    assert hint in stderr and "Value error" not in stderr


def test_names_given_to_the_library_are_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(OutlierError, match="did you mean 'q4-mixed'"):
        outlier_mlx.convert(tmp_path, tier="q4mixed")
    with pytest.raises(OutlierError, match="did you mean 'packed'"):
        export_tier(tmp_path, tmp_path / "out", "pakced")


# -- signs of life ----------------------------------------------------------------------------


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
    monkeypatch.setattr(terminal, "MOMENT", 3600.0)
    with working("loading a tier") as show:
        show("still loading")
    assert sent.getvalue() == ""


def test_work_is_shown_and_leaves_nothing(
    sent: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "MOMENT", 0.0)
    with working("loading [b]a tier whose name is longer than the terminal is wide") as show:
        wait_for("loading [b]a tier whose name is long", sent)
        show("reading: 1 of 2 tokens")
        wait_for("reading: 1 of 2 tokens", sent)
    assert screen(sent.getvalue()) == [""]
    assert sent.getvalue().count("\x1b[?25l") == sent.getvalue().count("\x1b[?25h") == 1


def test_without_escapes_a_line_is_written_over(
    plainly_sent: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "MOMENT", 0.0)
    with working("loading") as show:
        wait_for("loading", plainly_sent)
        show("on")
    with progress_bar("converting", quiet=False) as advance:
        advance(1, 4)
    with counting_bar("measuring", "tokens", quiet=False) as advance:
        advance(1, 2)
    text = plainly_sent.getvalue()
    assert "\x1b" not in text and "converting 25%" in text and "measuring 50%" in text
    assert screen(text) == [""]


def test_errors_take_the_sign_away(sent: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "MOMENT", 0.0)
    with pytest.raises(ZeroDivisionError), working("loading"):
        wait_for("loading", sent)
        raise ZeroDivisionError
    assert screen(sent.getvalue()) == [""]


def test_reading_is_shown_until_the_first_response(
    sent: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "MOMENT", 0.0)

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
    from outlier_mlx.engine.generate import Options, stream

    options = Options(max_tokens=1, prefill_step_size=16, ignore_chat_template=True)
    list(stream(model, tokenizer, "word " * 30, options, lambda *counts: told.append(counts)))
    assert len(told) > 2 and told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)


# -- unusual terminals ------------------------------------------------------------------------

TABLES = {
    "info": "info tier",
    "tiers": "tiers overlay",
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
    # Sentences are left to the terminal to wrap; tables have no comma but in headings.
    rows = [line for line in narrow.splitlines() if line.startswith(" ") or "  " in line.strip()]
    assert rows and not fits(40, [line.rstrip() for line in rows])
    assert "…" not in narrow
    if command in ("info", "tiers"):  # no measured figures
        numbers = re.compile(r"\d+\.\d+ [kMG]?B|\d+\.\d+")
        assert set(numbers.findall(wide)) == set(numbers.findall(narrow))


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
    shown = [line for line in lines_shown(written) if not line.startswith("wrote ")]
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
    def stream(*_: Any) -> Iterator[Any]:
        yield SimpleNamespace(text="Once upon")
        raise KeyboardInterrupt

    monkeypatch.setattr("outlier_mlx.engine.generate.stream", stream)
    result = run("generate", "--model", place / "tier", "-p", "the cat", code=130)
    assert (result.out, result.err) == ("Once upon\n", "interrupted\n")
