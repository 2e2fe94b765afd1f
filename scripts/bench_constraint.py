"""What a constraint costs for each token: on the embedded pair, and with a large vocabulary.

    python scripts/bench_constraint.py [--runs 7] [--tokens 120] [--vocabulary 150000]

First, texts of the embedded pair without and with a JSON schema, in turns, so that a busy machine
slows both: the medians of milliseconds a token, and the median of the differences between
neighbours. The schema is a list of texts with no end in sight, and without a schema nothing ends a
text, so all are equally long.

Then, without a model, what the logits processor takes for each token of random answers to some
schemas: for the pair's vocabulary, and for a made-up one of the pair's tokens and of pieces of
words. Printed are the time to compile the schema, and the median, the 90th and 99th percentile and
the maximum of the time for a token. These are times of the processor that this thread had, which
depend less on what else the machine does; the last column is the median of the wall time of what
MLX does with a mask, which is the same for all schemas.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer as Backend

import outlier_mlx
from outlier_mlx.cli.showcase import FOLDER
from outlier_mlx.engine.constraint import ConstraintError, Grammars
from outlier_mlx.engine.generate import vocabulary
from outlier_mlx.engine.loading import load_tokenizer
from outlier_mlx.engine.steps import Steps

TEXT = {"type": "string"}
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "born": {"type": "string", "format": "date"},
        "kind": {"enum": ["star", "planet", "moon", "comet"]},
        "magnitude": {"type": "number", "minimum": -30, "maximum": 30},
        "notes": {"type": "array", "items": TEXT, "maxItems": 5},
    },
    "required": ["name", "born", "kind", "magnitude", "notes"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "any object": {"type": "object"},
    "record": RECORD,
    "list of records": {"type": "array", "items": RECORD},
    "200 properties": {"type": "object", "properties": {f"field {n}": TEXT for n in range(200)}},
    "1000 names": {"type": "array", "items": {"enum": [f"name {n}" for n in range(1000)]}},
}
WIDTHS = (11, 11, 10, 10, 10, 9)
ENDLESS = {"type": "array", "items": TEXT, "minItems": 1000}


def compare(model: Any, grammars: Grammars, runs: int, tokens: int) -> tuple[float, ...]:
    """Milliseconds a token without and with a schema, and what it adds; one pair is not counted."""
    prompt = grammars.tokenizer.encode("How do I find Vega?")
    constraint = grammars.schema(ENDLESS)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(runs + 1):
        for found, processors in zip(times, ([], [constraint.start(prompt)]), strict=True):
            steps = Steps(model, prompt, processors=processors, max_tokens=tokens)
            steps.step()
            begun = time.perf_counter()
            while steps.finish_reason is None:
                steps.step()
            if number:
                found.append(1000 * (time.perf_counter() - begun) / (tokens - 1))
    added = [held - plain for plain, held in zip(*times, strict=True)]
    return median(times[0]), median(times[1]), median(added)


def made_up(folder: Path, count: int) -> Any:
    """A byte-level tokenizer with so many tokens: the pair's, and pieces of words and numbers."""
    backend = Backend.from_file(str(FOLDER / "base" / "tokenizer.json"))
    chance = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    known = set(backend.get_vocab())
    pieces: dict[str, None] = {}
    while len(known) + len(pieces) < count:
        length = min(12, 2 + int(chance.expovariate(0.25)))
        word = "".join(letters[int(26 * chance.random() ** 2)] for _ in range(length))
        piece = chance.choice(("Ġ", "", "", "")) + chance.choice((word, word.capitalize()))
        if piece not in known:
            pieces[piece] = None
    content = json.loads(backend.to_str())
    vocab = content["model"]["vocab"]
    first = max([*vocab.values(), *(token["id"] for token in content["added_tokens"])]) + 1
    vocab |= {piece: first + number for number, piece in enumerate(pieces)}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for name in ("tokenizer_config.json", "config.json"):
        (folder / name).write_bytes((FOLDER / "base" / name).read_bytes())
    return load_tokenizer(folder, {})


def answers(
    grammars: Grammars, schema: dict[str, Any], tokens: int
) -> Iterator[tuple[float, float]]:
    """Seconds for each of some tokens: of the processor, and of MLX."""
    chance = np.random.default_rng(0)
    constraint = grammars.schema(schema)
    processor, written = constraint.start([]), [0]
    for _ in range(tokens):
        logits = mx.array(chance.normal(size=(1, grammars.width)).astype(np.float32))
        mx.eval(logits)
        context = mx.array(written)
        mx.eval(context)
        begun = time.thread_time()
        held = processor(context, logits)
        taken = time.thread_time() - begun
        started = time.perf_counter()
        mx.eval(held)
        yield taken, time.perf_counter() - started
        token = int(mx.argmax(held))
        if token in grammars.tokenizer.eos_token_ids:
            processor, written = constraint.start([]), [0]
        else:
            written.append(token)


def report(name: str, grammars: Grammars, tokens: int) -> None:
    """Print the costs of all schemas with a vocabulary."""
    begun = time.perf_counter()
    grammars.schema({"type": "null"})
    print(f"{name}: {grammars.width} tokens, read in {time.perf_counter() - begun:.2f} s")
    heads = zip(
        ("compile ms", "median us", "90 % us", "99 % us", "most us", "MLX us"), WIDTHS, strict=True
    )
    print(f"  {'':18}" + "".join(f"{head:>{width}}" for head, width in heads))
    for schema_name, schema in SCHEMAS.items():
        begun = time.thread_time()
        grammars.schema(schema)
        compiled = time.thread_time() - begun
        try:
            taken, masked = zip(*answers(grammars, schema, tokens), strict=True)
        except ConstraintError as error:
            print(f"  {schema_name:18}{error}")
            continue
        cuts = quantiles(taken, n=100)
        figures = [median(taken), cuts[89], cuts[98], max(taken), median(masked)]
        row = "".join(f"{1e6 * f:{w}.0f}" for f, w in zip(figures, WIDTHS[1:], strict=True))
        print(f"  {schema_name:18}{1e3 * compiled:{WIDTHS[0]}.1f}{row}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tier = Path(folder) / "tier"
        outlier_mlx.convert(FOLDER / "overlay", FOLDER / "base", tier, tier="q4")
        model, tokenizer = outlier_mlx.load(tier)
        grammars = Grammars(tokenizer, vocabulary(model, tokenizer))
        plain, held, added = compare(model, grammars, options.runs, options.tokens)
        print(f"embedded pair: {plain:.2f} ms a token, {held:.2f} with a schema: {added:+.2f} ms")
        report("its vocabulary", grammars, options.tokens)
        large = made_up(Path(folder) / "tokenizer", options.vocabulary)
        report("a made-up one", Grammars(large, options.vocabulary), options.tokens)


if __name__ == "__main__":
    main()
