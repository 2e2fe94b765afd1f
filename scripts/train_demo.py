"""Train the demo pair; write base, overlay, two small dense models and held-out texts.

    python scripts/train_demo.py --out outlier_mlx/demo

First, the base is trained on stories and conversations of the ``old`` domain of ``demo_text`` and
on word lists, in PyTorch; half of the steps use the base rounded to int4, so that it can be
quantized later, and matrices are multiplied in bfloat16. Then ``outlier-mlx upcycle`` makes the
overlay from the texts of the new domains. It uses a system's OpenBLAS if there is one: with it, the
overlay takes about an hour on a slow core, and many times as long without. An interrupted run
resumes from its last checkpoint. Needs the extras ``train`` and ``gguf``.
"""

import argparse
import ctypes.util
import hashlib
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import demo_text
from demo_corpora import write_corpora
from demo_tokens import WINDOW, heldout_texts, train_tokenizer, training_texts, windows

if TYPE_CHECKING:
    import torch
    from demo_model import Shape, Weights
    from tokenizers import Tokenizer

CODE_FILES = (
    "demo_text.py",
    "demo_grammar.py",
    "demo_talk.py",
    "demo_tokens.py",
    "demo_model.py",
    "train_demo.py",
)
SIBLINGS = ("kitchen", "sea")  # domains of the small dense models
EXPERTS = "--layers 1-3 --experts-per-domain 2 --expert-size 192 --joint-weights"
TRAINING = "--batch 15 --learning-rate 0.25 --held-out 0.008 --no-grad-checkpoint"


@dataclass(frozen=True)
class Plan:
    """Settings of the training. A checkpoint of another plan is ignored."""

    seed: int = 20
    vocab: int = 1536
    base_steps: int = 1200
    expert_steps: int = 1600
    rows: int = 18
    base_documents: int = 45_000
    expert_documents: int = 8000  # in each new domain
    old_documents: int = 12_000
    sibling_documents: int = 9000
    base_rate: float = 5e-3
    sibling_steps: int = 600

    def fingerprint(self) -> str:
        """A digest of the plan and of the training code."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode())
        for name in CODE_FILES:
            digest.update((Path(__file__).parent / name).read_bytes())
        return digest.hexdigest()[:16]


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


class Stage:
    """One stage of training: Adam with warm-up and cosine decay; it can be resumed."""

    def __init__(self, name: str, weights: "Weights", plan: Plan, work: Path) -> None:
        import torch

        self.name, self.plan = name, plan
        self.path = work / f"{name}.pt"
        self.weights = {key: w.clone().requires_grad_() for key, w in weights.items()}
        decayed = [w for w in self.weights.values() if w.ndim > 1]
        plain = [w for w in self.weights.values() if w.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}],
            betas=(0.9, 0.98),
        )
        self.step = 0
        self.seconds = self.cpu_seconds = 0.0
        self._load()

    def _load(self) -> None:
        import torch

        if not self.path.exists():
            return
        saved = torch.load(self.path, weights_only=True)
        if saved["plan"] != self.plan.fingerprint():
            say(f"{self.path} belongs to another plan or script: starting this stage from step 0")
            return
        with torch.no_grad():
            for key, weight in self.weights.items():
                weight.copy_(saved["weights"][key])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]
        self.seconds, self.cpu_seconds = saved["time"]
        say(f"{self.name}: resuming at step {self.step}")

    def _save(self) -> None:
        import torch

        saved = {
            "plan": self.plan.fingerprint(),
            "weights": {key: weight.detach() for key, weight in self.weights.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "time": (self.seconds, self.cpu_seconds),
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(saved, temporary)
        temporary.replace(self.path)

    def run(
        self,
        steps: int,
        rate: float,
        loss_of: "Callable[[int, Weights], tuple[torch.Tensor, str]]",
    ) -> "Weights":
        """Train up to step ``steps``.

        Args:
            steps: number of steps in total.
            rate: largest learning rate.
            loss_of: returns the loss and a text for the progress line, given step and weights.
        """
        import torch

        wall, cpu = time.monotonic(), time.process_time()
        while self.step < steps:
            warm = min(1.0, (self.step + 1) / 100)
            cosine = 0.5 + 0.5 * math.cos(math.pi * self.step / steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate * warm * (0.02 + 0.98 * cosine)
            loss, remark = loss_of(self.step, self.weights)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
            torch.nn.utils.clip_grad_norm_(list(self.weights.values()), 1.0)
            self.optimizer.step()
            self.step += 1
            if self.step % 50 == 0 or self.step == steps:
                now, now_cpu = time.monotonic(), time.process_time()
                self.seconds += now - wall
                self.cpu_seconds += now_cpu - cpu
                wall, cpu = now, now_cpu
                self._save()
                left = self.seconds / self.step * (steps - self.step)
                say(f"{self.name} {self.step}/{steps}  {remark}  {left / 60:.1f} min left")
        return {key: weight.detach() for key, weight in self.weights.items()}


def draw(rows: "torch.Tensor", count: int, seed: int) -> "torch.Tensor":
    """``count`` random rows."""
    import torch

    rng = torch.Generator().manual_seed(seed)
    return rows[torch.randint(len(rows), (count,), generator=rng)]


def next_token_loss(
    weights: "Weights", shape: "Shape", batch: "torch.Tensor"
) -> "tuple[torch.Tensor, str]":
    """Mean next-token loss on rows ``(rows, WINDOW + 1)``, and a text for the progress line."""
    import demo_model
    import torch
    from torch.nn.functional import cross_entropy

    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = demo_model.forward(weights, shape, batch[:, :-1])
    loss = cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
    return loss, f"loss {loss.item():.3f}"


def train_base(plan: Plan, shape: "Shape", tokenizer: "Tokenizer", work: Path) -> Stage:
    """Next-token training on old text, and on word lists so that every token occurs."""
    import demo_model
    import torch

    stage = Stage("base", demo_model.init_base(shape, plan.seed), plan, work)
    if stage.step < plan.base_steps:
        say("base: generating its text")
        stories = list(training_texts("old", plan.base_documents, plan.seed + 2))
        lists = list(islice(demo_text.word_lists(plan.seed + 5), plan.base_documents // 4))
        rows, list_rows = windows(tokenizer, stories), windows(tokenizer, lists)
        say(f"base: {(rows.numel() + list_rows.numel()) / 1e6:.1f} million tokens")

    def loss_of(step: int, weights: "Weights") -> "tuple[torch.Tensor, str]":
        seed = plan.seed * 1_000_003 + step
        aside = plan.rows // 6
        batch = torch.cat([draw(rows, plan.rows - aside, seed), draw(list_rows, aside, seed)])
        if step % 2 and step > plan.base_steps // 2:
            weights = demo_model.int4_base(weights)
        return next_token_loss(weights, shape, batch)

    stage.run(plan.base_steps, plan.base_rate, loss_of)
    return stage


@dataclass
class Upcycling:
    """The time that the overlay took; see ``demo_report.Timed``."""

    name: str
    step: int
    seconds: float
    cpu_seconds: float


def train_overlay(plan: Plan, base: Path, work: Path) -> Upcycling:
    """Make ``work/overlay`` for the base in a folder, by the command line, as a user would.

    If it was interrupted, the times are those of the last run.
    """
    texts, out = work / "texts", work / "overlay"
    write_corpora(texts, plan.expert_documents, plan.old_documents)
    environment = dict(os.environ)
    if library := ctypes.util.find_library("openblas"):
        environment = {"LD_PRELOAD": library, "OPENBLAS_NUM_THREADS": "2"} | environment
    given = [f"--domain={d}={texts / f'{d}.jsonl'}" for d in demo_text.NEW_DOMAINS]
    steps = f"--window {WINDOW} --steps 0 --joint-steps {plan.expert_steps}"
    command = [sys.executable, "-m", "outlier_mlx", "upcycle", str(base), *given]
    command += [f"--keep={texts / 'old.jsonl'}", f"--out={out}", "--force"]
    command += f"{EXPERTS} {TRAINING} {steps}".split()
    wall, cpu = time.monotonic(), _cpu_of_children()
    subprocess.run(command, check=True, env=environment)
    wall, cpu = time.monotonic() - wall, _cpu_of_children() - cpu
    return Upcycling("overlay", plan.expert_steps, wall, cpu)


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train_sibling(
    plan: Plan, tokenizer: "Tokenizer", domain: str, parent: "Weights | None", work: Path
) -> "Weights":
    """Train a small Llama on ``domain`` from ``parent``; without one, on all siblings' domains."""
    import demo_model
    import torch

    shape = sibling_shape(tokenizer)
    start = parent or demo_model.init_base(shape, plan.seed + 6)
    stage = Stage(domain if parent else "parent", start, plan, work)
    steps = plan.sibling_steps // (2 if parent else 1)
    domains = (domain,) if parent else ("old", *SIBLINGS)
    texts = [training_texts(d, plan.sibling_documents, plan.seed + 7) for d in domains]
    rows = torch.cat([windows(tokenizer, list(t)) for t in texts]) if stage.step < steps else None

    def loss_of(step: int, weights: "Weights") -> "tuple[torch.Tensor, str]":
        assert rows is not None
        batch = draw(rows, plan.rows, plan.seed * 3_000_017 + step)
        return next_token_loss(weights, shape, batch)

    return stage.run(steps, plan.base_rate / (4 if parent else 1), loss_of)


def sibling_shape(tokenizer: "Tokenizer") -> "Shape":
    """The shape of the small dense models."""
    from demo_model import Shape

    return Shape(
        vocab=tokenizer.get_vocab_size(),
        hidden=128,
        width=384,
        layers=2,
        heads=2,
        kv_heads=1,
        moe_layers=(),
    )


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--work", type=Path, default=Path("build/train_demo"), help="checkpoints")
    parser.add_argument("--base-steps", type=int, default=Plan.base_steps)
    parser.add_argument("--expert-steps", type=int, default=Plan.expert_steps)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--force", action="store_true", help="write into an existing folder")
    args = parser.parse_args()
    plan = Plan(base_steps=args.base_steps, expert_steps=args.expert_steps)
    train(plan, args.out, args.work, args.threads, args.force)


def train(plan: Plan, out: Path, work: Path, threads: int, force: bool) -> None:
    """Train all models, write them and the texts to ``out``, and print the report."""
    import demo_files
    import demo_forms
    import demo_report
    import torch
    from demo_model import Shape

    if out.exists() and not force:
        sys.exit(f"{out} exists; --force replaces what the script writes")
    torch.set_num_threads(threads)
    torch.manual_seed(plan.seed)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(plan.vocab, plan.seed + 1)
    shape = Shape(vocab=tokenizer.get_vocab_size())
    base_stage = train_base(plan, shape, tokenizer, work)
    base = {name: weight.detach().half().float() for name, weight in base_stage.weights.items()}
    shutil.rmtree(work / "base", ignore_errors=True)
    demo_files.write_base(work / "base", base, shape, tokenizer)
    overlay = train_overlay(plan, work / "base", work)
    parent = train_sibling(plan, tokenizer, "", None, work)

    fresh = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        for name in ("base", "overlay"):
            shutil.copytree(work / name, fresh / name)
        for domain in SIBLINGS:
            dense = train_sibling(plan, tokenizer, domain, parent, work)
            demo_files.write_base(fresh / domain, dense, sibling_shape(tokenizer), tokenizer)
        demo_forms.write_awq(fresh / "sea", fresh / "sea-awq")
        demo_forms.write_gguf(fresh / "base", fresh / "base-q4_0.gguf")
        (fresh / "heldout").mkdir()
        for domain, texts in heldout_texts().items():
            path = fresh / "heldout" / f"{domain}.txt"
            path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        report = demo_report.report(fresh, [base_stage, overlay])
        (fresh / "heldout" / "README.md").write_text(report, encoding="utf-8")
        out.mkdir(exist_ok=True)
        for made in fresh.iterdir():
            old = out / made.name
            if old.is_dir():
                shutil.rmtree(old)
            made.replace(old)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    print(report)


if __name__ == "__main__":
    main()
