"""Models of real size of which only the headers are there: their files are holes."""

from __future__ import annotations

import json
import struct
from collections.abc import Container
from math import prod
from pathlib import Path

from outlier_mlx.models.config import parse_config
from outlier_mlx.models.stored import expected_tensors

_BYTES = {"U8": 1, "U32": 4, "F32": 4, "BF16": 2, "F16": 2}

# Qwen2.5-14B with experts in 28 of its layers, 8 in each.
CONFIG_14B = {
    "model_type": "outlier_moe",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "moe_layers": [*range(10, 38)],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 13824,
    "ternary": {"format": "tq1_0_strided", "version": 2},
    "quantization": {"group_size": 64, "bits": 4, "mode": "affine"},
}


class _Quantized(Container[str]):
    """The names of a model that is quantized as far as it can be."""

    def __contains__(self, name: object) -> bool:
        return str(name).endswith(".scales")


def write_large(folder: Path, **fields: object) -> Path:
    """A q4 tier of 14B and 224 experts; `fields` are others of its config."""
    folder.mkdir()
    raw = CONFIG_14B | fields
    (folder / "config.json").write_text(json.dumps(raw))
    header: dict[str, object] = {}
    at = 0
    for name, (shape, dtypes) in expected_tensors(parse_config(raw), _Quantized()).items():
        dtype = "BF16" if "BF16" in dtypes else dtypes[0]
        end = at + prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    return folder
