"""Time to the first token of a conversation's first and second message, served from kept KV caches.

    python scripts/bench_prefix.py [--runs 5] [--tokens 2000] [--long 30000]

A server of a model with random weights (Qwen2's form, 4 layers of 512) answers pairs of messages:
the first has so many tokens, and the second is the conversation with one more short message. Both
are streamed; measured is from sending the request to the first text. A third request is the second
one, to a new server that has the cache only on disk. Then: how long it takes to get a copy of a
kept cache of that many tokens, and of many more, beside a plain copy of as many bytes.
"""

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

import outlier_mlx
from outlier_mlx.serve.cache_dir import cache_dir
from outlier_mlx.serve.options import ServeOptions
from outlier_mlx.serve.prefix_cache import PrefixCache
from outlier_mlx.serve.server import Server

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.plain_models import SIZES, write_model

CONFIG = SIZES | {
    "model_type": "qwen2",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 8192,
}


@contextmanager
def serving(model: Path, kept: Path | None) -> Iterator[int]:
    """The port of a server."""
    where = None if kept is None else cache_dir(kept, 10**9, model, None, None)
    options = ServeOptions(port=0, cache_dir=where)
    server = Server("random", partial(outlier_mlx.load, model), options, lambda _: None, print)
    server.start()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.stop()


def first_token(port: int, prompt: list[int]) -> float:
    """Seconds from a request to the first event of its stream that has a choice."""
    connection = HTTPConnection("127.0.0.1", port)
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 4, "stream": True, "temperature": 0}
    begun = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body))
    response, seconds = connection.getresponse(), 0.0
    for line in response:
        if not seconds and line.startswith(b'data: {"'):
            seconds = time.perf_counter() - begun
    connection.close()
    return seconds


def conversations(model: Path, runs: int, count: int) -> None:
    """Print the times of the first message, of the second, and of the second after a restart."""
    with tempfile.TemporaryDirectory() as folder:
        prompts = [
            [5 + (i * 7 + run * 31 + i // 9) % 90 for i in range(count)] for run in range(runs)
        ]
        seconds: list[list[float]] = [[], [], []]
        with serving(model, Path(folder)) as port:
            first_token(port, [5] * 300)
            for prompt in prompts:
                seconds[0].append(first_token(port, prompt))
                seconds[1].append(first_token(port, [*prompt, *range(5, 25)]))
            time.sleep(1)
        with serving(model, Path(folder)) as port:
            first_token(port, [5] * 300)
            for prompt in prompts:
                seconds[2].append(first_token(port, [*prompt, *range(30, 50)]))
    names = ["first message", "second message", "second message, after a restart"]
    for name, found in zip(names, seconds, strict=True):
        ratio = median(later / first for later, first in zip(found, seconds[0], strict=True))
        print(f"{name}: {median(found) * 1000:.1f} ms ({ratio:.3f} of the first)")


def timed(action: Callable[[], Any]) -> float:
    """The median of five times, in seconds."""
    found = []
    for _ in range(5):
        begun = time.perf_counter()
        action()
        found.append(time.perf_counter() - begun)
    return median(found)


def copies(count: int) -> None:
    """Print how long `fetch` takes for so many tokens, without and with the copy."""
    cache = [KVCache() for _ in range(8)]
    for layer in cache:
        layer.update_and_fetch(*mx.zeros((2, 1, 4, count, 64), mx.float32))
    mx.eval([layer.state for layer in cache])
    tokens = [i % 250 for i in range(count)]
    kept = PrefixCache(None, None)
    begun = time.perf_counter()
    kept.keep(tokens, cache, "assistant")
    keeping = time.perf_counter() - begun

    def copied() -> None:
        found, _ = kept.fetch([*tokens, 1])
        mx.eval([layer.state for layer in found or []])

    plain = timed(lambda: mx.eval([array + 0 for layer in cache for array in layer.state[:2]]))
    lookup, whole = timed(lambda: kept.fetch([*tokens, 1])), timed(copied)
    print(
        f"{count} tokens, {kept.nbytes / 1e6:.0f} MB: keep {keeping * 1000:.1f} ms,"
        f" fetch {lookup * 1000:.1f} ms, with the copy {whole * 1000:.1f} ms;"
        f" a plain copy {plain * 1000:.1f} ms"
    )


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--long", type=int, default=30000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "random", CONFIG)
        conversations(model, arguments.runs, arguments.tokens)
    for count in (arguments.tokens, arguments.long):
        copies(count)


if __name__ == "__main__":
    main()
