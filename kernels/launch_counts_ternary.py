"""Count the launches of a layer's decoding step in ternary models, ours and mlx-lm's.

The layers are Qwen3.5's: a gated delta net, and full attention. See `launch_counts`.
"""

from collections import Counter
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta, prism_hadamard_qwen35, qwen3_5
from mlx_lm.models.cache import ArraysCache, KVCache

from kernels.costs_decode import Hybrid
from kernels.launch_counts import CONTEXT, launches_of
from outlier_mlx.runtime.affine2 import EXPERT_FORMAT_VERSION, ROWS
from outlier_mlx.runtime.ternary_model import TernaryModelArgs, ternary_model_on

GROUP = 128
_PLAIN = ("in_proj_a", "in_proj_b")


def config(model: Hybrid) -> dict[str, Any]:
    """The config.json of four layers of a model."""
    text = {
        "model_type": "qwen3_5_text",
        "hidden_size": model.hidden,
        "intermediate_size": model.width,
        "num_hidden_layers": 4,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": 256,
        "linear_num_value_heads": model.values,
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "full_attention_interval": 4,
        "tie_word_embeddings": model.tied,
        "vocab_size": model.vocab,
    }
    return {"model_type": "qwen3_5", "text_config": text}


def ternary(model: Hybrid, *, rotated: bool) -> nn.Module:
    """Four layers of this project's model in float16, whose arrays are never evaluated."""
    said = config(model)
    made = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(said))
    modules: dict[str, dict[str, int]] = {}
    rotations: list[dict[str, Any]] = []
    for path, (_, wide) in _matrices(made):
        modules[path] = {"in_features": wide}
        if rotated:
            rotation = {"width": wide, "block": model.block, "signed": True}
            rotations += [] if rotation in rotations else [rotation]
            modules[path]["rotation"] = rotations.index(rotation)
    fields = {"format": ROWS, "version": EXPERT_FORMAT_VERSION, "group_size": GROUP}
    said["ternary"] = fields | {"modules": modules, "rotations": rotations}
    own = ternary_model_on(qwen3_5.Model)(TernaryModelArgs.from_dict(said))
    own.set_dtype(mx.float16)
    mx.eval([rotation.parameters() for rotation in own.rotations])  # not made in each step
    return own.eval()


def mlx_two_bits(model: Hybrid, *, rotated: bool) -> nn.Module:
    """Four layers of mlx-lm's model in 2 bits and float16, likewise."""
    made = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(config(model)))
    paths = [path for path, _ in _matrices(made)]
    if not rotated:
        nn.quantize(made, GROUP, 2, class_predicate=lambda path, _: path in paths)
    else:
        modules = [
            {
                "path": path.removeprefix("language_model."),
                "block": model.block,
                "embedding": path.endswith("embed_tokens"),
                "dtype": "float16",
            }
            for path in paths
        ]
        pack: dict[str, Any] = {
            "schema_version": 2,
            "tensor_namespace": "mlx-vlm-qwen3_5",
            "modules": modules,
        }
        pack["quantization"] = {"bits": 2, "group_size": GROUP, "mode": "affine"}
        args = prism_hadamard_qwen35.ModelArgs.from_dict(config(model) | pack)
        made = prism_hadamard_qwen35.Model(args)
    made.set_dtype(mx.float16)
    return made.eval()


def count_layers(made: Any, model: Hybrid) -> tuple[Counter[str], Counter[str]]:
    """Launches of a step in a gated delta net, and in a layer of full attention."""
    net, full = made.layers[0], made.layers[3]
    x = mx.zeros((1, 1, model.hidden), mx.float16)
    channels = 128 * (model.values + 2 * 16)
    states = (
        mx.zeros((1, 3, channels), mx.float16),
        mx.zeros((1, model.values, 128, 128)),
    )
    keys = mx.zeros((1, model.kv_heads, 256, 256), mx.float16)

    def step_net(x: mx.array, *states: mx.array) -> Any:
        cache: Any = ArraysCache(size=2)
        cache.cache = [*states]
        return net(x, None, cache)

    def step_full(x: mx.array, keys: mx.array, values: mx.array) -> Any:
        cache = KVCache()
        cache.keys, cache.values, cache.offset = keys, values, CONTEXT
        return full(x, None, cache)

    with patch.object(qwen3_5, "gated_delta_update", _delta):
        return launches_of(net, step_net, x, *states), launches_of(full, step_full, x, keys, keys)


def _matrices(made: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (path, module.weight.shape)
        for path, module in made.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and not path.endswith(_PLAIN)
    ]


def _delta(
    q: mx.array, k: mx.array, v: mx.array, a: mx.array, b: mx.array, *rest: Any, **_: Any
) -> tuple[mx.array, mx.array]:
    """`gated_delta_update` as it is on a GPU: a sigmoid, `compute_g`, and a kernel."""
    decays, times, state = rest[:3]
    given = [q, k, v, mx.sigmoid(b), gated_delta.compute_g(decays, a, times), state]
    kernel: Any = mx.fast.metal_kernel(
        name="gated_delta",
        input_names=["q", "k", "v", "beta", "g", "state"],
        output_names=["y", "s"],
        source="",
    )
    y, state = kernel(
        inputs=given,
        grid=(1, 1, 1),
        threadgroup=(1, 1, 1),
        output_shapes=[v.shape, state.shape],
        output_dtypes=[v.dtype, state.dtype],
    )
    return y, state


def table(model: Hybrid) -> str:
    """Launches of the two kinds of layers of a model, rotated or not: Markdown."""
    lines = ["| | gated delta net | full attention |", "| :--- | ---: | ---: |"]
    arms = (("this project", ternary), ("mlx-lm, 2 bits", mlx_two_bits))
    for kind, rotated in (("", False), (", rotated", True)):
        for name, make in arms:
            found = count_layers(make(model, rotated=rotated), model)
            numbers = " | ".join(str(each.total()) for each in found)
            lines.append(f"| {name}{kind} | {numbers} |")
    return "\n".join(lines)
