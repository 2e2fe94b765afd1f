"""Conversations: what is read again, what is kept, what lines from a pipe do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import save_prompt_cache

import outlier_mlx
from outlier_mlx.engine.conversation import Conversation
from outlier_mlx.engine.generate import Options, generate_from_tokens
from outlier_mlx.engine.sessions import identity, load, save
from outlier_mlx.engine.tokenizer import Tokenizer
from outlier_mlx.errors import OutlierError
from tests.builders import write_overlay
from tests.damage import edit_json
from tests.engine import tier_of
from tests.folders import copy_writable
from tests.library import Library
from tests.program import Result, assert_refused, run

Loaded = tuple[Any, Tokenizer]
QUESTIONS = ("Hello there", "And then?", "Why?")


@pytest.fixture(scope="module")
def tier(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tier whose replies never end by themselves."""
    made = library.tier(library.overlay(layers=2, moe_layers=(1,), seed=8))
    tier = copy_writable(made, tmp_path_factory.mktemp("chat") / "tier")
    edit_json(tier / "generation_config.json", eos_token_id=1)
    return tier


@pytest.fixture(scope="module")
def loaded(tier: Path) -> Loaded:
    return outlier_mlx.load(tier)


def begin(loaded: Loaded, **options: Any) -> Conversation:
    defaults: dict[str, Any] = {"max_tokens": 12, "system_prompt": "Brief"}
    return Conversation(*loaded, Options(**defaults | options))


def say(conversation: Conversation, text: str, **options: Any) -> str:
    return "".join(response.text for response in conversation.reply(text, **options))


def offsets(conversation: Conversation) -> set[int]:
    assert conversation.cache
    return {layer.offset for layer in conversation.cache}


def afresh(conversation: Conversation, cached: list[int], n: int) -> list[int]:
    """What the model writes after these tokens without any cache."""
    options = Options(max_tokens=n)
    model, tokenizer = conversation.model, conversation.tokenizer
    return [response.token for response in generate_from_tokens(model, tokenizer, cached, options)]


def test_only_what_is_new_is_read(loaded: Loaded):
    """And the reply is that of a model that reads everything."""
    conversation = begin(loaded)
    _, tokenizer = loaded
    before = 0
    for question in QUESTIONS:
        text = say(conversation, question)
        assert offsets(conversation) == {len(conversation.cached)}
        assert conversation.read == len(conversation.cached) - 12 - before
        prompt, reply = conversation.cached[:-12], conversation.cached[-12:]
        assert afresh(conversation, prompt, 12) == reply
        # The text alone would not do: it is split into other tokens.
        assert tokenizer.encode(text, add_special_tokens=False) != reply
        before = len(conversation.cached)
    turn = tokenizer.encode("<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    assert conversation.read == len(turn)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 3


@pytest.mark.parametrize(("end", "saved"), [(2, 1), (0, 0)])
def test_a_reply_that_ends_itself(
    tier: Path, monkeypatch: pytest.MonkeyPatch, end: int, saved: int
):
    """The token that ended it stays in the cache if the template has it there, too."""
    model, tokenizer = outlier_mlx.load(tier)
    tokenizer.eos_token_ids = {0, 2}
    sampled = iter([50, 51, 52, end, *[53] * 100])
    monkeypatch.setattr(
        "outlier_mlx.engine.generate.make_sampler",
        lambda *_, **__: lambda _: mx.array([next(sampled)]),
    )
    conversation = Conversation(model, tokenizer, Options(max_tokens=12))
    text = say(conversation, "Hello")
    assert text == tokenizer.decode([50, 51, 52]) == conversation.messages[1]["content"]
    assert conversation.cached[-4:] == [50, 51, 52, end]
    say(conversation, "Why?")
    turn = tokenizer.encode("<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")
    assert conversation.read == len(turn) - saved
    assert offsets(conversation) == {len(conversation.cached)}


@pytest.mark.parametrize(
    "options",
    [{"max_kv_size": 24}, {"temp": 1.0, "seed": 3}, {"prefill_step_size": 3}],
    ids=str,
)
def test_options_go_with_the_cache(loaded: Loaded, options: dict[str, Any]):
    conversation = begin(loaded, **options)
    for number, question in enumerate(QUESTIONS):
        say(conversation, question)
        assert offsets(conversation) == {len(conversation.cached)}
        assert (conversation.read < 26) == (number > 0)


def test_a_quantized_cache_goes_on(tmp_path: Path):
    built = write_overlay(tmp_path / "overlay", hidden=128, intermediate=64)
    loaded = outlier_mlx.load(tier_of(built.path, None, tmp_path / "tier"))
    conversation = begin(loaded, kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    for question in QUESTIONS:
        say(conversation, question)
    assert {type(layer).__name__ for layer in conversation.cache or []} == {"QuantizedKVCache"}
    assert conversation.read < 26


def test_a_reply_that_is_stopped_stays(loaded: Loaded):
    conversation = begin(loaded)
    count = iter(range(100))
    text = say(conversation, "Hello there", stopped=lambda: next(count) > 6)
    assert conversation.messages[-1] == {"role": "assistant", "content": text}
    assert 0 < len(text) < 12
    assert offsets(conversation) == {len(conversation.cached)}
    say(conversation, "Go on")
    # What was written is read again from the last whole character on, at most.
    assert conversation.read < 40
    assert afresh(conversation, conversation.cached[:-12], 12) == conversation.cached[-12:]


def test_a_question_that_is_stopped_goes(loaded: Loaded):
    """While it is being read, with what was read kept."""
    conversation = begin(loaded, prefill_step_size=4)
    say(conversation, "Hello there")
    before = list(conversation.messages)
    read: list[int] = []
    assert not say(
        conversation,
        "A long question, " * 5,
        progress=lambda done, _: read.append(done),
        stopped=lambda: len(read) > 3,
    )
    assert conversation.messages == before
    assert offsets(conversation) == {len(conversation.cached)}
    say(conversation, "A long question, " * 4)
    assert conversation.read < 80 - read[-1]
    assert afresh(conversation, conversation.cached[:-12], 12) == conversation.cached[-12:]


def test_an_exception_in_a_step_costs_the_cache_alone(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
):
    model, _ = loaded
    conversation = begin(loaded)
    calls = iter(range(100))
    attention = type(model.layers[1].self_attn)
    forward = attention.__call__

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == 9:  # between the layers of a step
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(attention, "__call__", interrupted)
        say(conversation, "Hello there")
    assert conversation.cache is None
    assert conversation.messages[-1]["role"] == "assistant"
    say(conversation, "Go on")
    assert conversation.read == len(conversation.cached) - 12
    assert afresh(conversation, conversation.cached[:-12], 12) == conversation.cached[-12:]


def test_reset_and_another_system_prompt(loaded: Loaded):
    conversation = begin(loaded)
    first = say(conversation, "Hello")
    conversation.set_system("Be verbose")
    say(conversation, "Hello")
    assert conversation.read > 40
    conversation.set_system("Brief")
    conversation.reset()
    assert say(conversation, "Hello") == first


def test_a_message_that_is_too_long_is_told_in_one_line(tier: Path):
    told = run("chat", tier, "--max-tokens", 2, input="!" * 600 + "\n", code=1)
    assert_refused(told, "tokens; the context length is 512; /reset starts")
    long = run("chat", tier, "--max-tokens", 2, "--max-kv-size", 64, input="!" * 600 + "\n")
    assert long.out and "context length" not in long.err


def test_what_no_template_takes(tier: Path):
    model, tokenizer = outlier_mlx.load(tier)
    tokenizer.eos_token_ids = {1}  # not the template's, too
    conversation = Conversation(model, tokenizer, Options(max_tokens=400))
    with pytest.raises(OutlierError, match=r"has 6\d\d tokens; the context length is 512; /reset"):
        say(conversation, "!" * 600)
    assert not conversation.messages
    say(conversation, "!" * 300)
    assert len(conversation.cached) == 512
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(OutlierError, match="the chat template failed: roles must"):
        say(conversation, "Hello")
    tokenizer.has_chat_template = False
    with pytest.raises(OutlierError, match="no chat template"):
        Conversation(model, tokenizer, Options())


@pytest.mark.parametrize(("name", "read"), [("a.json", False), ("a.safetensors", True)])
def test_saved_conversations_go_on(loaded: Loaded, tmp_path: Path, name: str, read: bool):
    """With the KV cache nothing is read again, and the reply is the same."""
    told, path = begin(loaded), tmp_path / name
    say(told, "Hello there")
    save(path, told, "this model")
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert path.stat().st_mode & 0o777 == 0o600
    heard = begin(loaded, system_prompt=None)
    load(path, heard, "this model")
    assert (heard.messages, heard.options) == (told.messages, told.options)
    same = say(told, "And then?") == say(heard, "And then?")
    assert (heard.read == told.read) == read
    if read:
        assert same
        save(path, heard, "this model")  # the file it was loaded from
        load(path, told, "this model")
        assert say(told, "Why?") == say(heard, "Why?")


def test_a_conversation_without_cache_is_saved_too(loaded: Loaded, tmp_path: Path):
    path = tmp_path / "a.safetensors"
    told, heard = begin(loaded), begin(loaded)
    say(told, "Hello there")
    told.forget()
    save(path, told, "this model")
    load(path, heard, "this model")
    assert heard.messages == told.messages and heard.cache is None


def test_files_that_are_no_conversations(loaded: Loaded, tmp_path: Path):
    conversation = begin(loaded)
    say(conversation, "Hello there")
    path = tmp_path / "a.safetensors"
    save(path, conversation, "this model")
    whole = path.read_bytes()
    before = list(conversation.messages), conversation.cached

    def refused(file: Path, words: str, model: str = "this model") -> None:
        with pytest.raises(OutlierError, match=words):
            load(file, conversation, model)
        assert (conversation.messages, conversation.cached) == before

    refused(path, "the cache belongs to another model", "that model")
    path.write_bytes(whole[:-10])
    refused(path, "truncated")
    path.write_bytes(whole.replace(b'"KVCache"', b'"deque  "'))
    refused(path, "damaged prompt cache")
    path.write_bytes(whole.replace(b'\\"version\\": 1', b'\\"version\\": 7'))
    refused(path, "version 7 is not supported")
    cached = json.dumps(conversation.cached).encode()
    fewer = json.dumps(conversation.cached[1:]).encode().ljust(len(cached))
    path.write_bytes(whole.replace(cached, fewer))
    refused(path, "the cache does not match its conversation")
    assert conversation.cache
    save_prompt_cache(str(path), conversation.cache[:1], {"model": "this model"})
    refused(path, "damaged prompt cache|does not match")
    save_prompt_cache(str(path), conversation.cache)
    refused(path, "not a prompt cache of a conversation")
    text = tmp_path / "a.json"
    for document in (b"{", b"[]", b"{}", b'{"format": "outlier-mlx chat", "version": 2}'):
        text.write_bytes(document)
        refused(text, "a.json")
    valid = {"format": "outlier-mlx chat", "version": 1, "system": None}
    user, assistant = ({"role": role, "content": "x"} for role in ("user", "assistant"))
    for messages in ("x", [assistant], [user], [user, user], [user, assistant | {"x": 1}], [7, 7]):
        text.write_text(json.dumps(valid | {"messages": messages}))
        refused(text, "message")


def test_what_identifies_a_model(tier: Path):
    assert identity(tier, None) == identity(tier, None) != identity(tier, "float16")


def chat(tier: Path, lines: str, *options: object, code: int = 0) -> Result:
    """The command with lines from a pipe."""
    command = ["chat", "--model", tier, "--max-tokens", 8, "--temp", 0, *options]
    return run(*command, code=code, input=lines)


def test_a_message_a_line(tier: Path, loaded: Loaded):
    conversation = begin(loaded, max_tokens=8, system_prompt=None)
    expected = [say(conversation, question) for question in (*QUESTIONS[:2], "/a")]
    done = chat(tier, "Hello there\n\nAnd then?\n//a\n")
    assert done.out == "".join(f"{text}\n" for text in expected)
    assert not done.err


def test_commands(tier: Path, tmp_path: Path):
    kept = tmp_path / "a.json"
    done = chat(
        tier,
        f"Hello\n/save {kept}\n/save {kept}\n/reset\nHello\n/load {kept}\n/temp 0.5\n/temp\n"
        '/system\n/system Be brief\n/help\n"""two\nlines"""\n/exit\nnever said\n',
    )
    first, second, _ = done.out.split("\n", 2)
    assert first == second
    shown = ("saved", "new conversation", "1 messages", "temperature: 0.5", "Be brief", "/exit")
    for words in shown:
        assert words in done.err.replace("\n", " ")
    assert "never" not in done.out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/rest", "did you mean '/reset'"),
        ("/frobnicate", "/help lists them"),
        ("/temp hot", "expected a number from 0 to 100"),
        ("/temp -1", "expected a number from 0 to 100"),
        ("/save", "usage: /save FILE"),
        ("/save {taken}", "choose another name"),
        ("/save {folder}/no/such.json", "No such file or directory"),
        ("/load {folder}/none.json", "no such file"),
        ("/load {taken}", "not a saved conversation"),
        ('"""two', 'has no """ at its end'),
    ],
)
def test_commands_that_fail(tier: Path, tmp_path: Path, line: str, words: str):
    """End a pipe, in one line; nothing is said after them."""
    taken = tmp_path / "taken.json"
    taken.write_text("{}")
    done = chat(tier, line.format(taken=taken, folder=tmp_path) + "\nHello\n", code=1)
    assert_refused(done, words)
    assert taken.read_text() == "{}"


def test_a_prompt_cache_between_runs(tier: Path, loaded: Loaded, tmp_path: Path):
    conversation = begin(loaded, max_tokens=8, system_prompt=None)
    expected = [say(conversation, question) for question in QUESTIONS]
    kept = tmp_path / "kept.safetensors"
    for number, question in enumerate(QUESTIONS):
        done = chat(tier, f"{question}\n", "--prompt-cache", str(kept))
        assert done.out == f"{expected[number]}\n"
    before = kept.read_bytes()
    done = chat(tier, "Hello\n", "--prompt-cache", str(kept), "--dtype", "float16", code=1)
    assert "another --dtype" in done.err
    assert kept.read_bytes() == before
    chat(tier, "", "--prompt-cache", "kept.txt", code=2)
