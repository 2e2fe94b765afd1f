"""Write a trace for `outlier-mlx bench --trace` of a model that nobody routed: a Markov chain.

In each layer, each of a token's experts stays with probability `--keep`; otherwise another one is
drawn, in proportion to 1 / rank^`--favour`, with ranks in random order. The sizes are those of a
14B base with 28 MoE layers, in int4 and 1.6 bits.
"""

import argparse
from pathlib import Path

import numpy as np

from outlier_mlx.measure.expert_trace import About, Trace, write_trace

HIDDEN, WIDTH = 5120, 13824
WEIGHTS = 3 * HIDDEN * WIDTH  # of an FFN
EXPERT_BYTES = int(WEIGHTS * 1.6 / 8)
BASE_BYTES = 7_900_000_000
INT4 = 4.5  # bits, with scales and biases


def draw(options: argparse.Namespace) -> np.ndarray:
    """The experts of each token and layer, (tokens, layers, k) uint8."""
    random = np.random.default_rng(options.seed)
    found = np.empty((options.tokens, options.layers, options.top_k), np.uint8)
    for layer in range(options.layers):
        liking = random.permutation(np.arange(1.0, options.experts + 1) ** -options.favour)
        now = random.choice(options.experts, options.top_k, False, liking / liking.sum())
        for token in range(options.tokens):
            for place in np.flatnonzero(random.random(options.top_k) >= options.keep):
                free = liking.copy()
                free[np.delete(now, place)] = 0
                now[place] = random.choice(options.experts, p=free / free.sum())
            found[token, layer] = now
    return found


def main() -> None:
    """Write the trace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--favour", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    about = About(
        model="made up",
        sha256="",
        text=f"a chain that keeps {options.keep:g}, favours {options.favour:g}",
        layers=tuple(range(options.layers)),
        experts=options.experts,
        top_k=options.top_k,
        expert_bytes=EXPERT_BYTES,
        base_bytes=BASE_BYTES,
        shared_bytes=int(options.layers * WEIGHTS * INT4 / 8),
    )
    experts = draw(options)
    ones = np.ones(experts.shape, np.float16)
    write_trace(Trace(about, experts, ones, np.ones(options.tokens, np.uint32)), options.file)


if __name__ == "__main__":
    main()
