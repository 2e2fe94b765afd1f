"""Files that are copied from the sources: tokenizer, generation config, licences."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.token_ids import end_ids
from outlier_mlx.storage.output import write_json, write_whole
from outlier_mlx.storage.paths import entries, inside
from outlier_mlx.storage.texts import parse_json_object, read_bytes, read_json

GENERATION = "generation_config.json"
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
# Templates besides the usual one, as transformers writes them.
_MORE_TEMPLATES = "additional_chat_templates"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_CONFIG = "tokenizer_config.json"
_EXTRA, _ADDITIONAL = "extra_special_tokens", "additional_special_tokens"
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
                write_whole(target / name, _read_asset(owner, name))
        for path in entries(owner / _MORE_TEMPLATES, "*.jinja"):
            (target / _MORE_TEMPLATES).mkdir(exist_ok=True)
            name = f"{_MORE_TEMPLATES}/{path.name}"
            write_whole(target / name, _read_asset(owner, name))
        if (owner / _CONFIG).exists():
            config = parse_json_object(_read_asset(owner, _CONFIG), _CONFIG)
            write_json(target / _CONFIG, tidy_tokenizer_config(config, str(owner / _CONFIG)))
    source = next((f for f in folders if (f / GENERATION).exists()), None)
    if source is not None:
        content = _read_asset(source, GENERATION)
        stated = parse_json_object(content, GENERATION).get("eos_token_id")
        end_ids(stated, str(source / GENERATION))
        write_whole(target / GENERATION, content)
    copy_legal(folders, target, others)


def load_as_file(folder: Path) -> None:
    """Have transformers load a folder's `tokenizer.json` as it is.

    By a class of a model, transformers 5 would make some of its parts anew. In version 4, the
    general class gives models a `token_type_ids`, which decoders refuse, unless it is told not to.
    """
    if (folder / "tokenizer.json").exists():
        path = folder / _CONFIG
        config = read_json(inside(folder, _CONFIG)) if path.exists() else {}
        inputs = {"model_input_names": ["input_ids", "attention_mask"]}
        write_json(path, config | inputs | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _read_asset(folder: Path, name: str) -> bytes:
    """A file's bytes, of which transformers or mlx-lm would make the same: JSON is checked."""
    path = inside(folder, name)
    content = read_bytes(path)
    if name.endswith(".json"):
        parse_json_object(content, str(path))
    return content


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer of any kind."""
    return any((folder / name).exists() for name in _TOKENIZERS)


def has_chat_template(folder: Path) -> bool:
    """Whether a folder has a chat template, as a file or in the tokenizer's config."""
    if any((folder / name).exists() for name in TOKENIZER_FILES if name.startswith("chat_")):
        return True
    config = folder / _CONFIG
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


def copy_legal(folders: Sequence[Path], target: Path, others: str = "base") -> None:
    """Copy the licences and notices of all sources; different files get different names."""
    written: dict[str, bytes] = {}
    for folder in folders:
        for name in [p.name for p in entries(folder) if is_legal(p.name) and p.is_file()]:
            data = read_bytes(inside(folder, name))
            while written.get(name, data) != data:
                name = _renamed(name, others)
            write_whole(target / name, data)
            written[name] = data


def tidy_tokenizer_config(config: dict, where: str) -> dict:
    """A tokenizer config that transformers loads without running code from the folder.

    `auto_map` names such code. `extra_special_tokens` is a list in V3.2 checkpoints where
    transformers expects a mapping; the tokens are additional special tokens.

    Raises:
        CheckpointError: these are no tokens; `where` is the config's file.
    """
    config = {key: value for key, value in config.items() if key != "auto_map"}
    extra, known = (config.get(name) for name in (_EXTRA, _ADDITIONAL))
    for name, value in ((_EXTRA, extra), (_ADDITIONAL, known)):
        items = value.values() if isinstance(value, dict) and name == _EXTRA else value
        if items is not None and not _are_tokens(items):
            raise CheckpointError(f"{where}: {name} must be a list of tokens")
    if isinstance(extra, list):
        del config[_EXTRA]
        config[_ADDITIONAL] = (known or []) + [t for t in extra if t not in (known or [])]
    return config


def _are_tokens(items: object) -> bool:
    """Whether these are texts, or objects that hold one as their content."""
    if not isinstance(items, Collection) or isinstance(items, str | dict):
        return False
    texts = [item.get("content") if isinstance(item, dict) else item for item in items]
    return all(isinstance(text, str) for text in texts)
