"""Many clients at a time: what they ask, how answers are compared, and what first tokens take."""

from __future__ import annotations

import json
import random
import shutil
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.json_schemas import SCHEMAS
from tests.serving import Running, read_answer

#: Log probabilities in float32 differ by less, whatever the order of sums; so a token that differs
#: must be one of two that were nearly as likely.
ROUNDING = 2e-3
WORDS = "the heron stands in the water and waits for a fish while the wind turns over the reeds"
#: Qwen's way to write tools and calls, for a model that was trained without.
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<tool_call></tool_call><|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for tool_call in m.tool_calls or [] %}<tool_call>"
    "{{ tool_call.function.name }}{{ tool_call.function.arguments | tojson }}</tool_call>"
    "{# tool_call.name: mlx-lm knows the format by this #}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 4}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": _CITY | {"required": ["city"], "additionalProperties": False},
    },
}


def with_tools(tier: Path, folder: Path) -> Path:
    """A copy of a tier whose chat template has tools."""
    shutil.copytree(tier, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def prompt(words: int, seed: int) -> list[dict[str, str]]:
    """A message of so many words, which begins like no other."""
    rng = random.Random(seed)
    text = f"{rng.randrange(10**6)} " + " ".join(rng.choice(WORDS.split()) for _ in range(words))
    return [{"role": "user", "content": text}]


def questions() -> dict[str, dict[str, Any]]:
    """The bodies of requests, by a name that begins with their kind."""
    asked: dict[str, dict[str, Any]] = {}
    for n in range(8):
        asked[f"short {n}"] = {"messages": prompt(6, n), "max_tokens": 10 + 4 * n}
    for n in range(6):
        asked[f"long {n}"] = {"messages": prompt(110 + n, 100 + n), "max_tokens": 8}
    for n, name in enumerate(list(SCHEMAS)[:5]):
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMAS[name]}}
        body = {"messages": prompt(5, 200 + n), "response_format": schema, "max_tokens": 60}
        asked[f"schema {name}"] = body
    for n in range(3):
        body = {"messages": prompt(4, 300 + n), "tools": [TOOL], "tool_choice": "required"}
        asked[f"tools {n}"] = body | {"max_tokens": 100}
    for n in range(3):
        body = {"messages": prompt(5, 400 + n), "temperature": 1.0, "top_p": 0.9, "seed": n}
        asked[f"seeded {n}"] = body | {"max_tokens": 20}
    return {name: body | {"logprobs": True, "top_logprobs": 10} for name, body in asked.items()}


@dataclass
class Answer:
    """What a request got: the choice as JSON, and each token with its alternatives."""

    choice: dict[str, Any]

    @property
    def message(self) -> Any:
        message = self.choice["message"]
        calls = [call["function"] for call in message.get("tool_calls") or []]
        return message["content"], calls, self.choice["finish_reason"]

    @property
    def tokens(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (self.choice.get("logprobs") or {"content": []})["content"]
        return found


@contextmanager
def asking(server: Running, body: dict[str, Any]) -> Iterator[socket.socket]:
    """The connection on which a request was sent."""
    raw = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(raw)}"
    with server.connect() as connection:
        connection.settimeout(600)
        connection.sendall(f"{head}\r\n\r\n".encode() + raw)
        yield connection


def ask(server: Running, body: dict[str, Any]) -> Answer:
    """The answer to a request; whatever is no answer fails."""
    with asking(server, body) as connection:
        status, _, answer = read_answer(connection)
    assert status == 200, answer
    return Answer(answer["choices"][0])


def difference(alone: Answer, other: Answer) -> str | None:
    """How two answers differ by more than rounding; None if they do not.

    Up to the first token that differs, log probabilities must be equal within `ROUNDING`. That
    token must be an alternative that was as likely within `ROUNDING` when the request was alone;
    after it, texts may differ. The same holds for requests with a seed.
    """
    for place, (a, b) in enumerate(zip(alone.tokens, other.tokens, strict=False)):
        if a["token"] == b["token"]:
            if abs(a["logprob"] - b["logprob"]) > ROUNDING:
                return f"token {place}: {a['logprob']} alone, {b['logprob']} among others"
            continue
        likely = {top["token"]: top["logprob"] for top in a["top_logprobs"]}
        if b["token"] not in likely or a["logprob"] - likely[b["token"]] > ROUNDING:
            return f"token {place}: {a['token']!r} alone, {b['token']!r} among others"
        return None
    if alone.message != other.message:
        return f"{alone.message} alone, {other.message} among others"
    return None


@dataclass
class Report:
    """What a load test found."""

    answered: dict[str, int] = field(default_factory=dict)
    equal: int = 0
    tied: int = 0
    vanished: int = 0
    failures: list[str] = field(default_factory=list)


def load(server: Running, clients: int, seconds: float) -> Report:
    """Let clients ask for some time, after each question was asked alone."""
    asked = questions()
    alone = {name: ask(server, body) for name, body in asked.items()}
    report, lock = Report(), threading.Lock()
    until = time.monotonic() + seconds

    def work(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < until and not report.failures:
            if rng.random() < 0.1:
                vanish(server, rng)
                with lock:
                    report.vanished += 1
                continue
            name = rng.choice(list(asked))
            try:
                answer = ask(server, asked[name])
                problem = difference(alone[name], answer)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            with lock:
                kind = name.split()[0]
                report.answered[kind] = report.answered.get(kind, 0) + 1
                if problem:
                    report.failures.append(f"{name}: {problem}")
                elif answer.message == alone[name].message:
                    report.equal += 1
                else:
                    report.tied += 1

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(work, range(clients)))
    return report


def vanish(server: Running, rng: random.Random) -> None:
    """A client that disconnects, while its prompt is read or its reply is written."""
    with asking(server, {"messages": prompt(rng.choice([5, 110]), rng.randrange(10**6, 10**9))}):
        time.sleep(rng.uniform(0.0, 1.0))


def first_token(server: Running, body: dict[str, Any]) -> float:
    """Seconds until the first text of a stream."""
    begun = time.monotonic()
    with asking(server, body | {"stream": True}) as connection:
        for line in connection.makefile(encoding="utf-8"):
            if line.startswith("data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                if delta.get("content"):
                    return time.monotonic() - begun
    raise AssertionError("no text came")


@dataclass
class FirstTokens:
    """Seconds until the first token of short requests: idle, and while a long prompt is read."""

    idle: list[float]
    reading: list[float]

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return statistics.median(self.reading) / statistics.median(self.idle)


def first_tokens(server: Running, count: int) -> FirstTokens:
    """Measure first tokens, in turn on the idle server and while it reads a long prompt."""
    seeds = iter(range(10**6, 10**7))
    found = FirstTokens([], [])

    def short() -> float:
        return first_token(server, {"messages": prompt(6, next(seeds)), "max_tokens": 2})

    short()
    for _ in range(count):
        found.idle.append(short())
        with ThreadPoolExecutor(1) as pool:
            long = pool.submit(ask, server, {"messages": prompt(115, next(seeds)), "max_tokens": 1})
            assert server.wait(lambda: bool(server.server.generator.loop._waiting))
            time.sleep(random.uniform(0, 0.3))
            seconds = short()
            if not long.done():  # else its prompt may have been read before
                found.reading.append(seconds)
            long.result()
    return found
