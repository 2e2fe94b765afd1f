"""The plan of a tier: every part in the order in which it is written, and the config."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from outlier_mlx.checkpoints.base import WholeModel
from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.config import BASE_TYPE
from outlier_mlx.models.modules import Module, tier_modules
from outlier_mlx.models.quantization import GROUP_SIZES, largest_group
from outlier_mlx.models.spelling import without_nulls
from outlier_mlx.models.summary import kind_of
from outlier_mlx.models.tier_fields import FOREIGN, MODEL_FILE, base_fields, tier_fields
from outlier_mlx.runtime.affine2 import EXPERT_FORMAT_VERSION, ROWS
from outlier_mlx.storage.tensors import FloatTensor
from outlier_mlx.tiers.presets import Recipe
from outlier_mlx.writing.expert_parts import AffineExperts, TernaryExperts
from outlier_mlx.writing.float_parts import Constant, Plain, Quantized
from outlier_mlx.writing.parts import Part, quantization

# What belongs to the overlay's packaging, or is rewritten under its usual name.
_DROPPED = frozenset(
    ["auto_map", "base_model_name_or_path", BASE_TYPE, "v3_pipeline", "v3_checkpoint"]
    + ["ternary_switch", "pipeline", "notes", "transformers_version"]
    + ["hidden_dim", "intermediate_dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len"]
    + ["n_experts", "outlier_num_experts", "top_k", "outlier_num_experts_per_tok"]
    + ["moe_layer_indices", "v3_2_moe_layers", "rope_parameters", "torch_dtype", "dtype"]
    + ["quantization", "quantization_config", "model_file", *FOREIGN]
)
_STORED_DTYPES = {"BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Plan:
    """What a tier will hold.

    Attributes:
        parts: in the order in which they are written.
        config: the tier's `config.json`.
        recipe: the recipe with its dtype settled.
        unquantized: matrices that no group size divides, by path.
        notes: sentences about what takes more room than in the overlay.
    """

    parts: list[Part]
    config: dict
    recipe: Recipe
    unquantized: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in self.parts)


def make_plan(model: WholeModel, recipe: Recipe, alpha: Path | str | None = None) -> Plan:
    """Decide what a tier holds; small tensors (alphas) are read, nothing else.

    Args:
        model: an overlay on its base.
        recipe: how to store it; a dtype of None follows the checkpoint, bfloat16 for float32.
        alpha: a file of alphas that wins over the overlay's own, or "original".
    """
    recipe = settle_dtype(model, recipe)
    parts = list(_parts(model, recipe, model.overlay.alphas(alpha)))
    return finish_plan(parts, _config(model, recipe), recipe)


def settle_dtype(model: WholeModel, recipe: Recipe) -> Recipe:
    """The recipe with the dtype that the checkpoint suggests, where it names none."""
    if recipe.dtype is not None:
        return recipe
    stored = model.base["model.embed_tokens.weight"].dtype
    return replace(recipe, dtype=_STORED_DTYPES.get(stored, "bfloat16"))


def finish_plan(parts: list[Part], config: dict, recipe: Recipe) -> Plan:
    """A plan of these parts; `quantization` is added to the config, as the parts are stored."""
    unquantized = [
        part.path
        for part in parts
        if isinstance(part, Plain) and recipe.base_bits and len(part.tensor.shape) == 2
        if part.kind != "router"
    ]
    default = (recipe.base_bits or 2, recipe.group_size)
    return Plan(parts, config | quantization(parts, default), recipe, unquantized)


def _parts(model: WholeModel, recipe: Recipe, alphas: dict[int, np.ndarray]) -> Iterator[Part]:
    width = model.overlay.expert_intermediate or None
    for module in tier_modules(replace(model.config, expert_width=width)):
        layer = int(module.path.split(".")[2]) if ".layers." in module.path else 0
        if module.kind == "experts":
            yield _experts(model, recipe, module, layer)
        elif module.leaf == "alpha":
            yield Constant(
                module.path, module.kind, f"{module.path}.alpha", alphas[layer], "float32"
            )
        elif module.kind == "router":
            router = model.overlay.routers[layer]
            yield Plain(module.path, module.kind, router, f"{module.path}.weight", "float32")
        else:
            for target, shape in module.tensors().items():
                name = target.replace(".mlp.shared_expert.", ".mlp.")
                yield base_part(model, recipe, name, target, shape)


def base_part(
    model: WholeModel,
    recipe: Recipe,
    name: str,
    target: str,
    shape: tuple[int, ...],
    change: Callable[[FloatTensor], FloatTensor] | None = None,
) -> Part:
    """How the base tensor `name` is stored under the name `target`.

    Args:
        model: where it comes from; a bias that the base does not have is zero.
        recipe: whether and how matrices are quantized.
        name: its name in the base.
        target: its name in the tier.
        shape: its shape.
        change: wraps the tensor, where it is not stored as it is.
    """
    assert recipe.dtype is not None
    path, kind = target.rsplit(".", 1)[0], kind_of(target)
    tensor: FloatTensor | None = model.base.get(name)
    if tensor is None:
        return Constant(path, kind, target, np.zeros(shape, np.float32), recipe.dtype)
    twin: FloatTensor | None = model.twins.get(name)
    if change is not None:
        tensor = change(tensor)
        twin = change(twin) if twin is not None else None
    group = largest_group(shape[-1], recipe.group_size)
    bits = recipe.bits(name, model.config.layers)
    if bits is None or len(shape) != 2 or group is None:
        return Plain(path, kind, tensor, target, recipe.dtype, twin)
    return Quantized(path, kind, tensor, bits, group, recipe.dtype, twin)


def _experts(model: WholeModel, recipe: Recipe, module: Module, layer: int) -> Part:
    projection = module.path.rpartition(".")[2].removesuffix("_proj")
    matrices = tuple(getattr(expert, projection) for expert in model.overlay.experts[layer])
    if recipe.experts == "tq1_0":
        return TernaryExperts(module.path, module.kind, matrices)
    width = module.shape[-1]
    if largest_group(width) is None:
        raise CheckpointError(
            f"{matrices[0].trits.where}: affine2 needs widths that {GROUP_SIZES[0]} divides,"
            f" this one is {width}; --experts tq1_0 takes any"
        )
    return AffineExperts(module.path, module.kind, matrices)


def _config(model: WholeModel, recipe: Recipe) -> dict:
    config = model.config
    experts = ROWS if recipe.experts == "tq1_0" else recipe.experts
    own = tier_fields(config, model.overlay.expert_intermediate)
    return (
        common_config(model, recipe)
        | own
        | {
            "model_file": MODEL_FILE,
            "architectures": ["OutlierMoEForCausalLM"],
            "ternary": {"format": experts, "version": EXPERT_FORMAT_VERSION},
        }
    )


def common_config(model: WholeModel, recipe: Recipe) -> dict:
    """The fields of a `config.json` that do not depend on how experts are stored."""
    config = model.config
    spelled = without_nulls(config.raw)
    kept = {key: value for key, value in spelled.items() if key not in _DROPPED}
    return kept | {"dtype": recipe.dtype} | base_fields(config)
