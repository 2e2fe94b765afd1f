"""A loaded model for lm-evaluation-harness: mlx-lm's adapter, with the harness's rules.

mlx-lm's `MLXLM` runs the model for scores. How a text becomes tokens to be scored is taken from the
harness's own `TemplateLM`, as its other backends do, so that scores compare with theirs: blanks
that end a context belong to the continuation, an empty context is the BOS or EOS token, and the
first token of a rolling text is predicted, too. Answers are read as those of its other backends.
The model's context length is the limit for scoring, whatever the limit for generated tokens.
"""

import copy
import logging
from collections import defaultdict
from itertools import takewhile
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from lm_eval.api.model import LM, TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from mlx_lm import batch_generate

from outlier_mlx.engine.distributed.handshake import agree_on
from outlier_mlx.engine.distributed.ranks import agreed, ranks
from outlier_mlx.engine.prompts import check_tokens
from outlier_mlx.engine.tokenizer import Tokenizer
from outlier_mlx.errors import OutlierError
from outlier_mlx.terminal import Stages
from outlier_mlx.upstream import MLXLM

_logger = logging.getLogger("lm_eval.outlier_mlx")
#: Requests that are generated between two steps of the bar, in batches.
_BATCHES = 4


class HarnessModel(TemplateLM, MLXLM):
    """A model, as `lm_eval.evaluate` takes it.

    Args:
        model: maps tokens (1, length) and a cache to logits (1, length, vocab).
        tokenizer: the model's.
        max_length: the model's context length in tokens, for context and continuation.
        batch_size: number of texts generated together.
        max_tokens: tokens of an answer, at most; None: the task's own limit.
        chat: whether the chat template is applied to requests already.
        stages: shows progress.

    Raises:
        OutlierError: the tokenizer has neither a BOS nor an EOS token.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        batch_size: int,
        max_tokens: int | None,
        chat: bool,
        stages: Stages,
    ) -> None:
        # Not MLXLM's, which would load a model by itself.
        LM.__init__(self)
        self._model = model
        self.tokenizer: Any = tokenizer
        self.max_length = max_length
        self._batch_size = batch_size
        self._max_tokens = max_tokens
        self.use_chat_template = chat
        self._stages = stages
        if self.prefix_token_id is None:
            raise OutlierError("the model's tokenizer has neither a BOS nor an EOS token")
        check_tokens(model, [self.prefix_token_id], "the BOS or EOS before a text")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        bos = self.tokenizer.bos_token_id
        return bos if bos is not None else self.eot_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens of a text; a chat template adds the special tokens itself."""
        special = not self.use_chat_template if add_special_tokens is None else add_special_tokens
        tokens = self.tokenizer.encode(string, add_special_tokens=special)
        check_tokens(self._model, tokens, "a task's text")
        return tokens

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether greedy decoding gives it."""
        _agree("scores", requests)
        return TemplateLM.loglikelihood(self, requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations; a context that several share is read once."""
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, ((_text, wanted), context, continuation) in enumerate(requests):
            if not continuation:
                raise OutlierError(f"a continuation without tokens: {wanted[:80]!r}")
            if len(continuation) > self.max_length:
                raise OutlierError(
                    f"a continuation of {len(continuation)} tokens is longer than the context of"
                    f" {self.max_length}: {wanted[:80]!r}"
                )
            # The last token is predicted, not read.
            room = self.max_length + 1 - len(continuation)
            groups[tuple(context[-room:])].append(index)
        scored: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        with self._stages("scoring", "requests") as progress:
            for shared, members in groups.items():
                continuations = [requests[index][2] for index in members]
                found = self._score_group(list(shared), continuations)
                for index, score in zip(members, found, strict=True):
                    scored[index] = score
                done += len(members)
                progress(done, len(requests))
        return scored

    def _score_group(
        self, context: list[int], continuations: list[list[int]]
    ) -> list[tuple[float, bool]]:
        """Score several continuations of one context."""
        first, cache = self._process_prompt(context)  # (1, vocab) log-probabilities
        best = mx.argmax(first).item()
        found: list[tuple[Any, bool]] = []
        for number, tokens in enumerate(continuations):
            score, greedy = first[0, tokens[0]].item(), tokens[0] == best
            if len(tokens) > 1:
                last = number == len(continuations) - 1
                own = cache if last else copy.deepcopy(cache)
                rest, _, same = self._score_fn([tokens], cache=own)
                score += mx.sum(rest).item()
                greedy = greedy and bool(mx.all(same).item())
            found.append((score, greedy))
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts, in nats.

        Of a text longer than the model's context, each token is predicted from as many before it as
        fit.
        """
        _agree("texts", requests)
        windows: list[tuple[tuple[str, str], list[int], list[int]]] = []
        owners = []
        for number, request in enumerate(requests):
            text = request.args[0]
            # The prefix is the BOS token; another from the tokenizer would be scored as text.
            tokens = self.tok_encode(text, add_special_tokens=False)
            for window in get_rolling_token_windows(
                tokens, self.prefix_token_id, self.max_length, 1
            ):
                context, predicted = make_disjoint_window(window)
                windows.append((("", text), context, predicted))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (score, _greedy) in zip(
            owners, self._loglikelihood_tokens(windows), strict=True
        ):
            totals[owner] += score
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy answers, each cut before the first of its stop texts."""
        _agree("answers", requests)
        texts: list[str] = []
        long = sum(len(self.tok_encode(r.args[0])) > self.max_length for r in requests)
        if long:
            _logger.warning(
                "%d questions are longer than the model's context of %d tokens",
                long,
                self.max_length,
            )
        step = _BATCHES * self._batch_size
        with self._stages("generating", "answers") as progress:
            for at in range(0, len(requests), step):
                texts += self._answers([r.args for r in requests[at : at + step]])
                progress(len(texts), len(requests))
        return texts

    def _answers(self, asked: list[tuple[str, dict[str, Any]]]) -> list[str]:
        """Answers to questions with the `generation_kwargs` of their tasks."""
        options = [normalize_gen_kwargs(own) for _, own in asked]
        found = batch_generate(
            self._model,
            self.tokenizer,
            [self.tok_encode(question) or [self.prefix_token_id] for question, _ in asked],
            max_tokens=[self._max_tokens or own["max_gen_toks"] for own in options],
            prefill_batch_size=self._batch_size,
            completion_batch_size=self._batch_size,
            return_token_ids=True,
            sampler=_greedy,
        )
        stops = [[stop for stop in own["until"] if stop] for own in options]
        pairs = zip(found.token_ids or (), stops, strict=True)
        return [answer_text(self.tokenizer, tokens, stops) for tokens, stops in pairs]


def _agree(kind: str, requests: list[Any]) -> None:
    """Make sure that all ranks have the same requests, which come from their own task files."""
    if ranks().size > 1:
        asked = repr((kind, [request.args for request in requests]))
        agree_on("what the tasks ask", asked, "copy the task files again")


def _greedy(logprobs: mx.array) -> mx.array:
    """The likeliest tokens (batch,), as rank 0 has them, from log probabilities (batch, vocab)."""
    return agreed(mx.argmax(logprobs, axis=-1))


def answer_text(tokenizer: Tokenizer, tokens: list[int], stops: list[str]) -> str:
    """The text of an answer, as the harness's own models give it.

    Args:
        tokenizer: the model's.
        tokens: what the model wrote.
        stops: texts that end an answer; they may be special tokens, which are not in the text.

    Returns:
        What comes after the model's thoughts and before the first stop text.
    """
    ends = tokenizer.special_ids.intersection(map(tokenizer.convert_tokens_to_ids, stops))
    tokens = list(takewhile(lambda token: token not in ends, tokens))
    thought = tokenizer.rfind_think_end(tokens) if tokenizer.has_thinking else -1
    if thought >= 0:
        tokens = tokens[thought + len(tokenizer.think_end_tokens) :]
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    return postprocess_generated_text(text.lstrip() if thought >= 0 else text, stops, None)
