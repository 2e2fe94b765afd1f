"""Open AutoAWQ checkpoints, and unquantized checkpoints of the same families.

mlx-lm's own loader fails for Mixtral with AWQ: it looks for experts to stack before it converts
AWQ's tensors, and finds none. Here everything is converted to mlx-lm's names and layout first.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from outlier_mlx.errors import CheckpointError, listed
from outlier_mlx.imports.awq_config import AwqFormat, read_format
from outlier_mlx.imports.awq_parts import AwqMatrix, AwqPart, BiasErrors
from outlier_mlx.imports.hf_names import Place, Stored, by_place, name_in_source
from outlier_mlx.imports.opened import Opened
from outlier_mlx.models.config import ModelConfig, parse_config, spell_config
from outlier_mlx.models.families import family
from outlier_mlx.models.head import settle_head
from outlier_mlx.models.modules import Module
from outlier_mlx.models.quantization import largest_group
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.storage.texts import read_json
from outlier_mlx.writing.assets import copy_assets
from outlier_mlx.writing.expert_parts import Stacked
from outlier_mlx.writing.float_parts import Plain
from outlier_mlx.writing.parts import Part, quantization

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class _StoredAs:
    """How AWQ's matrices are stored."""

    bits: int
    dtype: str
    errors: BiasErrors


def open_awq_model(folder: Path, *, dtype: str | None = None, bits: int | None = None) -> Opened:
    """Open a folder of safetensors: AutoAWQ int4, or unquantized.

    A module is quantized if it has a `qweight`; `modules_to_not_convert` is ignored.

    Args:
        folder: folder with config.json.
        dtype: "float32" or "float16", the dtype of scales and biases; default: the one that is
            exact with `bits`.
        bits: 4 (default), or 5, which is exact with float16.

    Raises:
        CheckpointError: a tensor is missing, has a wrong shape, or the format is not supported.
    """
    raw = read_json(inside(folder, "config.json"))
    awq = read_format(folder, raw)
    tensors = read_shards(folder)
    _refuse_gptq(tensors)
    quantized = any(name.endswith(".qweight") for name in tensors)
    if quantized and awq is None:
        raise CheckpointError(
            f"{folder.name}: tensors are quantized, but config.json has no quantization_config and"
            " there is no quant_config.json"
        )
    tied, note = settle_head(raw.get("tie_word_embeddings"), tensors)
    model = replace(parse_config(raw, role="import"), tied=tied)
    notes = [*([note] if note else []), *family(model.family).notes(model)]
    stored_as = _stored_as(dtype, bits, quantized)
    parts = _Planner(
        folder.name, by_place(tensors, model), model, awq if quantized else None, stored_as
    ).parts()
    config = spell_config(model) | quantization(parts)
    config["dtype"] = config["torch_dtype"] = _activations(parts, stored_as)
    return Opened(
        source_format="AutoAWQ int4" if quantized else "unquantized safetensors",
        parts=parts,
        config=config,
        assets=lambda target: copy_assets([folder], target),
        notes=lambda: notes + _notes(parts, stored_as, quantized),
        details={"bits": stored_as.bits, "scales": stored_as.dtype} if quantized else {},
    )


def _refuse_gptq(tensors: Mapping[str, TensorRef]) -> None:
    for name, tensor in tensors.items():
        if name.endswith(".g_idx"):
            raise CheckpointError(f"{tensor.where}: a tensor of GPTQ, which is not supported")


def _stored_as(dtype: str | None, bits: int | None, quantized: bool) -> _StoredAs:
    if (dtype or bits) and not quantized:
        raise CheckpointError("--dtype and --bits are for quantized models; this one is not")
    if bits == 5 and dtype == "float32":
        raise CheckpointError("--bits 5 is for float16: with float32 scales, 4 bits are exact")
    chosen = dtype or ("float16" if bits == 5 else "float32")
    return _StoredAs(bits or 4, chosen, BiasErrors())


@dataclass(frozen=True)
class _Planner:
    """Makes parts from a checkpoint's tensors; tensors that are used are removed from `places`."""

    where: str
    places: dict[Place, Stored]
    config: ModelConfig
    awq: AwqFormat | None
    stored_as: _StoredAs

    def parts(self) -> list[Part]:
        """One part for each quantized module or other tensor, in the model's order.

        Raises:
            CheckpointError: a tensor is missing, wrong or unknown; the message names it.
        """
        modules = family(self.config.family).modules(self.config)
        parts = [part for module in modules for part in self._module(module)]
        for stored in self.places.values():
            for tensor in stored.values():
                raise CheckpointError(f"{tensor.where}: unknown tensor for this model")
        return parts

    def _module(self, module: Module) -> Iterator[Part]:
        experts = range(module.shape[0]) if module.kind == "experts" else (None,)
        stored = {e: self.places.get((module.path, e), {}) for e in experts}
        for expert, tensors in stored.items():
            if not {"weight", "qweight"} & tensors.keys():
                name = name_in_source(module, expert)
                raise CheckpointError(
                    f"{self.where}: the tensor {name}.weight (or .qweight) is missing"
                )
        if any("qweight" in tensors for tensors in stored.values()):
            matrices = tuple(self._matrix(module, *item) for item in stored.items())
            how = (self.stored_as.bits, self.stored_as.dtype, self.stored_as.errors)
            yield AwqPart(module.path, module.kind, module.shape, matrices, *how)
        elif module.kind == "experts":
            yield self._stacked(module, [tensors.pop("weight") for tensors in stored.values()])
        else:
            yield self._plain(module, "weight", stored[None].pop("weight"), module.shape)
        if module.bias:
            bias = stored[None].pop("bias", None)
            if bias is None:
                raise CheckpointError(f"{self.where}: the tensor {module.path}.bias is missing")
            yield self._plain(module, "bias", bias, module.shape[:1])

    def _plain(self, module: Module, leaf: str, tensor: TensorRef, shape: tuple[int, ...]) -> Part:
        tensor.require(shape, *_DTYPES)
        dtype = self._dtype(module, tensor)
        return Plain(module.path, module.kind, tensor, f"{module.path}.{leaf}", dtype)

    def _stacked(self, module: Module, tensors: list[TensorRef]) -> Part:
        for tensor in tensors:
            tensor.require(module.shape[1:], tensors[0].dtype)
        members = (self._plain(module, "weight", t, module.shape[1:]) for t in tensors)
        return Stacked(module.path, module.kind, tuple(members))

    def _dtype(self, module: Module, tensor: TensorRef) -> str:
        """The dtype of an unquantized tensor, always exact.

        With float32 scales, MLX computes everything in float32 from the first norm on, and would
        convert 16-bit weights at every use. Embeddings are only looked up, so they stay 16-bit.
        """
        narrow = module.kind == "embeddings" and not self.config.tied
        if self.awq is not None and self.stored_as.dtype == "float32" and not narrow:
            return "float32"
        return _DTYPES[tensor.dtype]

    def _matrix(self, module: Module, expert: int | None, stored: Stored) -> AwqMatrix:
        """Check the tensors of a quantized layer."""
        assert self.awq is not None
        name = name_in_source(module, expert)
        qweight = stored.pop("qweight", None)
        if qweight is None:
            raise CheckpointError(
                f"{name}.weight: not quantized, but other experts of the layer are"
            )
        if module.kind in ("embeddings", "norms"):
            raise CheckpointError(f"{qweight.where}: AWQ quantizes linear layers only")
        out, width = module.shape[-2:]
        if out % 8:
            raise CheckpointError(f"{qweight.where}: {out} columns, expected a multiple of 8")
        if qweight.shape == (width // 8, out):
            raise CheckpointError(
                f"{qweight.where}: shape {qweight.shape} is GPTQ's packing, which is not supported;"
                f" AWQ has {(width, out // 8)}"
            )
        qweight.require((width, out // 8), "I32")
        group = width if self.awq.group_size == -1 else self.awq.group_size
        if width % group or largest_group(group) is None:
            raise CheckpointError(f"{qweight.where}: groups of {group} do not fit {width} inputs")
        scales, qzeros = stored.pop("scales", None), stored.pop("qzeros", None)
        if scales is None:
            raise CheckpointError(f"{self.where}: the tensor {name}.scales is missing")
        if qzeros is None and self.awq.zero_point:
            raise CheckpointError(
                f"the tensor {name}.qzeros is missing, but {self.awq.where} has zero_point"
            )
        scales.require((width // group, out), "F16")
        if qzeros is not None:
            qzeros.require((width // group, out // 8), "I32")
        return AwqMatrix(qweight, scales, qzeros)


def _activations(parts: list[Part], stored_as: _StoredAs) -> str:
    """The dtype of activations in a forward pass."""
    if any(isinstance(part, AwqPart) for part in parts):
        return stored_as.dtype
    single = [part.members[0] if isinstance(part, Stacked) else part for part in parts]
    stored = Counter(part.dtype for part in single if isinstance(part, Plain))
    return stored.most_common(1)[0][0]


def _notes(parts: list[Part], stored_as: _StoredAs, quantized: bool) -> list[str]:
    if not quantized:
        return []
    if stored_as.dtype == "float32":
        return [
            "exact: scales and biases are float32. MLX then computes everything in float32, and the"
            " KV cache takes 4 bytes per value; --bits 5 is exact in 16 bits"
        ]
    notes = []
    if stored_as.bits == 5:
        notes.append("exact: 5 bits per weight, scales and biases in float16")
    else:
        errors = stored_as.errors
        notes.append(
            f"not exact: {100 * errors.exact / max(1, errors.groups):.1f} % of {errors.groups:,}"
            f" biases are exact in float16; errors of weights are up to {errors.largest:.3g}, or"
            f" {errors.largest_in_steps:.2g} of the step between two values of a weight"
        )
    others = {part.dtype for part in parts if isinstance(part, Plain)} - {"float16"}
    if others:
        notes.append(f"unquantized tensors are {listed(sorted(others))}, scales are float16")
    return notes
