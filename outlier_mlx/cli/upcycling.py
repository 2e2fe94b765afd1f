"""The command that trains experts over a base: upcycle."""

import re
import shlex
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outlier_mlx.cli.app import command, say
from outlier_mlx.cli.options import BaseRevision, Force, Json, OutFolder, Quiet
from outlier_mlx.cli.signals import Ended
from outlier_mlx.cli.training_display import (
    Display,
    experts_line,
    failing_as_json,
    memory_line,
    print_data,
    print_event,
    print_result,
)
from outlier_mlx.cli.training_options import Experts, Training
from outlier_mlx.errors import OutlierError
from outlier_mlx.terminal import size

if TYPE_CHECKING:
    from outlier_mlx.checkpoints.base import BaseModel
    from outlier_mlx.engine.machine import Budget
    from outlier_mlx.storage.hub import Source
    from outlier_mlx.train.log import RunLog
    from outlier_mlx.train.plan import MemoryPlan
    from outlier_mlx.train.settings import Settings
    from outlier_mlx.train.stages import Upcycled
    from outlier_mlx.train.texts import Corpora

_MOST_LAYERS = 10_000
_LAYERS = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")


@command("Make", "upcycle ./base --domain law=law.jsonl --keep general.txt --out ./overlay")
def upcycle(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Folder or hub repository of a dense model.")
    ],
    domain: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=PATH",
            help="A domain, and its text: a file, or a folder of .txt, .md and .jsonl. Repeatable.",
        ),
    ],
    keep: Annotated[
        Path,
        typer.Option(
            metavar="PATH", help="Text like what the base was trained on: it shall not forget that."
        ),
    ],
    out: OutFolder,
    experts: Experts,
    training: Training,
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Folder for checkpoints and log. Default: .NAME.training."
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what would be trained, and what it takes.")
    ] = False,
    so_far: Annotated[
        bool,
        typer.Option(
            "--so-far", help="Train no further: write what an interrupted training has so far."
        ),
    ] = False,
    ram: Annotated[
        float | None,
        typer.Option(min=1, help="With --plan: for a Mac with this many GB of memory."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png|.svg", help="Draw loss, perplexities and use of experts."),
    ] = None,
    revision: BaseRevision = None,
    as_json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Train ternary experts for domains over a frozen base: an overlay. Resumes if interrupted."""
    from outlier_mlx.engine.machine import budget
    from outlier_mlx.measure.pictures import check_picture
    from outlier_mlx.storage.hub import resolve
    from outlier_mlx.storage.paths import named
    from outlier_mlx.train.log import FILE, RunLog, read_log
    from outlier_mlx.train.picture import draw
    from outlier_mlx.train.texts import check_names
    from outlier_mlx.writing.folders import check_free

    with failing_as_json() if as_json else nullcontext():
        domains = [_domain(given) for given in domain]
        check_names([name for name, _ in domains])
        if ram is not None and not plan:
            raise typer.BadParameter("goes with --plan", param_hint="--ram")
        if so_far and plan:
            raise typer.BadParameter("with it, nothing is planned", param_hint="--so-far")
        target = named(out)
        place = _work_folder(work, target)
        asked = _Asked(domains, keep, experts, training, target, place, so_far, quiet)
        inputs = [base, training.teacher, keep, *(path for _, path in domains)]
        if not plan:
            check_free(target, force=force, sources=inputs)
            if picture is not None:
                check_picture(picture, force=force, sources=inputs)
        run, memory = asked.planned(resolve(base, revision), None if ram is None else budget(ram))
        display = Display(run.settings, len(domains), quiet=quiet, so_far=so_far)
        log = RunLog(place, [display, *([print_event] if as_json else [])])
        if not plan:
            run.check(memory)
        run.show_plan(log, memory)
        if plan:
            return
        made = run.train(log, display)
        run.write(made, inputs, force=force)
        log.tell(
            {"event": "done", "before": made.before, "after": made.after, "peak_bytes": made.peak}
        )
        if picture is not None:
            draw(read_log(place / FILE), picture)
        if not as_json:
            print_result(made.before, made.after)
        run.tell_end(made, base)


@dataclass(frozen=True)
class _Asked:
    """What is to be trained on, how, and where it goes."""

    domains: list[tuple[str, Path]]
    keep: Path
    experts: Experts
    training: Training
    target: Path
    work: Path
    so_far: bool
    quiet: bool

    def planned(self, source: "Source", available: "Budget | None") -> "tuple[_Run, MemoryPlan]":
        """The training of a base, with all settings, and the memory that it takes.

        Args:
            source: where the base is.
            available: memory for it; None: what this machine has.
        """
        from outlier_mlx.storage.hub import resolve
        from outlier_mlx.train.base import open_dense
        from outlier_mlx.train.stages import check_begun, planned

        training, domains = self.training, len(self.domains)
        base = open_dense(source.folder)
        settings = _settings(self.experts, training, domains)
        settings.check(base.config, domains)
        if self.so_far:
            check_begun(self.work)
        corpora = self._read(source, base)
        teacher = resolve(training.teacher) if training.teacher is not None else None
        settings, memory = planned(
            source,
            corpora,
            settings,
            self.work,
            dtype=training.dtype,
            available=available,
            teacher=None if self.so_far else teacher,
        )
        return _Run(self, source, base, teacher, settings, corpora), memory

    def _read(self, source: "Source", base: "BaseModel") -> "Corpora":
        from outlier_mlx.engine.loading import load_tokenizer
        from outlier_mlx.terminal import progress_bar
        from outlier_mlx.train.texts import read_corpora

        training = self.training
        tokenizer = load_tokenizer(source.folder, base.config.raw)
        positions = base.config.max_positions
        if training.window > positions:
            raise OutlierError(
                f"--window {training.window}: the base's context length is {positions} tokens"
            )
        with progress_bar("reading", quiet=self.quiet) as progress:
            return read_corpora(
                self.domains,
                self.keep,
                tokenizer,
                window=training.window,
                held_out=training.held_out,
                most_held_out=training.held_out_windows,
                seed=training.seed,
                vocab=base.config.vocab,
                progress=progress,
            )


@dataclass(frozen=True)
class _Run:
    """A training: what was asked for, and what it is made of."""

    asked: _Asked
    source: "Source"
    base: "BaseModel"
    teacher: "Source | None"
    settings: "Settings"
    corpora: "Corpora"

    def check(self, memory: "MemoryPlan") -> None:
        """Refuse to begin with too little memory, or with too little room on the disk."""
        from outlier_mlx.train.room import check_room

        memory.check()
        if not self.asked.so_far:
            trained, folders = (self.settings, self.corpora), (self.asked.target, self.asked.work)
            teaches = self.teacher is not None
            check_room(self.base.config, *trained, *folders, teacher=teaches)

    def show_plan(self, log: "RunLog", memory: "MemoryPlan") -> None:
        """Tell what will be trained and what it takes."""
        from outlier_mlx.train.overlay import describe, overlay_bytes

        settings, corpora = self.settings, self.corpora
        assert settings.layers is not None
        nbytes = overlay_bytes(self.base.config, settings, len(corpora.domains))
        log.tell(
            {
                "event": "plan",
                "base": self.source.name,
                "settings": settings.as_json(),
                "window": corpora.keep.train.shape[1] - 1,
                "texts": [describe(corpus) for corpus in corpora],
                "overlay_bytes": nbytes,
                "memory": memory.as_json(),
            }
        )
        if self.asked.quiet:
            return
        print_data(corpora)
        say(experts_line(settings, len(corpora.domains)) + f"; the overlay takes {size(nbytes)}")
        say(memory_line(memory, len(settings.layers)))

    def train(self, log: "RunLog", display: Display) -> "Upcycled":
        """Train, or go on where it was interrupted."""
        from outlier_mlx.train.stages import upcycle as train

        work = self.asked.work
        try:
            with display.shown():
                return train(
                    self.source,
                    self.corpora,
                    self.settings,
                    work,
                    teacher=self.teacher,
                    log=log,
                    dtype=self.asked.training.dtype,
                    so_far=self.asked.so_far,
                )
        except (KeyboardInterrupt, Ended):
            if work.exists():
                say(
                    f"the training is kept in {work}: the same command goes on from there, and with"
                    " --so-far writes what there is"
                )
            raise

    def write(self, made: "Upcycled", inputs: list[Any], *, force: bool) -> None:
        """Write the overlay."""
        from outlier_mlx.terminal import progress_bar
        from outlier_mlx.train.overlay import write_overlay

        with progress_bar("writing", quiet=self.asked.quiet) as progress:
            write_overlay(
                self.source,
                made,
                self.settings,
                self.corpora,
                self.asked.target,
                teacher=self.teacher.name if self.teacher is not None else None,
                inputs=inputs,
                force=force,
                progress=progress,
            )

    def tell_end(self, made: "Upcycled", base: str) -> None:
        """Tell what it took, what is left, and what to type next; `base` as the user gave it."""
        from outlier_mlx.storage.paths import files_below

        if self.asked.quiet:
            return
        work, target = self.asked.work, self.asked.target
        nbytes = sum(path.stat().st_size for path in files_below(work))
        say(f"peak memory: {size(made.peak)}")
        left = f"{work} ({size(nbytes)}) has the log and the checkpoints"
        if made.is_whole:
            say(f"{left}, and may be deleted")
        else:
            say(f"{left}: the command with --force, without --so-far, goes on from there")
        words = ["convert", str(target), "--base", base, "--out", f"{target}-tier"]
        say(f"next: outlier-mlx {shlex.join(words)}")


def _work_folder(work: Path | None, target: Path) -> Path:
    """The folder for checkpoints and log, which is not in the overlay's."""
    place = work if work is not None else target.with_name(f".{target.name}.training")
    if place.resolve().is_relative_to(target.resolve()):
        raise OutlierError(f"{place}: is, or lies in, the overlay's folder: name another --work")
    return place


def _domain(given: str) -> tuple[str, Path]:
    """Name and path of a domain."""
    name, found, path = given.partition("=")
    if not found or not path:
        raise typer.BadParameter(
            f"{given!r}: expected NAME=PATH, such as law=texts/law", param_hint="--domain"
        )
    return name, Path(path)


def _settings(experts: Experts, training: Training, domains: int) -> "Settings":
    from outlier_mlx.train.settings import Settings

    return Settings(
        layers=_layers(experts.layers),
        experts_per_domain=experts.experts_per_domain,
        top_k=experts.top_k or min(2, domains * experts.experts_per_domain),
        expert_size=experts.expert_size,
        init=experts.init,
        scales=experts.scales,
        straight_through=not training.no_straight_through,
        expert_steps=training.steps,
        joint_steps=training.joint_steps,
        joint_weights=training.joint_weights,
        batch=training.batch,
        learning_rate=training.learning_rate,
        keep_weight=training.keep_weight,
        keep_bound=training.keep_bound,
        balance=training.balance,
        stickiness=training.stickiness,
        seed=training.seed,
        layers_at_once=training.layers_at_once,
        grad_checkpoint=not training.no_grad_checkpoint,
        base_bits=None if training.base_bits == "none" else int(training.base_bits),
    )


def _layers(given: str) -> tuple[int, ...] | None:
    """The numbers that `--layers` names; None for auto."""
    if given == "auto":
        return None
    numbers: list[int] = []
    for word in given.split(","):
        match = _LAYERS.fullmatch(word.strip())
        first = int(match[1]) if match else 0
        last = int(match[2] or match[1]) if match else -1
        if not first <= last < first + _MOST_LAYERS:
            raise typer.BadParameter(
                f"{given!r}: expected auto, or numbers and ranges such as 8-20 or 3,5,7-9",
                param_hint="--layers",
            )
        numbers += range(first, last + 1)
    return tuple(sorted(set(numbers)))
