"""llama.cpp runs exported tiers: the same tokens, and the same probabilities as ours.

Its server tells log-probabilities: logits, up to a number that all tokens of a position share. Two
figures for each tier. Strict: their largest difference, as a part of the largest logit, with the
file's own numbers written out in float32, so that llama.cpp computes in float32. Quantized: the
mean difference (root mean square), as a part of the mean logit, with the file as it is; llama.cpp
rounds activations to 8 bits before it multiplies them with quantized weights.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outlier_mlx.checkpoints.export import export_tier
from outlier_mlx.cli.showcase import FOLDER
from outlier_mlx.engine.loading import load_tokenizer
from outlier_mlx.imports.gguf_tokenizer import read_vocabulary, write_tokenizer
from outlier_mlx.models.token_rules import RULES
from outlier_mlx.storage.gguf import read_gguf
from tests import damage
from tests.builders import write_overlay
from tests.engine import forward, load, tier_of
from tests.gguf_builder import spm_fields
from tests.goldens import golden
from tests.llamacpp import ask, in_float32, log_softmax
from tests.marks import slow_but

DIMS: dict[str, Any] = {"hidden": 256, "intermediate": 96, "expert_intermediate": 512, "experts": 3}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.25}


@dataclass(frozen=True)
class Case:
    """An overlay, how it is converted and exported, and the tolerances."""

    overlay: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    tier: dict[str, Any] = field(default_factory=dict)
    experts: str = "tq2_0"
    strict: float = 1e-5
    quantized: float = 0.05


EVEN = np.array([1, -0.5, 2], np.float32)
CASES = {
    "qwen2": Case({"scale_form": "per_row"}),
    "tq1_0": Case({"scale_form": "per_row"}, experts="tq1_0"),
    "q4_0": Case({"scale_form": "per_row"}, experts="q4_0"),
    "tied, padded": Case({"tied": True, "expert_intermediate": 300}),
    "every layer, one expert": Case({"moe_layers": None, "top_k": 1}),
    "last layer dense": Case({"moe_layers": (0, 2), "kv_heads": 1, "eps": 1e-3}),
    "qwen3": Case({"form": "real", "family": "qwen3", "head_dim": 96}),
    "llama, llama3": Case({"form": "real", "family": "llama", "scaling": LLAMA3}),
    "llama, linear": Case(
        {"form": "real", "family": "llama", "scaling": {"rope_type": "linear", "factor": 4.0}}
    ),
    "mistral": Case({"form": "real", "family": "mistral", "head_dim": 32}),
    "windows": Case(
        {"form": "real", "family": "llama"},
        {
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "sliding_window": 9,
        },
    ),
    "yarn": Case({"yarn": YARN}),
    "yarn, usual factor": Case({"yarn": {k: v for k, v in YARN.items() if "att" not in k}}),
    "yarn, turns": Case({"yarn": YARN | {"beta_fast": 16.0, "beta_slow": 2.0}}),
    "yarn, shorter": Case({"yarn": {"factor": 0.5, "original_max_position_embeddings": 64}}),
    "q4": Case({}, tier={"tier": "q4", "dtype": "bfloat16"}, quantized=0.1),
    # 6 bits become Q8_0: weights that differ.
    "q4-mixed, tq1_0": Case(
        {}, tier={"tier": "q4-mixed", "dtype": "bfloat16"}, experts="tq1_0", strict=0.01
    ),
    "bf16": Case({}, tier={"tier": "bf16"}),
}


def off(logs: np.ndarray, logits: np.ndarray) -> float:
    """The largest difference of log-probabilities, as a part of the largest logit."""
    assert logs.shape == logits.shape
    return float(np.abs(logs - log_softmax(logits)).max() / np.abs(logits).max())


def mean_off(logs: np.ndarray, logits: np.ndarray) -> float:
    """The mean difference of log-probabilities, as a part of the mean logit."""
    assert logs.shape == logits.shape
    return float(((logs - log_softmax(logits)) ** 2).mean() ** 0.5 / (logits**2).mean() ** 0.5)


# In the fast tests: each family once, and a tier in int4.
FEW = ["qwen2", "qwen3", "llama, llama3", "q4"]


@pytest.mark.parametrize("name", slow_but(FEW, CASES))
def test_logits(name: str, tmp_path: Path):
    case = CASES[name]
    built = write_overlay(tmp_path / "o", **{**DIMS, **case.overlay})
    path = built.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | case.config))
    even = EVEN[: built.dims.experts]
    for layer in built.alphas:
        prefix = "base." if case.overlay.get("form") == "real" else ""
        damage.replace_tensor(built.path, f"{prefix}model.layers.{layer}.mlp.alpha_values", even)
    tier = tier_of(built.path, None, tmp_path / "t", **case.tier)
    exported = export_tier(tier, tmp_path / "e", "gguf", experts=case.experts)
    assert not any("rounded" in note for note in exported.notes)
    prompts = [built.prompt(40), built.prompt(3)]
    ours = [forward(load(tier, dtype="float32"), prompt) for prompt in prompts]
    file = exported.path / "model.gguf"
    strict = ask(in_float32(file, tmp_path / "strict.gguf"), prompts).logs
    quantized = ask(file, prompts).logs
    worst = max(off(a, b) for a, b in zip(strict, ours, strict=True))
    mean = max(mean_off(a, b) for a, b in zip(quantized, ours, strict=True))
    print(f"{name}: strict {worst:.1e}, quantized {mean:.1e}")
    assert worst <= case.strict and mean <= case.quantized
    if case.strict == Case.strict:
        for theirs, own in zip(strict, ours, strict=True):
            np.testing.assert_array_equal(theirs.argmax(-1), own.argmax(-1))


@pytest.mark.slow
def test_alphas_that_are_rounded(tmp_path: Path):
    """The embedded pair: a scale a row, times alphas of six digits: within what is told."""
    tier = tier_of(FOLDER / "overlay", FOLDER / "base", tmp_path / "t")
    exported = export_tier(tier, tmp_path / "e", "gguf")
    (told,) = (note for note in exported.notes if "scales of experts" in note)
    text = (FOLDER / "heldout" / "sea.txt").read_text()[:600]
    prompt = load_tokenizer(tier, {}).encode(text)[:120]
    ours = forward(load(tier), prompt)
    file = exported.path / "model.gguf"
    (strict,) = ask(in_float32(file, tmp_path / "strict.gguf"), [prompt]).logs
    (quantized,) = ask(file, [prompt]).logs
    assert off(strict, ours) <= float(told.split("at most ")[1].split()[0])
    # The most likely token is the same nearly everywhere, also with activations of 8 bits.
    assert (strict.argmax(-1) == ours.argmax(-1)).all()
    assert (quantized.argmax(-1) == ours.argmax(-1)).mean() > 0.95


GOLDENS = [
    *(
        "v0_toy_dense",
        "v0_toy_gqa_bias",
        "v0_toy_moe",
        "v1_real_sharded",
        "v2_real_perchannel",
        "packed_experts_dir",
    ),
    *("v32_alpha_json_partial", "v32_alpha_tensors", "v33_overlay_yarn"),
]


@pytest.mark.parametrize("name", slow_but(["v0_toy_gqa_bias", "v33_overlay_yarn"], GOLDENS))
def test_goldens(name: str, tmp_path: Path):
    """llama.cpp against the published runtime's logits: ours only write the file.

    Their hidden sizes are no multiples of 256, so experts are in blocks of 32. They have no
    tokenizer, and get a small one: without any, the server of llama.cpp does not run.
    """
    case = golden(name)
    tier = tier_of(case.overlay, case.base, tmp_path / "t")
    own = json.loads((FOLDER / "base" / "tokenizer.json").read_text())
    model = own["model"] | {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    own |= {"model": model, "added_tokens": [], "post_processor": None}
    (tier / "tokenizer.json").write_text(json.dumps(own))
    (tier / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    exported = export_tier(tier, tmp_path / "e", "gguf", experts="q4_0")
    file = in_float32(exported.path / "model.gguf", tmp_path / "strict.gguf")
    (found,) = ask(file, [case.tokens]).logs
    expected = case.expected["logits"].reshape(found.shape)
    told = [note for note in exported.notes if "scales of experts" in note]
    rounded = float(told[0].split("at most ")[1].split()[0]) if told else 0.0
    difference = off(found, expected)
    print(f"{name}: {difference:.1e}, scales rounded by {rounded:.1e}")
    assert difference <= 1e-5 + rounded
    assert found[-1].argmax() == case.greedy[0]


# Tokens

SCRIPTS = (
    "the Sea I've WE'LL don'T O'Neill's naïve Straße Größe été smörgåsbord Привет мир нет"
    " 你好世界 東京 日本語 テスト 안녕하세요 مرحبا שלום हिन्दी ไทย Ελλην 3 42 1999 12345678 ½ ² ٣٤"
    " foo_bar camelCase HTTPServer x=y+1; {}[]() -- ... !? «quote» “smart” 🙂 👩‍🚀 🇫🇷 e.g. a.b@c.d"
    " /usr/bin \\n <tag> <|im_start|> <|im_end|> user assistant"
)
GAPS = [" "] * 12 + ["", "  ", "    ", "\n", "\n\n", " \n ", "\t", "\r\n", " \t\n\n  "]


def strings(count: int) -> list[str]:
    """Texts of words of many scripts, numbers, signs and blanks."""
    rng, words = random.Random(7), SCRIPTS.split()
    texts = []
    for _ in range(count):
        pieces = [rng.choice(words) + rng.choice(GAPS) for _ in range(rng.randint(1, 12))]
        texts.append(rng.choice(["", " ", "\n"]) + "".join(pieces))
    return texts


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "¿Qué tal?\n"},
]

# Other names of rules.
ALIASES = {"llama3", "llama-v3", "deepseek-r1-qwen"}


def with_rule(tokenizer: dict[str, Any], name: str) -> dict[str, Any]:
    """The embedded pair's tokenizer, with a rule by which llama.cpp is to split text."""
    rule = RULES[name]
    level = {"type": "ByteLevel", "trim_offsets": True, "add_prefix_space": False}
    steps: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        for split in rule.splits
    ]
    before = {"type": "Sequence", "pretokenizers": [*steps, level | {"use_regex": False}]}
    model = tokenizer["model"] | {"ignore_merges": rule.whole}
    return tokenizer | {"pre_tokenizer": before, "model": model, "normalizer": None}


@pytest.mark.parametrize("rule", slow_but(["llama-bpe", "qwen2"], sorted(set(RULES) - ALIASES)))
def test_a_thousand_strings(rule: str, tmp_path: Path):
    built = write_overlay(tmp_path / "o", **DIMS, vocab=1536, tokenizer=False)
    tier = tier_of(built.path, None, tmp_path / "t")
    own = json.loads((FOLDER / "base" / "tokenizer.json").read_text())
    (tier / "tokenizer.json").write_text(json.dumps(with_rule(own, rule)))
    config = (FOLDER / "base" / "tokenizer_config.json").read_text()
    config = config.replace("Qwen2Tokenizer", "PreTrainedTokenizerFast")
    (tier / "tokenizer_config.json").write_text(config)
    exported = export_tier(tier, tmp_path / "e", "gguf")
    tokenizer = load_tokenizer(tier, {})
    texts = strings(1000)
    said = ask(exported.path / "model.gguf", [], texts, ends=list(range(8)), messages=MESSAGES)
    assert rule in str(read_gguf(exported.path / "model.gguf").fields["tokenizer.ggml.pre"])
    plain = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    wrong = [(a, b, c) for a, b, c in zip(texts, plain, said.texts, strict=True) if b != c]
    assert not wrong, (len(wrong), wrong[:3])
    assert said.whole == [tokenizer.encode(text) for text in texts[:20]]
    assert said.template == json.loads(config)["chat_template"]
    assert said.prompt == tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    # Besides what the file names, llama.cpp knows some by their text; no other ends a reply.
    assert said.ends == [0, 2] and tokenizer.eos_token_ids <= {0, 2}


def test_a_thousand_strings_of_sentencepiece(tmp_path: Path):
    """A space before every text, bytes for what is no piece, and merges by score."""
    pairs = [
        "th",
        "he",
        "\u2581t",
        "the",
        "\u2581the",
        "se",
        "ea",
        "\u2581s",
        "\u2581sea",
        "er",
        "us",
    ]
    pieces = ["\u2581", *"etaoinshrdlucmfwypvbgkjqxz", *pairs]
    fields = {
        name: np.array(value) if name.endswith(("token_type", "scores")) else value
        for name, value in spm_fields(320, pieces).items()
    }
    built = write_overlay(tmp_path / "o", **DIMS, vocab=320, tokenizer=False)
    tier = tier_of(built.path, None, tmp_path / "t")
    write_tokenizer(read_vocabulary(fields, "llama", "x.gguf"), tier)
    exported = export_tier(tier, tmp_path / "e", "gguf")
    tokenizer = load_tokenizer(tier, {})
    texts = strings(1000)
    said = ask(exported.path / "model.gguf", [], texts)
    plain = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    wrong = [(a, b, c) for a, b, c in zip(texts, plain, said.texts, strict=True) if b != c]
    assert not wrong, (len(wrong), wrong[:3])
    assert said.whole == [tokenizer.encode(text) for text in texts[:20]]


def test_all_ends_that_a_file_names(tmp_path: Path):
    built = write_overlay(tmp_path / "o", **DIMS)
    tier = tier_of(built.path, None, tmp_path / "t")
    (tier / "generation_config.json").write_text('{"eos_token_id": [5, 6, 7]}')
    exported = export_tier(tier, tmp_path / "e", "gguf")
    assert any("not named: [7]" in note for note in exported.notes)
    found = ask(exported.path / "model.gguf", [], ends=list(range(10))).ends
    assert found == [0, 2, 5, 6]  # <|im_end|> by its text


# Failures


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("attention.layer_norm_rms_epsilon", None, "key not found in model"),
        ("expert_used_count", 99, "GGML_ASSERT"),
    ],
)
def test_what_llama_cpp_refuses(field: str, value: int | None, message: str, tmp_path: Path):
    """Whether it reports an error or ends its process, the test that asked fails and says why."""
    built = write_overlay(tmp_path / "o", **DIMS)
    exported = export_tier(tier_of(built.path, None, tmp_path / "t"), tmp_path / "e", "gguf")
    file = exported.path / "model.gguf"
    data, name = file.read_bytes(), f"step35.{field}".encode()
    assert data.count(name) == 1
    if value is None:
        file.write_bytes(data.replace(name, name[:-1] + b"_"))
    else:
        at = data.index(name) + len(name) + 4  # after the type
        file.write_bytes(data[:at] + value.to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(AssertionError, match=message):
        ask(file, [[5]])
