"""The commands of the page on outlier features run as they stand there, and write what it says."""

import json
import re
from pathlib import Path

import pytest

from tests.pages import ROOT, commands, prepare, run_block

PAGE = "docs/outliers.md"


@pytest.mark.slow
def test_commands(tmp_path: Path) -> None:
    prepare(tmp_path)
    listed = commands(PAGE)
    assert len(listed) == 3
    for command in listed:
        run_block("sh", command, tmp_path)
    tier, base = json.loads((tmp_path / "found" / "outliers.json").read_text())
    (more,) = json.loads((tmp_path / "more" / "outliers.json").read_text())
    # The page says that the demo's models have features from 3.5 on.
    assert tier["blog"]["unique_dims"]
    assert base["blog"]["unique_dims"]
    # Every field and file that it lists is there.
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    fields = re.search(r"## The fields.*?\n\n(.*?)\n\n", text, re.DOTALL)
    assert fields is not None
    for row in fields[1].splitlines()[2:]:
        for field in re.findall(r"`([\w.]+)`", row.split("|")[1]):
            entry = more
            for name in field.split("."):
                entry = entry[name]
    for file in re.findall(r"`([\w-]+\.(?:json|png))`", text):
        assert (tmp_path / "found" / file.replace("MODEL", "tier")).exists(), file
