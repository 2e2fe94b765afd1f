"""The models of a merge: dense llama, mistral and qwen2 checkpoints, checked against each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.models.config import ModelConfig, parse_config, raw_config
from outlier_mlx.models.families import family, with_role
from outlier_mlx.models.fields import short
from outlier_mlx.models.head import settle_head
from outlier_mlx.models.modules import check_complete
from outlier_mlx.storage.hub import Source, resolve
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.safetensors import FLOAT_DTYPES, TensorRef
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.storage.texts import read_json

#: Files to download from the hub. Some repositories also have the weights as `consolidated`.
MODEL_FILES = (
    *("*.json", "model*.safetensors", "*.txt", "*.jinja", "tokenizer.model"),
    *("LICENSE*", "NOTICE*"),
)
# Fields of `ModelConfig` that must be equal in all models, with their names in config.json.
_SAME = {
    "family": "model_type",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab": "vocab_size",
}


@dataclass(frozen=True)
class Dense:
    """A dense model on disk; its weights are not in memory.

    Attributes:
        source: its folder and name.
        config: its normalised config.
        tensors: its weights by name.
        notes: remarks for the user.
    """

    source: Source
    config: ModelConfig
    tensors: Mapping[str, TensorRef] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.source.name

    def ffn(self, layer: int, projection: str) -> TensorRef:
        """An FFN matrix: gate or up (intermediate, hidden), or down (hidden, intermediate)."""
        return self.tensors[f"model.layers.{layer}.mlp.{projection}_proj.weight"]


def open_models(base: str, experts: Sequence[str]) -> tuple[Dense, list[Dense], list[str]]:
    """Open a base and experts, and check that they can be merged. Each folder is opened once.

    Only headers, configs and tokenizers are read.

    Args:
        base: folder or hub repository, `OWNER/NAME` or `OWNER/NAME@REVISION`.
        experts: folders or hub repositories in the same syntax.

    Returns:
        The base, the experts in order, and notes for the user.

    Raises:
        CheckpointError: a model is not supported, is damaged or lacks tensors, or the models differ
            in type, dimensions or tokens; the message names the first difference.
        OutlierError: the hub cannot be reached, or a name includes a LoRA adapter.
    """
    opened: dict[Path, Dense] = {}
    found = []
    for name in (base, *experts):
        source = _resolve(name)
        key = source.folder.resolve()
        if key not in opened:
            opened[key] = _open(source)
        found.append(opened[key])
    first, others = found[0], [model for model in opened.values() if model is not found[0]]
    for other in others:
        _check_same(first, other)
    for model in (first, *others):
        _check_tensors(model)
    notes = [f"{model.name}: {note}" for model in (first, *others) for note in model.notes]
    return first, found[1:], notes + _compare_tokens(first, others)


def _resolve(name: str) -> Source:
    revision = None
    if not Path(name).is_dir():
        if "+" in name:
            raise OutlierError(f"{name}: adapters (MODEL+LORA) are not supported; fuse it first")
        name, _, revision = name.partition("@")
    return resolve(name, revision or None, MODEL_FILES)


def _open(source: Source) -> Dense:
    folder, where = source.folder, f"{source.name}: config.json"
    raw = raw_config(folder)
    kind, known = raw.get("model_type"), with_role("merge")
    if kind not in known:
        raise CheckpointError(
            f"{where}: model_type {short(kind)} cannot be merged; supported: {', '.join(known)}"
        )
    if raw.get("quantization_config") or raw.get("quantization"):
        raise CheckpointError(f"{source.name}: quantized models cannot be merged")
    tensors = {key: ref for key, ref in read_shards(folder).items() if _matters(key)}
    tied, note = settle_head(raw.get("tie_word_embeddings"), tensors)
    config = replace(parse_config(raw, role="merge", where=where), tied=tied)
    _check_supported(config, where)
    if tied:
        tensors.pop("lm_head.weight", None)
    notes = [*([note] if note else []), *family(config.family).notes(config)]
    return Dense(source, config, tensors, tuple(notes))


def _matters(key: str) -> bool:
    return key.startswith(("model.", "lm_head.")) and not key.endswith("rotary_emb.inv_freq")


def _check_supported(config: ModelConfig, where: str) -> None:
    """Refuse what mlx-lm's Mixtral and Qwen2-MoE do not support."""
    if config.head_dim * config.heads != config.hidden:
        raise CheckpointError(
            f"{where}: head_dim {config.head_dim} is not hidden_size / heads; MLX's Mixtral and"
            " Qwen2-MoE do not support this"
        )
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.raw.get(key):
            raise CheckpointError(f"{where}: {key} is not supported in a mixture of experts")


def _check_same(base: Dense, other: Dense) -> None:
    for key, shown in _SAME.items():
        ours, theirs = getattr(base.config, key), getattr(other.config, key)
        if ours != theirs:
            raise CheckpointError(
                f"{other.name}: {shown} is {theirs}, but {ours} in the base {base.name}"
            )


def _check_tensors(model: Dense) -> None:
    found = {name: tensor.shape for name, tensor in model.tensors.items()}
    check_complete(family(model.config.family).modules(model.config), found, model.name)
    for tensor in model.tensors.values():
        if tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{model.name}: {tensor.where}: dtype {tensor.dtype}, expected a float"
            )


def _compare_tokens(base: Dense, others: list[Dense]) -> list[str]:
    """Compare the tokens of models that have a tokenizer.json with the base's.

    Returns:
        Notes on added tokens that differ.

    Raises:
        CheckpointError: the vocabularies differ.
    """
    notes = []
    ours = _tokens(base)
    for other in others:
        theirs = _tokens(other)
        if ours is None or theirs is None:
            continue
        token = _first_difference(ours[0], theirs[0])
        if token is not None:
            raise CheckpointError(
                f"{other.name}: its tokenizer differs from that of the base {base.name}: token"
                f" {token[:40]!r} is {theirs[0].get(token)}, but {ours[0].get(token)} in the base"
            )
        token = _first_difference(ours[1], theirs[1])
        if token is not None:
            notes.append(
                f"{other.name}: its added tokens differ from those of the base {base.name}, whose"
                f" tokenizer is used: {token[:40]!r} is {theirs[1].get(token)}, but"
                f" {ours[1].get(token)} in the base"
            )
    return notes


def _first_difference(ours: dict[str, int], theirs: dict[str, int]) -> str | None:
    if ours == theirs:
        return None
    return min(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))


def _tokens(model: Dense) -> tuple[dict[str, int], dict[str, int]] | None:
    """Token ids of the vocabulary and of added tokens; None without a tokenizer.json."""
    folder = model.source.folder
    if not (folder / "tokenizer.json").exists():
        return None
    content = read_json(inside(folder, "tokenizer.json"))
    inner, extra = content.get("model"), content.get("added_tokens") or []
    vocab = inner.get("vocab") if isinstance(inner, dict) else None
    if isinstance(vocab, list):  # Unigram: pieces with scores
        vocab = {str(piece[0]): n for n, piece in enumerate(vocab) if isinstance(piece, list)}
    if not isinstance(vocab, dict) or not isinstance(extra, list):
        raise CheckpointError(f"{model.name}: tokenizer.json: not a tokenizer")
    added = {str(e.get("content")): e.get("id", -1) for e in extra if isinstance(e, dict)}
    return vocab, {token: n for token, n in added.items() if vocab.get(token) != n}
