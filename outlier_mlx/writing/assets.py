"""Files that are copied from the sources: tokenizer, generation config, licences."""

import re
from collections.abc import Sequence
from pathlib import Path

from outlier_mlx.storage.output import write_json, write_whole
from outlier_mlx.storage.paths import entries, inside
from outlier_mlx.storage.texts import read_bytes, read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_LEGAL = re.compile(r"(LICEN[SC]E|NOTICE)(-base|-expert)*(\.txt|\.md)?")


def copy_assets(folders: Sequence[Path], target: Path, others: str = "base") -> None:
    """Copy tokenizer, templates, generation config and licence files into a model's folder.

    All files of the tokenizer come from the first folder that has a tokenizer.

    Args:
        folders: the sources; earlier ones take precedence.
        target: the folder being written.
        others: "base" or "expert", which all folders but the first are. It is added to the names of
            their licence files if a different file has the name already.
    """
    owner = next(filter(has_tokenizer, folders), None)
    if owner is not None:
        for name in TOKENIZER_FILES:
            if (owner / name).exists():
                write_whole(target / name, read_bytes(inside(owner, name)))
        if (owner / "tokenizer_config.json").exists():
            config = tidy_tokenizer_config(read_json(inside(owner, "tokenizer_config.json")))
            write_json(target / "tokenizer_config.json", config)
    source = next((f for f in folders if (f / "generation_config.json").exists()), None)
    if source is not None:
        content = read_bytes(inside(source, "generation_config.json"))
        write_whole(target / "generation_config.json", content)
    _copy_legal(folders, target, others)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer of any kind."""
    return any((folder / name).exists() for name in _TOKENIZERS)


def has_chat_template(folder: Path) -> bool:
    """Whether a folder has a chat template, as a file or in the tokenizer's config."""
    if any((folder / name).exists() for name in TOKENIZER_FILES if name.startswith("chat_")):
        return True
    config = folder / "tokenizer_config.json"
    return config.exists() and bool(read_json(inside(folder, config.name)).get("chat_template"))


def is_legal(name: str) -> bool:
    """Whether the whole name of a file is that of a licence or notice."""
    return _LEGAL.fullmatch(name) is not None


def _renamed(name: str, owner: str) -> str:
    stem, dot, suffix = name.partition(".")
    return f"{stem}-{owner}{dot}{suffix}"


def is_only_legal(folder: Path, name: str) -> bool:
    """Whether a folder has this licence file, and no other of its name from another source."""
    others = [_renamed(name, owner) for owner in ("base", "expert")]
    found = [other for other in (name, *others) if (folder / other).is_file()]
    return is_legal(name) and found == [name]


def _copy_legal(folders: Sequence[Path], target: Path, others: str) -> None:
    """Copy the licences and notices of all sources; different files get different names."""
    written: dict[str, bytes] = {}
    for folder in folders:
        for name in [p.name for p in entries(folder) if is_legal(p.name) and p.is_file()]:
            data = read_bytes(inside(folder, name))
            while written.get(name, data) != data:
                name = _renamed(name, others)
            write_whole(target / name, data)
            written[name] = data


def tidy_tokenizer_config(config: dict) -> dict:
    """A tokenizer config that transformers loads without running code from the folder.

    `auto_map` names such code. `extra_special_tokens` is a list in V3.2 checkpoints where
    transformers expects a mapping; the tokens are additional special tokens.
    """
    config = {key: value for key, value in config.items() if key != "auto_map"}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):
        del config["extra_special_tokens"]
        known = config.get("additional_special_tokens") or []
        config["additional_special_tokens"] = known + [t for t in extra if t not in known]
    return config
