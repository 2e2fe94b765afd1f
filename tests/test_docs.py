"""Every command in the documentation runs as it stands there."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from outlier_mlx.showcase import FOLDER

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/measure.md", "docs/bench.md")
# A repository of the hub stands for the folder that it would be fetched to.
STAND_INS = {"Qwen/Qwen2.5-7B-Instruct": "./base", "./my-overlay": "./overlay"}


def commands(page: str) -> list[str]:
    """What a page tells its reader to type, but for setting up and for what needs a GPU."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [
        line
        for line in lines
        if line.startswith(("outlier-mlx", "mlx_lm.")) and "--save" not in line
    ]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands(page: str, tmp_path: Path) -> None:
    for name in ("base", "overlay"):
        shutil.copytree(FOLDER / name, tmp_path / name)
    text = (FOLDER / "heldout" / "sea.txt").read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    listed = commands(page)
    assert listed
    for command in listed:
        words = [STAND_INS.get(word, word) for word in shlex.split(command)]
        done = subprocess.run(
            words,
            cwd=tmp_path,
            env=os.environ | {"PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize(
    "page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target
