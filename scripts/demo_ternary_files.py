"""Write the demo's ternary models in the forms in which such models are published."""

import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from demo_files import write_json
from demo_forms import gguf_end, gguf_head, gguf_name
from demo_model import Shape, Weights
from demo_ternary import BLOCK, GROUP, Hybrid, is_rotated, is_ternary, ternarise
from gguf.quants import quantize
from safetensors.torch import save_file

# PrismML's types, which gguf-py does not know, and the bytes of a block of 128 weights.
PQ2_0, PTQ1_0 = 142, 143
gguf.constants.GGML_QUANT_SIZES |= {PQ2_0: (GROUP, 34), PTQ1_0: (GROUP, 28)}  # type: ignore[dict-item]
# Of a block of PTQ1_0: bytes, and the digits that each of them holds.
_RUNS = ((16, 5), (8, 5), (2, 4))
_QWEN35_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}
AFFINE = {"group_size": GROUP, "bits": 2, "mode": "affine"}


def qwen3_config(shape: Shape, end: int) -> dict[str, Any]:
    """The config.json of the Qwen3, without what is said of its quantization."""
    return {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": shape.hidden,
        "intermediate_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
    }


def write_mlx2(folder: Path, weights: Weights, config: dict[str, Any], tokenizer: Path) -> None:
    """Write a pack of MLX's 2-bit codes, as Ternary Bonsai comes."""
    tensors: Weights = {}
    for name, weight in weights.items():
        if is_ternary(name, weight, GROUP):
            tensors |= _affine(name.removesuffix(".weight"), weight)
        else:
            tensors[name] = weight.half()
    said = {"quantization": AFFINE, "quantization_config": AFFINE}
    _write(folder, tensors, config | said, tokenizer)


def write_pq2_0(out: Path, weights: Weights, config: dict[str, Any], tokenizer: Path) -> None:
    """Write the same weights as a GGUF file of PrismML's type PQ2_0."""
    writer = gguf_head(tokenizer, config, "demo ternary", out)
    for name, weight in weights.items():
        if not is_ternary(name, weight, GROUP):
            writer.add_tensor(gguf_name(name), weight.half().float().numpy())
            continue
        trits, scales = ternarise(weight, GROUP)
        codes = (trits.numpy() + 1).astype(np.uint8).reshape(*scales.shape[:2], -1, 4)
        packed = np.bitwise_or.reduce(codes << np.arange(0, 8, 2, dtype=np.uint8), axis=-1)
        halves = scales.numpy().astype("<f2").view(np.uint8)
        rows = np.concatenate([halves, packed], axis=-1).reshape(len(weight), -1)
        writer.add_tensor(gguf_name(name), rows, raw_dtype=PQ2_0)  # type: ignore[arg-type]
    gguf_end(writer)


def write_ptq1_0(
    out: Path,
    weights: Weights,
    signs: torch.Tensor,
    shape: Hybrid,
    config: dict[str, Any],
    tokenizer: Path,
) -> None:
    """Write the rotated model as a GGUF file of PrismML's type PTQ1_0.

    With one key head, value heads have the same order in llama.cpp.
    """
    said = config | {"model_type": "qwen35", "rope_theta": shape.theta}
    writer = gguf_head(tokenizer, said, "demo ternary, rotated", out)
    for key, number in {
        "full_attention_interval": shape.layers,
        "rope.dimension_count": int(shape.head_dim * shape.turned),
        "ssm.conv_kernel": shape.kernel,
        "ssm.state_size": shape.key_dim,
        "ssm.group_count": 1,
        "ssm.time_step_rank": shape.value_heads,
        "ssm.inner_size": shape.value_heads * shape.value_dim,
    }.items():
        writer.add_uint32(f"qwen35.{key}", number)
    rotated = [_qwen35_name(name) for name, weight in weights.items() if is_rotated(name, weight)]
    prefix = "prism.hadamard."
    writer.add_uint32(prefix + "version", 2)
    writer.add_uint32(prefix + "block_size", BLOCK)
    writer.add_string(prefix + "transform", "normalized-sylvester-walsh-hadamard")
    writer.add_string(prefix + "axis", "input-last-dimension")
    writer.add_string(prefix + "sign_mode", "explicit")
    writer.add_array(prefix + "sign_widths", [BLOCK])
    writer.add_array(prefix + "sign_values", signs.int().tolist())
    writer.add_array(prefix + "weight_names", [n for n in rotated if n != "token_embd.weight"])
    writer.add_array(prefix + "inverse_weight_names", ["token_embd.weight"])
    writer.add_bool(prefix + "gdn_v_grouped", True)
    writer.add_bool(prefix + "tied_output", True)
    for name, weight in weights.items():
        to = _qwen35_name(name)
        if is_ternary(name, weight, GROUP):
            writer.add_tensor(to, _ptq1_0(weight), raw_dtype=PTQ1_0)  # type: ignore[arg-type]
            continue
        values = -weight.exp() if name.endswith("A_log") else weight.half().float()
        writer.add_tensor(to, values.squeeze(-1).numpy() if weight.ndim == 3 else values.numpy())
    gguf_end(writer)


def _qwen35_name(name: str) -> str:
    """What llama.cpp calls a tensor of the Qwen3.5."""
    stem, _, leaf = name.rpartition(".")
    if ".layers." not in name:
        return gguf_name(name)
    _, _, number, place = stem.split(".", 3)
    if leaf in ("A_log", "dt_bias"):
        return f"blk.{number}." + {"A_log": "ssm_a", "dt_bias": "ssm_dt.bias"}[leaf]
    short = _QWEN35_NAMES.get(place)
    return f"blk.{number}.{short}.weight" if short else gguf_name(name)


def _ptq1_0(weight: torch.Tensor) -> np.ndarray:
    """Rows of blocks: five digits a byte, in runs of bytes, and the scale after them."""
    trits, scales = ternarise(weight, GROUP)
    digits = (trits.numpy() + 1).astype(np.int64)
    pieces, at = [], 0
    for count, each in _RUNS:
        run = digits[..., at : at + count * each].reshape(*digits.shape[:2], each, count)
        numbers = (run * 3 ** np.arange(4, 4 - each, -1)[:, None]).sum(axis=-2)
        pieces.append(((256 * numbers + 242) // 243).astype(np.uint8))
        at += count * each
    halves = scales.numpy().astype("<f2").view(np.uint8)
    return np.concatenate([*pieces, halves], axis=-1).reshape(len(weight), -1)


def write_bitnet(folder: Path, weights: Weights, config: dict[str, Any], tokenizer: Path) -> None:
    """Write a packed BitNet checkpoint: four rows a byte, and one scale a matrix."""
    tensors: Weights = {}
    for name, weight in weights.items():
        if not is_ternary(name, weight, 0):
            tensors[name] = _short(weight).bfloat16()
            continue
        trits, scale = ternarise(weight, 0)
        codes = (trits + 1).to(torch.uint8).view(4, -1, weight.shape[1])
        tensors[name] = codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6
        tensors[name + "_scale"] = scale.view(1).bfloat16()
    said = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
    }
    _write(folder, tensors, config | {"quantization_config": said}, tokenizer)


def write_tq2_0(out: Path, weights: Weights, config: dict[str, Any], tokenizer: Path) -> None:
    """Write the same weights as a GGUF file of the type TQ2_0; the embedding stays as it is."""
    writer = gguf_head(tokenizer, config, "demo ternary, one scale a matrix", out)
    kinds = gguf.GGMLQuantizationType
    for name, weight in weights.items():
        if is_ternary(name, weight, 0):
            trits, scale = ternarise(weight, 0)
            data, kind = quantize((trits * scale).numpy(), kinds.TQ2_0), kinds.TQ2_0
        else:
            kind = kinds.F32 if weight.ndim == 1 else kinds.F16
            data = quantize(_short(weight).numpy(), kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    gguf_end(writer)


def write_rotated(
    folder: Path, weights: Weights, signs: torch.Tensor, config: dict[str, Any], tokenizer: Path
) -> None:
    """Write a `prism_hadamard_qwen35` pack: text only; narrow matrices are not rotated."""
    tensors: Weights = {}
    modules = []
    for name, weight in weights.items():
        path = name.removesuffix(".weight")
        if not is_ternary(name, weight, GROUP):
            tensors[name] = weight if name.endswith("A_log") else weight.half()
            continue
        tensors |= _affine(path, weight)
        rotated, embedding = is_rotated(name, weight), "embed_tokens" in path
        if rotated:
            tensors[f"{path}.signs"] = signs.clone()
        block = BLOCK if rotated else 0
        modules.append({"path": path, "block": block, "embedding": embedding, "dtype": "float16"})
    said = {
        "model_type": "prism_hadamard_qwen35",
        "base_model_type": "qwen3_5",
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "gdn_activation_layout": "grouped",
        "quantization": AFFINE,
        "modules": modules,
        "tie_word_embeddings": True,
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "text_config": config,
    }
    _write(folder, tensors, said, tokenizer)


def qwen35_config(shape: Hybrid, end: int) -> dict[str, Any]:
    """The `text_config` of the Qwen3.5."""
    return {
        "model_type": "qwen3_5_text",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "linear_num_value_heads": shape.value_heads,
        "linear_num_key_heads": 1,
        "linear_key_head_dim": shape.key_dim,
        "linear_value_head_dim": shape.value_dim,
        "linear_conv_kernel_dim": shape.kernel,
        "full_attention_interval": shape.layers,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "rms_norm_eps": shape.eps,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": shape.theta,
            "partial_rotary_factor": shape.turned,
        },
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
    }


def _short(weight: torch.Tensor) -> torch.Tensor:
    """Rounded to numbers that both float16 and bfloat16 hold."""
    return weight.half().bfloat16().float()


def _affine(path: str, weight: torch.Tensor) -> Weights:
    """The three tensors of a matrix in MLX's 2-bit codes: trit + 1, scales, and their negatives."""
    trits, scales = ternarise(weight, GROUP)
    codes = (trits.numpy() + 1).astype(np.uint32).reshape(len(weight), -1, 16)
    words = np.bitwise_or.reduce(codes << np.arange(0, 32, 2, dtype=np.uint32), axis=-1)
    halves = scales.squeeze(-1).half()
    return {
        f"{path}.weight": torch.from_numpy(words),
        f"{path}.scales": halves,
        f"{path}.biases": -halves,
    }


def _write(folder: Path, tensors: Weights, config: dict[str, Any], tokenizer: Path) -> None:
    """Write a model folder with the tokenizer of another one."""
    folder.mkdir(parents=True)
    path = folder / "model.safetensors"
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"format": "mlx"})
    path.chmod(0o644)  # safetensors makes files that only their owner can read
    write_json(folder / "config.json", config)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"):
        shutil.copyfile(tokenizer / name, folder / name)
