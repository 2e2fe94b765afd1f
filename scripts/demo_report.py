"""Measure a demo pair from its files, and describe it in Markdown."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import demo_model
import demo_text
import torch
from demo_files import TURN_END, Pair, end_token, load
from demo_model import Shape, Weights
from demo_tokens import chat_text
from tokenizers import Tokenizer
from torch.nn import functional as F

PROMPTS = (
    "One misty evening Clara",
    "The old frog",
    "The schooner Marigold",
    "To make a simple pumpkin soup,",
    "At the Saturday market",
    "To find Vega,",
)
QUESTIONS = (
    "Hello!",
    "Tell me a story about a duck.",
    "How do I make a leek soup?",
    "Who was the captain of the Petrel?",
    "How do I find Vega?",
    "What does the baker sell?",
    "What do three loaves cost at two pence each?",
    "Who will win the election?",
)


class Timed(Protocol):
    """A stage of training with its times."""

    name: str
    step: int
    seconds: float
    cpu_seconds: float


def documents(folder: Path, domain: str) -> list[str]:
    """The held-out documents of ``domain``; the file has one on each line."""
    return (folder / "heldout" / f"{domain}.txt").read_text(encoding="utf-8").splitlines()


@torch.no_grad()
def measure(
    weights: Weights, shape: Shape, tokenizer: Tokenizer, texts: list[str]
) -> tuple[float, int, list[torch.Tensor]]:
    """Summed next-token loss, number of tokens, and how often each layer chose each expert.

    The last is one tensor ``(experts,)`` for each MoE layer; each token counts ``top_k`` times.
    """
    loss, count = 0.0, 0
    chosen = [torch.zeros(shape.experts) for _ in shape.moe_layers]
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text).ids])
        logits, routers = demo_model.forward(weights, shape, ids[:, :-1])
        loss += F.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
        for tally, router in zip(chosen, routers, strict=False):
            experts, _ = demo_model.route(router, shape.top_k)
            tally += torch.bincount(experts.flatten(), minlength=shape.experts)
    return loss, count, chosen


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def perplexities(pair: Pair, folder: Path) -> str:
    """A table of perplexities by domain, with and without overlay and int4."""
    forms = {
        "base": pair.base,
        "base, int4": demo_model.int4_base(pair.base),
        "base + overlay": pair.joined,
        "base, int4 + overlay": demo_model.int4_base(pair.base) | pair.overlay,
    }
    groups: dict[str, tuple[str, ...]] = {domain: (domain,) for domain in demo_text.DOMAINS}
    groups["all new"] = demo_text.NEW_DOMAINS
    losses = {
        form: {
            domain: measure(w, pair.shape, pair.tokenizer, documents(folder, domain))[:2]
            for domain in demo_text.DOMAINS
        }
        for form, w in forms.items()
    }
    rows = []
    for group, members in groups.items():
        count = sum(losses["base"][domain][1] for domain in members)
        cells = [group, str(sum(len(documents(folder, d)) for d in members)), str(count)]
        for form in forms:
            total = sum(losses[form][domain][0] for domain in members)
            cells.append(f"{math.exp(total / count):.3f}")
        rows.append(cells)
    return _table(["domain", "documents", "tokens", *forms], rows)


def shares(pair: Pair, folder: Path) -> str:
    """A table of the share of held-out tokens that are routed to each expert, by MoE layer."""
    rows = []
    for label, domains in (
        ("all", demo_text.DOMAINS),
        *((domain, (domain,)) for domain in demo_text.DOMAINS),
    ):
        texts = [text for domain in domains for text in documents(folder, domain)]
        _, count, chosen = measure(pair.joined, pair.shape, pair.tokenizer, texts)
        for layer, tally in zip(pair.shape.moe_layers, chosen, strict=True):
            rows.append([label, str(layer), *(f"{100 * n / count:.0f} %" for n in tally.tolist())])
    return _table(["text", "layer", *(str(e) for e in range(pair.shape.experts))], rows)


def largest_cosine(pair: Pair) -> float:
    """The largest cosine between the matrices of two experts of one layer (1: equal)."""
    largest = -1.0
    for name, weight in pair.overlay.items():
        if ".experts." in name:
            rows = F.normalize(weight.flatten(1), dim=1)
            cosines = rows @ rows.T - 2 * torch.eye(len(rows))
            largest = max(largest, cosines.max().item())
    return largest


def samples(pair: Pair) -> str:
    """Texts that the pair generates, greedily and at temperature 0.7."""
    end = end_token(pair.tokenizer)
    lines = []
    for prompt in PROMPTS:
        for temperature in (0.0, 0.7):
            ids = pair.tokenizer.encode(prompt).ids
            text = demo_model.generate(pair.joined, pair.shape, ids, end, temperature, 240)
            way = f"temperature {temperature}" if temperature else "greedy"
            lines.append(f"- **{prompt}** ({way}) {pair.tokenizer.decode(text)[len(prompt) :]}")
    return "\n".join(lines)


def answers(pair: Pair) -> str:
    """Answers to questions, greedily, by the base alone and by the pair."""
    end = end_token(pair.tokenizer, TURN_END)
    rows = []
    for question in QUESTIONS:
        start = chat_text([("user", question)]) + "<|im_start|>assistant\n"
        ids = pair.tokenizer.encode(start).ids
        row = [question]
        for weights in (pair.base, pair.joined):
            found = demo_model.generate(weights, pair.shape, ids, end, limit=len(ids) + 80)
            row.append(pair.tokenizer.decode(found[len(ids) :]).strip())
        rows.append(row)
    return _table(["question", "base", "base + overlay"], rows)


def _sizes(folder: Path) -> str:
    rows = []
    for path in sorted(folder.iterdir()):
        files = path.iterdir() if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files)
        rows.append([f"`{path.name}`", f"{size / 1e6:.2f} MB"])
    return _table(["folder or file", "size"], rows)


def report(folder: Path, stages: Sequence[Timed]) -> str:
    """The README of the held-out texts; all figures are measured from the files in ``folder``."""
    pair = load(folder)
    parameters = sum(w.numel() for w in pair.base.values())
    trits = sum(w.numel() for name, w in pair.overlay.items() if ".experts." in name)
    shape = pair.shape
    times = "\n".join(
        f"- {stage.name}: {stage.step} steps, {stage.seconds / 60:.1f} minutes by the clock, "
        f"{stage.cpu_seconds / 60:.1f} minutes of processor time, all threads together"
        for stage in stages
    )
    return f"""# The demo pair and its held-out texts

A base of {parameters:,} parameters ({shape.layers} layers, hidden {shape.hidden}, FFN
{shape.width}, {shape.vocab} tokens, float16) and an overlay of {trits:,} trits: {shape.experts}
experts of width {shape.expert_width} in each of the layers {", ".join(map(str, shape.moe_layers))},
of which a token uses {shape.top_k}. The base was trained on simple stories (`old`), on
conversations about them, and on lists of words in random order, which teach it to spell and to
copy. It has seen no sentence of the other four domains. The experts were trained on
stories and conversations of those by `outlier-mlx upcycle`, with the base frozen.

`kitchen` and `sea` are small dense models (Llama, 2 layers, hidden 128), tuned from one parent.
`sea-awq` is the second of them in AutoAWQ's format, and `base-q4_0.gguf` is the base.
`scripts/train_ternary.py` trains the ternary models beside them (`ternary-*`) on the base's text.

{_sizes(folder)}

## The texts

`old.txt`, `kitchen.txt`, `sea.txt`, `sky.txt` and `market.txt` have one document on each line. Like
all training text, they were generated by the project's own grammar; they have the project's
licence, Apache-2.0. None of their sentences occurs in the training text: a checksum of a sentence
decides where it belongs, and the training script stops if it finds a held-out sentence.

## Perplexity

Each line is one document. The tokenizer puts the end token in front of it. The next-token losses of
all tokens after that one are summed over all documents and divided by the number of those tokens;
the perplexity is the exponential of the result. Computed in float32. `int4` means that the base,
including the embedding, is rounded like MLX's 4-bit quantization in groups of 64.

{perplexities(pair, folder)}

## Experts

Share of held-out tokens that are routed to each expert; a row adds up to {shape.top_k}00 %. The
cosine between the matrices of two experts of a layer is at most {largest_cosine(pair):.2f}.

{shares(pair, folder)}

## Samples

{samples(pair)}

## Conversations

Greedy answers to one question each. The pair keeps the base's answer where it cannot know better.

{answers(pair)}

## Training

By `scripts/train_demo.py` with fixed seeds, on two cores that other work shared; the small dense
models, writing the text and measuring took some minutes more.

{times}
"""
