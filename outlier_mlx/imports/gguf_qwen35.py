"""GGUF models of the architecture `qwen35`: gated delta nets with full attention in between.

mlx-lm's model is `qwen3_5`. llama.cpp repeats key heads for value heads the other way round, so its
converter reorders value heads: head r * nk + k of the file is head k * (nv / nk) + r of Hugging
Face and MLX. Norms are final (1 is added already). Source: llama.cpp, `conversion/` and
`src/models/qwen35.cpp`.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.imports.gguf_blocks import values
from outlier_mlx.imports.gguf_config import Metadata, rows_of_embeddings, short_float, special_ids
from outlier_mlx.imports.gguf_names import AnyRows, Rows, Tiled
from outlier_mlx.imports.gguf_tokenizer import Vocabulary
from outlier_mlx.models.modules import Module
from outlier_mlx.storage.gguf import GgufTensor
from outlier_mlx.storage.gguf_model import GgufModel

ROOT = "language_model."
MODEL_TYPE = "qwen3_5"
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "full_attention_interval": "full_attention_interval",
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INSIDE = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
}
_LAYER = re.compile(r"model\.layers\.([0-9]+)\.(.+)")
_BLOCK = re.compile(r"blk\.([0-9]+)\.(nextn\.)?.+")
OUT_PROJ = ".linear_attn.out_proj"


def read_qwen35(model: GgufModel, vocabulary: Vocabulary) -> dict[str, Any]:
    """The config.json of mlx-lm's model.

    Raises:
        CheckpointError: metadata is missing, or asks for what mlx-lm's model does not do.
    """
    said = Metadata(model, "qwen35")
    text = {name: said.need(key) for name, key in _SIZES.items()}
    width = _value_width(said, model, text)
    rope = _rope(said, model, text["head_dim"])
    layers = said.need("block_count") - said.get("nextn_predict_layers", (int,), 0)
    interval = text["full_attention_interval"]
    text |= {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": layers,
        "num_key_value_heads": _kv_heads(said, model, layers, interval),
        "linear_value_head_dim": width,
        "rms_norm_eps": short_float(said.need("attention.layer_norm_rms_epsilon", (float,))),
        "vocab_size": rows_of_embeddings(model),
        "tie_word_embeddings": "output.weight" not in model.tensors,
        "attention_bias": False,
        "hidden_act": "silu",
        "layer_types": [
            "linear_attention" if (n + 1) % interval else "full_attention" for n in range(layers)
        ],
        "rope_parameters": rope,
    }
    ids = special_ids(vocabulary)
    if len(vocabulary.tokens) != text["vocab_size"]:
        raise CheckpointError(
            f"{model.where}: {len(vocabulary.tokens)} tokens, but token_embd.weight has"
            f" {text['vocab_size']} rows"
        )
    return {
        "model_type": MODEL_TYPE,
        "text_config": text | ids,
        "tie_word_embeddings": text["tie_word_embeddings"],
        **ids,
    }


def _value_width(said: Metadata, model: GgufModel, text: dict[str, Any]) -> int:
    """The width of a delta net's value head; checks all heads."""
    heads, keys = text["linear_num_value_heads"], text["linear_num_key_heads"]
    if heads % keys:
        raise CheckpointError(
            f"{model.where}: {heads} value heads are no multiple of {keys} key heads"
        )
    width, rest = divmod(said.need("ssm.inner_size"), heads)
    if rest:
        raise CheckpointError(f"{model.where}: qwen35.ssm.inner_size is not whole value heads")
    if said.get("attention.value_length", (int,), text["head_dim"]) != text["head_dim"]:
        raise CheckpointError(f"{model.where}: heads of keys and values have different widths")
    return int(width)


def _rope(said: Metadata, model: GgufModel, head_dim: int) -> dict[str, Any]:
    """The `rope_parameters` of config.json."""
    kind = said.get("rope.scaling.type", (str,), "none")
    if kind != "none":
        raise CheckpointError(f"{model.where}: qwen35.rope.scaling.type {kind!r} is not supported")
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": short_float(said.need("rope.freq_base", (float,))),
        "partial_rotary_factor": said.get("rope.dimension_count", (int,), head_dim) / head_dim,
    }
    sections = model.fields.get("qwen35.rope.dimension_sections")
    if sections is not None:
        rope |= {"mrope_section": np.asarray(sections)[:3].tolist(), "mrope_interleaved": True}
    return rope


def _kv_heads(said: Metadata, model: GgufModel, layers: int, interval: int) -> int:
    """Heads of keys and values; some files have a list with 0 for each delta net."""
    key = "attention.head_count_kv"
    given = model.fields.get(f"qwen35.{key}")
    if not isinstance(given, np.ndarray):
        return said.need(key)
    full = given[:layers][interval - 1 :: interval]
    if not len(full) or (full != full[0]).any():
        raise CheckpointError(f"{model.where}: qwen35.{key}: layers have different numbers")
    return int(full[0])


@dataclass
class Qwen35Names:
    """Finds the tensors of mlx-lm's modules; like `gguf_names.Names`."""

    model: GgufModel
    config: dict[str, Any]
    used: set[str] = field(default_factory=set)

    @property
    def order(self) -> tuple[int, ...]:
        """For each value head of MLX, its number in the file."""
        heads, times = self.config["text_config"]["linear_num_value_heads"], self.repeats
        keys = heads // times
        return tuple(head % times * keys + head // times for head in range(heads))

    @property
    def repeats(self) -> int:
        """Value heads of a key head."""
        text = self.config["text_config"]
        return int(text["linear_num_value_heads"] // text["linear_num_key_heads"])

    @property
    def is_tiled(self) -> bool:
        """Whether the file has another order of value heads than MLX."""
        return self.order != tuple(range(len(self.order)))

    def weight(self, module: Module) -> tuple[AnyRows, ...]:
        """The rows of a module's weight.

        Raises:
            CheckpointError: the tensor is missing, or has a wrong shape.
        """
        name = f"{module.path}.{module.leaf}".removeprefix(ROOT)
        match = _LAYER.fullmatch(name)
        place = match[2] if match else name
        stored = f"blk.{match[1]}.{_INSIDE[place]}" if match else _OUTSIDE[place]
        shape = module.shape[:2] if place.endswith("conv1d.weight") else module.shape
        tensor = self._tensor(stored, shape)
        text = self.config["text_config"]
        heads, width = text["linear_num_value_heads"], text["linear_value_head_dim"]
        keys = 2 * text["linear_num_key_heads"] * text["linear_key_head_dim"]
        if len(shape) == 1 and place.endswith(("A_log", "dt_bias")):
            tensor = replace(tensor, shape=(heads, 1))
        rows = {
            "linear_attn.in_proj_qkv.weight": (keys, width),
            "linear_attn.conv1d.weight": (keys, width),
            "linear_attn.in_proj_z.weight": (0, width),
            "linear_attn.in_proj_a.weight": (0, 1),
            "linear_attn.in_proj_b.weight": (0, 1),
            "linear_attn.A_log": (0, 1),
            "linear_attn.dt_bias": (0, 1),
        }.get(place)
        if rows is not None:
            return (Tiled(tensor, *rows, self.order),)
        return (Rows(tensor, 0, 1 if len(tensor.shape) == 1 else tensor.rows),)

    def bias(self, module: Module) -> tuple[AnyRows, ...]:
        """Refuse a module with a bias: files of this architecture have none."""
        raise CheckpointError(f"{self.model.where}: {module.path} has no bias in a qwen35 model")

    def factor(self, module: Module) -> GgufTensor | None:
        """No weight is multiplied by a number."""
        return None

    def check_all_used(self) -> None:
        """Refuse tensors that no module uses; drafts' are left out."""
        drafts = self.drafts()
        for name, tensor in self.model.tensors.items():
            if name not in self.used and name not in drafts:
                raise CheckpointError(f"{tensor.where}: unknown tensor for a qwen35 model")

    def drafts(self) -> set[str]:
        """The names of the tensors of draft heads."""
        blocks = {m[1] for name in self.model.tensors if (m := _BLOCK.fullmatch(name)) and m[2]}
        return {n for n in self.model.tensors if (m := _BLOCK.fullmatch(n)) and m[1] in blocks}

    def _tensor(self, name: str, shape: tuple[int, ...]) -> GgufTensor:
        tensor = self.model.need(name, shape)
        self.used.add(name)
        return tensor


def is_a_log(module: Module) -> bool:
    """Whether a module is the decay of a delta net, which the file has as -exp of it."""
    return module.leaf == "A_log"


def read_a_log(rows: AnyRows) -> np.ndarray:
    """The decay, (heads,) float32: log(-ssm_a).

    Raises:
        CheckpointError: a value is not below 0.
    """
    found = values(rows.tensor.kind, rows.read(0, rows.count)).reshape(-1)
    if not (found < 0).all():
        raise CheckpointError(f"{rows.tensor.where}: holds numbers that are not below 0")
    return np.log(-found.astype(np.float64)).astype(np.float32)
