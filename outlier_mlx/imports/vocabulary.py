"""Whether a tokenizer's ids are rows of the embeddings."""

from pathlib import Path

from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.safetensors import read_json


def largest_id(folder: Path) -> int | None:
    """The largest id that the `tokenizer.json` in a folder can give; None without such a file."""
    if not (folder / "tokenizer.json").exists():
        return None
    content = read_json(inside(folder, "tokenizer.json"))
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    # BPE and WordPiece map tokens to ids; Unigram's are counted.
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    if isinstance(vocabulary, list):
        ids.append(len(vocabulary) - 1)
    ids += [token.get("id") for token in added or () if isinstance(token, dict)]
    return max((number for number in ids if type(number) is int), default=None)
