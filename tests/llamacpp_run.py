"""What llama.cpp makes of a GGUF file; a program, since llama.cpp ends its process on an error.

`xllamacpp` is llama.cpp's own server as a Python module. It is asked over HTTP, by what the server
documents: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md

Reads a job from stdin and writes what it found to stdout, both as JSON; see `tests/llamacpp.py`.
"""

from __future__ import annotations

import json
import sys
from http.client import HTTPConnection
from typing import Any

import xllamacpp


def parameters(job: dict[str, Any]) -> xllamacpp.CommonParams:
    """One thread of the CPU, with keys and values in float32."""
    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.n_parallel = params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.no_extra_bufts = True  # weights as they are in the file
    params.n_gpu_layers = 0
    params.warmup = params.fit_params = False
    params.verbosity = 2  # warnings and errors
    params.port = 0  # any that is free
    return params


class Server:
    """llama.cpp's server of a model, in this process."""

    def __init__(self, params: xllamacpp.CommonParams) -> None:
        self._server = xllamacpp.Server(params)
        address = self._server.listening_address.removeprefix("http://")
        self._connection = HTTPConnection(address, timeout=120)

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer to a POST, or to a GET if there is nothing to say."""
        data = json.dumps(body).encode() if body else None
        self._connection.request("POST" if body else "GET", path, data)
        response = self._connection.getresponse()
        answer = response.read().decode()
        assert response.status == 200, f"{path}: {answer}"
        return json.loads(answer)

    def tokens(self, text: str, special: bool) -> list[int]:
        """The tokens of a text; `special`: with those that every text has around it."""
        return self.ask("/tokenize", content=text, add_special=special)["tokens"]

    def after(self, tokens: list[int], then: int, **options: Any) -> dict[str, Any]:
        """What the model makes of a prompt, with one token `then` after it, whatever it says."""
        forced = {"n_predict": 1, "logit_bias": [[then, 1000]]}
        return self.ask("/completion", prompt=tokens, **forced, **options)

    def log_probabilities(self, tokens: list[int], plain: int) -> list[list[float]]:
        """Of every next token after each of these, before any sampling.

        Each position goes on from the one before, but the last reads the whole prompt at once. A
        token `plain` comes next: with one that is part of a character, or that ends a text, the
        server tells no probabilities.
        """
        rows = []
        for count in range(1, len(tokens) + 1):
            every = {"n_probs": 1 << 20, "cache_prompt": count < len(tokens)}
            (found,) = self.after(tokens[:count], plain, **every)["completion_probabilities"]
            pairs = sorted((top["id"], top["logprob"]) for top in found["top_logprobs"])
            assert [number for number, _ in pairs] == list(range(len(pairs)))
            rows.append([value for _, value in pairs])
        return rows


def main() -> None:
    job = json.load(sys.stdin)
    server = Server(parameters(job))
    plain = server.tokens("a", False)[-1]
    prompt = ""
    if job["messages"]:
        prompt = server.ask("/apply-template", messages=job["messages"])["prompt"]
    answer = {
        "logs": [server.log_probabilities(tokens, plain) for tokens in job["tokens"]],
        "texts": [server.tokens(text, False) for text in job["texts"]],
        "whole": [server.tokens(text, True) for text in job["texts"][:20]],
        "template": server.ask("/props")["chat_template"],
        "ends": [n for n in job["ends"] if server.after([plain], n)["stop_type"] == "eos"],
        "prompt": server.tokens(prompt, True),
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
