"""Saved conversations: JSON with the messages, or mlx-lm's prompt cache file with the KV cache."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from outlier_mlx.engine.conversation import Conversation, Message
from outlier_mlx.engine.generate import described, vocabulary
from outlier_mlx.errors import CheckpointError, OutlierError, one_line
from outlier_mlx.storage.output import whole_file, write_whole
from outlier_mlx.storage.paths import entries
from outlier_mlx.storage.safetensors import read_header
from outlier_mlx.storage.texts import parse_json, read_json
from outlier_mlx.upstream import load_prompt_cache, make_prompt_cache, save_prompt_cache

FORMAT = "outlier-mlx chat"
VERSION = 1
SUFFIX = ".safetensors"
CACHES = ("KVCache", "RotatingKVCache", "QuantizedKVCache")
# mlx-lm builds lists of the lengths in these keys: limit the number of digits.
_CACHE_KEYS = re.compile(r"0\.\w{1,32}|1\.\d{1,4}|2\.\d{1,5}(\.[01])?")
_TENSOR_NAMES = re.compile(r"\d{1,4}\.\d(\.\d)?")


def identity(
    folder: Path, dtype: str | None, alpha: Path | None = None, *, times: bool = False
) -> str:
    """A SHA-256 digest of everything that a KV cache depends on.

    Args:
        folder: the model folder; its manifest, config and sizes of weight files count.
        dtype: activation dtype of `--dtype`, or None.
        alpha: file of `--alpha`, or None.
        times: the times at which these files were last changed count, too.
    """
    state = [dtype, str(mx.default_device().type)]
    if alpha is not None:
        state.append(f"alpha {hashlib.sha256(alpha.read_bytes()).hexdigest()}")
    manifest = folder / "tier.json"
    if manifest.exists():
        state.append(hashlib.sha256(manifest.read_bytes()).hexdigest())
    for path in sorted([folder / "config.json", *entries(folder, "*.safetensors")]):
        found = path.stat()
        state.append(f"{path.name} {found.st_size}" + f" {found.st_mtime_ns}" * times)
    return hashlib.sha256(json.dumps(state).encode()).hexdigest()


def save(path: Path, conversation: Conversation, model: str) -> None:
    """Save a conversation; with its KV cache if the file name ends in .safetensors.

    The file is replaced atomically, and only its owner can read it.

    Args:
        path: the file; an existing file is replaced.
        conversation: the conversation to save.
        model: `identity` of the model.

    Raises:
        OSError: the file cannot be written.
    """
    if path.suffix == SUFFIX:
        with whole_file(path, private=True) as part:
            _save_cache(part, conversation, model)
        return
    text = json.dumps(_document(conversation), indent=2, ensure_ascii=False)
    write_whole(path, text, private=True)


def load(path: Path, conversation: Conversation, model: str) -> None:
    """Load a saved conversation.

    Args:
        path: a file that `save` wrote.
        conversation: its messages, system prompt and cache are replaced.
        model: `identity` of the model; a KV cache must have the same.

    Raises:
        OutlierError: the file is not a saved conversation, or its cache belongs to another model;
            the conversation is unchanged.
    """
    try:
        if path.suffix == SUFFIX:
            _load_cache(path, conversation, model)
            return
        system, messages = _parse(read_json(path), path)
    except CheckpointError as error:
        raise OutlierError(f"{path}: not a saved conversation: {error}") from None
    conversation.reset()
    conversation.set_system(system)
    conversation.messages = messages


def _document(conversation: Conversation) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "system": conversation.options.system_prompt,
        "messages": conversation.messages,
    }


def _parse(document: object, path: Path) -> tuple[str | None, list[Message]]:
    """Check a `_document`; returns its system prompt and messages."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise OutlierError(f"{path}: not a saved conversation")
    if document.get("version") != VERSION:
        raise OutlierError(f"{path}: version {document.get('version')!r} is not supported")
    system, messages = document.get("system"), document.get("messages")
    if not (system is None or isinstance(system, str)) or not isinstance(messages, list):
        raise OutlierError(f"{path}: system must be a string, messages must be a list")
    for number, message in enumerate(messages):
        role = "assistant" if number % 2 else "user"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise OutlierError(f"{path}: message {number}: expected a role and a content")
        if message["role"] != role or not isinstance(message["content"], str):
            raise OutlierError(f"{path}: message {number}: expected a string from role {role!r}")
    if len(messages) % 2:
        raise OutlierError(f"{path}: the last message has no reply")
    return system, messages


def _save_cache(file: Path, conversation: Conversation, model: str) -> None:
    cache, cached = conversation.cache, conversation.cached
    text, tokens = conversation.spoken
    if cache is None:
        cache, cached = make_prompt_cache(conversation.model), []
    if tokens != cached[: len(tokens)]:
        text, tokens = "", []
    metadata = {
        "document": json.dumps(_document(conversation)),
        "model": model,
        "cached": json.dumps(cached),
        "spoken": json.dumps([text, len(tokens)]),
    }
    save_prompt_cache(str(file), cache, metadata)


def _load_cache(path: Path, conversation: Conversation, model: str) -> None:
    if not all(map(_TENSOR_NAMES.fullmatch, read_header(path))):
        raise OutlierError(f"{path}: not a prompt cache")
    try:
        keys: dict[str, str] = cast(Any, mx.load(str(path), return_metadata=True))[1]
        if not all(map(_CACHE_KEYS.fullmatch, keys)) or keys.get("0.model") is None:
            raise OutlierError(f"{path}: not a prompt cache of a conversation")
        if keys["0.model"] != model:
            raise OutlierError(f"{path}: the cache belongs to another model, or to another --dtype")
        cache, metadata = load_prompt_cache(str(path), return_metadata=True)
        # Evaluate now: the file is replaced when the conversation is saved.
        mx.eval([layer.state for layer in cache])
        names = ("document", "cached", "spoken")
        parsed: list[Any] = [parse_json(metadata[n].encode(), path.name) for n in names]
    except (OutlierError, OSError, MemoryError):
        raise
    except Exception as error:  # mlx-lm raises many types of errors for damaged files
        reason = f"{type(error).__name__}: {one_line(str(error))}"[:200]
        raise OutlierError(f"{path}: damaged prompt cache: {reason}") from None
    document, cached, spoken = parsed
    system, messages = _parse(document, path)
    if not _fits_model(cache, cached, conversation) or not _is_prefix(spoken, cached):
        raise OutlierError(f"{path}: the cache does not match its conversation")
    conversation.reset()
    conversation.set_system(system)
    conversation.messages = messages
    if cached:
        conversation.cache, conversation.cached = cache, cached
        conversation.spoken = (spoken[0], cached[: spoken[1]])


def _fits_model(cache: list[Any], cached: Any, conversation: Conversation) -> bool:
    """Whether each layer's cache fits this model and holds `len(cached)` tokens."""
    heads = described(conversation.model).kv_heads
    vocab = vocabulary(conversation.model, conversation.tokenizer)
    if not isinstance(cached, list) or len(cache) != len(conversation.model.layers):
        return False
    if not all(type(token) is int and 0 <= token < vocab for token in cached):
        return False
    for layer in cache:
        if type(layer).__name__ not in CACHES or layer.offset != len(cached):
            return False
        if not cached:
            continue
        for array in (layer.keys, layer.values):
            first = array[0] if isinstance(array, list | tuple) else array
            if first.ndim != 4 or first.shape[0] != 1 or heads not in (None, first.shape[1]):
                return False
            rotates = type(layer).__name__ == "RotatingKVCache"
            if not rotates and first.shape[2] < len(cached):
                return False
    return True


def _is_prefix(spoken: Any, cached: list[int]) -> bool:
    if not isinstance(spoken, list) or len(spoken) != 2 or not isinstance(spoken[0], str):
        return False
    return type(spoken[1]) is int and 0 <= spoken[1] <= len(cached)
