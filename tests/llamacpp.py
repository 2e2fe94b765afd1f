"""llama.cpp as another program computes with it: `llamacpp_run.py` in a Python that has it.

`llama-cpp-python` is built from source when it is installed, which takes many minutes, so the
developers' tools do not include it. Any Python that has it will do: OUTLIER_LLAMA_CPP names it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

VARIABLE = "OUTLIER_LLAMA_CPP"
_SCRIPT = Path(__file__).with_name("llamacpp_run.py")


@dataclass(frozen=True)
class Found:
    """What llama.cpp says of a file: see `llamacpp_run.py`."""

    logits: list[np.ndarray]
    texts: list[list[int]]
    whole: list[list[int]]
    template: str | None
    ends: list[int]


@cache
def python() -> str | None:
    """A Python that has `llama_cpp`; None if there is none."""
    name = os.environ.get(VARIABLE, sys.executable)
    probe = [name, "-c", "import llama_cpp"]
    return name if subprocess.run(probe, capture_output=True).returncode == 0 else None


def require_llama_cpp() -> None:
    """Skip the test if there is no llama.cpp to ask."""
    if python() is None:
        pytest.skip(
            f"llama-cpp-python is not installed: pip install llama-cpp-python (it is built from"
            f" source), or {VARIABLE}=/path/to/a/python that has it"
        )


def ask(model: Path, tokens: list[list[int]], texts: list[str] | None = None) -> Found:
    """Load a file in llama.cpp, and ask for logits and tokens."""
    name, out = python(), model.with_suffix(".npz")
    assert name is not None
    job: dict[str, Any] = {"model": str(model), "tokens": tokens, "texts": texts or []}
    job |= {"out": str(out), "ends": list(range(300))}
    ran = subprocess.run(
        [name, str(_SCRIPT)], input=json.dumps(job), capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    said = json.loads(ran.stdout)
    with np.load(out) as arrays:
        logits = [arrays[key] for key in arrays.files]
    return Found(logits, said["texts"], said["whole"], said["template"], said["ends"])


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
