"""Opening AutoAWQ checkpoints, and unquantized ones of the same families.

mlx-lm's own loader stacks Mixtral's experts before it transforms AWQ's tensors, and then finds
none of them. Here everything is in MLX's names and form before mlx-lm sees it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from outlier_mlx.checkpoints.shards import read_shards
from outlier_mlx.errors import CheckpointError
from outlier_mlx.imports.awq_layout import mlx_group
from outlier_mlx.imports.awq_parts import AwqMatrix, AwqPart, Loss
from outlier_mlx.imports.families import Module, complete_config, modules
from outlier_mlx.imports.hf_names import Place, Stored, by_place, name_in_source
from outlier_mlx.imports.opened import Opened, quantization
from outlier_mlx.imports.plain_parts import StackedPlain
from outlier_mlx.plain_config import normalised
from outlier_mlx.storage.folders import inside
from outlier_mlx.storage.parts import Part
from outlier_mlx.storage.safetensors import TensorRef, read_json
from outlier_mlx.tiers.assets import copy_assets
from outlier_mlx.tiers.parts import Plain

# Layouts of AutoAWQ other than GEMM, by the names that configs give them.
_OTHER_VERSIONS = ("gemv", "gemv_fast", "marlin", "exllama", "exllamav2", "ipex")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class AwqFormat:
    """What a config says of quantization.

    Attributes:
        where: file and field, for messages.
        group_size: weights along `in` that share a scale; -1 for all of a row.
        zero_point: whether zeros are stored; without, they are 8.
    """

    where: str
    group_size: int
    zero_point: bool


@dataclass(frozen=True)
class _Form:
    """How AWQ's matrices are written."""

    bits: int
    dtype: str
    loss: Loss


def open_awq_model(folder: Path, *, dtype: str | None = None, bits: int | None = None) -> Opened:
    """Open a folder of safetensors: AutoAWQ int4, or unquantized.

    A module is quantized if and only if it has a `qweight`: `modules_to_not_convert` is not asked.

    Args:
        folder: with config.json.
        dtype: "float32" or "float16", of scales and biases; by default what is exact with `bits`.
        bits: 4, or 5, with which float16 is exact; default 4.

    Raises:
        CheckpointError: names what is missing, has the wrong shape, or is of another format.
    """
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: no config.json")
    raw = read_json(inside(folder, "config.json"))
    awq = read_format(folder, raw)
    # As mlx-lm does; beside them, some repositories have the same weights under other names.
    usual = any(folder.glob("model*.safetensors"))
    tensors = read_shards(folder, pattern="model*.safetensors" if usual else "*.safetensors")
    _refuse_gptq(tensors)
    quantized = any(name.endswith(".qweight") for name in tensors)
    if quantized and awq is None:
        raise CheckpointError(
            f"{folder.name}: tensors are quantized, but neither config.json has a"
            " quantization_config, nor is there a quant_config.json"
        )
    tied = not any(name.startswith("lm_head.") for name in tensors)
    config, notes = complete_config(normalised(raw), "config.json", tied=tied)
    form = _form(dtype, bits, quantized)
    places = by_place(tensors, config)
    parts = _parts(places, config, awq, form)
    _check_all_used(places)
    stored = {p.path: (p.bits, p.group_size) for p in parts if isinstance(p, AwqPart)}
    if stored:
        config["quantization"] = quantization(stored)
    config["dtype"] = config["torch_dtype"] = _activations(parts, form)
    return Opened(
        form="AutoAWQ int4" if stored else "unquantized safetensors",
        parts=parts,
        config=config,
        assets=lambda target: copy_assets([folder], target),
        notes=lambda: notes + _notes(parts, form, bool(stored)),
        details={"bits": form.bits, "scales": form.dtype} if stored else {},
    )


def read_format(folder: Path, config: dict) -> AwqFormat | None:
    """AutoAWQ's settings, from config.json or from the quant_config.json of old repositories.

    Returns:
        None where nothing is said of quantization.

    Raises:
        CheckpointError: the method, version or number of bits is none that is read.
    """
    if "quantization" in config:
        raise CheckpointError(
            f"{folder.name}: config.json has `quantization`: an MLX model already"
        )
    settings, where = config.get("quantization_config"), "config.json: quantization_config"
    if settings is None and (folder / "quant_config.json").exists():
        settings, where = read_json(inside(folder, "quant_config.json")), "quant_config.json"
        settings.setdefault("quant_method", "awq")
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{where}: an object was expected")
    method = str(settings.get("quant_method"))[:40].lower()
    if method != "awq":
        raise CheckpointError(f"{where}: quant_method {method}; only awq is imported")
    version = str(settings.get("version", "gemm"))[:40].lower()
    backend = str(settings.get("backend", "autoawq"))[:40].lower()
    if version != "gemm":
        known = "another layout" if version in _OTHER_VERSIONS else "unknown"
        raise CheckpointError(f"{where}: version {version} ({known}); only gemm is imported")
    if backend != "autoawq":
        raise CheckpointError(f"{where}: backend {backend}; only autoawq's layout is imported")
    bits = settings.get("bits", settings.get("w_bit"))
    if type(bits) is not int or bits != 4:
        raise CheckpointError(f"{where}: bits {str(bits)[:40]}, expected 4")
    group = settings.get("group_size", settings.get("q_group_size", 128))
    if type(group) is not int or (group != -1 and (group < 1 or mlx_group(group) is None)):
        raise CheckpointError(
            f"{where}: group_size {str(group)[:40]}, expected -1 or a multiple of 32"
        )
    zero_point = settings.get("zero_point", True)
    if not isinstance(zero_point, bool):
        raise CheckpointError(f"{where}: zero_point {str(zero_point)[:40]}, expected a boolean")
    return AwqFormat(where, group, zero_point)


def _refuse_gptq(tensors: Mapping[str, TensorRef]) -> None:
    for name, tensor in tensors.items():
        if name.endswith(".g_idx"):
            raise CheckpointError(f"{tensor.where}: GPTQ has this tensor, AWQ has not; GPTQ is not"
                                  " imported")  # fmt: skip


def _form(dtype: str | None, bits: int | None, quantized: bool) -> _Form:
    if (dtype or bits) and not quantized:
        raise CheckpointError("nothing here is quantized: --dtype and --bits change nothing")
    if bits == 5 and dtype == "float32":
        raise CheckpointError("5 bits are for float16: with float32 scales, 4 bits lose nothing")
    chosen = dtype or ("float16" if bits == 5 else "float32")
    return _Form(bits or 4, chosen, Loss())


def _parts(
    places: dict[Place, Stored], config: dict, awq: AwqFormat | None, form: _Form
) -> list[Part]:
    """A part a tensor or quantized module, in the model's order; takes what it uses of `places`."""
    parts: list[Part] = []
    for module in modules(config):
        experts = range(module.shape[0]) if module.kind == "experts" else (None,)
        stored = {e: places.get((module.path, e), {}) for e in experts}
        for expert, tensors in stored.items():
            if not {"weight", "qweight"} & tensors.keys():
                name = name_in_source(module, expert)
                raise CheckpointError(f"the tensor {name}.weight (or .qweight) is missing")
        if any("qweight" in tensors for tensors in stored.values()):
            assert awq is not None
            matrices = tuple(_matrix(tensors, module, e, awq) for e, tensors in stored.items())
            stacked = module.kind == "experts"
            parts.append(
                AwqPart(
                    module.path, module.kind, matrices, stacked, form.bits, form.dtype, form.loss
                )
            )
        else:
            parts.append(_plain(module, list(stored.values())))
        if module.bias:
            bias = stored[None].pop("bias", None)
            if bias is None:
                raise CheckpointError(f"the tensor {module.path}.bias is missing")
            parts.append(_plain_tensor(module, "bias", bias, module.shape[:1]))
    return parts


def _plain(module: Module, stored: list[Stored]) -> Part:
    tensors = [one.pop("weight") for one in stored]
    if module.kind != "experts":
        return _plain_tensor(module, "weight", tensors[0], module.shape)
    for tensor in tensors:
        _check(tensor, module.shape[1:], tuple(_DTYPES))
        if tensor.dtype != tensors[0].dtype:
            raise CheckpointError(
                f"{tensor.where}: {tensor.dtype}, but {tensors[0].name} is {tensors[0].dtype}"
            )
    name, dtype = f"{module.path}.weight", _DTYPES[tensors[0].dtype]
    return StackedPlain(module.path, module.kind, tuple(tensors), name, dtype)


def _plain_tensor(module: Module, leaf: str, tensor: TensorRef, shape: tuple[int, ...]) -> Part:
    _check(tensor, shape, tuple(_DTYPES))
    name = f"{module.path}.{leaf}"
    return Plain(module.path, module.kind, tensor, name, _DTYPES[tensor.dtype])


def _matrix(stored: Stored, module: Module, expert: int | None, awq: AwqFormat) -> AwqMatrix:
    """A quantized layer, checked; what it uses is taken from `stored`."""
    name = name_in_source(module, expert)
    out, width = module.shape[-2:] if len(module.shape) > 1 else (module.shape[0], 1)
    qweight = stored.pop("qweight", None)
    if qweight is None:
        raise CheckpointError(f"{name}.weight: not quantized, but other experts of its layer are")
    if module.kind in ("embeddings", "norms"):
        raise CheckpointError(f"{qweight.where}: AWQ quantizes linear layers only")
    if out % 8:
        raise CheckpointError(f"{qweight.where}: {out} columns, expected a multiple of 8")
    if qweight.shape == (width // 8, out) != (width, out // 8):
        raise CheckpointError(
            f"{qweight.where}: shape {qweight.shape} is packed along the input, as GPTQ does it;"
            f" AWQ has {(width, out // 8)}; GPTQ is not imported"
        )
    _check(qweight, (width, out // 8), ("I32",))
    group = width if awq.group_size == -1 else awq.group_size
    if width % group or mlx_group(group) is None:
        raise CheckpointError(f"{qweight.where}: groups of {group} do not fit {width} inputs")
    scales = stored.pop("scales", None)
    if scales is None:
        raise CheckpointError(f"{name}.scales is missing")
    _check(scales, (width // group, out), ("F16",))
    qzeros = stored.pop("qzeros", None)
    if qzeros is None and awq.zero_point:
        raise CheckpointError(f"{name}.qzeros is missing, but {awq.where} has zero_point")
    if qzeros is not None:
        _check(qzeros, (width // group, out // 8), ("I32",))
    return AwqMatrix(qweight, scales, qzeros)


def _check(tensor: TensorRef, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes:
        raise CheckpointError(
            f"{tensor.where}: {tensor.dtype} {tensor.shape}, expected {' or '.join(dtypes)} {shape}"
        )


def _check_all_used(places: dict[Place, Stored]) -> None:
    for stored in places.values():
        for tensor in stored.values():
            raise CheckpointError(f"{tensor.where}: not a tensor of this model")


def _activations(parts: list[Part], form: _Form) -> str:
    """The dtype that a forward pass ends up in."""
    if any(isinstance(part, AwqPart) for part in parts):
        return form.dtype
    stored = Counter(part.dtype for part in parts if isinstance(part, Plain | StackedPlain))
    return stored.most_common(1)[0][0]


def _notes(parts: list[Part], form: _Form, quantized: bool) -> list[str]:
    if not quantized:
        return []
    if form.dtype == "float32":
        return [
            "exact: scales and biases are float32. mlx-lm then computes in float32, and its KV"
            " cache takes 4 bytes a value; --bits 5 is exact in 16 bits"
        ]
    notes = []
    if form.bits == 5:
        notes.append("exact: 5 bits a weight, scales and biases in float16")
    else:
        loss = form.loss
        notes.append(
            f"not exact: {100 * loss.exact / max(1, loss.groups):.1f} % of {loss.groups:,} biases"
            f" survive float16; a weight is off by up to {loss.largest:.3g}, which is"
            f" {loss.largest_in_steps:.2g} of the step between two of its values"
        )
    others = {part.dtype for part in parts if isinstance(part, Plain)} - {"float16"}
    if others:
        notes.append(f"unquantized tensors in {', '.join(sorted(others))} beside float16 scales")
    return notes
