"""Measure time and memory of importing ternary models with the layer shapes of a 4B model.

    python scripts/bench_import.py [--form mlx2 ...] [--layers 3] [--repeat 3] [--work FOLDER]

For each form it writes a model of a few layers to a temporary folder (all layers have the same
weights), imports it in new processes, and removes everything again. The table has the wall time
and the CPU time of all threads, which depends less on what else the machine does; both of the
fastest run, with the highest peak of memory. The source was just written, so that it is read from
the page cache. `export` is the way back, from packed rows to MLX's 2-bit format.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from bench_convert import memory  # noqa: E402

from tests import ternary_sources as build  # noqa: E402
from tests.gguf_builder import gpt2_fields  # noqa: E402
from tests.tensor_file import Stored, stored  # noqa: E402

HIDDEN, WIDE, HEADS, KV_HEADS, HEAD, VOCAB = 2560, 9728, 32, 8, 128, 2048
CONFIG = build.QWEN3 | {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD,
    "vocab_size": VOCAB,
}
# Path in mlx-lm's model and in GGUF, and shape.
MATRICES = (
    ("self_attn.q_proj", "attn_q", (HEADS * HEAD, HIDDEN)),
    ("self_attn.k_proj", "attn_k", (KV_HEADS * HEAD, HIDDEN)),
    ("self_attn.v_proj", "attn_v", (KV_HEADS * HEAD, HIDDEN)),
    ("self_attn.o_proj", "attn_output", (HIDDEN, HEADS * HEAD)),
    ("mlp.gate_proj", "ffn_gate", (WIDE, HIDDEN)),
    ("mlp.up_proj", "ffn_up", (WIDE, HIDDEN)),
    ("mlp.down_proj", "ffn_down", (HIDDEN, WIDE)),
)
NORMS = (
    ("input_layernorm", "attn_norm", HIDDEN),
    ("post_attention_layernorm", "ffn_norm", HIDDEN),
    ("self_attn.q_norm", "attn_q_norm", HEAD),
    ("self_attn.k_norm", "attn_k_norm", HEAD),
)
FORMS = ("mlx2", "mlx2-g64", "bitnet", *build.BLOCKS, "export")


def write_source(folder: Path, form: str, layers: int) -> Path:
    """Write a model of one of `FORMS`; returns what is imported."""
    rng = np.random.default_rng(0)
    config = CONFIG | {"num_hidden_layers": layers}
    if form in build.BLOCKS:
        return _write_gguf(folder, form, config, rng)
    group = 64 if form.endswith("g64") else 128
    bitnet = form == "bitnet"
    how = {"quant_method": "bitnet"} if bitnet else {"group_size": group, "bits": 2}
    pack = build.Pack(config | {"quantization_config": how})
    layer = {path: build.random_ternary(shape, group, rng) for path, _, shape in MATRICES}
    tensors: dict[str, Stored] = {}
    for path, matrix in layer.items():
        tensors |= _bitnet(path, matrix) if bitnet else build.affine2(path, matrix)
    for path, _, size in NORMS:
        tensors[f"{path}.weight"] = stored(np.ones(size), "F16")
    for n in range(layers):
        pack.tensors |= {f"model.layers.{n}.{name}": tensor for name, tensor in tensors.items()}
    pack.tensors["model.norm.weight"] = stored(np.ones(HIDDEN), "F16")
    pack.tensors["model.embed_tokens.weight"] = stored(np.ones((VOCAB, HIDDEN)), "F16")
    return pack.write(folder)


def _bitnet(path: str, matrix: build.Ternary) -> dict:
    quarters = (matrix.trits + 1).astype(np.uint8).reshape(4, -1, matrix.trits.shape[1])
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None, None]
    packed = np.bitwise_or.reduce(quarters << shifts, axis=0)
    return {
        f"{path}.weight": stored(packed),
        f"{path}.weight_scale": stored(np.full(1, 10, np.float32), "BF16"),
    }


def _write_gguf(folder: Path, kind: str, config: dict, rng: np.random.Generator) -> Path:
    fields = {
        "general.architecture": "qwen3",
        "qwen3.context_length": 512,
        "qwen3.embedding_length": HIDDEN,
        "qwen3.block_count": config["num_hidden_layers"],
        "qwen3.feed_forward_length": WIDE,
        "qwen3.attention.head_count": HEADS,
        "qwen3.attention.head_count_kv": KV_HEADS,
        "qwen3.attention.key_length": HEAD,
        "qwen3.attention.value_length": HEAD,
        "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen3.rope.freq_base": 1e6,
        **gpt2_fields(VOCAB),
    }
    model, layer = build.GgufFile(fields), {}
    for _, name, shape in MATRICES:
        matrix = build.random_ternary(shape, build.BLOCKS[kind], rng)
        data = [
            build.encode(kind, *part).tobytes()
            for part in zip(
                np.array_split(matrix.trits, 16), np.array_split(matrix.scales, 16), strict=True
            )
        ]
        layer[name] = (kind, shape, b"".join(data))
    for n in range(config["num_hidden_layers"]):
        model.tensors |= {f"blk.{n}.{name}.weight": item for name, item in layer.items()}
        for _, name, size in NORMS:
            model.add(f"blk.{n}.{name}.weight", np.ones(size))
    model.add("output_norm.weight", np.ones(HIDDEN))
    model.add("token_embd.weight", np.ones((VOCAB, HIDDEN)))
    folder.mkdir()
    return model.write(folder / "model.gguf")


def measure(source: Path, out: Path, form: str) -> dict:
    """Import (or export) once in this process; returns times, sizes and peak memory."""
    from outlier_mlx.checkpoints.export import export_tier
    from outlier_mlx.imports import import_model

    warnings.simplefilter("ignore")
    before, begin = memory("VmRSS"), (time.perf_counter(), time.process_time())
    if form == "export":
        export_tier(source, out, "mlx2")
    else:
        import_model(source, out)
    return {
        "seconds": time.perf_counter() - begin[0],
        "cpu": time.process_time() - begin[1],
        "peak": memory("VmHWM"),
        "more": memory("VmHWM") - before,
        "source": _size(source),
        "written": _size(out),
    }


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def bench(form: str, args: argparse.Namespace, scratch: Path) -> dict:
    """Write one model and import it several times; returns the best times and the worst peak."""
    source, out = scratch / "source", scratch / "out"
    try:
        model = write_source(source, "mlx2" if form == "export" else form, args.layers)
        if form == "export":
            _child(model, scratch / "rows", "mlx2")
            model = scratch / "rows"
        runs = []
        for _ in range(args.repeat):
            runs.append(_child(model, out, form))
            shutil.rmtree(out)
    finally:
        for folder in (source, scratch / "rows", out):
            shutil.rmtree(folder, ignore_errors=True)
    choose = {"peak": max, "more": max}
    return {key: choose.get(key, min)(run[key] for run in runs) for key in runs[0]}


def _child(source: Path, out: Path, form: str) -> dict:
    command = [sys.executable, __file__, "--form", form, "--child", str(source), str(out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def run(args: argparse.Namespace) -> None:
    """Run all measurements and print the table."""
    print(f"{args.layers} layers, {os.cpu_count()} cores, best of {args.repeat}")
    print("form      source  written  time   source  CPU    CPU s   peak  of it for")
    print("          MB      MB       s      GB/s    s      a GB    MB    import")
    with tempfile.TemporaryDirectory(prefix="bench-import-", dir=args.work) as scratch:
        for form in args.form:
            found = bench(form, args, Path(scratch))
            size = found["source"] / 1e9
            print(
                f"{form:9} {1e3 * size:<7.0f} {found['written'] / 1e6:<8.0f}"
                f" {found['seconds']:<6.2f} {size / found['seconds']:<7.2f} {found['cpu']:<6.2f}"
                f" {found['cpu'] / size:<7.2f} {found['peak'] / 1e6:<5.0f}"
                f" {found['more'] / 1e6:.0f}",
                flush=True,
            )


def main() -> None:
    """Parse the command line; `--child SOURCE OUT` measures one import."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--form", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--layers", type=int, default=6, help="a 4B model has 36")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the temporary files")
    parser.add_argument("--child", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child[0], args.child[1], args.form[0])))
    else:
        # Remove the temporary files also if a signal ends the process.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        run(args)


if __name__ == "__main__":
    main()
