"""Synthetic checkpoints on disk: bases of several families, and overlays for them in the forms
that exist.

Weights are random with unit-variance activations and logits of a few units; the same dims and
seed give the same base whether it is written alone or inside an overlay.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.tensor_file import Stored, stored, write_shards

Array = np.ndarray
PARTS = ("gate", "up", "down")


@dataclass(frozen=True)
class Dims:
    """What a model is. `moe_layers` None writes no list: then every layer is MoE.

    `family` is the base's model type, `yarn` holds the fields of a YaRN rope_scaling other than its
    type, and `scaling` a whole one of another type. `biases` says whether every projection of
    attention and FFN has one, as Llama's configs can have it.
    """

    hidden: int = 64
    intermediate: int = 128
    expert_intermediate: int = 80
    vocab: int = 288
    layers: int = 4
    moe_layers: tuple[int, ...] | None = (1, 3)
    experts: int = 4
    top_k: int = 2
    heads: int = 4
    kv_heads: int = 2
    tied: bool = False
    eps: float = 1e-6
    rope_theta: float = 1e6
    yarn: dict[str, float] | None = None
    seed: int = 0
    family: str = "qwen2"
    head_dim: int | None = None
    scaling: dict[str, Any] | None = None
    biases: bool = False

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """The layers with experts."""
        return tuple(range(self.layers)) if self.moe_layers is None else self.moe_layers

    @property
    def head_width(self) -> int:
        """The width of an attention head."""
        return self.head_dim or self.hidden // self.heads


@dataclass(frozen=True)
class Built:
    """What was written, as a reader should find it: float32 values after rounding to storage."""

    path: Path
    dims: Dims
    config: dict[str, Any]
    base: dict[str, Array]  # by its own name; also when the files are elsewhere
    routers: dict[int, Array] = field(default_factory=dict)  # (E, H) a layer
    trits: dict[tuple[int, int, str], Array] = field(default_factory=dict)  # int8 (out, in)
    scales: dict[tuple[int, int, str], Array] = field(default_factory=dict)  # in the file's shape
    alphas: dict[int, Array] = field(default_factory=dict)  # (E,) a layer, after all rules

    def prompt(self, length: int = 12) -> list[int]:
        """Random tokens of the vocabulary, the same for the same seed."""
        rng = np.random.default_rng([self.dims.seed, 2])
        return rng.integers(0, self.dims.vocab, length).tolist()


def base_weights(dims: Dims) -> dict[str, Array]:
    """The base's float32 tensors by name."""
    rng = np.random.default_rng([dims.seed, 0])
    h, width = dims.hidden, dims.head_width
    queries, keys = dims.heads * width, dims.kv_heads * width

    def matrix(out: int, width: int, gain: float = 1.0) -> Array:
        return (rng.standard_normal((out, width)) * gain / np.sqrt(width)).astype(np.float32)

    def vector(n: int, mean: float, spread: float) -> Array:
        return (mean + spread * rng.standard_normal(n)).astype(np.float32)

    # A tied embedding of unit variance would make the last token predict itself.
    weights = {"model.embed_tokens.weight": matrix(dims.vocab, h, 3 if dims.tied else h**0.5)}
    for n in range(dims.layers):
        layer = {
            "input_layernorm.weight": vector(h, 1, 0.1),
            "post_attention_layernorm.weight": vector(h, 1, 0.1),
            "self_attn.o_proj.weight": matrix(h, queries, 1),
            "mlp.gate_proj.weight": matrix(dims.intermediate, h),
            "mlp.up_proj.weight": matrix(dims.intermediate, h),
            "mlp.down_proj.weight": matrix(h, dims.intermediate, 2),
        }
        for name, out in (("q", queries), ("k", keys), ("v", keys)):
            layer[f"self_attn.{name}_proj.weight"] = matrix(out, h, 1.5)
            if dims.family == "qwen2" or dims.biases:
                layer[f"self_attn.{name}_proj.bias"] = vector(out, 0, 0.3)
            if dims.family == "qwen3" and name != "v":
                layer[f"self_attn.{name}_norm.weight"] = vector(width, 1.3, 0.2)
        if dims.biases:
            layer["self_attn.o_proj.bias"] = vector(h, 0, 0.3)
            for part in PARTS:
                rows = h if part == "down" else dims.intermediate
                layer[f"mlp.{part}_proj.bias"] = vector(rows, 0, 0.3)
        weights |= {f"model.layers.{n}.{key}": value for key, value in layer.items()}
    weights["model.norm.weight"] = vector(h, 1, 0.1)
    if not dims.tied:
        weights["lm_head.weight"] = matrix(dims.vocab, h, 3)
    return weights


def model_config(dims: Dims, rope: str = "old") -> dict[str, Any]:
    """config.json of the base; `rope` says where RoPE's fields are: "old", "new" or "both"."""
    config: dict[str, Any] = {
        "architectures": [f"{dims.family.capitalize()}ForCausalLM"],
        "model_type": dims.family,
        "hidden_act": "silu",
        "hidden_size": dims.hidden,
        "intermediate_size": dims.intermediate,
        "max_position_embeddings": 512,
        "num_attention_heads": dims.heads,
        "num_hidden_layers": dims.layers,
        "num_key_value_heads": dims.kv_heads,
        "rms_norm_eps": dims.eps,
        "tie_word_embeddings": dims.tied,
        "vocab_size": dims.vocab,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if dims.head_dim is not None:
        config["head_dim"] = dims.head_dim
    if dims.biases:
        config |= {"attention_bias": True, "mlp_bias": True}
    scaling = {"rope_type": "yarn", **dims.yarn} if dims.yarn else dims.scaling
    if rope in ("old", "both"):
        config["rope_theta"] = dims.rope_theta
        if dims.yarn:
            config["rope_scaling"] = {"type": "yarn", **dims.yarn}
        elif scaling:
            config["rope_scaling"] = scaling
    if rope in ("new", "both"):
        kind = scaling or {"rope_type": "default"}
        config["rope_parameters"] = {"rope_theta": dims.rope_theta, **kind}
    return config


def write_base(
    path: Path,
    *,
    base_dtype: str = "BF16",
    shards: int = 1,
    rope: str = "old",
    tokenizer: bool = True,
    **dims: Any,
) -> Built:
    """Write a plain folder of a base; `dims` are fields of Dims."""
    size = Dims(**dims)
    tensors = {key: stored(value, base_dtype) for key, value in base_weights(size).items()}
    config = model_config(size, rope)
    _write_folder(path, config, tensors, shards)
    if tokenizer:
        write_tokenizer(path, size.vocab)
    return Built(path, size, config, _as_read(tensors))


def write_overlay(
    path: Path,
    form: str = "v32",
    *,
    with_base: bool = True,
    scale_form: str | tuple[str, str, str] = "one",
    alpha: str = "tensor",
    base_dtype: str = "BF16",
    scale_dtype: str = "F16",
    shards: int = 1,
    rope: str = "old",
    tokenizer: bool = True,
    **dims: Any,
) -> Built:
    """Write an overlay in the form "v32" or "real" (V1/V2); `dims` are fields of Dims.

    `scale_form` is "0d", "one", "per_row" or "flat_row", or one of these each for gate, up, down.
    `alpha` is "tensor", "json", "partial" (alpha.json without the last expert), "both"
    (alpha.json that disagrees with the tensors) or "none". Experts in several shards straddle them.
    """
    size = Dims(**dims)
    rng = np.random.default_rng([size.seed, 1])
    base = {key: stored(value, base_dtype) for key, value in base_weights(size).items()}
    forms = (scale_form,) * 3 if isinstance(scale_form, str) else scale_form
    routers, trits, scales, alphas = {}, {}, {}, {}
    for n in size.routed_layers:
        router = rng.standard_normal((size.experts, size.hidden)) * (2 / size.hidden**0.5)
        routers[n] = stored(router, base_dtype)
        # Six digits, so that alpha.json and the tensor say the same.
        sign = rng.choice([-1, 1], size.experts)
        alphas[n] = np.round(rng.uniform(0.4, 1.4, size.experts) * sign, 6)
        for e in range(size.experts):
            for part, scale_shape in zip(PARTS, forms, strict=True):
                widths = (size.expert_intermediate, size.hidden)
                out, width = widths[::-1] if part == "down" else widths
                trits[n, e, part] = rng.integers(-1, 2, (out, width), dtype=np.int8)
                rows = {"0d": (), "one": (1,), "per_row": (out, 1), "flat_row": (out,)}[scale_shape]
                scale = rng.uniform(0.5, 1.5, rows) * (1.5 / width) ** 0.5
                scales[n, e, part] = stored(scale, scale_dtype)

    mlp = {"v32": "model.layers.{}.mlp.", "real": "base.model.layers.{}.mlp."}[form]
    tensors: dict[str, Stored] = {}
    if with_base:
        tensors |= {_form_key(key, form, size): value for key, value in base.items()}
    for n in size.routed_layers:
        tensors[mlp.format(n) + "router.weight"] = routers[n]
        if alpha in ("tensor", "both"):
            tensors[mlp.format(n) + "alpha_values"] = stored(alphas[n], "F32")
    for (n, e, part), value in trits.items():
        prefix = f"{mlp.format(n)}experts.{e}.{part}_"
        tensors[prefix + "ternary"] = stored(value)
        tensors[prefix + "scale"] = scales[n, e, part]

    config = model_config(size, rope)
    config["architectures"] = ["OutlierMoEForCausalLM"]
    if form == "real":
        config["model_type"] = "outlier_moe"
        if size.family != "qwen2":
            config["base_model_type"] = size.family
        config |= {"outlier_num_experts": size.experts, "outlier_num_experts_per_tok": size.top_k}
    else:
        config |= {"n_experts": size.experts, "top_k": size.top_k}
    if size.moe_layers is not None:
        config["moe_layer_indices"] = list(size.moe_layers)
    _write_folder(path, config, tensors, shards)
    if alpha in ("json", "partial", "both"):
        _write_json(path / "alpha.json", _alpha_json(alphas, alpha))
    if tokenizer:
        write_tokenizer(path, size.vocab)

    effective = {n: values.astype(np.float32) for n, values in alphas.items()}
    for values in effective.values():
        if alpha == "none":
            values[:] = 1
        elif alpha == "partial":
            values[-1] = 0
    return Built(
        path,
        size,
        config,
        _as_read(base),
        {n: value.array().astype(np.float32) for n, value in routers.items()},
        trits,
        {key: value.array().astype(np.float32) for key, value in scales.items()},
        effective,
    )


def _form_key(key: str, form: str, dims: Dims) -> str:
    """The name that a base tensor has inside an overlay of this form."""
    if form == "v32":
        return key
    for n in dims.routed_layers:
        for part in PARTS:
            if key == f"model.layers.{n}.mlp.{part}_proj.weight":
                key = f"model.layers.{n}.mlp.shared_expert.{part}_W"
    return "base." + key


def _alpha_json(alphas: dict[int, Array], kind: str) -> dict[str, dict[str, float]]:
    table = {}
    for n, values in alphas.items():
        stated = {"json": values, "partial": values[:-1], "both": 2 - values}[kind]
        table[str(n)] = {str(e): round(float(value), 6) for e, value in enumerate(stated)}
    return table


def _as_read(tensors: dict[str, Stored]) -> dict[str, Array]:
    return {key: value.array().astype(np.float32) for key, value in tensors.items()}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")


def _write_folder(
    path: Path, config: dict[str, Any], tensors: dict[str, Stored], shards: int
) -> None:
    """config.json and the shards, tensors dealt out in turn; an index when there are several."""
    path.mkdir(parents=True, exist_ok=True)
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", {"eos_token_id": [0, 2], "do_sample": False})
    write_shards(path, tensors, shards)


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def write_tokenizer(
    path: Path, vocab: int, *, chat_template: bool = True, special_list: bool = False
) -> None:
    """A byte-level BPE of exactly `vocab` tokens or the most there are: three special ones, the
    bytes (printable ASCII first, should they not all fit), then two-letter merges.

    `special_list` writes `extra_special_tokens` as a list, as V3.2 checkpoints do.
    """
    # The byte alphabet of GPT-2: printable bytes are themselves, the others follow from U+0100.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    symbol = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    order = [ord(" "), ord("\n"), *range(33, 127)]
    order += [b for b in range(256) if b not in order]
    tokens = [*SPECIAL, *(symbol[b] for b in order)]
    space = symbol[ord(" ")]
    merges = [[a, b] for a in f"{space}eaotinshr" for b in "thndrseaoi"]
    tokens = (tokens + [a + b for a, b in merges])[:vocab]
    merges = [pair for pair in merges if "".join(pair) in tokens]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": t, "special": True, **flags} for i, t in enumerate(SPECIAL)]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": merges,
    }
    _write_json(
        path / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": model,
        },
    )
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[0],
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    if special_list:
        config["extra_special_tokens"] = list(SPECIAL[1:])
    if chat_template:
        config["chat_template"] = CHAT_TEMPLATE
    _write_json(path / "tokenizer_config.json", config)
