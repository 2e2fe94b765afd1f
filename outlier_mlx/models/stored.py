"""How models are stored: the tensors of a tier, and the parameters in any stored tensor."""

from collections.abc import Container, Mapping
from math import prod

from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.description import Description, ModelConfig
from outlier_mlx.models.families import family
from outlier_mlx.models.modules import Module, tier_modules
from outlier_mlx.models.quantization import AFFINE_BITS, GROUP_SIZES
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.ternary import row_bytes

#: A tensor's shape, and the dtypes it may have.
Expected = tuple[tuple[int, ...], tuple[str, ...]]
#: Dtypes of what is not packed. MLX converts no float64.
FLOATS = ("F32", "F16", "BF16")


def check_tensors(config: ModelConfig, tensors: Mapping[str, TensorRef]) -> None:
    """Check that a model's files hold the tensors that its config asks for, and no others.

    Args:
        config: of a tier, or of a plain model in MLX's format whose family is known.
        tensors: the model's.

    Raises:
        CheckpointError: names the first tensor that is missing, unknown, or of another shape or
            dtype; or the config does not say how a matrix is stored.
    """
    expected = expected_tensors(config, tensors)
    for name, (shape, dtypes) in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{name}: missing, expected {shape}")
        tensor.require(shape, *dtypes)
    for name, tensor in tensors.items():
        if name not in expected:
            raise CheckpointError(f"{tensor.where}: not a tensor of this model")


def stored_modules(config: ModelConfig) -> list[Module]:
    """The modules of a tier, or of a plain model, in the order of a forward pass."""
    tier = "ternary" in config.raw
    return tier_modules(config) if tier else family(config.family).modules(config)


def expected_tensors(config: ModelConfig, found: Container[str]) -> dict[str, Expected]:
    """Names, shapes and dtypes of a model's tensors; see `check_tensors`.

    Args:
        config: the model's.
        found: names of the stored tensors; a matrix that has `scales` is quantized.

    Raises:
        CheckpointError: the config has no width of the experts, or does not say how a matrix is
            stored.
    """
    modules = stored_modules(config)
    by_path = config.quantization.by_path if config.quantization else {}
    matrices = {module.path for module in modules if _is_matrix(module, config)}
    for path in by_path:
        if path not in matrices:
            raise CheckpointError(
                f"config.json: quantization: {path[:80]} is no matrix to quantize"
            )
    expected: dict[str, Expected] = {}
    for module in modules:
        expected |= _tensors(module, config, found)
    return expected


def _tensors(module: Module, config: ModelConfig, found: Container[str]) -> dict[str, Expected]:
    is_tier = "ternary" in config.raw
    by_path = config.quantization.by_path if config.quantization else {}
    if is_packed(module, config):
        return _rows(module)
    if module.kind == "experts" and not is_tier:
        apart = _apart(module, config)
        if next(iter(apart)) in found:
            return {name: (shape, FLOATS) for name, shape in apart.items()}
    dtypes = ("F32",) if is_tier and module.kind in ("experts", "router") else FLOATS
    quantized = (
        f"{module.path}.scales" in found
        or by_path.get(module.path) is not None
        or (is_tier and module.kind == "experts")
    )
    if quantized and _is_matrix(module, config):
        return _affine(module, config, dtypes)
    return {name: (shape, dtypes) for name, shape in module.tensors().items()}


def _apart(module: Module, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """A projection of experts under Hugging Face's names, a tensor an expert; mlx-lm joins them."""
    count, *shape = module.shape
    prefix, _, projection = module.path.partition(".switch_mlp.")
    if config.family == "mixtral":
        projection = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[projection]
    return {f"{prefix}.experts.{n}.{projection}.weight": tuple(shape) for n in range(count)}


def _is_matrix(module: Module, config: ModelConfig) -> bool:
    """Whether a module can be quantized in MLX's formats."""
    fixed = "ternary" in config.raw and module.kind == "router"
    return len(module.shape) > 1 and not fixed and not is_packed(module, config)


def is_packed(module: Module, config: ModelConfig) -> bool:
    """Whether a module is experts in packed rows of trits."""
    if module.kind != "experts":
        return False
    if "ternary" in config.raw:
        return bool(config.raw["ternary"].get("format") != "affine2")
    switch = config.raw.get("ternary_switch")
    return switch is not None and int(module.path.split(".")[2]) in switch["layers"]


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
    unsound = how is None or how.bits not in AFFINE_BITS or how.group_size not in GROUP_SIZES
    if how is None or unsound or width % how.group_size:
        raise CheckpointError(f"config.json: quantization does not say how {module.path} is stored")
    groups = ((*lead, width // how.group_size), dtypes)
    bias = {f"{module.path}.bias": (module.shape[:1], FLOATS)} if module.bias else {}
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
    listed_modules = config.raw["ternary"].get("modules") if "ternary" in config.raw else None
    if isinstance(listed_modules, dict):  # a ternary model
        if key.startswith("rotations."):
            return 0
        if module in listed_modules and leaf == "weight":
            return int(shape[0] * listed_modules[module]["in_features"])
    if weight is not None and weight.dtype == "U8" and f"{module}.weight_scale" in tensors:
        return 4 * prod(shape) if leaf == "weight" else 0  # BitNet: four rows a byte
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
