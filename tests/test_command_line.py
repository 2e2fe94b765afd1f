"""What all commands have in common: help, the two spellings of MODEL, and what wrong usage says."""

from __future__ import annotations

import ast
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer

import outlier_mlx
from outlier_mlx.cli.options import Generation, KVCache, Sampling, Xtc
from outlier_mlx.cli.running import generation_options
from outlier_mlx.cli.values import Reader
from outlier_mlx.engine.generate import Options
from tests.builders import write_overlay
from tests.program import COMMANDS, GROUP, ROOT, assert_refused, run
from tests.screen import on_terminal

# Commands that take one model, with what else they need.
ONE_MODEL = {
    "generate": ["--prompt", "x"],
    "chat": [],
    "serve": ["--port", "0"],
    "info": [],
    "bench": [],
    "perplexity": ["--text", "text.txt"],
    "routing": ["--text", "text.txt"],
    "tune": ["--text", "text.txt"],
    "eval": ["--tasks", "x"],
    "verify": [],
    "export": ["--out", "out"],
    "push": ["owner/name", "--dry-run"],
    "outliers": ["--text", "text.txt", "--out", "found"],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder but for `text.txt` and a folder `tier` that is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The heron stands in the water.")
    (tmp_path / "tier").mkdir()
    return tmp_path


# Help


@pytest.mark.parametrize("columns", [40, 60, 80])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_plain_and_fits(command: str, columns: int) -> None:
    """No names of Python's types, no name of an option cut, no line too long."""
    text = run(*command.split(), "--help", env={"COLUMNS": str(columns)}).out
    lines = [line for line in text.splitlines() if columns > 40 or "|" not in line]
    assert max(map(len, lines)) <= columns
    assert not re.search(r"<\w|list\[|range>|Of [a-z]+[.;]|…", text)
    assert not re.search(r" +$", text, re.MULTILINE)
    options = GROUP.commands[command].params if command else []
    for option in options:
        assert option.param_type_name == "argument" or all(name in text for name in option.opts)
        assert option.help


def test_commands_are_listed_under_headings() -> None:
    text = run("--help").out
    headings = re.findall(r"^(\w+):\n", text, re.MULTILINE)
    assert headings == ["Make", "Run", "Measure", "Share", "Options", "General"]
    sections = dict(zip(headings, re.split(r"^\w+:\n", text, flags=re.MULTILINE)[1:], strict=True))
    for heading, command in [("Make", "convert"), ("Run", "chat"), ("Measure", "eval")]:
        assert f"\n  {command} " in "\n" + sections[heading]
    listed = re.findall(r"^  ([a-z-]+) ", "".join(list(sections.values())[:4]), re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)
    measure = re.findall(r"^  ([a-z-]+) ", sections["Measure"], re.MULTILINE)
    assert measure[:2] == ["info", "bench"] and measure[-2:] == ["eval", "compare"]


def test_headings_are_bold_on_a_terminal_that_may_have_it() -> None:
    assert "\x1b[1mRun\x1b[0m:" in on_terminal(80, "--help")
    for setting in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b" not in on_terminal(80, "--help", **setting)


# MODEL, or --model


@pytest.mark.parametrize("command", ONE_MODEL)
@pytest.mark.parametrize("words", [["./nothing"], ["--model", "./nothing"], ["--model=./nothing"]])
def test_a_model_in_either_spelling(command: str, words: list[str], here: Path) -> None:
    """Both get as far as looking for the folder."""
    options = ONE_MODEL[command]
    for line in ([*words, *options], [*options, *words] if words[0][0] == "-" else []):
        if line:
            told = run(command, *line, code=1).err
            assert re.fullmatch(r"error: \S*nothing\b.*\n", told), told


@pytest.mark.parametrize("command", ONE_MODEL)
def test_a_model_in_both_spellings_or_none(command: str, here: Path) -> None:
    options = ONE_MODEL[command]
    told = run(command, "./tier", "--model", "./tier", *options, code=2).err
    see = f"(see outlier-mlx {command} --help)"
    assert told == f"error: the model is given twice: as argument MODEL and by --model {see}\n"
    if command != "outliers":
        told = run(command, "--model", "./tier", "--model", "./tier", *options, code=2).err
        assert told == f"error: --model is given twice, but there is one model {see}\n"
    if command != "push":
        told = run(command, *options, code=2).err
        assert told == (
            f"error: no model is given: name one, as argument MODEL or by --model MODEL {see}\n"
        )
    else:  # the one word that is there is taken for the model
        assert "missing argument 'OWNER/NAME'" in run(command, "owner/name", code=2).err


def test_a_prompt_may_look_like_the_option(tmp_path: Path) -> None:
    write_overlay(tmp_path / "overlay", layers=1, moe_layers=(0,))
    tier = outlier_mlx.convert(tmp_path / "overlay", out=tmp_path / "tier")
    as_option, as_argument = (
        run("generate", *words, "-p", "--model", "-m", 2, "--quiet").out
        for words in (["--model", tier], [tier])
    )
    assert as_option == as_argument


# Wrong usage


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("genrate", "no such command 'genrate'. Did you mean 'generate'?"),
        ("gen", "no such command 'gen'. Did you mean 'generate'?"),
        ("e", "no such command 'e'. Did you mean 'export' or 'eval'?"),
        ("zzz", "no such command 'zzz' (see"),
        ("generate ./tier --max-tok 3", "no such option: --max-tok. Did you mean '--max-tokens'?"),
        ("generate ./tier --no-pr", "no such option: --no-pr. Did you mean '--no-prompt-lookup'?"),
        ("serve ./tier --hots ::1", "no such option: --hots. Did you mean '--host'?"),
        ("generate ./tier", "missing option '--prompt' / '-p'"),
        ("generate ./tier -p x --max-tokens ten", "--max-tokens: 'ten' is not a whole number"),
        ("generate ./tier -p x -m 1.5", "--max-tokens: '1.5' is not a whole number"),
        ("generate ./tier -p x -m 0", "--max-tokens: 0 is less than 1"),
        ("generate ./tier -p x --temp warm", "--temp: 'warm' is not a number"),
        ("generate ./tier -p x --temp nan", "--temp: 'nan' is not a number"),
        ("generate ./tier -p x --top-p 2", "--top-p: 2 is more than 1.0"),
        ("generate ./tier -p x --seed -1", "--seed: -1 is less than 0"),
        (
            "generate ./tier -p x --seed 18446744073709551616",
            "--seed: 18446744073709551616 is more",
        ),
        ("eval ./tier --tasks x --seed 4294967296", "--seed: 4294967296 is more than 4294967295"),
        ("generate ./tier -p \udcff", "--prompt: not UTF-8 text"),
        ("serve ./tier --host \udcff", "--host: not UTF-8 text"),
        ("eval \udcff --tasks x", "MODEL: not UTF-8 text"),
        ("bench ./tier --num-trials " + "9" * 400, f"--num-trials: {'9' * 30}... is more than"),
        ("chat ./tier --temp inf", "--temp: 'inf' is not a number"),
        ("generate ./tier -p x extra", "got unexpected extra argument(s) (extra)"),
        ("generate ./tier -p", "option '-p' requires an argument"),
        ("perplexity ./tier --text no.txt", "--text: no such file: no.txt"),
        ("perplexity ./tier --text tier", "--text: is a folder: tier"),
        ("bench ./tier --save", "--save: saves what --kernels finds, so it needs --kernels"),
        ("merge a.yaml --out a --group-size 32", "--group-size: only --bits makes groups"),
        ("compare a.json --out a.bmp", "--out: a.bmp: a picture's name must end in"),
    ],
)
@pytest.mark.parametrize("columns", ["40", "400"])
def test_wrong_usage_is_told_in_one_line(line: str, told: str, columns: str, here: Path) -> None:
    result = run(*line.split(), code=2, env={"COLUMNS": columns})
    assert result.out == "" and result.err.startswith(f"error: {told}")
    assert result.err.count("\n") == 1
    command = " ".join(name for name in line.split()[:1] if name in GROUP.commands)
    assert result.err.endswith(f"(see outlier-mlx {command} --help)\n".replace("  ", " "))


def test_no_option_takes_a_number_that_is_none_or_huge() -> None:
    words = ["nan", "inf", "-inf", "1e999", "9" * 400, "-" + "9" * 400, "9" * 5000, str(2**64)]
    found = 0
    for command in GROUP.commands.values():
        for param in command.params:
            if param.type_descriptor.annotation not in (int, float):
                continue
            real = param.type_descriptor.annotation is float
            for word in [*words[:4], "3.5e38"] if real else words:
                with pytest.raises(typer.BadParameter) as told:
                    Reader().coerce([word] if param.multiple else word, param, None)
                assert len(told.value.message) < 80
                found += 1
    assert found > 200


def test_names_of_folders_may_be_any_bytes(here: Path) -> None:
    refused = run("info", "\udcff", code=2)
    assert refused.err.startswith("error: MODEL: not UTF-8 text")
    Path("\udcff").mkdir()
    assert_refused(run("info", "\udcff", code=1), "config.json")


def test_a_program_without_arguments_shows_its_help() -> None:
    assert run(code=2).both == run("--help").out


# Groups of options


def test_options_of_a_group_have_the_defaults_of_the_engine() -> None:
    """But for the length, which is the command line's own."""
    given = generation_options(Generation(), Sampling(), KVCache(), Xtc())
    assert given == Options(max_tokens=given.max_tokens)


def test_every_option_of_a_group_arrives() -> None:
    groups: list[Any] = []
    expected: dict[str, Any] = {}
    for group in (Generation, Sampling, KVCache, Xtc):
        values: dict[str, Any] = {field.name: 4 for field in fields(group)}
        # The engine refuses other sizes, and a limit beside quantization.
        values |= {"kv_group_size": 64} if group is KVCache else {}
        values |= {"max_kv_size": None} if group is Generation else {}
        groups.append(group(**values))
        expected |= values
    more: dict[str, Any] = {
        "prefill_response": "It",
        "ignore_chat_template": True,
        "json_schema": {},
    }
    given = generation_options(*groups, **more)
    assert vars(given) == expected | more


def test_commands_may_have_defaults_of_their_own() -> None:
    assert re.search(r"--temp X .*\[default: 0\.7\]", run("chat", "--help").out, re.DOTALL)
    assert re.search(r"--temp X .*\[default: 0\.0\]", run("serve", "--help").out, re.DOTALL)


def options_in(path: Path) -> set[str]:
    """The options that the texts of a module name."""
    texts = [
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return {option for text in texts for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)}


def test_messages_name_options_that_there_are() -> None:
    options = {
        name: {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        for name, command in GROUP.commands.items()
    }
    # Options of mlx-lm, and of uv.
    foreign = {"--trust-remote-code", "--adapter-path", "--hf-path", "--mlx-path", "--python"}
    every = set().union(*options.values(), *(p.opts for p in GROUP.params), ["--help"], foreign)
    package = ROOT / "outlier_mlx"
    for path in sorted(package.rglob("[!.]*.py")):
        assert options_in(path) <= every, path
    for path in [package / "checkpoints/tier.py", *package.glob("checkpoints/export*.py")]:
        # An overlay is converted first.
        assert options_in(path) <= options["export"] | {"--base"}, path
