"""The portable tier: a model that stock mlx-lm loads, with no code of its own.

mlx-lm's `ernie4_5_moe` computes the same function: softmax routing renormalised over the chosen
experts, ungated shared experts beside them, dense layers around one contiguous range of MoE
layers. What differs is put into the weights: biases everywhere (zeros where there are none),
positions rotated in adjacent pairs (rows of the query and key projections are reordered), and
alphas (folded into the scales and biases of the down projections). The shared experts have the
width of the routed ones: where that makes no whole number of them, experts are widened with zeros.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from outlier_mlx.checkpoints.base import WholeModel
from outlier_mlx.checkpoints.overlay import base_shapes
from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.attention import has_windows
from outlier_mlx.models.config import PROJECTIONS
from outlier_mlx.models.quantization import GROUP_SIZES, largest_group
from outlier_mlx.storage.padding import padded, padding_note, whole_blocks
from outlier_mlx.storage.tensors import Derived
from outlier_mlx.terminal import size
from outlier_mlx.tiers.plan import Plan, base_part, common_config, finish_plan, settle_dtype
from outlier_mlx.tiers.presets import Recipe
from outlier_mlx.writing.expert_parts import AffineExperts
from outlier_mlx.writing.float_parts import Constant, Plain
from outlier_mlx.writing.parts import Part

MODEL_TYPE = "ernie4_5_moe"


@dataclass(frozen=True)
class AdjacentPairs(Derived):
    """The rows of a query or key tensor, reordered within each head.

    Bases rotate element j of a head with element j + width / 2; here the two stand side by side.
    """

    head_dim: int

    def read_float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of the reordered tensor."""
        stop = self.shape[0] if stop is None else stop
        # Whole heads are read, and the rows asked for taken from them.
        first, last = start // self.head_dim, -(-stop // self.head_dim)
        heads = self.tensor.read_float32(first * self.head_dim, last * self.head_dim)
        halves = heads.reshape(last - first, 2, self.head_dim // 2, *heads.shape[1:])
        rows = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(heads.shape)
        return rows[start - first * self.head_dim :][: stop - start]


def make_portable_plan(model: WholeModel, recipe: Recipe, alpha: Path | str | None = None) -> Plan:
    """Decide what a portable tier holds; see `outlier_mlx.tiers.plan.make_plan`.

    Raises:
        CheckpointError: stock mlx-lm cannot express this overlay; the reason and what can be done
            instead are named.
    """
    width = _expert_width(model)
    recipe = settle_dtype(model, recipe)
    parts = list(_parts(model, recipe, model.overlay.alphas(alpha), width))
    own = model.overlay.expert_intermediate
    # Codes, scales and biases alike are in proportion to the width.
    zeros = sum(part.nbytes for part in parts if isinstance(part, AffineExperts))
    zeros = zeros * (width - own) // width
    plan = finish_plan(parts, _config(model, recipe, width), recipe)
    return replace(plan, notes=padding_note(own, width, f", {size(zeros)}"))


def _expert_width(model: WholeModel) -> int:
    """The least width of experts that mlx-lm's model and MLX's groups can have."""
    config, own, least = model.config, model.overlay.expert_intermediate, GROUP_SIZES[0]
    layers = config.moe_layers
    # The shared FFN is a number of experts side by side, and each of them whole groups.
    widths = range(whole_blocks(max(own, 1), least), config.intermediate + 1, least)
    width = next((each for each in widths if config.intermediate % each == 0), None)
    if not layers:
        reason = "it has no MoE layer"
    elif list(layers) != list(range(layers[0], layers[-1] + 1)):
        reason = f"its MoE layers {list(layers)} leave gaps"
    elif config.rope_scaling is not None:
        kind = config.rope_scaling["rope_type"]
        reason = f"it scales positions ({'YaRN' if kind == 'yarn' else kind})"
    elif config.qk_norm:
        reason = "its base has norms of queries and keys"
    elif has_windows(config):
        reason = "its base attends to a window of tokens in some layers"
    elif largest_group(config.hidden) is None:
        reason = f"{least} does not divide the hidden size {config.hidden}"
    elif width is None:
        reason = (
            f"its experts are {own} wide, and no multiple of {least} from there on divides the"
            f" width of the base's FFN, {config.intermediate}"
        )
    else:
        return width
    raise CheckpointError(
        f"{model.overlay.path.name}: no portable tier: {reason}; without --portable the tier runs"
        " in outlier-mlx, and in mlx-lm with --trust-remote-code"
    )


def _parts(
    model: WholeModel, recipe: Recipe, alphas: dict[int, np.ndarray], width: int
) -> Iterator[Part]:
    config = model.config
    shapes = base_shapes(config)
    for name, shape in shapes.items():
        words = name.split(".")
        layer = int(words[2]) if words[1] == "layers" else None
        moe = layer in config.moe_layers and ".mlp." in name
        target = name.replace(".mlp.", ".mlp.shared_experts.") if moe else name
        change = None
        if ".q_proj." in name or ".k_proj." in name:
            change = partial(AdjacentPairs, head_dim=config.head_dim)
        yield base_part(model, recipe, name, target, shape, change)
        bias, added = (f"{full.removesuffix('weight')}bias" for full in (name, target))
        if name.endswith("_proj.weight") and bias not in shapes:
            yield base_part(model, recipe, bias, added, shape[:1])
        if moe and name.endswith("mlp.down_proj.weight"):
            assert layer is not None
            yield from _moe_parts(model, recipe, layer, alphas[layer], width)


def _moe_parts(
    model: WholeModel, recipe: Recipe, layer: int, alphas: np.ndarray, width: int
) -> Iterator[Part]:
    assert recipe.dtype is not None
    prefix = f"model.layers.{layer}.mlp"
    router = model.overlay.routers[layer]
    # float32 here does not spread: mlx-lm takes the routing probabilities in float32 anyway.
    yield Plain(f"{prefix}.gate", "router", router, f"{prefix}.gate.weight", "float32")
    for projection in PROJECTIONS:
        hidden = model.config.hidden
        shape = (hidden, width) if projection == "down" else (width, hidden)
        experts = model.overlay.experts[layer]
        matrices = tuple(padded(getattr(expert, projection), shape) for expert in experts)
        path = f"{prefix}.switch_mlp.{projection}_proj"
        factors = tuple(alphas.tolist()) if projection == "down" else ()
        yield AffineExperts(path, "experts", matrices, recipe.dtype, factors)
        zeros = np.zeros((len(matrices), shape[0]), np.float32)
        yield Constant(path, "experts", f"{path}.bias", zeros, recipe.dtype)


def _config(model: WholeModel, recipe: Recipe, width: int) -> dict:
    config = model.config
    return common_config(model, recipe) | {
        "model_type": MODEL_TYPE,
        "head_dim": config.head_dim,
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "use_bias": True,
        "moe_num_experts": config.experts,
        "moe_k": config.top_k,
        "moe_intermediate_size": width,
        "moe_num_shared_experts": config.intermediate // width,
        "moe_layer_start_index": config.moe_layers[0],
        "moe_layer_end_index": config.moe_layers[-1],
        "moe_layer_interval": 1,
        "moe_gate_act": "softmax",
    }
