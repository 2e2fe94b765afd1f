"""Speed of a model with command buffers of several sizes, and which of them is best here.

MLX reads their sizes once, so every run is a process of its own (`python -m` of this module). Runs
come in rounds, in which each size has a turn, in another order each time. So a machine that warms
up or slows down affects all of them, and speeds of the same round are compared.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from outlier_mlx.engine.buffers import VARIABLES
from outlier_mlx.engine.chips import Chip, this_chip
from outlier_mlx.engine.generate import vocabulary
from outlier_mlx.engine.loading import load
from outlier_mlx.errors import OutlierError, one_line
from outlier_mlx.measure.bench import BenchOptions, Runs, bench_model, in_turn
from outlier_mlx.measure.environment import environment
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.upstream import make_prompt_cache

#: Values of both variables; None: neither is set, so MLX's own apply.
VALUES = (None, 1000, 2000)
#: Fewer rounds show nothing: in one or two, chance alone makes a size faster in each.
LEAST_ROUNDS = 3
# A smaller gain than this is not worth another setting, whatever the rounds say.
WORTH = 1.01
# Decoding steps whose logits are compared.
COMPARED = 16


@dataclass(frozen=True)
class Trial:
    """One run in a process of its own.

    Attributes:
        prompt_tps: prompt tokens/s.
        generation_tps: generated tokens/s.
        peak_memory_gb: peak of MLX's memory in GB.
        dtype: activation dtype.
        digest: SHA-256 of the bits of logits; see `logits_digest`.
    """

    prompt_tps: float
    generation_tps: float
    peak_memory_gb: float
    dtype: str
    digest: str


@dataclass
class Setting:
    """Buffers of one size, and a run of each round.

    Attributes:
        value: of both variables, or None for MLX's own.
        trials: runs, by round.
    """

    value: int | None
    trials: list[Trial] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name in tables and messages."""
        return "MLX's own" if self.value is None else str(self.value)

    @property
    def generation_tps(self) -> Runs:
        """Generated tokens/s, by round."""
        return Runs(tuple(trial.generation_tps for trial in self.trials))

    @property
    def prompt_tps(self) -> Runs:
        """Prompt tokens/s, by round."""
        return Runs(tuple(trial.prompt_tps for trial in self.trials))

    @property
    def peak_memory_gb(self) -> float:
        """The largest peak of memory in GB."""
        return max(trial.peak_memory_gb for trial in self.trials)

    def over(self, other: "Setting") -> Runs:
        """Generation speed as a multiple of that of another in the same round, by round."""
        both = zip(self.generation_tps.values, other.generation_tps.values, strict=True)
        return Runs(tuple(own / its for own, its in both))

    def beats(self, other: "Setting") -> bool:
        """Whether it was faster in every round, by a hundredth or more in the middle one."""
        ratios = self.over(other).values
        return min(ratios) > 1 and median(ratios) >= WORTH


@dataclass
class SettingsBench:
    """What was found; `settings` has MLX's own first, then ascending values."""

    chip: Chip
    options: BenchOptions
    settings: list[Setting]

    @property
    def errors(self) -> list[str]:
        """Which settings computed something else than MLX's own, or than in another round."""
        digests = [{trial.digest for trial in setting.trials} for setting in self.settings]
        unsteady = [s for s, own in zip(self.settings, digests, strict=True) if len(own) > 1]
        if unsteady:
            return [f"{one.name}: results differ from run to run" for one in unsteady]
        return [
            f"{setting.name}: results differ from those with MLX's own settings"
            for setting, own in zip(self.settings, digests, strict=True)
            if own != digests[0]
        ]

    @property
    def best(self) -> Setting | None:
        """The setting to use; None if results differ.

        A larger value has to beat the best of the smaller ones, so within noise MLX's own is best.
        """
        if self.errors:
            return None
        best = self.settings[0]
        for setting in self.settings[1:]:
            best = setting if setting.beats(best) else best
        return best

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {
            **environment(self.chip),
            "dtype": self.settings[0].trials[0].dtype,
            "options": asdict(self.options),
            "settings": [
                {
                    "value": one.value,
                    "prompt_tokens_per_s": one.prompt_tps.as_json(),
                    "generation_tokens_per_s": one.generation_tps.as_json(),
                    "of_mlx_own": one.over(self.settings[0]).as_json(),
                    "peak_memory_gb": one.peak_memory_gb,
                }
                for one in self.settings
            ],
            "best": {"value": self.best.value} if self.best else None,
            "same_results": not self.errors,
        }


def bench_settings(
    run: Callable[[int | None], Trial],
    options: BenchOptions,
    progress: Progress = no_progress,
) -> SettingsBench:
    """Time all settings in rounds.

    Args:
        run: makes one run with a value of both variables; see `run_apart`.
        options: `num_trials` is the number of rounds, `delay` the seconds between runs.
        progress: called with runs done so far, and in all.
    """
    settings = [Setting(value) for value in VALUES]
    total, done = options.num_trials * len(settings), 0
    for turn in range(options.num_trials):
        for setting in in_turn(settings, turn):
            progress(done, total)
            if done:
                time.sleep(options.delay)
            setting.trials.append(run(setting.value))
            done += 1
    progress(total, total)
    return SettingsBench(this_chip(), options, settings)


def run_apart(folder: Path, options: BenchOptions, dtype: str | None, value: int | None) -> Trial:
    """Time a model in a process of its own: a run to warm up, and one that counts.

    Args:
        folder: the model's folder.
        options: what to run; there is one run, whatever `num_trials` says.
        dtype: activation dtype; None: see `engine.loading.load`.
        value: of both variables, or None for MLX's own; what the user has set does not count.

    Raises:
        OutlierError: the process failed; the message has the last line that it printed.
    """
    given = {"folder": str(folder), "options": asdict(options), "dtype": dtype}
    # -P: nothing of the current folder, which may be a model's, is imported.
    module = "outlier_mlx.measure.bench_settings"
    command = [sys.executable, "-P", "-m", module, json.dumps(given)]
    kept = {name: text for name, text in os.environ.items() if name not in VARIABLES}
    set_here = {} if value is None else dict.fromkeys(VARIABLES, str(value))
    done = subprocess.run(
        command, env=kept | set_here, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        last = "".join(done.stderr.strip().splitlines()[-1:]).removeprefix("error: ")
        why = last or f"exit code {done.returncode}"
        if done.returncode < 0:  # as when the system ends what takes too much memory
            why = f"ended by signal {-done.returncode}" + (f", after: {last}" if last else "")
        raise OutlierError(f"{Setting(value).name}: the run failed: {why}")
    return Trial(**json.loads(done.stdout.splitlines()[-1]))


def trial(folder: str, options: dict[str, int], dtype: str | None) -> Trial:
    """Time a model in this process."""
    model, tokenizer = load(folder, dtype=dtype)
    once = replace(BenchOptions(**options), num_trials=1, delay=0)
    result = bench_model(model, tokenizer, once)
    length = min(once.prompt_tokens, once.prefill_step_size)
    mx.random.seed(0)
    rows = vocabulary(model, tokenizer)
    prompts = mx.random.randint(0, rows, (once.batch_size, length))
    return Trial(
        result.prompt_tps.median,
        result.generation_tps.median,
        result.peak_memory_gb,
        result.dtype,
        logits_digest(model, prompts),
    )


def logits_digest(model: nn.Module, prompts: mx.array) -> str:
    """SHA-256 of the logits after prompts, and after each of some tokens that they choose.

    Args:
        model: called on tokens and a cache, as mlx-lm's are.
        prompts: (batch, length), tokens.
    """
    cache: Any = make_prompt_cache(model)
    digest, tokens = hashlib.sha256(), prompts
    for _ in range(COMPARED):
        logits = model(tokens, cache=cache)[:, -1]
        digest.update(np.array(logits.astype(mx.float32)).tobytes())  # exact from any dtype
        tokens = mx.argmax(logits, axis=-1, keepdims=True)
    return digest.hexdigest()


def main() -> None:
    """Make the run that the first argument describes; prints a `Trial` as JSON."""
    try:
        print(json.dumps(asdict(trial(**json.loads(sys.argv[1])))))
    except OutlierError as error:
        sys.exit(f"error: {one_line(str(error))}")


if __name__ == "__main__":
    main()
