"""Count the launches of a decoding step from MLX's graph; nothing runs, and no GPU is needed.

A step is traced as `mx.export_function` does, and each primitive of its graph is one launch on a
GPU, or none. What MLX fuses is one launch: a function that was compiled with `mx.compile`, and
the operations of `mx.fast`, of which the graph of a CPU would show every part. In the traced graph,
a kernel that does nothing stands for each of them.
"""

import io
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import qwen2_moe
from mlx_lm.models.activations import swiglu
from mlx_lm.models.cache import KVCache

from outlier_mlx.runtime import routing
from outlier_mlx.runtime.affine2 import EXPERT_FORMAT_VERSION, ROWS
from outlier_mlx.runtime.model import Model, ModelArgs

# Primitives that only change a shape, strides, a dtype's name or the order of evaluation.
FREE = {
    "Broadcast", "CustomTransforms", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice",
    "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
# Primitives of one launch. (Some take two if their inputs are large; not so in decoding.)
SINGLE = {
    "Add", "AddMM", "Arange", "ArgPartition", "ArgSort", "AsType", "BitwiseAnd", "BitwiseInvert",
    "BitwiseOr", "BitwiseXor", "Concatenate", "Contiguous", "Convolution", "Divide", "Equal",
    "FloorDivide", "Full", "Gather", "GatherAxis", "GatherMM", "GatherQMM", "Hadamard", "LeftShift",
    "Less", "Matmul", "Multiply", "Negative", "NotEqual", "QuantizedMatmul", "RightShift", "Select",
    "Sigmoid", "SliceUpdate", "Softmax", "Sort", "Subtract", "Sum",
}  # fmt: skip
FAST = ((mx.fast, ("rms_norm", "rope", "scaled_dot_product_attention")), (mx, ("dequantize",)))
COMPILED = type(swiglu)
OWNERS = ("mlx", "mlx_lm", "outlier_mlx")  # packages whose compiled functions are known
CONTEXT = 16  # tokens in the cache of a step


class _TracedError(Exception):
    """Ends a trace whose graph was counted."""


def launches(function: Callable[..., Any], *inputs: mx.array) -> Counter[str]:
    """The launches of a call, by kernel or primitive.

    Args:
        function: takes arrays, and returns an array or several.
        inputs: arrays of its shapes and dtypes; they are not evaluated.

    Raises:
        ValueError: it is not known how many launches a primitive is.
    """
    graph = io.StringIO()
    with _stand_ins() as names:

        def traced(*given: mx.array) -> None:
            outputs = function(*given)
            mx.export_to_dot(graph, *(outputs if isinstance(outputs, tuple) else (outputs,)))
            raise _TracedError

        with suppress(_TracedError):
            mx.export_function(lambda _: None, traced, *inputs)
    found = Counter(re.findall(r'\[label ="(\w+)"', graph.getvalue()))
    unknown = found.keys() - FREE - SINGLE - {"CustomKernel"}
    if unknown:
        raise ValueError(f"it is not known how many launches these are: {sorted(unknown)}")
    assert found.pop("CustomKernel", 0) == len(names), "a result of a kernel is not used"
    return Counter({name: n for name, n in found.items() if name in SINGLE}) + Counter(names)


@contextmanager
def _stand_ins() -> Iterator[list[str]]:
    """Makes one kernel of all that is one launch; yields the names of those that are launched."""
    names: list[str] = []
    inside = 0
    make: Any = mx.fast.metal_kernel

    def metal_kernel(name: str, *args: Any, **options: Any) -> Any:
        kernel = make(name, *args, **options)

        def launch(**call: Any) -> Any:
            if not inside:
                names.append(name)
            # Without a GPU, a kernel can be traced if it is told where it would run.
            return kernel(**call, stream=mx.gpu)

        return launch

    def standing_for(name: str, function: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(*args: Any, **options: Any) -> mx.array:
            nonlocal inside
            inside += 1
            y = function(*args, **options)  # for shape and dtype; nothing uses it
            inside -= 1
            inputs = [a for a in (*args, *options.values()) if isinstance(a, mx.array)]
            given = [f"x{i}" for i in range(len(inputs))]
            kernel = metal_kernel(name, input_names=given, output_names=["y"], source="")
            one = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1)}
            return kernel(inputs=inputs, output_shapes=[y.shape], output_dtypes=[y.dtype], **one)[0]

        return call

    with ExitStack() as patches:

        def replace(owner: Any, name: str, by: Any) -> None:
            patches.enter_context(patch.object(owner, name, by))

        replace(mx.fast, "metal_kernel", metal_kernel)
        replace(mx.metal, "is_available", lambda: True)
        for owner, fast in FAST:
            for name in fast:
                replace(owner, name, standing_for(name, getattr(owner, name)))
        for module in [m for n, m in sys.modules.items() if n.split(".")[0] in OWNERS]:
            for name, value in list(vars(module).items()):
                if isinstance(value, COMPILED):
                    replace(module, name, standing_for(name, value))
        yield names


# Models


@dataclass(frozen=True)
class Shape:
    """Dimensions of a model: by default, those of Outlier's 14B, with experts in every layer."""

    hidden: int = 5120
    width: int = 13824  # of the shared FFN, and of an expert
    heads: int = 40
    kv_heads: int = 8
    vocab: int = 152064
    layers: int = 28
    experts: int = 8
    top_k: int = 2

    def config(self) -> dict[str, Any]:
        """The fields of a `config.json` that both models have."""
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.width,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "moe_intermediate_size": self.width,
            "rms_norm_eps": 1e-6,
            "vocab_size": self.vocab,
            "tie_word_embeddings": False,
        }


def tier(shape: Shape) -> nn.Module:
    """An int4 tier in bfloat16 whose arrays are never evaluated."""
    fields = {"moe_layers": [*range(shape.layers)], "activation_dtype": "bfloat16"}
    ternary = {"format": ROWS, "version": EXPERT_FORMAT_VERSION}
    args: Any = ModelArgs.from_dict(
        shape.config() | {"model_type": "qwen2", "ternary": ternary} | fields
    )
    model = Model(args)
    nn.quantize(model, group_size=64, bits=4)
    weights = model.sanitize(dict(tree_flatten(model.parameters())))
    return model.update(tree_unflatten([*weights.items()])).eval()


def mlx_lm_moe(shape: Shape) -> nn.Module:
    """mlx-lm's Qwen2-MoE in 4 bits and bfloat16, likewise."""
    width = {"shared_expert_intermediate_size": shape.width}
    model = qwen2_moe.Model(qwen2_moe.ModelArgs(model_type="qwen2_moe", **shape.config() | width))
    nn.quantize(model, group_size=64, bits=4)
    model.set_dtype(mx.bfloat16)
    return model.eval()


def launches_of(module: nn.Module, call: Callable[..., Any], *inputs: mx.array) -> Counter[str]:
    """Launches of a call; the module's arrays are inputs, so that none of them is evaluated."""
    names, arrays = zip(*tree_flatten(module.parameters()), strict=True)

    def run(*given: mx.array) -> Any:
        module.update(tree_unflatten([*zip(names, given, strict=False)]))
        return call(*given[len(names) :])

    try:
        return launches(run, *arrays, *inputs)
    finally:
        module.update(tree_unflatten([*zip(names, arrays, strict=True)]))


def count(model: Any, shape: Shape) -> dict[str, Counter[str]]:
    """Launches of a decoding step by part.

    Returns:
        "shared FFN": the shared expert of a layer. "routed": the rest of its MoE block.
        "layer": a layer with attention and norms. "token": the whole model.
    """
    layer, hidden = model.layers[0], mx.zeros((1, 1, shape.hidden), mx.bfloat16)
    keys = mx.zeros((1, shape.kv_heads, 256, shape.hidden // shape.heads), mx.bfloat16)

    def step(module: Callable[..., Any], x: mx.array, *cached: mx.array) -> Any:
        caches = []
        for at in range(0, len(cached), 2):
            cache = KVCache()
            cache.keys, cache.values = cached[at : at + 2]
            cache.offset = CONTEXT
            caches.append(cache)
        return module(x, caches)

    block = launches_of(layer.mlp, layer.mlp, hidden)
    shared = launches_of(layer.mlp.shared_expert, layer.mlp.shared_expert, hidden)
    one = partial(step, lambda x, caches: layer(x, None, caches[0]))
    whole = partial(step, lambda x, caches: model(x, cache=caches))
    return {
        "routed": block - shared,
        "shared FFN": shared,
        "layer": launches_of(layer, one, hidden, keys, keys),
        "token": launches_of(model, whole, mx.zeros((1, 1), mx.uint32), *[keys] * 2 * shape.layers),
    }


def table(shapes: Sequence[Shape]) -> str:
    """Launches of tiers, of tiers that route in plain MLX, and of mlx-lm's Qwen2-MoE: Markdown."""
    lines = ["| experts | | routing and experts | shared FFN | a layer | a token |"]
    lines.append("| ---: | :--- | ---: | ---: | ---: | ---: |")
    for shape in shapes:
        arms = [("tier", count(tier(shape), shape))]
        with patch.object(routing, "can_route", lambda *_: False):
            arms.append(("tier, routing in plain MLX", count(tier(shape), shape)))
        arms.append(("mlx-lm's Qwen2-MoE", count(mlx_lm_moe(shape), shape)))
        for name, parts in arms:
            numbers = " | ".join(str(found.total()) for found in parts.values())
            lines.append(f"| {shape.experts}, top {shape.top_k} | {name} | {numbers} |")
    return "\n".join(lines)
