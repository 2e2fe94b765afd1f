"""The models of a merge: dense llama, mistral and qwen2 checkpoints, checked against each other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.models.plain import check_complete, complete_config, head_dim, modules
from outlier_mlx.models.spelling import normalised
from outlier_mlx.storage.hub import Source, resolve
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.safetensors import FLOAT_DTYPES, TensorRef, read_json
from outlier_mlx.storage.shards import read_shards

MODEL_TYPES = ("llama", "mistral", "qwen2")
#: What is fetched from the hub. Some repositories hold the weights twice, as `consolidated`, too.
MODEL_FILES = (
    *("*.json", "model*.safetensors", "*.txt", "*.jinja", "tokenizer.model"),
    *("LICENSE*", "NOTICE*"),
)
_SAME = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "vocab_size"),
)


@dataclass(frozen=True)
class Dense:
    """A dense model on disk; nothing of its weights is in memory.

    Attributes:
        source: where it is and what it is called.
        config: as `imports.families.complete_config` spells it.
        tensors: its weights by name.
    """

    source: Source
    config: dict
    tensors: Mapping[str, TensorRef] = field(repr=False)

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.source.name

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.config["num_hidden_layers"]

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.config["hidden_size"]

    @property
    def vocab(self) -> int:
        """Rows of the embedding."""
        return self.config["vocab_size"]

    def ffn(self, layer: int, projection: str) -> TensorRef:
        """A matrix of a layer's FFN: gate and up (intermediate, hidden), down (hidden, inter.)."""
        return self.tensors[f"model.layers.{layer}.mlp.{projection}_proj.weight"]


def open_models(base: str, experts: Sequence[str]) -> tuple[Dense, list[Dense], list[str]]:
    """Open a base and experts, each folder once, and check that they fit together.

    Only headers, configs and tokenizers are read.

    Args:
        base: folder or hub repository, `OWNER/NAME` or `OWNER/NAME@REVISION`.
        experts: likewise.

    Returns:
        The base, the experts in order, and what is odd about them but no error.

    Raises:
        CheckpointError: one is no dense model that can be merged, is damaged or lacks tensors, or
            they differ in kind, dimensions or tokens; the message names the first difference.
        OutlierError: the hub cannot be reached, or a name asks for a LoRA.
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
    return first, found[1:], _compare_tokens(first, others)


def _resolve(name: str) -> Source:
    revision = None
    if not Path(name).is_dir():
        if "+" in name:
            raise OutlierError(f"{name}: adapters (MODEL+LORA) are not merged; fuse it first")
        name, _, revision = name.partition("@")
    return resolve(name, revision or None, MODEL_FILES)


def _open(source: Source) -> Dense:
    folder, where = source.folder, f"{source.name}: config.json"
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: not a model: no config.json")
    config = normalised(read_json(inside(folder, "config.json")), where)
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise CheckpointError(
            f"{where}: model_type {str(kind)[:40]!r}; what can be merged is dense:"
            f" {', '.join(MODEL_TYPES)}"
        )
    if config.get("quantization_config") or config.get("quantization"):
        raise CheckpointError(f"{source.name}: quantized; a merge needs weights in floats")
    tensors = {key: ref for key, ref in read_shards(folder).items() if _matters(key)}
    config, _ = complete_config(config, where, tied="lm_head.weight" not in tensors)
    _check_supported(config, where)
    if config["tie_word_embeddings"]:
        tensors.pop("lm_head.weight", None)
    return Dense(source, config, tensors)


def _matters(key: str) -> bool:
    return key.startswith(("model.", "lm_head.")) and not key.endswith("rotary_emb.inv_freq")


def _check_supported(config: dict, where: str) -> None:
    """Refuse what the models that mlx-lm has for the result cannot say."""
    if head_dim(config) * config["num_attention_heads"] != config["hidden_size"]:
        raise CheckpointError(
            f"{where}: head_dim {head_dim(config)} is not hidden_size / heads; MLX's Mixtral and"
            " Qwen2-MoE have no such heads"
        )
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(key):
            raise CheckpointError(f"{where}: {key}: a mixture of experts cannot have it")
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind not in (None, "default"):
        raise CheckpointError(
            f"{where}: rope_scaling {str(kind)[:40]!r}: MLX's Mixtral and Qwen2-MoE would ignore it"
        )


def _check_same(base: Dense, other: Dense) -> None:
    for key in _SAME:
        if base.config[key] != other.config[key]:
            raise CheckpointError(
                f"{other.name}: {key} is {other.config[key]}, but {base.config[key]} in the base"
                f" {base.name}"
            )


def _check_tensors(model: Dense) -> None:
    found = {name: tensor.shape for name, tensor in model.tensors.items()}
    check_complete(modules(model.config), found, model.name)
    for tensor in model.tensors.values():
        if tensor.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{model.name}: {tensor.where}: dtype {tensor.dtype}, expected a float"
            )


def _compare_tokens(base: Dense, others: list[Dense]) -> list[str]:
    """Compare tokens with the base's, where both have a tokenizer.json.

    Raises:
        CheckpointError: the vocabularies differ. Added tokens may: those are told.
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
                f" {token[:40]!r} is {theirs[0].get(token)} here and {ours[0].get(token)} there"
            )
        token = _first_difference(ours[1], theirs[1])
        if token is not None:
            notes.append(
                f"{other.name}: its added tokens differ from those of the base {base.name}, whose"
                f" tokenizer is used: {token[:40]!r} is {theirs[1].get(token)} here and"
                f" {ours[1].get(token)} there"
            )
    return notes


def _first_difference(ours: dict[str, int], theirs: dict[str, int]) -> str | None:
    if ours == theirs:
        return None
    return min(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))


def _tokens(model: Dense) -> tuple[dict[str, int], dict[str, int]] | None:
    """Numbers by token: of the vocabulary, and of tokens that were added to it."""
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
