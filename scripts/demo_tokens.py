"""The demo pair's training text as tokens: held-out and training documents, and the tokenizer."""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import demo_text

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WINDOW = 192  # tokens in a training row
HELDOUT_DOCUMENTS = {"old": 64, "kitchen": 20, "sea": 20, "sky": 20, "market": 20}
TALK_SHARE = 3  # one of 3 documents is a conversation


def heldout_texts() -> dict[str, list[str]]:
    """The held-out documents of each domain."""
    return {
        domain: [" ".join(story) for story in islice(demo_text.documents(domain, 0, True), count)]
        for domain, count in HELDOUT_DOCUMENTS.items()
    }


def chat_text(turns: list[tuple[str, str]]) -> str:
    """A conversation of roles and texts as the pair's chat template writes it."""
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def training_texts(domain: str, count: int, seed: int) -> Iterator[str]:
    """Training documents; raises RuntimeError if one has a sentence of the held-out texts.

    Conversations are not held out: they have sentences of their own.
    """
    heldout = {
        sentence
        for story in islice(demo_text.documents(domain, 0, True), HELDOUT_DOCUMENTS[domain])
        for sentence in story
    }
    talks = demo_text.conversations(domain, seed)
    for number, story in enumerate(islice(demo_text.documents(domain, seed), count)):
        if number % TALK_SHARE == 0:
            yield chat_text(next(talks))
            continue
        if not heldout.isdisjoint(story):
            raise RuntimeError(f"{domain}: a held-out sentence in the training text: {story}")
        yield " ".join(story)


def train_tokenizer(vocab: int, seed: int) -> "Tokenizer":
    """Train byte-level BPE on all domains; it puts the end token before each text.

    Text is split like in Qwen2's tokenizer (transformers, ``tokenization_qwen2.py``), because some
    libraries always use this split for Qwen2 models.
    """
    from demo_files import END, TURN_END, TURN_START, end_token
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [t for d in demo_text.DOMAINS for t in training_texts(d, 3000, seed)]
    tokenizer.train_from_iterator(texts, trainer)
    end = end_token(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, end)]
    )
    return tokenizer


def windows(tokenizer: "Tokenizer", texts: list[str]) -> "torch.Tensor":
    """Rows of ``WINDOW + 1`` tokens, int64; each row begins with a new document."""
    import torch

    rows: list[list[int]] = []
    row: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        row += encoding.ids
        if len(row) > WINDOW:
            rows.append(row[: WINDOW + 1])
            row = []
    return torch.tensor(rows)
