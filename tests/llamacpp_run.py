"""What llama.cpp makes of a GGUF file; run by a Python that has `llama_cpp`, and nothing of ours.

Reads a job from stdin as JSON (the file, sequences of tokens, texts), and writes to a `.npz` file
the logits of every token, and to stdout, as JSON, the tokens of the texts and the chat template.
"""

from __future__ import annotations

import ctypes
import json
import sys

import llama_cpp
import numpy as np


def logits(model: object, tokens: list[int]) -> np.ndarray:
    """Float32 (tokens, vocabulary), with keys and values in float32."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(256, len(tokens))
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = 0
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for n, token in enumerate(tokens):
        batch.token[n], batch.pos[n], batch.logits[n] = token, n, 1
        batch.n_seq_id[n], batch.seq_id[n][0] = 1, 0
    assert llama_cpp.llama_decode(context, batch) == 0
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = [
        np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, n), (vocab,)).copy()
        for n in range(len(tokens))
    ]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return np.stack(rows)


def tokenized(model: object, text: str, special: bool) -> list[int]:
    """The tokens of a text; `special`: with those that every text has around it."""
    vocab = llama_cpp.llama_model_get_vocab(model)
    data = text.encode()
    room = (llama_cpp.llama_token * (len(data) + 8))()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), room, len(room), special, True)
    assert count >= 0
    return list(room[:count])


def main() -> None:
    job = json.load(sys.stdin)
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    if not job.get("loud"):
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(job["model"].encode(), params)
    assert model, "llama.cpp does not load it"
    found = [logits(model, tokens) for tokens in job["tokens"]]
    np.savez(job["out"], *found)
    template = llama_cpp.llama_model_chat_template(model, None)
    vocab = llama_cpp.llama_model_get_vocab(model)
    answer = {
        "texts": [tokenized(model, text, False) for text in job["texts"]],
        "whole": [tokenized(model, text, True) for text in job["texts"][:20]],
        "template": template.decode() if template else None,
        "eos": llama_cpp.llama_vocab_eos(vocab),
        "ends": [n for n in job["ends"] if llama_cpp.llama_vocab_is_eog(vocab, n)],
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
