"""What paging costs a step when nothing has to be read, against the same model without paging.

    python scripts/bench_paging.py [MODEL] [--steps N]

Without MODEL, it is the embedded demo pair: its steps are so short that anything shows. Steps of a
few models take turns, in random order, on the same tokens with KV caches of their own. Medians of
the ratios of the steps of a turn are printed, with the range that holds the median of repeated
measurements nine times of ten (bootstrap).

- slots: paged, with a slot for every expert. A layer that has all its experts is not waited for.
- 100 %: `--expert-memory 100%`, which loads all experts as without paging.
- again: the model without paging once more, to show what is noise.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from outlier_mlx import convert
from outlier_mlx.cli.showcase import FOLDER
from outlier_mlx.engine.loading import load_model
from outlier_mlx.engine.paging.budget import ALL, ExpertMemory
from outlier_mlx.engine.paging.paged import store_of

PROMPT, WARM_UP = 64, 20


class Running:
    """A model in the middle of a text."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, make_prompt_cache(model)
        store = store_of(model)
        if store is not None:  # so that nothing is read while it is timed
            for layer in store.layers:
                store.enter(layer)
                store.ensure(layer, range(store.experts))
        tokens = mx.arange(PROMPT)[None] % 200
        self.token = mx.argmax(model(tokens, cache=self.cache)[:, -1:], axis=-1)
        mx.eval(self.token)

    def step(self) -> float:
        """Seconds of a step."""
        begun = time.perf_counter()
        self.token = mx.argmax(self.model(self.token, cache=self.cache)[:, -1:], axis=-1)
        mx.eval(self.token)
        return time.perf_counter() - begun


def measure(folder: Path, steps: int) -> None:
    """Time all models, and print ratios."""
    models = {
        "without paging": load_model(folder)[0],
        "slots": load_model(folder, expert_memory=ALL, always_page=True)[0],
        "100 %": load_model(folder, expert_memory=ExpertMemory(share=1.0))[0],
        "again": load_model(folder)[0],
    }
    running = {name: Running(model) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(WARM_UP + steps):
        for name in random.sample(list(running), len(running)):
            took = running[name].step()
            if turn >= WARM_UP:
                seconds[name].append(took)
    if len({int(one.token) for one in running.values()}) > 1:
        raise SystemExit("the texts differ")
    base = seconds.pop("without paging")
    print(f"a step without paging: {1e3 * statistics.median(base):.3f} ms, {steps} turns")
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(found, base, strict=True)]
        medians = sorted(
            statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(500)
        )
        low, high = medians[25], medians[475]
        print(f"{name}: {statistics.median(ratios):.4f} ({low:.4f} to {high:.4f})")


def main() -> None:
    """Measure the model that is given, or the demo's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args()
    random.seed(0)
    if given.model is not None:
        measure(given.model, given.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        tier = Path(folder) / "tier"
        convert(FOLDER / "overlay", FOLDER / "base", tier, tier="q4")
        measure(tier, given.steps)


if __name__ == "__main__":
    main()
