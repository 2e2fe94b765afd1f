"""The command line: what goes where, what options do, and how it looks on a terminal."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import outlier_mlx
from outlier_mlx.engine.generate import Options, generate_text
from tests.builders import write_base, write_overlay
from tests.damage import edit_config
from tests.program import (
    COMMANDS,
    GROUP,
    HEAVY,
    ROOT,
    Result,
    run,
    run_command,
    run_program,
    run_python,
    start_program,
)
from tests.screen import COLOUR, ESCAPE, fits, lines_shown, on_terminal

PROMPT = "The heron stands in the water"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `overlay`, its `base`, and `tier`; heads are 32 wide."""
    folder = tmp_path_factory.mktemp("cli")
    dims: dict[str, Any] = {"layers": 2, "heads": 2, "kv_heads": 1}
    write_overlay(folder / "overlay", moe_layers=(1,), **dims)
    write_base(folder / "base", **dims)
    outlier_mlx.convert(folder / "overlay", out=folder / "tier")
    return folder


# Convert


def test_convert_reports_on_stderr(place: Path, tmp_path: Path) -> None:
    result = run("convert", place / "overlay", "--out", tmp_path / "out")
    assert result.out == ""
    lines = result.err.splitlines()
    assert lines[0].strip() == "out: q4, bfloat16"
    words = [line.split() for line in lines]
    assert ["bits", "per"] in words and ["part", "params", "size", "weight"] in words
    # 2 experts' worth of rows: 5 trits a byte in rows of multiples of 4 bytes, a scale a row.
    assert ["experts", "61.4", "K", "17.9", "kB", "2.33"] in words
    assert any(line[0] == "total" for line in words if line)
    assert lines[-1] == f"wrote {tmp_path / 'out'} from an overlay of form v3.2"
    assert "\x1b" not in result.err


def test_convert_names_what_stays_unquantized(tmp_path: Path) -> None:
    dims: dict[str, Any] = {"hidden": 48, "layers": 1, "moe_layers": (0,)}
    overlay = write_overlay(tmp_path / "overlay", **dims).path
    stderr = run("convert", overlay, "--out", tmp_path / "out").err
    (line,) = [line for line in stderr.splitlines() if line.startswith("unquantized")]
    assert "model.embed_tokens" in line and re.search(r"and \d+ more$", line)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ("", "overlay-q4"),
        ("--tier q8", "overlay-q8"),
        ("--tier f32", "overlay-f32"),
        ("--group-size 32", "overlay-q4-g32"),
        ("--base-bits 8 --experts affine2", "overlay-q8-affine2"),
        ("--base-bits none --dtype float16", "overlay-f16"),
        ("--base-bits 16 --dtype bfloat16", "overlay-bf16"),
    ],
)
def test_default_output(
    tmp_path: Path, options: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = write_overlay(
        tmp_path / "overlay", layers=1, moe_layers=(0,), expert_intermediate=64
    ).path
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run("convert", overlay, *options.split())
    assert [path.name for path in (tmp_path / "here").iterdir()] == [name]
    assert (tmp_path / "here" / name / "tier.json").exists()


def test_quiet_is_silent(place: Path, tmp_path: Path) -> None:
    result = run("convert", place / "overlay", "--out", tmp_path / "out", "--quiet")
    assert result.both == ""
    result = run("verify", tmp_path / "out", "--quiet")
    assert result.err == ""


def test_names_are_printed_as_they_are(place: Path, tmp_path: Path) -> None:
    """No markup, no emoji, no control characters: names come from folders and files."""
    out = tmp_path / "[" / "b] [c] :smile: \x1b[31mred"
    shown = "b] [c] :smile: \\x1b[31mred"
    stderr = run("convert", place / "overlay", "--out", out).err
    assert stderr.startswith(f"{shown}: q4") and f"[/{shown} from" in stderr
    stdout = run("info", out).out
    assert stdout.startswith(f"{shown}: tier (tq1_0_strided)\n")
    edit_config(out, model_type="\x1b[31mred\nand more")
    assert "\x1b" not in run("info", out).out
    overlay = write_overlay(tmp_path / "overlay", layers=1, moe_layers=(0,)).path
    edit_config(overlay, hidden_act="\x1b]0;title\a")
    stderr = run("convert", overlay, code=1).err
    assert len(stderr.splitlines()) == 1 and stderr.strip().isprintable()


# Generate


def generate(place: Path, *options: object, **how: Any) -> Result:
    return run("generate", "--model", place / "tier", *options, **how)


def test_generate_prints_the_text_and_then_statistics(place: Path) -> None:
    result = generate(place, "--prompt", PROMPT, "--max-tokens", 8)
    model, tokenizer = outlier_mlx.load(place / "tier")
    text = "".join(r.text for r in generate_text(model, tokenizer, PROMPT, Options(max_tokens=8)))
    assert result.out == text + "\n"
    pattern = (
        r"prompt: (\d+) tokens, [\d.]+ tokens/s\n"
        r"generation: 8 tokens, [\d.]+ tokens/s\n"
        r"peak memory: \d+\.\d{3} GB\n"
    )
    assert re.fullmatch(pattern, result.err)
    quiet = generate(place, "--prompt", PROMPT, "--max-tokens", 8, "--quiet")
    assert (quiet.out, quiet.err) == (result.out, "")


def prompt_tokens(result: Result) -> int:
    match = re.match(r"prompt: (\d+) tokens", result.err)
    assert match
    return int(match[1])


def test_generate_uses_the_chat_template(place: Path) -> None:
    _, tokenizer = outlier_mlx.load(place / "tier")
    templated = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    with_system = f"<|im_start|>system\nBe brief<|im_end|>\n{templated}"
    for text, options in [
        (templated, []),
        (PROMPT, ["--ignore-chat-template"]),
        (with_system, ["--system-prompt", "Be brief"]),
        (templated + "It", ["--prefill-response", "It"]),
    ]:
        result = generate(place, "-p", PROMPT, "-m", 1, *options)
        expected = len(tokenizer.encode(text, add_special_tokens=False))
        # What the answer begins with is not closed, so a newline or end mark may be missing.
        assert prompt_tokens(result) in (
            {expected, expected + 2} if "--pre" in str(options) else {expected}
        )


def test_generate_reads_stdin(place: Path) -> None:
    given = generate(place, "--prompt", "-", "-m", 8, input="Line one\nline two: é")
    expected = generate(place, "--prompt", "Line one\\nline two: é", "-m", 8)
    assert given.out == expected.out
    assert prompt_tokens(given) == prompt_tokens(expected)
    result = generate(place, "--prompt", "-", input=b"\xff\xfe", code=1)
    assert result.err == "error: stdin: the prompt is not UTF-8 text: invalid start byte\n"


def test_seeds_reproduce(place: Path) -> None:
    def sampled(seed: int) -> str:
        return generate(place, "-p", PROMPT, "-m", 16, "--temp", 1, "--seed", seed).out

    first = sampled(1)
    assert sampled(1) == first
    assert sampled(2) != first
    assert generate(place, "-p", PROMPT, "-m", 16).out != first


@pytest.mark.parametrize(
    "options",
    [
        "--kv-bits 8 --kv-group-size 32 --quantized-kv-start 0",
        "--kv-bits 4 --kv-group-size 32",
        "--max-kv-size 8",
        "--top-k 1 --temp 1",
        "--prefill-step-size 3",
        "--dtype bfloat16",
        # MLX compiles these samplers, for seconds on a CPU.
        pytest.param(
            "--min-p 0.1 --top-p 0.9 --xtc-probability 0.5 --xtc-threshold 0.1 --temp 1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_generation_options_are_taken(place: Path, options: str) -> None:
    result = generate(place, "-p", PROMPT, "-m", 4, *options.split())
    assert "generation: 4 tokens" in result.err
    if options in ("--top-k 1 --temp 1", "--prefill-step-size 3"):
        assert result.out == generate(place, "-p", PROMPT, "-m", 4).out


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example_that_is_valid(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = run(command, "--help", env={"COLUMNS": "400", "TERM": "dumb"}).out
    (line,) = [line.strip() for line in text.splitlines() if "Example: " in line]
    program, name, *arguments = shlex.split(line.removeprefix("Example: "))
    assert (program, name) == ("outlier-mlx", command)
    monkeypatch.chdir(tmp_path)
    for argument in arguments:
        if Path(argument).suffix in (".txt", ".json"):
            Path(argument).write_text("{}")
    GROUP.commands[command].make_context(command, arguments)  # complains of what it does not know


def test_version() -> None:
    assert run("--version").out == f"outlier-mlx {outlier_mlx.__version__}\n"


LOOK = f"""
import sys
from tests.program import HEAVY, run
for command in [[], *([name] for name in {COMMANDS!r})]:
    result = run(*command, "--help")
    assert "Usage" in result.out, command
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    assert not loaded, (command, loaded)
"""


def test_help_imports_nothing_heavy() -> None:
    """So it answers at once; what is imported is certain, how long it takes is not."""
    run_python(LOOK, cwd=ROOT)


INTERRUPTED = """
import sys

class Interrupted:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupted())
import outlier_mlx.cli
"""


def test_ctrl_c_while_modules_are_loaded() -> None:
    result = run_python(INTERRUPTED, cwd=ROOT, code=130)
    assert (result.out, result.err) == ("", "interrupted\n")


# As a program


def test_each_command_as_a_program(place: Path, tmp_path: Path) -> None:
    done = run_program("convert", place / "overlay", cwd=tmp_path)
    tier = tmp_path / "overlay-q4"
    assert done.out == "" and "wrote overlay-q4" in done.err and "\x1b" not in done.err
    done = run_program("generate", "--model", tier, "--prompt", "-", "-m", 6, input=PROMPT)
    assert done.out == generate(place, "--prompt", PROMPT, "-m", 6).out
    assert len(done.err.splitlines()) == 3
    assert '"kind": "tier"' in run_program("info", tier, "--json").out
    assert "whole: " in run_program("verify", tier).out


def test_python_m_and_debug(place: Path) -> None:
    command = [sys.executable, "-m", "outlier_mlx", "convert", place / "base", "--debug"]
    done = run_command(*command, code=1)
    assert done.err.startswith("Traceback")
    assert "CheckpointError: " in done.err.splitlines()[-1]


def test_a_reader_that_leaves(place: Path) -> None:
    """As in `outlier-mlx generate ... | head -c 1`."""
    command = ["generate", "--model", place / "tier", "-p", PROMPT, "-m", 4000]
    process = start_program(*command, "--temp", 1, "--seed", 1, "--ignore-memory")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=120) != 0
    assert process.stderr.read() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_result_that_cannot_be_written(place: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = run_program("info", place / "tier", "--json", code=1, stdout=full)
    assert "Traceback" not in done.err
    assert "No space left on device" in done.err


# On a terminal


@pytest.mark.parametrize("columns", [40, pytest.param(80, marks=pytest.mark.slow)])
def test_convert_on_a_terminal(place: Path, tmp_path: Path, columns: int) -> None:
    written = on_terminal(columns, "convert", place / "overlay", "--out", tmp_path / "out")
    assert COLOUR.search(written)
    shown = lines_shown(written)
    bars = [line for line in shown if "converting" in line]
    assert any("100%" in line for line in bars)
    assert any("MB/s" in line for line in bars) == (columns == 80)
    # A path is not broken: a terminal wraps it.
    assert not fits(columns, [line for line in shown if str(tmp_path) not in line])
    # The bar is gone in the end, and the cursor is back.
    after = written[written.rindex("converting") :]
    assert "\x1b[2K" in after and "\x1b[?25h" in after
    total = next(line for line in shown if line.startswith("total"))
    assert re.fullmatch(r"total +[\d.]+ K +[\d.]+ kB +[\d.]+", total)


def test_info_without_colour(place: Path) -> None:
    written = on_terminal(80, "info", place / "tier", NO_COLOR="1")
    assert not COLOUR.search(written)
    assert not fits(80, lines_shown(written))
    piped = run_program("info", place / "tier").out
    assert [line.rstrip() for line in piped.splitlines()] == lines_shown(written)[:-1]


@pytest.mark.parametrize("command", [(), ("convert",), ("generate",)], ids=str)
def test_help_fits_a_terminal(command: tuple[str, ...]) -> None:
    text = run(*command, "--help", env={"COLUMNS": "80"}).out
    assert max(len(ESCAPE.sub("", line)) for line in text.splitlines()) <= 80
    assert "Usage: " in text


def test_speech_is_kept_apart(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The library itself prints nothing."""
    calls: list[Callable[[], object]] = [
        lambda: outlier_mlx.load(place / "tier"),
        lambda: outlier_mlx.open_overlay(place / "overlay"),
    ]
    for call in calls:
        call()
    assert capfd.readouterr() == ("", "")
