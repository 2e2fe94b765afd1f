"""A model whose every next token is written down, so that what a server answers is known."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from outlier_mlx.engine.loading import load_tokenizer

#: Ends a reply, begins one, stands before each message, and begins a reply to a tool's result.
END, START, ROLE, RESULT = "<|end|>", "<|start|>", "<|role|>", "<|result|>"
#: Qwen's way to write tools, calls and results; other messages of any role.
TOOLS = (
    "{% if tools %}<|role|>tools{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "<tool_call></tool_call>{% endif %}"
    "{% for m in messages %}<|role|>{{ m.role }}:{{ m.content }}"
    "{% for tool_call in m.tool_calls or [] %}"
    "{{ tool_call.function.name }}{{ tool_call.function.arguments | tojson }}"
    "{# tool_call.name: mlx-lm knows the format by this #}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>{% endif %}"
)
#: Without tools, and for the usual roles alone.
PLAIN = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}"
    "<|role|>{{ m.role }}:{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>{% endif %}"
)


class Scripted(nn.Module):
    """Token t is followed by `successors[t]`, whatever stands before it."""

    def __init__(self, successors: list[int]) -> None:
        super().__init__()
        self.layers: list[Any] = [None]
        self._successors = mx.array(successors)

    def make_cache(self) -> list[Any]:
        return [KVCache()]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        nothing = mx.zeros((tokens.shape[0], 1, tokens.shape[1], 1))
        cache[0].update_and_fetch(nothing, nothing)
        following = self._successors[tokens]
        return 20.0 * (following[..., None] == mx.arange(len(self._successors))).astype(mx.float32)


class Script:
    """Loads a model that answers every chat with the same tokens.

    Args:
        folder: a new folder for the tokenizer.
        reply: the texts of the reply's tokens.
        template: the chat template, or None.
        marks: texts that are tokens besides those of the reply and the bytes.
        then: the texts of the reply's tokens after the mark `RESULT`.
        after: those after other marks, which the template writes.
        special: which of all texts are special tokens.
    """

    def __init__(
        self,
        folder: Path,
        *reply: str,
        template: str | None = TOOLS,
        marks: tuple[str, ...] = ("<tool_call>", "</tool_call>"),
        then: tuple[str, ...] = (),
        after: dict[str, tuple[str, ...]] | None = None,
        special: tuple[str, ...] = (),
    ) -> None:
        after = after or {}
        marks += (*after, *(text for texts in after.values() for text in texts))
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(
            [AddedToken(t, normalized=False) for t in (END, START, ROLE, RESULT, *special)]
        )
        added = [t for t in dict.fromkeys((*marks, *reply, *then)) if t not in special]
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in added])
        vocab = tokenizer.get_vocab()
        self._successors = [vocab[END]] * len(vocab)
        paths = [[START, *reply, END], [RESULT, *then, END]]
        paths += [[mark, *texts, END] for mark, texts in after.items()]
        followed = [text for path in paths for text in path[:-1]]
        assert len(set(followed)) == len(followed), "a token has one successor"
        for path in paths:
            for text, following in pairwise(path):
                self._successors[vocab[text]] = vocab[following]
        folder.mkdir(parents=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
        if template is not None:
            config["chat_template"] = template
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        self.folder = folder

    def __call__(self) -> tuple[nn.Module, Any]:
        return Scripted(self._successors), load_tokenizer(self.folder, {})


class Writing(nn.Module):
    """After the latest of some tokens, it writes that token's text, one token after another.

    Args:
        texts: for each of these tokens, those that follow it; the last one is repeated.
        vocab: number of tokens.
    """

    def __init__(self, texts: dict[int, list[int]], vocab: int) -> None:
        super().__init__()
        self.layers: list[Any] = [None]
        self._texts, self._vocab = texts, vocab

    def make_cache(self) -> list[Any]:
        return [KVCache()]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        new = tokens[:, None, :, None].astype(mx.float32)
        seen: Any = cache[0].update_and_fetch(new, new)[0][:, 0, :, 0].tolist()
        count = tokens.shape[1]
        following = mx.array(
            [[self._next(row[: len(row) - n]) for n in reversed(range(count))] for row in seen]
        )
        return 20.0 * (following[..., None] == mx.arange(self._vocab)).astype(mx.float32)

    def _next(self, tokens: list[float]) -> int:
        marks = [place for place, token in enumerate(tokens) if int(token) in self._texts]
        if not marks:
            return 0
        text = self._texts[int(tokens[marks[-1]])]
        return text[min(len(tokens) - 1 - marks[-1], len(text) - 1)]


class Written:
    """Loads a model that writes its replies with ordinary tokens, each a byte, and marks of calls.

    Args:
        folder: a new folder for the tokenizer.
        template: the chat template.
        replies: the reply after each mark that the template writes.
    """

    def __init__(self, folder: Path, template: str, replies: dict[str, str]) -> None:
        more: dict[str, tuple[str, ...]] = dict.fromkeys(replies.keys() - {START, RESULT}, ())
        self.folder = Script(folder, template=template, after=more).folder
        self._replies = replies

    def __call__(self) -> tuple[nn.Module, Any]:
        tokenizer = load_tokenizer(self.folder, {})
        vocab = tokenizer.get_vocab()
        texts = {
            vocab[mark]: [*tokenizer.encode(reply), vocab[END]]
            for mark, reply in self._replies.items()
        }
        return Writing(texts, len(vocab)), tokenizer
