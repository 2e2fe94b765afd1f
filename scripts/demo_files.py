"""Write the demo's base and small models as Hugging Face folders; read the base and its overlay."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_model import Shape, Weights
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CARD = """---
license: apache-2.0
---

Made by `scripts/train_demo.py` of outlier-mlx for its documentation and tests.
"""
# ChatML, as Qwen2's models use it.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def end_token(tokenizer: Tokenizer, text: str = END) -> int:
    """The id of the token that begins and ends a document, or of another one."""
    end = tokenizer.token_to_id(text)
    if end is None:
        raise ValueError(f"the tokenizer has no {text}")
    return end


def _save(folder: Path, tensors: Weights) -> None:
    path = folder / "model.safetensors"
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def write_base(folder: Path, weights: Weights, shape: Shape, tokenizer: Tokenizer) -> None:
    """Write an ordinary Hugging Face folder of a Qwen2 or Llama model, float16."""
    folder.mkdir(parents=True)
    end = end_token(tokenizer)
    _save(folder, {name: weight.half() for name, weight in weights.items()})
    name = "Qwen2" if shape.moe_layers else "Llama"
    config = model_config(shape, end) | {
        "model_type": name.lower(),
        "architectures": [f"{name}ForCausalLM"],
    }
    write_json(folder / "config.json", config)
    ends = [tokenizer.token_to_id(TURN_END), end]
    write_json(folder / "generation_config.json", {"bos_token_id": end, "eos_token_id": ends})
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer" if shape.moe_layers else "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": TURN_END,
        "pad_token": END,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def model_config(shape: Shape, end: int) -> dict[str, Any]:
    """The fields of a model's config.json."""
    return {
        "model_type": "qwen2",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": "float16",
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Pair:
    """The weights of a written pair in float32; experts are scale times trits."""

    shape: Shape
    tokenizer: Tokenizer
    base: Weights
    overlay: Weights

    @property
    def joined(self) -> Weights:
        """All weights of base and overlay."""
        return self.base | self.overlay


def load(folder: Path) -> Pair:
    """Read the pair from the files in ``folder``."""
    config = json.loads((folder / "overlay" / "config.json").read_text(encoding="utf-8"))
    base = load_file(folder / "base" / "model.safetensors")
    stored = load_file(folder / "overlay" / "model-00001-of-00001.safetensors")
    first = f"model.layers.{config['moe_layer_indices'][0]}.mlp.experts.0"
    shape = Shape(
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        width=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        experts=config["n_experts"],
        top_k=config["top_k"],
        expert_width=stored[f"{first}.gate_ternary"].shape[0],
        moe_layers=tuple(config["moe_layer_indices"]),
        theta=config["rope_theta"],
        eps=config["rms_norm_eps"],
    )
    overlay = {name: w.float() for name, w in stored.items() if ".experts." not in name}
    for n in shape.moe_layers:
        stem = f"model.layers.{n}.mlp.experts."
        for part in ("gate", "up", "down"):
            overlay[stem + part] = torch.stack(
                [
                    stored[f"{stem}{e}.{part}_ternary"].float()
                    * stored[f"{stem}{e}.{part}_scale"].float()
                    for e in range(shape.experts)
                ]
            )
    tokenizer = Tokenizer.from_file(str(folder / "base" / "tokenizer.json"))
    return Pair(shape, tokenizer, {name: w.float() for name, w in base.items()}, overlay)
