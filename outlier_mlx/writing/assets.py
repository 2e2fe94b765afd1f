"""What comes along unchanged, or nearly: tokenizer, chat template, generation config, licence."""

import json
import re
import shutil
from pathlib import Path

from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.safetensors import read_bytes, read_json

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
_LEGAL = re.compile(r"(LICEN[SC]E|NOTICE)(-base)*(\.txt|\.md)?")


def copy_assets(folders: list[Path], target: Path) -> list[str]:
    """Copy tokenizer, templates, generation config and licence files into a tier.

    The tokenizer comes as a whole from the first folder that has one: halves of two would not fit.

    Args:
        folders: where to look, the first wins.
        target: the tier being written.

    Returns:
        The names of the files written; without a tokenizer none of its names is among them.
    """
    written = []
    owner = next((f for f in folders if any((f / name).exists() for name in _TOKENIZERS)), None)
    if owner is not None:
        for name in TOKENIZER_FILES:
            if (owner / name).exists():
                shutil.copyfile(inside(owner, name), target / name)
                written.append(name)
        if (owner / "tokenizer_config.json").exists():
            config = tidy_tokenizer_config(read_json(inside(owner, "tokenizer_config.json")))
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            (target / "tokenizer_config.json").write_text(text, encoding="utf-8")
            written.append("tokenizer_config.json")
    source = next((f for f in folders if (f / "generation_config.json").exists()), None)
    if source is not None:
        shutil.copyfile(inside(source, "generation_config.json"), target / "generation_config.json")
        written.append("generation_config.json")
    return written + _copy_legal(folders, target)


def is_legal(name: str) -> bool:
    """Whether a file of this name is a licence or notice: nothing that only begins so is."""
    return _LEGAL.fullmatch(name) is not None


def base_variant(name: str) -> str:
    """What the base's licence file is called where the overlay has another of its name."""
    stem, dot, suffix = name.partition(".")
    return f"{stem}-base{dot}{suffix}"


def _copy_legal(folders: list[Path], target: Path) -> list[str]:
    """Every source's licence and notice; two that differ are both kept."""
    written: dict[str, bytes] = {}
    for folder in folders:
        for name in sorted(p.name for p in folder.iterdir() if is_legal(p.name) and p.is_file()):
            data = read_bytes(inside(folder, name))
            while written.get(name, data) != data:
                name = base_variant(name)
            (target / name).write_bytes(data)
            written[name] = data
    return list(written)


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
