"""From a prompt to text: the tokens are the reference's, the options are mlx-lm's."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

import outlier_mlx
from outlier_mlx.engine.generate import Options, encode_prompt, generate_text, prefill_step
from outlier_mlx.engine.tokenizer import Tokenizer
from outlier_mlx.errors import OutlierError
from outlier_mlx.runtime.model import Model
from tests.builders import Built, write_overlay
from tests.damage import edit_json
from tests.engine import tier_of
from tests.folders import copy_writable
from tests.program import run
from tests.reference import ReferenceModel, greedy
from tests.reference_reader import read_overlay
from tests.serving import running

PROMPT = "The heron stands in the water"


@pytest.fixture(scope="module")
def reference(overlay: Built) -> ReferenceModel:
    return read_overlay(overlay.path)


Loaded = tuple[Any, Tokenizer]


@pytest.fixture(scope="module")
def loaded(tier: Path) -> Loaded:
    return outlier_mlx.load(tier)


def tokens_of(loaded: Loaded, prompt: str = PROMPT, **options: Any) -> list[int]:
    return [
        r.token for r in generate_text(*loaded, prompt, Options(**{"max_tokens": 12} | options))
    ]


def expected_tokens(reference: ReferenceModel, prompt: list[int], n: int = 12) -> list[int]:
    tokens, logits = greedy(reference, prompt, n)
    assert np.diff(np.sort(logits, axis=-1)[:, -2:]).min() > 1e-3  # else use another prompt
    assert not {0, 2} & set(tokens)  # these end a text
    return tokens


def test_load_gives_mlx_lm_s_types(loaded: Loaded):
    model, tokenizer = loaded
    assert isinstance(model, Model) and isinstance(tokenizer, TokenizerWrapper)
    logits = model(mx.array([[1, 2, 3]]))
    assert logits.shape == (1, 3, 288)
    assert tokenizer.decode(tokenizer.encode(PROMPT)) == PROMPT


def test_greedy_tokens_are_the_references(loaded: Loaded, reference: ReferenceModel):
    _, tokenizer = loaded
    chat = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    for ignore, text in ((True, PROMPT), (False, chat)):
        prompt = tokenizer.encode(text, add_special_tokens=False)
        expected = expected_tokens(reference, prompt)
        for step in (2048, 5):
            found = tokens_of(loaded, ignore_chat_template=ignore, prefill_step_size=step)
            assert found == expected


def test_prefill_comes_in_steps(loaded: Loaded, monkeypatch: pytest.MonkeyPatch):
    lengths: list[int] = []
    kind: Any = type(loaded[0])
    call = kind.__call__

    def spy(self: Model, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        lengths.append(inputs.shape[1])
        return call(self, inputs, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", spy)
    tokens_of(loaded, prefill_step_size=5, max_tokens=1)
    assert max(lengths) == 5 and lengths.count(5) > 3


def test_text_is_streamed(loaded: Loaded):
    responses = list(generate_text(*loaded, PROMPT, Options(max_tokens=12)))
    pieces = [response.text for response in responses]
    assert "".join(pieces) == loaded[1].decode([response.token for response in responses])
    last = responses[-1]
    assert last.generation_tokens == 12 and last.finish_reason == "length"
    assert last.prompt_tokens == len(encode_prompt(loaded[1], PROMPT, Options()))


def test_blanks_and_nul_are_written_as_they_are(
    tier: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
):
    tokens = loaded[1].encode("  \0 the") + [0]
    sampled = iter([mx.array([token]) for token in [*tokens, 0, 0]])
    monkeypatch.setattr(
        "outlier_mlx.engine.generate.make_sampler", lambda *_, **__: lambda _: next(sampled)
    )
    assert run("generate", tier, "--prompt", "Hi").out == "  \0 the\n"


@pytest.mark.parametrize("options", [{}, {"max_kv_size": 16}], ids=str)
def test_options_mean_what_they_mean_to_mlx_lm(loaded: Loaded, options: dict[str, Any]):
    model, tokenizer = loaded
    prompt = encode_prompt(tokenizer, PROMPT, Options())
    text = mlx_lm.generate(model, tokenizer, prompt, max_tokens=12, **options)
    ours = "".join(
        r.text for r in generate_text(*loaded, PROMPT, Options(max_tokens=12, **options))
    )
    assert ours == text


def test_a_quantized_cache(tmp_path: Path):
    """8 bits of KV cache change little; the group must divide the head width."""
    built = write_overlay(tmp_path / "overlay", hidden=128, intermediate=64)
    loaded = outlier_mlx.load(tier_of(built.path, None, tmp_path / "tier"))
    exact = tokens_of(loaded)
    rough = tokens_of(loaded, kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    assert rough[:4] == exact[:4]
    with pytest.raises(OutlierError, match="--kv-group-size 64 does not divide the head width 32"):
        tokens_of(loaded, kv_bits=8)


def test_prompts(loaded: Loaded):
    _, tokenizer = loaded
    encode = partial(encode_prompt, tokenizer)

    def text(**options: Any) -> str:
        return tokenizer.decode(encode("Hi", Options(**options)))

    user = "<|im_start|>user\nHi<|im_end|>\n"
    assert text() == user + "<|im_start|>assistant\n"
    system = "<|im_start|>system\nBe brief<|im_end|>\n"
    assert text(system_prompt="Be brief") == system + user + "<|im_start|>assistant\n"
    assert text(prefill_response="Well,") == user + "<|im_start|>assistant\nWell,"
    assert text(ignore_chat_template=True) == "Hi"
    with pytest.raises(OutlierError, match="--system-prompt needs a chat template"):
        encode("Hi", Options(system_prompt="Be brief", ignore_chat_template=True))
    with pytest.raises(OutlierError, match="empty"):
        encode("", Options(ignore_chat_template=True))


@pytest.mark.parametrize("adds", [True, False])
def test_one_bos_before_a_text(tier: Path, tmp_path: Path, adds: bool):
    """Whether the tokenizer puts it there, the text begins with it, or both."""
    folder = copy_writable(tier, tmp_path / "tier")
    bos = "<|im_start|>"
    rule = {
        "type": "TemplateProcessing",
        "single": [
            *([{"SpecialToken": {"id": bos, "type_id": 0}}] if adds else []),
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            text: {"id": text, "ids": [number], "tokens": [text]}
            for number, text in ((1, bos), (2, "<|im_end|>"))
        },
    }
    edit_json(folder / "tokenizer.json", post_processor=rule)
    edit_json(folder / "tokenizer_config.json", bos_token=bos)
    _, tokenizer = outlier_mlx.load(folder)
    plain = tokenizer.encode("Hi", add_special_tokens=False)
    encode = partial(encode_prompt, tokenizer, options=Options(ignore_chat_template=True))
    assert encode(f"{bos}Hi") == [1, *plain, 2]
    assert encode("Hi") == [1] * adds + [*plain, 2]
    # A second one that is written stays.
    assert encode(f"{bos}{bos}Hi") == [1, 1, *plain, 2]
    assert encode("  ") == [1] * adds + [*tokenizer.encode("  ", add_special_tokens=False), 2]
    assert tokenizer.encode(bos * 2, add_special_tokens=False) == [1, 1]
    assert encode_prompt(tokenizer, "Hi", Options()).count(1) == 2  # those of the template
    with running(folder) as server:
        for prompt in ("Hi", f"{bos}Hi"):
            body = {"prompt": prompt, "max_tokens": 1}
            count = server.post(body, "/v1/completions")[2]["usage"]["prompt_tokens"]
            assert count == len(encode(prompt))


def test_seeds(loaded: Loaded):
    first, again, other = (tokens_of(loaded, temp=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert tokens_of(loaded, temp=1.0, seed=1, top_k=1) == tokens_of(loaded)
    assert tokens_of(loaded, temp=1.0, seed=1, min_p=1.0) == tokens_of(loaded)
    assert tokens_of(loaded, temp=1.0, seed=1, top_p=5e-324) == tokens_of(loaded)
    assert tokens_of(loaded, temp=5e-324, seed=1) == tokens_of(loaded)


def test_generation_config_ends_a_text(tier: Path, tmp_path: Path, loaded: Loaded):
    """Its eos_token_id, several perhaps, holds; config.json's own is what there is else."""
    tokens = tokens_of(loaded)
    place = next(n for n in range(3, 12) if tokens[n] not in tokens[:n])
    copy = copy_writable(tier, tmp_path / "tier")
    edit_json(copy / "generation_config.json", eos_token_id=[287, tokens[place]])
    responses = list(generate_text(*outlier_mlx.load(copy), PROMPT, Options(max_tokens=12)))
    assert [r.token for r in responses] == tokens[: place + 1]
    assert responses[-1].finish_reason == "stop"
    (copy / "generation_config.json").unlink()
    edit_json(copy / "config.json", eos_token_id=tokens[3])
    assert tokens_of(outlier_mlx.load(copy)) == tokens[: tokens.index(tokens[3]) + 1]


def test_the_chat_template_ends_a_text(tier: Path, tmp_path: Path, loaded: Loaded):
    """Its token after a reply does, if it is an added one, besides those of the config."""
    tokens = tokens_of(loaded, ignore_chat_template=True)
    names = loaded[1].convert_ids_to_tokens(tokens)
    place = next(
        n for n, name in enumerate(names) if n and name.isascii() and name not in names[:n]
    )
    copy = copy_writable(tier, tmp_path / "tier")
    edit_json(copy / "generation_config.json", eos_token_id=0)
    assert outlier_mlx.load(copy)[1].eos_token_ids == {0, 2}  # <|im_end|> is 2
    template = "{% for m in messages %}{{ m.content }} " + names[place] + "{% endfor %}"
    edit_json(copy / "tokenizer_config.json", chat_template=template)
    again = outlier_mlx.load(copy)
    assert again[1].eos_token_ids == {0}
    assert tokens_of(again, ignore_chat_template=True) == tokens
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    added = tokenizer["added_tokens"][0] | {"id": tokens[place], "content": names[place]}
    edit_json(copy / "tokenizer.json", added_tokens=[*tokenizer["added_tokens"], added])
    again = outlier_mlx.load(copy)
    assert tokens_of(again, ignore_chat_template=True) == tokens[: place + 1]
    with running(copy) as server:
        body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        _, _, answer = server.post(body, path="/v1/completions")
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == place + 1


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{{ messages }}", "{{ messages[1].content }}", "Hi"]
)
def test_a_template_that_ends_no_reply(tier: Path, tmp_path: Path, template: str):
    copy = copy_writable(tier, tmp_path / "tier")
    edit_json(copy / "generation_config.json", eos_token_id=0)
    edit_json(copy / "tokenizer_config.json", chat_template=template)
    assert outlier_mlx.load(copy)[1].eos_token_ids == {0}


def test_a_tokenizer_beside_yarn(tmp_path: Path):
    """transformers reads config.json, too, and must not stumble over it."""
    yarn = {"factor": 4.0, "original_max_position_embeddings": 32}
    built = write_overlay(tmp_path / "overlay", yarn=yarn)
    loaded = outlier_mlx.load(tier_of(built.path, None, tmp_path / "tier"))
    prompt = loaded[1].encode(PROMPT)
    expected = expected_tokens(read_overlay(built.path), prompt, 6)
    assert tokens_of(loaded, ignore_chat_template=True, max_tokens=6) == expected


def test_no_code_of_a_tier_runs(tier: Path, tmp_path: Path, loaded: Loaded):
    copy = copy_writable(tier, tmp_path / "tier")
    mark = tmp_path / "it ran"
    code = f"open({str(mark)!r}, 'w').close()\nraise SystemExit\n"
    for name in ("outlier_moe.py", "tokenizer.py", "modeling.py"):
        (copy / name).write_text(code)
    edit_json(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenizer.T", None]})
    edit_json(
        copy / "config.json", auto_map={"AutoConfig": "modeling.C", "AutoModel": "modeling.M"}
    )
    assert tokens_of(outlier_mlx.load(copy)) == tokens_of(loaded)
    assert not mark.exists()


def test_loading_twice_shares_nothing(tier: Path, loaded: Loaded):
    model, tokenizer = outlier_mlx.load(tier)
    layer = model.layers[1].mlp
    layer.alpha = layer.alpha * 0
    assert tokens_of((model, tokenizer)) != tokens_of(loaded)


def test_options_have_mlx_lms_defaults():
    from mlx_lm.generate import setup_arg_parser

    theirs = vars(setup_arg_parser().parse_args([]))
    ours = vars(Options())
    assert ours.pop("json_schema") is None
    different = {name: theirs[name] for name, value in ours.items() if theirs[name] != value}
    assert different == {"max_tokens": 100}


def test_the_tokenizer_needs_no_network(tier: Path, monkeypatch: pytest.MonkeyPatch):
    import socket

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    outlier_mlx.load(tier)
    assert json.loads((tier / "config.json").read_text())["model_type"] == "outlier_moe"


@pytest.mark.parametrize("more", [0, 1, 1000])
def test_top_k_of_all_tokens_is_no_limit(loaded: Loaded, more: int):
    """mlx-lm's sampler takes less than all."""
    sampled = partial(tokens_of, loaded, temp=1.0, seed=3)
    assert sampled(top_k=288 + more) == sampled() != sampled(top_k=2)


def test_the_context_ends_a_prompt_or_a_text(loaded: Loaded, recwarn: Any):
    """It has 512 tokens, unless the cache may drop some."""
    _, tokenizer = loaded
    word = len(tokenizer.encode("word "))
    fits, full = "word " * (511 // word), "word " * (512 // word + 1)
    ask = partial(tokens_of, loaded, ignore_chat_template=True)
    told = f"the prompt has {len(tokenizer.encode(full))} tokens; the context length is 512; --max-"
    with pytest.raises(OutlierError, match=re.escape(told)):
        ask(full)
    assert len(ask(full, max_kv_size=64, max_tokens=3)) == 3
    room = 512 - len(tokenizer.encode(fits))
    assert room < 12
    assert len(ask(fits, max_tokens=room)) == room
    assert not list(recwarn)
    assert len(ask(fits)) == room
    (warning,) = recwarn
    assert str(warning.message) == "the text ends where the model's context of 512 tokens does"
    exact = tokenizer.decode(tokenizer.encode(full)[:512])
    with pytest.raises(OutlierError, match="the prompt has 512 tokens"):
        ask(exact)


@pytest.mark.parametrize(
    ("size", "most", "step"),
    [(10**4, 2048, 2048), (10**7, 2048, 20), (10**7, 3, 3), (7 * 10**9, 2048, 1)],
)
def test_steps_of_a_large_model_are_short_on_a_cpu(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, size: int, most: int, step: int
):
    """They depend on its size alone."""
    monkeypatch.setattr("outlier_mlx.engine.generate.total_parameters", lambda _: size)
    assert prefill_step(loaded[0], most) == step
    seen: list[tuple[int, int | None]] = []

    def progress(done: int, total: int | None) -> None:
        seen.append((done, total))

    options = Options(max_tokens=1, prefill_step_size=most)
    list(generate_text(*loaded, PROMPT, options, progress))
    total = len(encode_prompt(loaded[1], PROMPT, Options()))
    assert seen == [(n, total) for n in [*range(0, total - 1, step), total - 1, total]]
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert prefill_step(loaded[0], most) == most
