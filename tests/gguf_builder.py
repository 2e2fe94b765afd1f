"""Small GGUF models written by the package `gguf`, and what their weights are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize

# Where a block's float16 scales are, from its beginning.
SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
FLOATS = {"F32": np.float32, "F16": np.float16}
# Largest scale, so that weights are some tenths.
_D = {"Q8_0": 2e-3, "Q4_K": 1e-3, "Q5_K": 5e-4, "Q6_K": 5e-5, "Q3_K": 2e-3, "Q2_K": 5e-3}


def blocks(
    kind: str, shape: tuple[int, ...], rng: np.random.Generator, *, row_scales: bool = True
) -> np.ndarray:
    """Random valid blocks, (..., out, row_bytes) uint8. Ternary rows share a scale by default."""
    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    count = shape[-1] // size
    raw = rng.integers(0, 256, (*shape[:-1], count, nbytes), dtype=np.uint8)
    if kind == "TQ2_0":  # the code 3 is no trit
        codes = rng.integers(0, 3, (*shape[:-1], count, 64, 4), dtype=np.uint8)
        raw[..., :64] = np.bitwise_or.reduce(codes << np.arange(0, 8, 2, dtype=np.uint8), axis=-1)
    for at in SCALES[kind]:
        ternary = kind.startswith("TQ")
        d = rng.uniform(0.2, 1, (*shape[:-1], 1 if ternary and row_scales else count, 1))
        half = (d * _D.get(kind, 0.02)).astype("<f2")
        raw[..., at : at + 2] = np.broadcast_to(half, raw[..., :1].shape).copy().view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


@dataclass
class Tensor:
    """A tensor to write: its bytes as the package takes them, its type, and its values."""

    data: np.ndarray
    kind: str
    values: np.ndarray


def tensor(kind: str, shape: tuple[int, ...], rng: np.random.Generator, **how: Any) -> Tensor:
    """A random tensor of a type; floats are about 0.1."""
    number = gguf.GGMLQuantizationType[kind]
    if kind in FLOATS:
        data = rng.normal(0, 0.1, shape).astype(FLOATS[kind])
        return Tensor(data, kind, data.astype(np.float32))
    if kind == "BF16":
        data = gguf.quants.quantize(rng.normal(0, 0.1, shape).astype(np.float32), number)
    else:
        data = blocks(kind, shape, rng, **how)
    return Tensor(data, kind, dequantize(data, number).reshape(shape))


@dataclass
class Model:
    """A model to write; change it before `write`.

    Attributes:
        tensors: by GGUF name.
        fields: metadata, by key.
        weights: float32, by MLX's name, in MLX's order.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        """Write one file."""
        write_gguf(path, self.fields, self.tensors)
        return path

    def split(self, folder: Path, count: int, name: str = "model") -> list[Path]:
        """Write several files; the metadata is in the first."""
        names = list(self.tensors)
        paths = []
        for n in range(count):
            fields = self.fields if n == 0 else {"general.architecture": "llama"}
            own = {"split.no": n, "split.count": count, "split.tensors.count": len(names)}
            part = {name: self.tensors[name] for name in names[n::count]}
            path = folder / f"{name}-{n + 1:05d}-of-{count:05d}.gguf"
            write_gguf(path, {**fields, **own}, part)
            paths.append(path)
        return paths


def write_gguf(path: Path, fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a file by means of the package `gguf`."""
    writer = gguf.GGUFWriter(path, fields["general.architecture"])
    for key, value in fields.items():
        if key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, item in tensors.items():
        raw = None if item.kind in FLOATS else gguf.GGMLQuantizationType[item.kind]
        writer.add_tensor(name, item.data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]


def spm_fields(count: int, pieces: list[str] | None = None) -> dict[str, Any]:
    """A SentencePiece vocabulary of `count` tokens, padded with unused ones."""
    pieces = pieces if pieces is not None else ["\u2581", "h", "e", "he", "\u2581he"]
    tokens = [*SPM_TOKENS, *pieces]
    types = [2, 3, 3, *[6] * 256, *[1] * len(pieces)]
    spare = count - len(tokens)
    assert spare >= 0
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + [f"[PAD{n}]" for n in range(spare)],
        "tokenizer.ggml.scores": [
            *[0.0] * 259,
            *(-float(n) for n in range(len(pieces))),
            *[0.0] * spare,
        ],
        "tokenizer.ggml.token_type": types + [5] * spare,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def gpt2_fields(count: int, rule: str = "qwen2") -> dict[str, Any]:
    """A byte-level vocabulary of `count` tokens with two merges."""
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "\u0120he", "<|end|>", "<|tool|>"]
    types = [*[1] * (len(tokens) - 2), 3, 4]
    spare = count - len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens + [f"[PAD{n}]" for n in range(spare)],
        "tokenizer.ggml.token_type": types + [5] * spare,
        "tokenizer.ggml.merges": ["h e", "\u0120 he"],
        "tokenizer.ggml.eos_token_id": tokens.index("<|end|>"),
    }


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; small, but with every part in it."""

    arch: str = "llama"
    experts: int = 0
    hidden: int = 64
    width: int = 96
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 288
    tied: bool = False
    head_dim: int | None = None

    @property
    def head(self) -> int:
        return self.head_dim or self.hidden // self.heads


class _Maker:
    """Adds random tensors to a model, of the type of their part."""

    def __init__(self, shape: Shape, kinds: dict[str, str], row_scales: bool, seed: int) -> None:
        self.shape, self.kinds, self.row_scales = shape, kinds, row_scales
        self.rng = np.random.default_rng(seed)
        self.made = Model()

    def add(self, name: str, part: str, shape: tuple[int, ...], mlx: str, turned: int = 0) -> None:
        """Add a tensor; `turned` is the size of a head whose rotary pairs lie side by side."""
        kind = self.kinds.get(part, "F32")
        how = {"row_scales": self.row_scales} if kind.startswith("TQ") else {}
        item = tensor(kind, shape, self.rng, **how)
        if part == "norm":
            item.data = item.data + item.data.dtype.type(1)
            item.values = item.data.astype(np.float32, copy=False)
        values = item.values
        if turned:
            starts = range(0, len(values), turned)
            halves = [values[n + r : n + turned : 2] for n in starts for r in (0, 1)]
            values = np.concatenate(halves)
        self.made.tensors[name] = item
        self.made.weights[mlx] = values

    def attention(self, n: int) -> None:
        s, to, of = self.shape, f"blk.{n}", f"model.layers.{n}"
        self.add(f"{to}.attn_norm.weight", "norm", (s.hidden,), f"{of}.input_layernorm.weight")
        norm = f"{of}.post_attention_layernorm.weight"
        self.add(f"{to}.ffn_norm.weight", "norm", (s.hidden,), norm)
        for name, rows in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads)):
            turned = s.head if s.arch == "llama" and name in "qk" else 0
            mlx, size = f"{of}.self_attn.{name}_proj", (rows * s.head, s.hidden)
            self.add(f"{to}.attn_{name}.weight", "attn", size, f"{mlx}.weight", turned)
            if s.arch == "qwen2":
                self.add(f"{to}.attn_{name}.bias", "bias", size[:1], f"{mlx}.bias")
            if s.arch == "qwen3" and name in "qk":
                norm = f"{of}.self_attn.{name}_norm.weight"
                self.add(f"{to}.attn_{name}_norm.weight", "norm", (s.head,), norm)
        size = (s.hidden, s.heads * s.head)
        self.add(f"{to}.attn_output.weight", "attn", size, f"{of}.self_attn.o_proj.weight")

    def dense(self, n: int) -> None:
        s = self.shape
        for name in ("gate", "up", "down"):
            size = (s.hidden, s.width) if name == "down" else (s.width, s.hidden)
            mlx = f"model.layers.{n}.mlp.{name}_proj.weight"
            self.add(f"blk.{n}.ffn_{name}.weight", name, size, mlx)

    def experts(self, n: int, layout: str) -> None:
        s, to, weights = self.shape, f"blk.{n}", self.made.weights
        moe = f"model.layers.{n}.block_sparse_moe"
        router = (s.experts, s.hidden)
        self.add(f"{to}.ffn_gate_inp.weight", "router", router, f"{moe}.gate.weight")
        for name in ("gate", "up", "down"):
            size = (s.hidden, s.width) if name == "down" else (s.width, s.hidden)
            mlx = f"{moe}.switch_mlp.{name}_proj.weight"
            if layout == "split":
                for e in range(s.experts):
                    part = f"{name}.{e}" if f"{name}.{e}" in self.kinds else name
                    self.add(f"{to}.ffn_{name}.{e}.weight", part, size, f"{mlx}.{e}")
                weights[mlx] = np.stack([weights.pop(f"{mlx}.{e}") for e in range(s.experts)])
            elif layout == "stacked" or name == "down":
                self.add(f"{to}.ffn_{name}_exps.weight", name, (s.experts, *size), mlx)
            elif name == "gate":
                both = (s.experts, 2 * s.width, s.hidden)
                self.add(f"{to}.ffn_gate_up_exps.weight", name, both, mlx)
                weights[f"{moe}.switch_mlp.up_proj.weight"] = weights[mlx][:, s.width :]
                weights[mlx] = weights[mlx][:, : s.width]


def build(
    *,
    layout: str = "stacked",
    kinds: dict[str, str] | None = None,
    row_scales: bool = True,
    seed: int = 0,
    **sizes: Any,
) -> Model:
    """A random model.

    Args:
        layout: of experts: "stacked", "split" (a tensor each) or "fused" (gate and up in one).
        kinds: types by part: embed, attn, bias, gate, up, down, output, router, norm; "F32"
            otherwise. Of split experts, "gate.1" and so on win over "gate".
        row_scales: whether ternary rows have one scale.
        seed: of the weights.
        sizes: see `Shape`.
    """
    s = Shape(**sizes)
    maker = _Maker(s, kinds or {}, row_scales, seed)
    maker.add("token_embd.weight", "embed", (s.vocab, s.hidden), "model.embed_tokens.weight")
    for n in range(s.layers):
        maker.attention(n)
        if s.experts:
            maker.experts(n, layout)
        else:
            maker.dense(n)
    maker.add("output_norm.weight", "norm", (s.hidden,), "model.norm.weight")
    if not s.tied:
        maker.add("output.weight", "output", (s.vocab, s.hidden), "lm_head.weight")
    made = maker.made
    made.fields = {
        "general.architecture": s.arch,
        f"{s.arch}.context_length": 512,
        f"{s.arch}.embedding_length": s.hidden,
        f"{s.arch}.block_count": s.layers,
        f"{s.arch}.feed_forward_length": s.width,
        f"{s.arch}.attention.head_count": s.heads,
        f"{s.arch}.attention.head_count_kv": s.kv_heads,
        f"{s.arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{s.arch}.rope.freq_base": 10000.0,
        f"{s.arch}.rope.dimension_count": s.head,
        **(gpt2_fields(s.vocab) if s.arch in ("qwen2", "qwen3") else spm_fields(s.vocab)),
    }
    if s.head_dim:
        keys = ("attention.key_length", "attention.value_length")
        made.fields |= {f"{s.arch}.{key}": s.head_dim for key in keys}
    if s.experts:
        made.fields |= {f"{s.arch}.expert_count": s.experts, f"{s.arch}.expert_used_count": 2}
    return made


def write_page(folder: Path) -> None:
    """The files that the page on importing names."""
    sizes: dict[str, Any] = {"hidden": 256, "width": 256, "layers": 1}
    kinds = dict.fromkeys(("embed", "attn", "gate", "up"), "Q4_K") | {"down": "Q6_K"}
    build(kinds=kinds, **sizes).write(folder / "mistral-Q4_K_M.gguf")
    (folder / "split-models").mkdir()
    build(experts=2, layout="split").split(folder / "split-models", 2, "moe")
    build().write(folder / "split-models" / "other.gguf")
    ternary = dict.fromkeys(("gate", "up", "down"), "TQ1_0")
    build(experts=2, kinds=ternary, **sizes).write(folder / "ternary-moe.gguf")
