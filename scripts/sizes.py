"""Write docs/sizes.md: sizes of tiers for published shapes, computed by the converter's own plan.

No weights are needed: a plan needs only headers, and these are synthetic. With `--check`, the
script only fails if the page is out of date.
"""

import argparse
import sys
from pathlib import Path

from outlier_mlx.checkpoints.base import WholeModel
from outlier_mlx.checkpoints.overlay import Expert, Overlay, base_shapes
from outlier_mlx.engine.machine import GPU_SHARE
from outlier_mlx.models.config import Defaults, parse_config
from outlier_mlx.models.sizes import kv_bytes
from outlier_mlx.models.summary import SummaryRow
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.tensors import ExpertMatrix
from outlier_mlx.tiers.plan import Plan, make_plan
from outlier_mlx.tiers.presets import Recipe
from outlier_mlx.writing.parts import Parts

PAGE = Path(__file__).parents[1] / "docs" / "sizes.md"
EXPERTS, TOP_K = 8, 2
# hidden, FFN, layers, heads, KV heads (Qwen2.5's own config.json files), MoE layers.
SHAPES = {
    "7B base, 14 MoE layers": (3584, 18944, 28, 28, 4, range(7, 21)),
    "14B base, 28 MoE layers": (5120, 13824, 48, 40, 8, range(10, 38)),
    "32B base, 35 MoE layers": (5120, 27648, 64, 40, 8, range(14, 49)),
}
VOCAB = 152064
RAM = (16, 24, 32, 64, 96, 128, 192)
CONTEXTS = (8192, 32768)
# Bits per weight of experts in other formats, with scales.
GGUF_TQ1_0 = 54 * 8 / 256
AFFINE_4BIT = 4.5


def made_up(name: str, shape: tuple[int, ...], dtype: str = "BF16") -> TensorRef:
    """A synthetic header entry: there is no such tensor."""
    return TensorRef(name, Path("made-up.safetensors"), dtype, shape, 0)


def model_of(shape: tuple) -> WholeModel:
    """A synthetic model of a shape in `SHAPES`; its experts are as wide as the shared FFN."""
    hidden, width, layers, heads, kv_heads, moe_layers = shape
    raw = {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": VOCAB,
        "n_experts": EXPERTS,
        "top_k": TOP_K,
        "moe_layers": list(moe_layers),
    }
    config = parse_config(raw, Defaults())

    def matrix(out: int, inner: int) -> ExpertMatrix:
        return ExpertMatrix(made_up("trits", (out, inner), "I8"), made_up("scale", (1,), "F16"))

    expert = Expert(matrix(width, hidden), matrix(width, hidden), matrix(hidden, width))
    overlay = Overlay(
        path=Path("made-up"),
        form="v3.2",
        config=config,
        base={},
        routers={n: made_up("router", (EXPERTS, hidden)) for n in moe_layers},
        experts={n: [expert] * EXPERTS for n in moe_layers},
    )
    base = {name: made_up(name, size) for name, size in base_shapes(config).items()}
    return WholeModel(config, base, {}, overlay)


def of_kind(plan: Plan, kind: str) -> SummaryRow:
    """The row for a kind of part in a plan's summary."""
    return next(row for row in Parts(plan.parts).rows if row.kind == kind)


def alternatives(model: WholeModel) -> dict[str, float]:
    """Bytes of all weights, with the experts in each format and the base in int4."""
    ternary = make_plan(model, Recipe())
    experts = of_kind(ternary, "experts")
    rest = ternary.nbytes - experts.nbytes
    return {
        "int4 + TQ1_0 (`q4`)": ternary.nbytes,
        "int4 + affine 2-bit": make_plan(model, Recipe(experts="affine2")).nbytes,
        "int4 + GGUF TQ1_0": rest + experts.params * GGUF_TQ1_0 / 8,
        "4-bit everything": rest + experts.params * AFFINE_4BIT / 8,
    }


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; columns of numbers are right-aligned."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def page() -> str:
    """The text of docs/sizes.md."""
    models = {name: model_of(shape) for name, shape in SHAPES.items()}
    formats = {name: alternatives(model) for name, model in models.items()}
    names = list(next(iter(formats.values())))
    total = [[name, *(f"{formats[name][label] / 1e9:.1f}" for label in names)] for name in formats]
    by_part = []
    for name, model in models.items():
        for row in Parts(make_plan(model, Recipe()).parts).rows:
            by_part.append(
                [f"{name}: {row.kind}", f"{row.params / 1e9:.3f}", f"{row.nbytes / 1e9:.3f}"]
                + [f"{row.bits_per_weight:.3f}"]
            )
    fits = []
    for name, model in models.items():
        for label in names:
            cells = []
            for tokens in CONTEXTS:
                need = formats[name][label] + kv_bytes(model.config, tokens)
                least = next((ram for ram in RAM if need <= GPU_SHARE * ram * 2**30), None)
                cells.append(f"{need / 1e9:.1f} GB: {f'{least} GB' if least else 'none'}")
            fits.append([f"{name}, {label}", *cells])
    return f"""# Sizes

`python scripts/sizes.py` computes this page with the converter's own plan, for the shapes of
Qwen2.5's bases with {EXPERTS} experts in each MoE layer, of which a token uses {TOP_K}. 1 GB is 10⁹
bytes.

The numbers of MoE layers are those of published checkpoints: 14 layers, 224 experts (28 layers of
8) and 280 experts (35 layers of 8). The experts are assumed to be as wide as the base's FFN; this
is known for the 7B base (18944). If a checkpoint's experts are narrower, its tiers are smaller:
`outlier-mlx info` shows the content of a checkpoint.

## Bytes of all weights, in GB

In each column, the base is int4 in groups of 64 (4.5 bits per weight with scales and biases). Only
the experts differ: 1.6 bits with a float32 scale per row; MLX affine 2-bit in groups of 128 with
float32 scale and bias; GGUF's TQ1_0 (54 bytes for 256 weights); 4.5 bits.

{table(["", *names], total)}

## Parts of a `q4` tier

{table(["", "10⁹ parameters", "GB", "bits per weight"], by_part)}

## What fits which Mac

Each cell has the size of the weights and a 16-bit KV cache, and the smallest memory for which they
take at most {GPU_SHARE:.0%}: the share that macOS lets the GPU use by default
([gpustack#1375](https://github.com/gpustack/gpustack/issues/1375)). Prefill needs some more,
and [the plan](memory.md#the-plan) says how much.

{table(["", *(f"{tokens // 1024}k of context" for tokens in CONTEXTS)], fits)}
"""


def main() -> int:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only fail if it is out of date")
    if parser.parse_args().check:
        if PAGE.read_text(encoding="utf-8") == page():
            return 0
        print("docs/sizes.md is out of date: run scripts/sizes.py", file=sys.stderr)
        return 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
