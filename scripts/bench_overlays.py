"""Synthetic overlays with the layer shapes of published models, in every form on disk.

Tensors repeat one random block: the time for reading and packing does not depend on the weights.
"""

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from outlier_mlx.checkpoints.monolith import ALIGNMENT, HEADER, MAGIC, ROW, VERSION, aligned
from outlier_mlx.checkpoints.overlay import base_shapes
from outlier_mlx.models.config import PROJECTIONS, Defaults, parse_config
from outlier_mlx.writing.writer import ShardedWriter, TensorSpec

EXPERTS, TOP_K = 8, 2
BLOCK_BYTES = 16 << 20
_SCALE = 0.01
# A packed byte of five trits is below 243; five zero trits, which fill the last byte, are 121.
_PACKED, _FILL = 243, 121


@dataclass(frozen=True)
class Shape:
    """Dimensions of a published base."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    layers: int
    vocab: int


#: Qwen2.5's dimensions from its config.json files, and a tiny shape for tests.
SHAPES = {
    "7b": Shape(3584, 18944, 28, 4, 28, 152064),
    "14b": Shape(5120, 13824, 40, 8, 48, 152064),
    "32b": Shape(5120, 27648, 40, 8, 64, 152064),
    "tiny": Shape(256, 512, 4, 2, 8, 512),
}

#: (layer, expert)
Place = tuple[int, int]


@dataclass(frozen=True)
class Model:
    """The first `layers` layers of a shape, all with experts."""

    shape: Shape
    layers: int
    vocab: int

    def config(self) -> dict:
        """The overlay's config.json."""
        return {
            "model_type": "qwen2",
            "hidden_act": "silu",
            "hidden_size": self.shape.hidden,
            "intermediate_size": self.shape.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.shape.heads,
            "num_key_value_heads": self.shape.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "n_experts": EXPERTS,
            "top_k": TOP_K,
        }

    def base(self) -> list[TensorSpec]:
        """The base and the routers, bfloat16, with the keys of V3.2."""
        shapes = base_shapes(parse_config(self.config(), Defaults()))
        shapes |= {
            f"model.layers.{n}.mlp.router.weight": (EXPERTS, self.shape.hidden)
            for n in range(self.layers)
        }
        return [TensorSpec(name, "BF16", shape) for name, shape in shapes.items()]

    def places(self) -> list[Place]:
        """Layer and number of every expert."""
        return [(n, e) for n in range(self.layers) for e in range(EXPERTS)]

    def matrices(self) -> dict[str, tuple[int, int]]:
        """The projections of an expert, (out, in)."""
        wide, narrow = (self.shape.ffn, self.shape.hidden), (self.shape.hidden, self.shape.ffn)
        return {name: narrow if name == "down" else wide for name in PROJECTIONS}

    def expert(self, prefix: str, trits: str = "I8", rows: bool = False) -> list[TensorSpec]:
        """The six tensors of an expert, with one scale per matrix or, with `rows`, per row."""
        return [
            spec
            for name, shape in self.matrices().items()
            for spec in (
                TensorSpec(f"{prefix}{name}_ternary", trits, shape),
                TensorSpec(f"{prefix}{name}_scale", "F16", (shape[0], 1) if rows else (1,)),
            )
        ]


class Blocks:
    """Random content: one block for each dtype; every tensor repeats its block."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        trits = rng.integers(-1, 2, BLOCK_BYTES, dtype=np.int8)
        floats = rng.standard_normal(BLOCK_BYTES // 2, dtype=np.float32) * np.float32(0.02)
        self._blocks = {
            "I8": trits.view(np.uint8),
            "BF16": (floats.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8),
            "BF16 trits": (
                (trits[: BLOCK_BYTES // 2].astype(np.float32).view(np.uint32) >> 16)
                .astype(np.uint16)
                .view(np.uint8)
            ),
            "F16": np.full(BLOCK_BYTES // 2, _SCALE, np.float16).view(np.uint8),
            "packed": rng.integers(0, _PACKED, BLOCK_BYTES, dtype=np.uint8),
        }

    def pieces(self, name: str, nbytes: int) -> Iterator[memoryview]:
        """`nbytes` bytes that repeat the block `name`."""
        block = self._blocks[name]
        for start in range(0, nbytes, len(block)):
            yield block[: min(len(block), nbytes - start)].data

    def shards(self, folder: Path, specs: list[TensorSpec], float_trits: bool = False) -> None:
        """Write tensors as shards with an index."""
        with ShardedWriter(folder, specs) as writer:
            for spec in specs:
                ternary = float_trits and spec.name.endswith("_ternary")
                for piece in self.pieces("BF16 trits" if ternary else spec.dtype, spec.nbytes):
                    writer.write(spec.name, piece)
            writer.finish()

    def file(self, path: Path, specs: list[TensorSpec]) -> None:
        """Write tensors as one safetensors file."""
        entries, offset = {}, 0
        for spec in specs:
            stop = offset + spec.nbytes
            entries[spec.name] = {
                "dtype": spec.dtype,
                "shape": spec.shape,
                "data_offsets": [offset, stop],
            }
            offset = stop
        header = json.dumps(entries).encode()
        with path.open("wb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            for spec in specs:
                out.writelines(self.pieces(spec.dtype, spec.nbytes))

    def packed(self, trits: int) -> Iterator[memoryview | bytes]:
        """This number of trits, five per byte."""
        yield from self.pieces("packed", trits // 5)
        if trits % 5:
            yield bytes([_FILL])


def write_v32(folder: Path, model: Model, blocks: Blocks, trits: str = "I8") -> None:
    """V3.2: shards with all tensors; one scale per matrix."""
    specs = model.base()
    for n, e in model.places():
        specs += model.expert(f"model.layers.{n}.mlp.experts.{e}.", trits)
    blocks.shards(folder, specs, float_trits=trits != "I8")


def write_float(folder: Path, model: Model, blocks: Blocks) -> None:
    """V3.2 with trits in bfloat16."""
    write_v32(folder, model, blocks, "BF16")


def write_real(folder: Path, model: Model, blocks: Blocks) -> None:
    """V2: keys `base.model.*`; one scale per row."""
    specs = [TensorSpec(f"base.{s.name}", s.dtype, s.shape) for s in model.base()]
    for n, e in model.places():
        specs += model.expert(f"base.model.layers.{n}.mlp.experts.{e}.", rows=True)
    blocks.shards(folder, specs)


# V3.2's names in keys, and V0's names.
_TOY = (
    ("model.", ""),
    (".self_attn.", ".attn."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".mlp.router.weight", ".ffn.router_weight"),
    (".mlp.experts.", ".ffn.experts."),
    ("_ternary", "_proj.weight"),
    ("_scale", "_proj.scale"),
    (".mlp.", ".ffn.shared."),
)


def write_toy(folder: Path, model: Model, blocks: Blocks) -> None:
    """V0: keys `layers.N.ffn.*`."""
    specs = model.base()
    for n, e in model.places():
        specs += model.expert(f"model.layers.{n}.mlp.experts.{e}.")
    named = []
    for spec in specs:
        name = spec.name
        for new, old in _TOY:
            name = name.replace(new, old)
        named.append(TensorSpec(name, spec.dtype, spec.shape))
    blocks.shards(folder, named)


def write_per_file(folder: Path, model: Model, blocks: Blocks) -> None:
    """One file for each expert; the base, which an export leaves out, is in shards."""
    (folder / "experts").mkdir()
    routers = [spec for spec in model.base() if "router" in spec.name]
    names = [f"layers.{n}.router.weight" for n in range(model.layers)]
    named = [TensorSpec(n, s.dtype, s.shape) for n, s in zip(names, routers, strict=True)]
    blocks.shards(folder, [spec for spec in model.base() if "router" not in spec.name])
    blocks.file(folder / "router_state.safetensors", named)
    for n, e in model.places():
        blocks.file(folder / f"experts/layer_{n:02}_expert_{e:02}.safetensors", model.expert(""))


def write_packed(folder: Path, model: Model, blocks: Blocks, monolith: bool = False) -> None:
    """`packed_experts/` with one file for each tensor, or with all tensors in experts.bin."""
    blocks.shards(folder, model.base())
    inner = folder / "packed_experts"
    inner.mkdir()
    index = {}
    for n, e in model.places():
        for name, shape in model.matrices().items():
            key = f"base.model.layers.{n}.mlp.experts.{e}.{name}"
            index[f"{key}_ternary"] = _packed_entry(f"{key}_ternary", shape)
            index[f"{key}_scale"] = _raw_entry(f"{key}_scale")
            if not monolith:
                with (inner / index[f"{key}_ternary"]["file"]).open("wb") as file:
                    file.writelines(blocks.packed(shape[0] * shape[1]))
                (inner / index[f"{key}_scale"]["file"]).write_bytes(_scale())
    (inner / "index.json").write_text(json.dumps(index))
    (inner / "meta.json").write_text('{"model_ref": "synthetic", "format": "tq10"}')
    if monolith:
        with (inner / "experts.bin").open("wb") as file:
            _write_monolith(file, model, blocks)


def write_monolith(folder: Path, model: Model, blocks: Blocks) -> None:
    """`packed_experts/experts.bin`."""
    write_packed(folder, model, blocks, monolith=True)


def _packed_entry(key: str, shape: tuple[int, int]) -> dict:
    size = shape[0] * shape[1]
    entry = {"file": key.replace(".", "_") + ".bin", "shape": shape, "dtype": "uint8"}
    return entry | {"format": "tq10", "original_bytes": size, "packed_bytes": -(-size // 5)}


def _raw_entry(key: str) -> dict:
    entry = {"file": key.replace(".", "_") + ".bin", "shape": [1], "dtype": "float16"}
    return entry | {"format": "raw", "packed_bytes": len(_scale())}


def _scale() -> bytes:
    return np.array([_SCALE], "<f2").tobytes()


def _write_monolith(file: BinaryIO, model: Model, blocks: Blocks) -> None:
    places = model.places()
    sizes = [out * width for out, width in model.matrices().values()]
    lengths = [n for size in sizes for n in (-(-size // 5), len(_scale()))]
    begin = ALIGNMENT + aligned(ROW.size * len(places))
    step = aligned(sum(lengths))
    file.write(HEADER.pack(MAGIC, VERSION, model.layers, EXPERTS, len(places), 6, *lengths))
    file.seek(ALIGNMENT)
    for i, (n, e) in enumerate(places):
        file.write(ROW.pack(n, e, begin + i * step, sum(lengths)))
    for i in range(len(places)):
        file.seek(begin + i * step)
        for size in sizes:
            file.writelines(blocks.packed(size))
            file.write(_scale())
    file.truncate(begin + len(places) * step)


def write_gguf(folder: Path, model: Model, blocks: Blocks) -> None:
    """experts.gguf with TQ1_0 blocks and llama.cpp's names; the base is in shards."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    blocks.shards(folder, model.base())
    trits = np.random.default_rng(0).integers(-1, 2, (4096, 256)).astype(np.float32)
    sample = quants.TQ1_0.quantize(trits * np.float32(_SCALE))  # (4096, 54)
    writer = GGUFWriter(folder / "experts.gguf", "outlier")
    kind = GGMLQuantizationType.TQ1_0
    shapes = []
    for n in range(model.layers):
        for name, (out, width) in model.matrices().items():
            shape = (EXPERTS, out, width // 256 * sample.shape[1])
            shapes.append(shape)
            writer.add_tensor_info(
                f"blk.{n}.ffn_{name}_exps.weight",
                shape,
                np.dtype(np.uint8),
                int(np.prod(shape)),
                raw_dtype=kind,
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shape in shapes:
        writer.write_tensor_data(np.resize(sample, shape))
    writer.close()


#: Writers by the name of the form.
FORMS: dict[str, Callable[[Path, Model, Blocks], None]] = {
    "v3.2": write_v32,
    "real": write_real,
    "toy": write_toy,
    "float": write_float,
    "per-file": write_per_file,
    "packed": write_packed,
    "monolith": write_monolith,
    "gguf": write_gguf,
}


def write_overlay(folder: Path, form: str, model: Model) -> None:
    """Write an overlay in a form to a new folder."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config()))
    FORMS[form](folder, model, Blocks())


def source_bytes(form: str, model: Model) -> int:
    """Size of an overlay on disk in bytes, within a few per cent."""
    weights = sum(out * width for out, width in model.matrices().values()) * len(model.places())
    per_weight = {"float": 2.0, "packed": 0.2, "monolith": 0.2, "gguf": 54 / 256}.get(form, 1.0)
    return int(weights * per_weight) + sum(spec.nbytes for spec in model.base())
