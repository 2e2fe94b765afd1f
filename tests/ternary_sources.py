"""Small ternary models in the forms that are imported, and what their weights are.

A `Ternary` is a matrix as trits and scales. Encoders here are written from the formats' pages, and
share no code with the package.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.builders import write_tokenizer
from tests.gguf_builder import gpt2_fields
from tests.plain_models import make_model
from tests.tensor_file import Stored, from_bfloat16, rounded, stored, to_bfloat16, write_stored

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 300,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
LLAMA: dict[str, Any] = {
    **QWEN3,
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "tie_word_embeddings": False,
}
QWEN35_TEXT: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "hidden_size": 512,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "vocab_size": 300,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
}


@dataclass
class Ternary:
    """Trits (out, in) int8, and float32 scales (out, in / group), or (out,) if the group is 0."""

    trits: np.ndarray
    scales: np.ndarray
    group: int

    @property
    def values(self) -> np.ndarray:
        """The weights, float32."""
        width = self.group or self.trits.shape[1]
        spread = np.repeat(self.scales.reshape(len(self.trits), -1), width, axis=1)
        return self.trits.astype(np.float32) * spread


def random_ternary(
    shape: tuple[int, int], group: int, rng: np.random.Generator, dtype: str = "F16"
) -> Ternary:
    """A random matrix; a scale is a number of `dtype`."""
    out, width = shape
    trits = rng.integers(-1, 2, shape, np.int8)
    scales = rounded(rng.uniform(0.02, 0.1, (out, width // group)), dtype)
    return Ternary(trits, scales, group)


def words(trits: np.ndarray, code: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
    """MLX's 2-bit words (out, in / 16) uint32 of codes, by default trit + 1."""
    codes = trits + 1 if code is None else code(trits)
    lanes = codes.astype(np.uint32).reshape(*codes.shape[:-1], -1, 16)
    return np.bitwise_or.reduce(lanes << np.arange(0, 32, 2, dtype=np.uint32), axis=-1)


def affine2(path: str, matrix: Ternary, dtype: str = "F16") -> dict[str, Stored]:
    """The three tensors of a matrix, as mlx-lm's packs have them."""
    return {
        f"{path}.weight": stored(words(matrix.trits)),
        f"{path}.scales": stored(matrix.scales, dtype),
        f"{path}.biases": stored(-matrix.scales, dtype),
    }


@dataclass
class Pack:
    """A model in safetensors to write; change it before `write`.

    Attributes:
        config: its config.json.
        tensors: by name in the files.
        matrices: its ternary matrices by path in mlx-lm's model.
    """

    config: dict[str, Any]
    tensors: dict[str, Stored] = field(default_factory=dict)
    matrices: dict[str, Ternary] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write the folder, with a tokenizer."""
        folder.mkdir(parents=True)
        write_stored(folder / "model.safetensors", self.tensors)
        (folder / "config.json").write_text(json.dumps(self.config))
        write_tokenizer(folder, 290)
        return folder


def _parameters(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """The shapes and random values of mlx-lm's model of a config, by name."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    flat: Any = tree_flatten(make_model(config, seed).parameters())
    return {name: np.array(value.astype(mx.float32)) for name, value in flat}


def mlx_pack(
    config: dict[str, Any] | None = None, group: int = 128, dtype: str = "F16", seed: int = 0
) -> Pack:
    """A pack of 2-bit codes with all matrices in it ternary."""
    config = QWEN3 if config is None else config
    quantization = {"group_size": group, "bits": 2, "mode": "affine"}
    pack = Pack(config | {"quantization": quantization, "quantization_config": quantization})
    rng = np.random.default_rng(seed)
    for name, value in _parameters(config, seed).items():
        path = name.removesuffix(".weight")
        if value.ndim == 2 and value.shape[1] % group == 0 and "conv1d" not in name:
            pack.matrices[path] = random_ternary(value.shape, group, rng, dtype)
            pack.tensors |= affine2(path, pack.matrices[path], dtype)
        else:
            pack.tensors[name] = stored(value, dtype)
    return pack


def prism_pack(schema: int = 2, blocks: tuple[int, ...] = (512, 0), seed: int = 0) -> Pack:
    """A rotated pack; modules take the blocks in turn."""
    inner = {"model_type": "qwen3_5", "text_config": QWEN35_TEXT, "tie_word_embeddings": False}
    pack = Pack({**inner, "model_type": "prism_hadamard_qwen35", "base_model_type": "qwen3_5"})
    modules: list[dict[str, Any]] = []
    rng = np.random.default_rng(seed)
    signs = {width: rng.choice([-1, 1], width) for width in (256, 512)}
    root = "language_model." if schema == 1 else ""
    for name, value in _parameters(inner, seed).items():
        path, wide = name.removesuffix(".weight"), value.ndim == 2 and "in_proj_a" not in name
        if not wide or "in_proj_b" in name or value.shape[1] % 128:
            pack.tensors[name.removeprefix(root)] = stored(value, "F16")
            continue
        block = blocks[len(modules) % len(blocks)] if value.shape[1] == 512 else 0
        pack.matrices[path] = random_ternary(value.shape, 128, rng)
        pack.tensors |= affine2(path.removeprefix(root), pack.matrices[path])
        if block:
            pack.tensors[f"{path.removeprefix(root)}.signs"] = stored(signs[value.shape[1]], "F32")
        modules.append(
            {
                "path": path.removeprefix("language_model."),
                "block": block,
                "embedding": "embed" in path,
                "dtype": "float16",
            }
        )
    namespace = {1: "mlx-lm-text", 2: "mlx-vlm-qwen3_5"}[schema]
    pack.config |= {"schema_version": schema, "tensor_namespace": namespace, "modules": modules}
    pack.config["quantization"] = {"bits": 2, "group_size": 128, "mode": "affine"}
    return pack


def bitnet_pack(divides: bool = True, seed: int = 0) -> Pack:
    """A Llama with packed BitLinear layers; the head stays as it is."""
    kind = {"linear_class": "bitlinear" if divides else "autobitlinear"}
    pack = Pack(LLAMA | {"quantization_config": {"quant_method": "bitnet", **kind}})
    rng = np.random.default_rng(seed)
    for name, value in _parameters(LLAMA, seed).items():
        path = name.removesuffix(".weight")
        if ".layers." not in name or value.ndim < 2:
            pack.tensors[name] = stored(value, "BF16")
            continue
        scale = rounded(rng.uniform(8, 12), "BF16")
        trits = rng.integers(-1, 2, value.shape, np.int8)
        quarters = (trits + 1).astype(np.uint8).reshape(4, -1, trits.shape[1])
        packed = np.bitwise_or.reduce(
            quarters << np.arange(0, 8, 2, dtype=np.uint8)[:, None, None], axis=0
        )
        pack.tensors[f"{path}.weight"] = stored(packed)
        pack.tensors[f"{path}.weight_scale"] = stored(scale.reshape(1), "BF16")
        factor = np.float32(1) / scale if divides else scale
        pack.matrices[path] = Ternary(trits, np.full(len(trits), factor, np.float32), 0)
    return pack


def master_pack(seed: int = 0) -> Pack:
    """A Llama with the bfloat16 weights that BitLinear layers are trained with."""
    settings = {"quant_method": "bitnet", "quantization_mode": "online"}
    pack = Pack(LLAMA | {"quantization_config": settings})
    for name, value in _parameters(LLAMA, seed).items():
        bits = to_bfloat16(value)
        pack.tensors[name] = Stored("BF16", value.shape, bits.tobytes())
        if ".layers." not in name or value.ndim < 2:
            continue
        exact = from_bfloat16(bits)
        mean = np.float32(max(np.abs(exact.astype(np.float64)).mean(), 1e-5))
        inverse = np.float32(1) / mean
        trits = np.clip(np.rint(exact * inverse), -1, 1).astype(np.int8)
        scale = rounded(np.float32(1) / inverse, "BF16")
        path = name.removesuffix(".weight")
        pack.matrices[path] = Ternary(trits, np.full(len(trits), scale, np.float32), 0)
    return pack


# ggml's numbers of types.
TYPE_IDS = {"F32": 0, "F16": 1, "TQ1_0": 34, "TQ2_0": 35, "Q2_0": 42, "PQ2_0": 142, "PTQ1_0": 143}
# Weights of a block.
BLOCKS = {"TQ1_0": 256, "TQ2_0": 256, "Q2_0": 64, "PQ2_0": 128, "PTQ1_0": 128}
# Of the types with five digits a byte: bytes, and digits of each, one run after another.
_RUNS = {"TQ1_0": ((32, 5), (16, 5), (4, 4)), "PTQ1_0": ((16, 5), (8, 5), (2, 4))}


def encode(kind: str, trits: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Rows of blocks, (out, row_bytes) uint8, of trits (out, in) and scales d (out, blocks)."""
    size = BLOCKS[kind]
    half = d.astype("<f2")[..., None].view(np.uint8)
    blocks = (trits + 1).astype(np.int64).reshape(*d.shape, size)
    if kind in _RUNS:
        pieces, at = [], 0
        for count, digits in _RUNS[kind]:
            run = blocks[..., at : at + count * digits].reshape(*d.shape, digits, count)
            powers = 3 ** np.arange(4, 4 - digits, -1)
            q = (run * powers[:, None]).sum(axis=-2)
            pieces.append(((256 * q + 242) // 243).astype(np.uint8))
            at += count * digits
        rows = np.concatenate([*pieces, half], axis=-1)
    elif kind == "TQ2_0":
        lanes = blocks.reshape(*d.shape, 2, 4, 32) << np.arange(0, 8, 2)[:, None]
        rows = np.concatenate([lanes.sum(axis=-2).reshape(*d.shape, 64), half], axis=-1)
    else:
        lanes = blocks.reshape(*d.shape, -1, 4) << np.arange(0, 8, 2)
        rows = np.concatenate([half, lanes.sum(axis=-1)], axis=-1)
    return rows.astype(np.uint8).reshape(len(trits), -1)


@dataclass
class GgufFile:
    """A GGUF file to write.

    Attributes:
        fields: metadata.
        tensors: type, shape (out, in) and bytes by name.
        matrices: ternary matrices by path in mlx-lm's model.
        others: its other tensors, by name in mlx-lm's model.
    """

    fields: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = field(default_factory=dict)
    matrices: dict[str, Ternary] = field(default_factory=dict)
    others: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, name: str, values: np.ndarray) -> None:
        """Add a float32 tensor."""
        self.tensors[name] = ("F32", values.shape, values.astype("<f4").tobytes())

    def write(self, path: Path) -> Path:
        """Write it."""
        head = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.fields))
        for key, value in self.fields.items():
            head += _text(key) + _value(value)
        offset = 0
        for name, (kind, shape, data) in self.tensors.items():
            head += _text(name) + struct.pack("<I", len(shape))
            head += struct.pack(f"<{len(shape)}Q", *shape[::-1])
            head += struct.pack("<IQ", TYPE_IDS[kind], offset)
            offset += len(data) + -len(data) % 32
        with path.open("wb") as file:
            file.write(head + bytes(-len(head) % 32))
            for _, _, data in self.tensors.values():
                file.write(data + bytes(-len(data) % 32))
        return path


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A value of metadata, with its type before it."""
    kinds: dict[type, tuple[int, str]] = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if not isinstance(value, list):
        number, code = kinds[type(value)]
        return struct.pack("<I", number) + struct.pack(code, value)
    first = value[0] if value else ""
    if isinstance(first, str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_text, value))
    number, code = (5, "<i") if isinstance(first, int) else kinds[type(first)]
    return struct.pack("<IIQ", 9, number, len(value)) + b"".join(
        struct.pack(code, item) for item in value
    )


_LLAMA_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def dense_gguf(kind: str, *, one_scale: bool = False, pairs: bool = False) -> GgufFile:
    """A Qwen3 whose matrices are all of one type.

    Args:
        kind: a type of `BLOCKS`.
        one_scale: give all blocks of a row the same scale.
        pairs: give each two neighbouring blocks the same scale.
    """
    config = QWEN3 | {"intermediate_size": 512}
    fields = {
        "general.architecture": "qwen3",
        "qwen3.context_length": 512,
        "qwen3.embedding_length": 256,
        "qwen3.block_count": config["num_hidden_layers"],
        "qwen3.feed_forward_length": 512,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 64,
        "qwen3.attention.value_length": 64,
        "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen3.rope.freq_base": 1e6,
        **gpt2_fields(config["vocab_size"]),
    }
    made, rng = GgufFile(fields), np.random.default_rng(5)
    for name, value in _parameters(config, 5).items():
        path = name.removesuffix(".weight")
        if path in ("model.embed_tokens", "model.norm"):
            to = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}[path]
        else:
            _, _, layer, place = path.split(".", 3)
            to = f"blk.{layer}.{_LLAMA_NAMES[place]}"
        if value.ndim == 1:
            made.add(f"{to}.weight", rounded(value, "F16"))
            continue
        matrix = random_ternary(value.shape, BLOCKS[kind], rng)
        if one_scale:
            matrix.scales[:] = matrix.scales[:, :1]
        if pairs:
            matrix.scales[:, 1::2] = matrix.scales[:, 0::2]
        made.matrices[path] = matrix
        data = encode(kind, matrix.trits, matrix.scales).tobytes()
        made.tensors[f"{to}.weight"] = (kind, value.shape, data)
    return made


_QWEN35_NAMES = {
    **_LLAMA_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def qwen35_gguf(kind: str = "PTQ1_0", *, rotated: bool = False) -> GgufFile:
    """A Qwen3.5 with two value heads to each key head, in llama.cpp's order of them.

    Args:
        kind: type of its matrices.
        rotated: say that all of them are rotated, in blocks of 128.
    """
    text = QWEN35_TEXT
    keys, heads = text["linear_num_key_heads"], text["linear_num_value_heads"]
    width, times = text["linear_value_head_dim"], heads // keys
    fixed = 2 * keys * text["linear_key_head_dim"]
    # Head r * keys + k of the file is head k * times + r of MLX.
    order = [k * times + r for r in range(times) for k in range(keys)]

    def tiled(array: np.ndarray, first: int = 0, size: int = 1) -> np.ndarray:
        blocks = array[first:].reshape(heads, size, *array.shape[1:])[order]
        return np.concatenate([array[:first], blocks.reshape(array[first:].shape)])

    made, rng = GgufFile(_qwen35_fields()), np.random.default_rng(9)
    config = {"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": False}
    for name, value in _parameters(config, 9).items():
        short = name.removeprefix("language_model.")
        path, _, leaf = short.rpartition(".")
        if path in _TOP:
            to = f"{_TOP[path]}.weight"
        else:
            _, _, layer, place = path.split(".", 3)
            to = f"blk.{layer}.{_QWEN35_NAMES.get(place, '')}.{leaf}"
            to = to.replace("..A_log", ".ssm_a").replace("..dt_bias", ".ssm_dt.bias")
        sort = to.split(".")[-2] if leaf == "weight" else leaf
        if value.ndim != 2 or sort in ("ssm_alpha", "ssm_beta"):
            stored_value = rounded(value, "F16")
            made.others[name] = stored_value
            if sort == "A_log":
                stored_value = -np.exp(stored_value)
            if sort in ("A_log", "dt_bias", "ssm_alpha", "ssm_beta"):
                stored_value = tiled(stored_value)
            if sort == "ssm_conv1d":
                stored_value = tiled(stored_value[..., 0], fixed, width)
            made.add(to, stored_value)
            continue
        matrix = random_ternary(value.shape, BLOCKS[kind], rng)
        made.matrices[name.removesuffix(".weight")] = matrix
        trits, scales = matrix.trits, matrix.scales
        if sort in ("attn_qkv", "attn_gate"):
            first = fixed if sort == "attn_qkv" else 0
            trits, scales = tiled(trits, first, width), tiled(scales, first, width)
        if sort == "ssm_out" and not rotated:
            trits = tiled(trits.T, 0, width).T
            matrix.scales[:] = matrix.scales[:, :1]  # heads are narrower than blocks
        made.tensors[to] = (kind, value.shape, encode(kind, trits, scales).tobytes())
    if rotated:
        names = [name for name in made.tensors if made.tensors[name][0] == kind]
        made.fields |= rotation_fields([n for n in names if n != "token_embd.weight"], 128)
        made.fields["prism.hadamard.gdn_v_grouped"] = True
    return made


def rotation_fields(names: list[str], block: int, widths: tuple[int, ...] = (256, 512)) -> dict:
    """The metadata of a rotation of tensors and of the embedding."""
    signs = np.random.default_rng(4).choice([-1, 1], sum(widths)).tolist()
    return {
        "prism.hadamard.version": 1,
        "prism.hadamard.block_size": block,
        "prism.hadamard.transform": "normalized-sylvester-walsh-hadamard",
        "prism.hadamard.axis": "input-last-dimension",
        "prism.hadamard.sign_mode": "explicit",
        "prism.hadamard.sign_widths": list(widths),
        "prism.hadamard.sign_values": signs,
        "prism.hadamard.weight_names": names,
        "prism.hadamard.inverse_weight_names": ["token_embd.weight"],
    }


def _qwen35_fields() -> dict[str, Any]:
    text = QWEN35_TEXT
    numbers = {
        "block_count": text["num_hidden_layers"],
        "context_length": 512,
        "embedding_length": text["hidden_size"],
        "feed_forward_length": text["intermediate_size"],
        "full_attention_interval": text["full_attention_interval"],
        "attention.head_count": text["num_attention_heads"],
        "attention.head_count_kv": text["num_key_value_heads"],
        "attention.key_length": text["head_dim"],
        "attention.value_length": text["head_dim"],
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": text["head_dim"] // 4,
        "rope.freq_base": 1e6,
        "ssm.conv_kernel": 4,
        "ssm.state_size": text["linear_key_head_dim"],
        "ssm.group_count": text["linear_num_key_heads"],
        "ssm.time_step_rank": text["linear_num_value_heads"],
        "ssm.inner_size": text["linear_num_value_heads"] * text["linear_value_head_dim"],
    }
    own = {f"qwen35.{key}": value for key, value in numbers.items()}
    return {
        "general.architecture": "qwen35",
        **own,
        **gpt2_fields(text["vocab_size"], "qwen35"),
    }
