"""The memory that a process with paged experts really takes, as its system counts it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from outlier_mlx.engine.paging.slots import slot_nbytes
from outlier_mlx.models.config import parse_config
from outlier_mlx.models.stored import expected_tensors
from tests.large import CONFIG_14B
from tests.program import ROOT, run_command, run_python

# 96 experts of 2.5 MB in the affine form, 236 MB in all; beside them there is little.
SIZES: dict[str, object] = {
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "moe_layers": [*range(6)],
    "num_experts": 16,
    "moe_intermediate_size": 2560,
    "quantization": None,
    "dtype": "float32",
}
TOTAL = 6 * 16
# Bytes that a process may take beyond its plan: Python's objects, and what allocators keep. The
# interpreter and MLX's code are not in it. On a CPU, 13 to 31 MB of it were measured.
OVERHEAD = 48 << 20

RUN = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.generate import generate_step
from outlier_mlx.engine.loading import load_model
from outlier_mlx.engine.needs import Use
from outlier_mlx.engine.paging.budget import ALL, ExpertMemory
from outlier_mlx.engine.paging.paged import store_of
from outlier_mlx.engine.plan import plan

def peak():
    # getrusage would begin with what the parent had.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

folder, slots = Path(sys.argv[1]), int(sys.argv[2])
mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))
before = peak()
memory = ExpertMemory(slots=slots) if slots else ALL
planned = plan(folder, Use(64, step=256), memory)
model, _ = load_model(folder, expert_memory=planned)
for _ in generate_step(mx.arange(60) % 500, model, max_tokens=4, prefill_step_size=256):
    pass
read = store_of(model).statistics.bytes_read if slots else 0
print(peak() - before, planned.needed, read)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tier with random weights, in one file."""
    folder = tmp_path_factory.mktemp("tier")
    raw = CONFIG_14B | SIZES
    (folder / "config.json").write_text(json.dumps(raw))
    rng = np.random.default_rng(0)
    tensors = {}
    for name, (shape, dtypes) in expected_tensors(parse_config(raw), set()).items():
        if dtypes[0] == "U8":
            tensors[name] = rng.integers(0, 243, shape, np.uint8)
        elif name.endswith("norm.weight"):
            tensors[name] = np.ones(shape, np.float32)
        else:
            tensors[name] = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_process_stays_within_the_plan(folder: Path) -> None:
    expert = slot_nbytes(1024, 2560, packed=False)
    taken = {}
    for slots in 0, 16, 48:
        peak, planned, read = map(int, run_python(RUN, folder, slots).out.split())
        taken[slots] = peak
        assert peak <= planned + OVERHEAD, slots
        assert (read > 0) == (slots > 0)
    assert taken[48] - taken[16] == pytest.approx(32 * expert, abs=OVERHEAD)
    # With all experts in memory, their packed rows are there, too.
    assert taken[0] - taken[16] > (TOTAL - 16) * expert


@pytest.mark.slow
def test_the_benchmark_of_steps() -> None:
    script = ROOT / "scripts" / "bench_paging.py"
    told = run_command(sys.executable, script, "--steps", 5).out.splitlines()
    names = [line.partition(": ")[0] for line in told]
    assert names == ["a step without paging", "slots", "100 %", "again"]
