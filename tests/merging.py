"""Small dense models to merge, and texts on different topics for their experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.builders import Dims, base_weights, model_config, write_tokenizer
from tests.damage import edit_json
from tests.tensor_file import stored, write_stored

SIZES: dict[str, Any] = {"hidden": 32, "intermediate": 64, "layers": 2, "heads": 4, "kv_heads": 2}
# Words of a topic share no word, and few letters, with another topic's.
TOPICS = [
    text.split()
    for text in (
        "sea tide sail seal shell reef salt sand ease haste steel slate",
        "bumpy crumb rug wrung purr bunny gum burrow curry mum churn grub",
        "007 42 1984 365 12 99 2048 31 64 77 100 256",
    )
]


def write_dense(
    path: Path,
    kind: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "F32",
    tokenizer: bool = True,
    bos: bool = True,
    tied: bool = False,
    **dims: Any,
) -> Path:
    """Write a dense model of random weights; a llama, mistral or qwen2."""
    size = Dims(**{**SIZES, "vocab": 300, "tied": tied, "seed": seed, **dims})
    path.mkdir(parents=True)
    weights = base_weights(size)
    if kind != "qwen2":
        weights = {name: value for name, value in weights.items() if not name.endswith(".bias")}
    write_stored(path / "model.safetensors", {k: stored(v, dtype) for k, v in weights.items()})
    names = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
    config = model_config(size) | {"model_type": kind, "rope_theta": 20000.0}
    config["architectures"] = [names.get(kind, "Qwen2ForCausalLM")]
    (path / "config.json").write_text(json.dumps(config))
    if tokenizer:
        write_tokenizer(path, size.vocab, chat_template=False)
        if bos:
            edit_json(path / "tokenizer_config.json", bos_token="<|im_start|>")
    return path


def write_models(folder: Path, kind: str = "llama", experts: int = 3, **options: Any) -> Path:
    """Write `base` and `expert_0`, `expert_1` ...; the experts have no tokenizer."""
    write_dense(folder / "base", kind, **options)
    for number in range(experts):
        path = folder / f"expert_{number}"
        write_dense(path, kind, seed=number + 1, **options | {"tokenizer": False})
    return folder


def write_merge_config(folder: Path, **changes: Any) -> Path:
    """Write `merge.yaml` for what `write_models` wrote: three experts, a topic each.

    `changes` replace top-level keys; None takes one out.
    """
    merge_config: dict[str, Any] = {
        "base_model": "./base",
        "gate_mode": "hidden",
        "experts": [
            {"source_model": f"./expert_{n}", "positive_prompts": prompts(n, 4, seed=1)}
            for n in range(3)
        ],
    }
    merge_config = {k: v for k, v in (merge_config | changes).items() if v is not None}
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump(merge_config), encoding="utf-8")
    return path


def prompts(topic: int, count: int, *, seed: int, words: int = 6) -> list[str]:
    """Prompts of random words of a topic."""
    rng = np.random.default_rng([seed, topic])
    return [" ".join(rng.choice(TOPICS[topic], words)) for _ in range(count)]


def write_texts(folder: Path) -> list[str]:
    """Write a text on each topic; their names."""
    names = []
    for topic in range(len(TOPICS)):
        names.append(f"topic_{topic}.txt")
        text = "\n".join(prompts(topic, 30, seed=2))
        (folder / names[-1]).write_text(text, encoding="utf-8")
    return names


def topical_experts(folder: Path, held_out: int = 8) -> list[dict[str, Any]]:
    """A configuration's experts with prompts, a text and held-out prompts on a topic each."""
    return [
        {
            "source_model": f"./expert_{n}",
            "positive_prompts": prompts(n, 4, seed=1),
            "texts": [name],
            "held_out": prompts(n, held_out, seed=3),
        }
        for n, name in enumerate(write_texts(folder))
    ]
