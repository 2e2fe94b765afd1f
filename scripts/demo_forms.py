"""Write the demo base in two formats that ``outlier-mlx import`` reads: GGUF, and AutoAWQ's."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from demo_files import CHAT_TEMPLATE, write_json
from gguf.quants import quantize
from safetensors.numpy import load_file, save_file

GROUP = 128  # inputs that share a scale in the AWQ checkpoint
# Nibbles of a word that hold columns 0 to 7 (AutoAWQ, layout "gemm").
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(base: Path, out: Path) -> None:
    """Write ``base`` as one GGUF file: Q8_0 embedding, Q4_0 matrices, float32 vectors."""
    config = _json(base / "config.json")
    writer = gguf_head(base, config, "demo base", out)
    for name, value in load_file(base / "model.safetensors").items():
        quant = "F32" if value.ndim == 1 else "Q8_0" if "embed" in name else "Q4_0"
        of_type = gguf.GGMLQuantizationType[quant]
        data = quantize(value.astype(np.float32), of_type)
        writer.add_tensor(gguf_name(name), data, raw_dtype=of_type)
    gguf_end(writer)


def gguf_head(tokenizer: Path, config: dict[str, Any], name: str, out: Path) -> gguf.GGUFWriter:
    """A GGUF file with the metadata of a model; its tensors are still to be added.

    Args:
        tokenizer: a folder with the tokenizer.
        config: the model's config.json.
        name: the model's name.
        out: the file.
    """
    tokens = _json(tokenizer / "tokenizer.json")
    writer = gguf.GGUFWriter(out, config["model_type"])
    writer.add_name(name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    special = {token["content"]: token["id"] for token in tokens["added_tokens"]}
    vocabulary = sorted(tokens["model"]["vocab"].items(), key=lambda item: item[1])
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([text for text, _ in vocabulary])
    writer.add_token_types([control if text in special else normal for text, _ in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokens["model"]["merges"]])
    ends = _json(tokenizer / "tokenizer_config.json")
    writer.add_bos_token_id(special[ends["bos_token"]])
    writer.add_eos_token_id(special[ends["eos_token"]])
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)
    return writer


def gguf_name(name: str) -> str:
    """What GGUF calls a tensor."""
    stem, kind = name.rsplit(".", 1)
    short = GGUF_NAMES.get(stem)
    if short is None:
        _, _, number, rest = stem.split(".", 3)
        short = f"blk.{number}.{GGUF_NAMES[rest]}"
    return f"{short}.{kind}"


def gguf_end(writer: gguf.GGUFWriter) -> None:
    """Write what was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_awq(base: Path, out: Path) -> None:
    """Write ``base`` as an AutoAWQ checkpoint, quantized by rounding alone."""
    out.mkdir(parents=True)
    for path in base.glob("*.json"):
        shutil.copyfile(path, out / path.name)
    tensors: dict[str, np.ndarray] = {}
    for name, value in load_file(base / "model.safetensors").items():
        if value.ndim == 1 or "embed" in name:
            tensors[name] = value
            continue
        stem = name.removesuffix("weight")
        codes, zeros, scales = _awq(value.astype(np.float32).T)
        tensors |= {
            stem + "qweight": _packed(codes),
            stem + "qzeros": _packed(zeros),
            stem + "scales": scales,
        }
    # save_file writes memory as it lies, so a transposed array would be written wrongly.
    whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(whole, out / "model.safetensors", {"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    quantization = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "version": "gemm",
        "zero_point": True,
    }
    write_json(
        out / "config.json", _json(base / "config.json") | {"quantization_config": quantization}
    )


def _awq(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes ``(in, out)``, zeros and float16 scales ``(in / GROUP, out)``: w = (code - zero) s."""
    groups = weight.reshape(-1, GROUP, weight.shape[1])
    low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
    scales = np.maximum((high - low) / 15, 1e-5).astype(np.float16)
    exact = scales.astype(np.float32)
    zeros = np.clip(np.round(-low / exact), 0, 15)
    codes = np.clip(np.round(groups / exact[:, None]) + zeros[:, None], 0, 15)
    return codes.reshape(weight.shape).astype(np.uint32), zeros.astype(np.uint32), scales


def _packed(codes: np.ndarray) -> np.ndarray:
    """int32 ``(rows, columns / 8)``."""
    nibbles = codes.reshape(len(codes), -1, 8) << (4 * np.array(NIBBLES, np.uint32))
    return np.bitwise_or.reduce(nibbles, axis=2).view(np.int32)


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))
