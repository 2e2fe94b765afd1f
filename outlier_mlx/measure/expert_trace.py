"""Traces: which experts each token was routed to, in a file that `bench --trace` replays.

A trace is a safetensors file with the tensors

    experts    (tokens, layers, k) uint8, or uint16 for more than 256 experts
    weights    (tokens, layers, k) float16: routing weight times alpha. It is 0 only if it was
               exactly 0: such an expert is not needed
    foreseen   (tokens, layers, k) as `experts`, if it was recorded: what a layer's router gives for
               the residual stream as the MoE layer before it gets it; for the first layer, its own
    passes     (passes,) uint32: how many tokens, in their order, went through the layers together

and the fields of `About` as a JSON object in its metadata.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.fields import MAX_COUNT, Fields
from outlier_mlx.storage.output import write_whole
from outlier_mlx.storage.safetensors import TensorRef, read_described
from outlier_mlx.storage.texts import parse_json_object

#: Tokens of a prompt that go through the layers together, as in mlx-lm.
PROMPT_CHUNK = 2048
# Key of the metadata, and the version of the format.
_KEY, _VERSION = "outlier-mlx trace", 1
# 200,000 tokens of a model with 28 layers and two experts a token.
_MAX_BYTES = 64_000_000
# Experts of a layer, and of all layers: far above any model's.
_MAX_EXPERTS, _MAX_ALL = 65535, 1_000_000
_MAX_SIZE = 2**53


@dataclass(frozen=True)
class About:
    """What a trace was recorded from, and what the parts of its model take.

    Attributes:
        model: name of the tier.
        sha256: of the tier's manifest, which lists its files' checksums; empty if there is none.
        text: name of the text.
        layers: numbers of the MoE layers, ascending.
        experts: experts of a layer.
        top_k: experts of a token in a layer.
        expert_bytes: of an expert's packed rows and scales.
        base_bytes: what decoding a token reads besides routed experts.
        shared_bytes: of `base_bytes`, the shared FFNs of the MoE layers.
    """

    model: str
    sha256: str
    text: str
    layers: tuple[int, ...]
    experts: int
    top_k: int
    expert_bytes: int
    base_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Trace:
    """Who was routed to, token by token; the module says what the arrays hold."""

    about: About
    experts: np.ndarray
    weights: np.ndarray
    passes: np.ndarray
    foreseen: np.ndarray | None = None

    @property
    def recall(self) -> float | None:
        """Of the experts needed above the first MoE layer, the share that was foreseen."""
        if self.foreseen is None or len(self.about.layers) < 2:
            return None
        found = self.experts[:, 1:, :, None] == self.foreseen[:, 1:, None, :]
        needed = self.weights[:, 1:] != 0
        return float(found.any(-1)[needed].mean()) if needed.any() else None

    def decoded(self, prompt: int = 0) -> "Trace":
        """The same tokens, decoded one by one after a prompt.

        Args:
            prompt: of each pass, so many tokens are a prompt, in chunks of `PROMPT_CHUNK` at most.
        """
        passes: list[int] = []
        for count in self.passes.tolist():
            whole, rest = divmod(min(prompt, count), PROMPT_CHUNK)
            passes += [PROMPT_CHUNK] * whole + [rest] * (rest > 0) + [1] * max(0, count - prompt)
        return replace(self, passes=np.array(passes, np.uint32))


def write_trace(trace: Trace, path: Path) -> None:
    """Write a trace; the file appears whole or not at all."""
    arrays = {"experts": trace.experts, "weights": trace.weights, "passes": trace.passes}
    if trace.foreseen is not None:
        arrays["foreseen"] = trace.foreseen
    described = json.dumps({"version": _VERSION} | asdict(trace.about))
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_whole(path, save(arrays, metadata={_KEY: described}))


def read_trace(path: Path) -> Trace:
    """Read a trace that `write_trace` wrote.

    Raises:
        CheckpointError: the file is damaged or too large, or is no trace.
    """
    tensors, metadata = read_described(path)
    if _KEY not in metadata:
        raise CheckpointError(f"{path.name}: not a trace, which `routing --trace` writes")
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > _MAX_BYTES:
        raise CheckpointError(f"{path.name}: a trace of {total} bytes; at most {_MAX_BYTES} fit")
    about = _about(Fields(parse_json_object(metadata[_KEY], path.name), path.name, strict=True))
    arrays = _arrays(tensors, about, path.name)
    trace = Trace(about, **arrays)
    for name in ("experts", "foreseen"):
        if name in arrays and arrays[name].max() >= about.experts:
            limit = about.experts
            raise CheckpointError(f"{path.name}: {name}: expected numbers below {limit}")
    if not trace.passes.all() or int(trace.passes.sum(dtype=np.uint64)) != len(trace.experts):
        count = len(trace.experts)
        raise CheckpointError(f"{path.name}: passes: expected counts that sum to {count}, none 0")
    return trace


def _about(fields: Fields) -> About:
    version = fields.size("version", most=_MAX_SIZE)
    if version != _VERSION:
        fields.refuse(f"version {version} of the format; supported: {_VERSION}")
    layers: Any = fields.raw.get("layers")
    if (
        not isinstance(layers, list)
        or not 0 < len(layers) <= MAX_COUNT
        or any(type(n) is not int or not 0 <= n < MAX_COUNT for n in layers)
        or sorted(set(layers)) != layers
    ):
        fields.refuse("layers: expected the numbers of layers, ascending")
    texts: dict[str, Any] = {name: fields.raw.get(name) for name in ("model", "sha256", "text")}
    if not all(isinstance(text, str) for text in texts.values()):
        fields.refuse("model, sha256 and text: expected texts")
    experts = fields.size("experts", most=min(_MAX_EXPERTS, _MAX_ALL // len(layers)))
    sizes: dict[str, Any] = {
        name: fields.size(name, least=least, most=_MAX_SIZE)
        for name, least in (("expert_bytes", 1), ("base_bytes", 0), ("shared_bytes", 0))
    }
    if sizes["shared_bytes"] > sizes["base_bytes"]:
        fields.refuse("shared_bytes: expected at most base_bytes")
    top_k = fields.size("top_k", most=experts)
    return About(**texts, layers=tuple(layers), experts=experts, top_k=top_k, **sizes)


def _arrays(tensors: Mapping[str, TensorRef], about: About, name: str) -> dict[str, np.ndarray]:
    """The arrays of a trace, of the dtypes and shapes that the module describes."""
    number = "U8" if about.experts <= 256 else "U16"
    expected = {"experts": number, "weights": "F16", "passes": "U32", "foreseen": number}
    missing = {"experts", "weights", "passes"} - tensors.keys()
    if missing or tensors.keys() - expected.keys():
        raise CheckpointError(
            f"{name}: expected the tensors {_names(expected)}; found {_names(tensors)}"
        )
    tokens = (*tensors["experts"].shape, 0)[0]
    for key in (name for name in expected if name in tensors):
        ref = tensors[key]
        each: tuple[int, ...] = (tokens, len(about.layers), about.top_k)
        shape = (*ref.shape, 0)[:1] if key == "passes" else each
        if ref.dtype != expected[key] or ref.shape != shape or 0 in shape:
            raise CheckpointError(
                f"{ref.where}: {ref.dtype} {ref.shape}, expected {expected[key]} {shape}"
            )
    return {key: ref.read() for key, ref in tensors.items()}


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))[:200] or "none"
