"""How models are stored: the tensors of a tier, and the parameters in any stored tensor."""

from collections.abc import Container, Mapping
from math import prod

from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.description import Description, ModelConfig
from outlier_mlx.models.modules import Module, tier_modules
from outlier_mlx.models.quantization import GROUP_SIZES
from outlier_mlx.storage.safetensors import FLOAT_DTYPES, TensorRef
from outlier_mlx.ternary import row_bytes

#: A tensor's shape, and the dtypes it may have.
Expected = tuple[tuple[int, ...], tuple[str, ...]]
# Bits of a weight in a tier.
_BITS = (2, 4, 6, 8)


def expected_tensors(config: ModelConfig, found: Container[str]) -> dict[str, Expected]:
    """Names, shapes and dtypes of a tier's tensors.

    Args:
        config: the tier's.
        found: names of the stored tensors; a matrix that has `scales` is quantized.

    Raises:
        CheckpointError: the config has no width of the experts, or does not say how a matrix is
            stored.
    """
    ternary = config.raw.get("ternary") or {}
    expected: dict[str, Expected] = {}
    for module in tier_modules(config):
        if module.kind == "experts":
            if ternary.get("format") == "affine2":
                expected |= _affine(module, config, ("F32",))
            else:
                expected |= _rows(module)
        elif module.kind == "router":
            expected |= {name: (shape, ("F32",)) for name, shape in module.tensors().items()}
        elif len(module.shape) == 2 and f"{module.path}.scales" in found:
            expected |= _affine(module, config, FLOAT_DTYPES)
        else:
            expected |= {name: (shape, FLOAT_DTYPES) for name, shape in module.tensors().items()}
    return expected


def _rows(module: Module) -> dict[str, Expected]:
    """Experts as packed rows of trits, with a scale for each row."""
    *lead, width = module.shape
    return {
        f"{module.path}.weight": ((*lead, row_bytes(width)), ("U8",)),
        f"{module.path}.scales": (tuple(lead), ("F32",)),
    }


def _affine(module: Module, config: ModelConfig, dtypes: tuple[str, ...]) -> dict[str, Expected]:
    """A matrix in MLX's affine format, and the bias that it may have."""
    *lead, width = module.shape
    how = config.quantization.of(module.path) if config.quantization else None
    unsound = how is None or how.bits not in _BITS or how.group_size not in GROUP_SIZES
    if how is None or unsound or width % how.group_size:
        raise CheckpointError(f"config.json: quantization does not say how {module.path} is stored")
    groups = ((*lead, width // how.group_size), dtypes)
    bias = {f"{module.path}.bias": (module.shape[:1], FLOAT_DTYPES)} if module.bias else {}
    return {
        f"{module.path}.weight": ((*lead, width * how.bits // 32), ("U32",)),
        f"{module.path}.scales": groups,
        f"{module.path}.biases": groups,
    } | bias


def stored_params(
    key: str, tensors: Mapping[str, TensorRef], config: Description, where: str
) -> int:
    """The number of parameters in a stored tensor; 0 for scales and biases of quantized weights.

    Args:
        key: name of the tensor.
        tensors: all tensors of the model.
        config: the model's.
        where: name of the model in messages.

    Raises:
        CheckpointError: the config has no width for the rows of a packed tensor, or no bits for its
            weights.
    """
    shape = tensors[key].shape
    module, _, leaf = key.rpartition(".")
    if f"{module}.qweight" in tensors and leaf in ("qweight", "qzeros", "scales"):  # AWQ
        return 8 * prod(shape) if leaf == "qweight" else 0
    weight = tensors.get(f"{module}.weight")
    ternary = "ternary" in config.raw or "ternary_switch" in config.raw
    packed = weight is not None and weight.dtype in (("U8", "U32") if ternary else ("U32",))
    if packed and leaf in ("scales", "biases"):
        return 0
    if key.endswith("_scale") or (leaf == "scale" and ".experts." in key):
        return 0
    if leaf != "weight" or not packed:
        return prod(shape)
    if tensors[key].dtype == "U8":
        width = config.expert_width if ".down_proj" in module else config.hidden
        if width is None:
            raise CheckpointError(f"{where}: config.json does not say how wide {key} is")
        return prod(shape[:-1]) * width
    how = config.quantization.of(module) if config.quantization else None
    if how is None:
        raise CheckpointError(f"{where}: config.json does not say how many bits {key} has")
    return prod(shape) * 32 // how.bits
