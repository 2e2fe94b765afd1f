"""Write the training texts of the demo's domains, one JSONL file each, for ``upcycle``.

    python scripts/demo_corpora.py --documents 3000 --out ./texts

A line is a story or a conversation, as `{"text": ...}`; no sentence of the held-out texts is in it.
"""

import argparse
import json
from pathlib import Path

import demo_text
from demo_tokens import training_texts

SEED = 24


def write_corpora(folder: Path, documents: int, old: int | None = None) -> None:
    """Write ``DOMAIN.jsonl`` of every domain into ``folder``, which is made.

    Args:
        folder: where to write.
        documents: number of documents of each domain.
        old: the same of the domain that the base knows; default: as many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for domain in demo_text.DOMAINS:
        count = documents if domain in demo_text.NEW_DOMAINS else old or documents
        lines = (json.dumps({"text": text}) for text in training_texts(domain, count, SEED))
        text = "".join(f"{line}\n" for line in lines)
        (folder / f"{domain}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--documents", type=int, default=3000, help="of each domain")
    parser.add_argument("--old", type=int, help="of the domain that the base knows, if not as many")
    args = parser.parse_args()
    write_corpora(args.out, args.documents, args.old)


if __name__ == "__main__":
    main()
