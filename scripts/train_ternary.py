"""Train the demo's ternary models, and write them in the forms in which such models are published.

    python scripts/train_ternary.py --demo outlier_mlx/demo

Needs the trained pair's tokenizer, and the extras ``train`` and ``gguf``. All models read the text
of the pair's base. First, a Qwen3 is trained with a scale for each group of 128 weights; then it is
tuned with one scale for each matrix, as BitNet has; and a Qwen3.5 is trained whose matrices are
ternary after a rotation. An interrupted run resumes from its last checkpoint.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import demo_ternary_files as files
import torch
from demo_files import end_token
from demo_model import Shape, Weights
from demo_ternary import (
    BLOCK,
    GROUP,
    Hybrid,
    hybrid_logits,
    init_hybrid,
    init_qwen3,
    rounded,
    unrotated,
)
from demo_tokens import training_texts, windows
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from train_demo import Plan, Stage, draw, next_token_loss, say

LENGTH = 128  # tokens in a row of training
SHORT = 64  # where tokens are read one after another
NAMES = (
    "ternary-mlx2",
    "ternary-pq2_0.gguf",
    "ternary-bitnet",
    "ternary-tq2_0.gguf",
    "ternary-rotated",
    "ternary-ptq1_0.gguf",
)


@dataclass(frozen=True)
class TernaryPlan(Plan):
    """Settings of the training."""

    ternary_steps: int = 500
    matrix_steps: int = 100
    rotated_steps: int = 150
    whole_steps: int = 80
    ternary_rate: float = 8e-3
    ternary_documents: int = 24_000

    def fingerprint(self) -> str:
        """A digest of the plan and of the training code."""
        digest = hashlib.sha256(super().fingerprint().encode())
        for name in ("demo_ternary.py", "train_ternary.py"):
            digest.update((Path(__file__).parent / name).read_bytes())
        return digest.hexdigest()[:16]


def train_qwen3(plan: TernaryPlan, shape: Shape, rows: torch.Tensor, work: Path) -> Weights:
    """Train the model with a scale for each group."""
    stage = Stage("ternary", init_qwen3(shape, plan.seed + 8), plan, work)

    def loss_of(step: int, weights: Weights) -> tuple[torch.Tensor, str]:
        batch = draw(rows, plan.rows, plan.seed * 4_000_037 + step)
        return next_token_loss(rounded(weights, GROUP), shape, batch)

    return stage.run(plan.ternary_steps, plan.ternary_rate, loss_of)


def tune_matrices(
    plan: TernaryPlan, shape: Shape, start: Weights, rows: torch.Tensor, work: Path
) -> Weights:
    """Tune it with one scale for each matrix."""
    stage = Stage("ternary-matrices", start, plan, work)

    def loss_of(step: int, weights: Weights) -> tuple[torch.Tensor, str]:
        batch = draw(rows, plan.rows, plan.seed * 5_000_011 + step)
        return next_token_loss(rounded(weights, 0), shape, batch)

    return stage.run(plan.matrix_steps, plan.ternary_rate / 3, loss_of)


def train_rotated(
    plan: TernaryPlan, shape: Hybrid, signs: torch.Tensor, rows: torch.Tensor, work: Path
) -> Weights:
    """Train the Qwen3.5, ternary in the rotated space: first on short rows, then on whole ones."""

    def loss_of(step: int, weights: Weights, whole: bool = False) -> tuple[torch.Tensor, str]:
        batch = draw(rows, plan.rows // (1 + whole), plan.seed * 6_000_013 + step + 10_000 * whole)
        batch = batch if whole else batch[:, : SHORT + 1]
        with torch.autocast("cpu", torch.bfloat16):
            turned = unrotated(rounded(weights, GROUP), signs)
            logits = hybrid_logits(turned, shape, batch[:, :-1])
        loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        return loss, f"loss {loss.item():.3f}"

    stage = Stage("ternary-rotated", init_hybrid(shape, plan.seed + 9), plan, work)
    found = stage.run(plan.rotated_steps, plan.ternary_rate, loss_of)
    stage = Stage("ternary-rotated-whole", found, plan, work)
    return stage.run(plan.whole_steps, plan.ternary_rate, partial(loss_of, whole=True))


def rotation_signs(seed: int) -> torch.Tensor:
    """The signs of all rotations, (BLOCK,)."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (BLOCK,), generator=rng) * 2.0 - 1


def main() -> None:
    """Parse the command line, train and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--demo", type=Path, required=True, help="the pair's folder, to write to")
    parser.add_argument("--work", type=Path, default=Path("build/train_ternary"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--force", action="store_true", help="replace what the script writes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    train(TernaryPlan(), args.demo, args.work, args.force)


def train(plan: TernaryPlan, demo: Path, work: Path, force: bool) -> None:
    """Train all models, and write them to ``demo``."""
    if any((demo / name).exists() for name in NAMES) and not force:
        sys.exit(f"{demo} has ternary models; --force replaces them")
    torch.manual_seed(plan.seed)
    source = demo / "sea"  # a folder with the tokenizer
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    vocab, end = tokenizer.get_vocab_size(), end_token(tokenizer)
    say("ternary: generating the text")
    texts = list(training_texts("old", plan.ternary_documents, plan.seed + 10))
    rows = windows(tokenizer, texts)[:, : LENGTH + 1]
    shape, hybrid = Shape(vocab=vocab, layers=2, moe_layers=()), Hybrid(vocab=vocab)
    grouped = train_qwen3(plan, shape, rows, work)
    whole = tune_matrices(plan, shape, grouped, rows, work)
    signs = rotation_signs(plan.seed)
    rotated = train_rotated(plan, hybrid, signs, rows, work)

    with tempfile.TemporaryDirectory(dir=demo, prefix=".ternary.") as scratch:
        fresh, config = Path(scratch), files.qwen3_config(shape, end)
        pack, pq2_0, bitnet, tq2_0, turned, ptq1_0 = (fresh / name for name in NAMES)
        text = files.qwen35_config(hybrid, end)
        files.write_mlx2(pack, grouped, config, source)
        files.write_pq2_0(pq2_0, grouped, config, source)
        files.write_bitnet(bitnet, whole, config, source)
        files.write_tq2_0(tq2_0, whole, config, source)
        files.write_rotated(turned, rotated, signs, text, source)
        files.write_ptq1_0(ptq1_0, rotated, signs, hybrid, text, source)
        for name in NAMES:
            old = demo / name
            if old.is_dir():
                shutil.rmtree(old)
            (fresh / name).replace(old)


if __name__ == "__main__":
    main()
