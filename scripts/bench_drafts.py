"""What prompt lookup saves, or costs, for texts that repeat themselves and for ordinary ones.

    python scripts/bench_drafts.py [MODEL] [--turns N] [--length N]

Without MODEL, it is the embedded demo pair. The model computes all its steps, but the texts are
given: its logits are replaced, so that any model writes the same. Generation with and without
lookup takes turns, in random order. Printed are steps, drafted and accepted tokens of the last
turn, and the median of the ratios of times in a turn, without lookup over with it (above 1: lookup
is faster), with the range that holds the median of repeated measurements nine times of ten
(bootstrap). All of it is measured on this machine; times of a step depend on it.

- edit: a function is written again with one name changed.
- quotes: a summary that quotes sentences of the prompt.
- ordinary: held-out texts, of which the first is the prompt.
- random: random tokens, which repeat pairs by chance.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

import outlier_mlx
from outlier_mlx.cli.showcase import FOLDER, heldout
from outlier_mlx.engine.drafting import Drafting
from outlier_mlx.engine.steps import Counts, Steps

CODE = """def total(prices, discount):
    result = 0
    for price in prices:
        if price < 0:
            raise ValueError("a price is negative")
        result += price * (1 - discount)
    return result


def report(prices, discount):
    for number, price in enumerate(prices):
        print(number, price, price * (1 - discount))
    print("in total:", total(prices, discount))
"""
ARTICLE = [
    "The harbour was rebuilt in four years, and the old crane was kept as a landmark.",
    "Ships of more than two hundred metres can now enter it at every tide.",
    "The fishermen, who had feared for their places, got a quay of their own in the north.",
    "Next spring a museum will open in the warehouse where tea was once weighed.",
]


class Given(nn.Module):
    """A model that computes as ever, and then writes a given text.

    Args:
        model: the model.
        text: tokens of prompt and text.
    """

    def __init__(self, model: Any, text: list[int]) -> None:
        super().__init__()
        self._model, self._text = model, text

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        """Logits (1, length, vocab) that have the text's next tokens as the likeliest."""
        begun = cache[0].offset + 1
        logits = self._model(tokens, cache=cache)
        following = self._text[begun : begun + tokens.shape[1]]
        following += [0] * (tokens.shape[1] - len(following))
        wanted = mx.arange(logits.shape[-1]) == mx.array(following)[:, None]
        return mx.where(wanted, 1e4, logits)


def texts(tokenizer: Any, vocab: int, length: int) -> dict[str, tuple[list[int], list[int]]]:
    """Prompts and what is written after them, of that many tokens at most."""
    first, *others = (text for domain in heldout().values() for text in domain)
    quotes = f'It says: "{ARTICLE[2]}" And before that: "{ARTICLE[0]}" Then: "{ARTICLE[3]}"'
    written = {
        "edit": (f"Rename discount to rebate:\n{CODE}", CODE.replace("discount", "rebate")),
        "quotes": (" ".join(ARTICLE), f'{quotes} And: "{ARTICLE[1]}"'),
        "ordinary": (first, "\n".join(others)),
    }
    found = {
        name: (tokenizer.encode(prompt), tokenizer.encode(text)[:length])
        for name, (prompt, text) in written.items()
    }
    draw = random.Random(0)
    tokens = [draw.randrange(min(vocab, 200)) for _ in range(2 * length)]
    return found | {"random": (tokens[:length], tokens[length:])}


def write(
    model: Any, prompt: list[int], text: list[int], drafting: Drafting
) -> tuple[float, Counts]:
    """Seconds from the first token to the last, and what it took."""
    given = Given(model, prompt + text)
    cache = make_prompt_cache(model)
    steps = Steps(given, prompt, cache=cache, max_tokens=len(text), drafts=drafting.new(cache))
    while steps.read(512):
        pass
    found = steps.step()
    begun = time.perf_counter()
    while steps.finish_reason is None:
        found += steps.step()
    took = time.perf_counter() - begun
    if [chosen.token for chosen in found] != text:
        raise SystemExit("the text is not the one that was given")
    return took, steps.counts


def measure(folder: Path, turns: int, length: int) -> None:
    """Time all texts, and print a line for each."""
    model, tokenizer = outlier_mlx.load(folder)
    ways = {lookup: Drafting(model, lookup=lookup) for lookup in (True, False)}
    for name, (prompt, text) in texts(tokenizer, len(tokenizer.get_vocab()), length).items():
        ratios, counts, plain = [], Counts(), []
        for turn in range(turns + 1):
            took = {}
            for lookup in random.sample([True, False], 2):
                took[lookup], seen = write(model, prompt, text, ways[lookup])
                counts = seen if lookup else counts
            if turn:  # the first prepares
                ratios.append(took[False] / took[True])
                plain.append(took[False])
        medians = sorted(
            statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(500)
        )
        print(
            f"{name:9} {len(text):4} tokens in {counts.steps:4} steps,"
            f" {counts.accepted} of {counts.drafted} drafted tokens accepted;"
            f" {len(text) / statistics.median(plain):.0f} tokens/s without lookup;"
            f" time without / with: {statistics.median(ratios):.2f}"
            f" ({medians[25]:.2f} to {medians[474]:.2f})"
        )


def main() -> None:
    """Read the arguments, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--length", type=int, default=300, help="tokens of a text at most")
    given = parser.parse_args()
    if given.model is not None:
        measure(given.model, given.turns, given.length)
        return
    with tempfile.TemporaryDirectory() as scratch:
        tier = Path(scratch) / "tier"
        outlier_mlx.convert(FOLDER / "overlay", FOLDER / "base", tier, tier="q4")
        measure(tier, given.turns, given.length)


if __name__ == "__main__":
    main()
