"""llama.cpp as another program computes with it: `llamacpp_run.py` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_SCRIPT = Path(__file__).with_name("llamacpp_run.py")
# Messages of llama.cpp without a debugger's, and no Metal: its kernels are not compiled.
_SETTINGS = {"GGML_NO_BACKTRACE": "1", "GGML_METAL_DEVICES": "0"}


@dataclass(frozen=True)
class Found:
    """What llama.cpp says of a file.

    Attributes:
        logs: for each sequence of tokens, the log-probabilities (tokens, vocabulary) of the next.
        texts: the tokens of each text.
        whole: those of the first 20 texts, with the tokens that every text has around it.
        template: the chat template.
        prompt: the tokens of the messages, as this template writes them.
        ends: which of the tokens that were asked about end a reply.
    """

    logs: list[np.ndarray]
    texts: list[list[int]]
    whole: list[list[int]]
    template: str
    ends: list[int]
    prompt: list[int]


def ask(
    model: Path,
    tokens: list[list[int]],
    texts: list[str] | None = None,
    ends: list[int] | None = None,
    messages: list[dict[str, str]] | None = None,
) -> Found:
    """Load a file in llama.cpp, and ask for probabilities, tokens, ends of replies and a prompt.

    Raises:
        AssertionError: llama.cpp fails or ends; with the last that it said.
    """
    job: dict[str, Any] = {"model": str(model), "tokens": tokens, "texts": texts or []}
    job |= {"ends": ends or [], "messages": messages or []}
    ran = subprocess.run(
        [sys.executable, str(_SCRIPT)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | _SETTINGS,
    )
    assert ran.returncode == 0, f"llama.cpp: {ran.returncode}\n{ran.stderr[-2000:]}"
    said = json.loads(ran.stdout)
    return Found(**said | {"logs": [np.array(logs) for logs in said["logs"]]})


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Float64 log-probabilities of logits (..., vocabulary)."""
    below = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return below - np.log(np.exp(below).sum(-1, keepdims=True))


def in_float32(model: Path, out: Path) -> Path:
    """The same file with every quantized tensor as the numbers that it stands for.

    llama.cpp rounds activations to 8 bits for quantized weights, and to 16 bits for others of 16
    bits; with these numbers it computes in float32.
    """
    reader = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
