"""Completion in shells, and what is suggested for a word that is mistyped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import outlier_mlx
from outlier_mlx.checkpoints.export import export_tier
from outlier_mlx.errors import OutlierError
from tests.program import HEAVY, SCRIPT, run, run_command, run_python

COMPLETE = "_OUTLIER_MLX_COMPLETE"


# Completion


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


# Hints


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
