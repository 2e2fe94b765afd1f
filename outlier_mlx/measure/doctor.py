"""What `doctor` finds: of this machine or another Mac, and of a model there.

Every number comes with its source: measured here, reported by the system, published, given by the
user, or computed from others.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outlier_mlx.checkpoints.headers import headers
from outlier_mlx.checkpoints.stored_model import open_config
from outlier_mlx.engine.chips import Chip, named_chip, this_chip
from outlier_mlx.engine.machine import GPU_SHARE, budget, free, gpu_limit
from outlier_mlx.engine.needs import Use
from outlier_mlx.engine.paging.budget import ExpertMemory
from outlier_mlx.errors import OutlierError, listed
from outlier_mlx.measure.checked_results import self_test
from outlier_mlx.measure.disk import (
    NotMeasuredError,
    are_enough,
    expert_pieces,
    measure_folder,
    measure_pieces,
)
from outlier_mlx.measure.doctor_model import Model, model_findings
from outlier_mlx.measure.expected import Machine
from outlier_mlx.measure.findings import (
    COMPUTED,
    GIVEN,
    MEASURED,
    PUBLISHED,
    REPORTED,
    Finding,
    unknown,
)
from outlier_mlx.measure.speeds import Speed, products_gb_s, speed_here
from outlier_mlx.measure.versions import PACKAGE, installed_versions
from outlier_mlx.models.config import describe
from outlier_mlx.runtime.ops import use_metal
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.terminal import Stages, size
from outlier_mlx.upstream import pip_install

# Wrong results that a line names.
_NAMED = 3


@dataclass(frozen=True)
class Given:
    """What is said of the machine, in place of what is found.

    Attributes:
        ram_gb: memory in units of 2**30 bytes.
        chip: name of a chip, as `chips.named_chip` takes it.
        bandwidth_gb_s: memory bandwidth in GB/s.
        disk_gb_s: GB/s that the disk reads.
    """

    ram_gb: float | None = None
    chip: str | None = None
    bandwidth_gb_s: float | None = None
    disk_gb_s: float | None = None

    @property
    def elsewhere(self) -> bool:
        """Whether it is about another Mac, of which nothing can be measured here."""
        named = self.ram_gb is not None or self.chip is not None
        # A CPU is not limited by its bandwidth.
        return named or (self.bandwidth_gb_s is not None and not use_metal())


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        where: "this machine", or "another Mac".
        machine: findings about the machine.
        name: name of the model; None: none was named.
        model: findings about the model.
    """

    where: str
    machine: Sequence[Finding]
    name: str | None = None
    model: Sequence[Finding] = ()

    @property
    def problems(self) -> list[str]:
        """What is wrong, and what to do, a line each."""
        every = [*self.machine, *self.model]
        return [finding.problem for finding in every if finding.problem is not None]

    def as_json(self) -> dict[str, Any]:
        """Findings by name, and the problems."""
        found: dict[str, Any] = {"machine": {f.key: f.as_json() for f in self.machine}}
        if self.name is not None:
            found["model"] = {"name": self.name} | {f.key: f.as_json() for f in self.model}
        return found | {"problems": self.problems}


def examine(
    model: str | None,
    given: Given,
    use: Use,
    memory: ExpertMemory,
    revision: str | None,
    stages: Stages,
) -> Report:
    """Examine this machine or another Mac, and a model there.

    Args:
        model: a folder or hub repository, of which only headers are read, but for measuring the
            disk; None: no model.
        given: what is said of the machine; of another Mac, with its memory if there is a model.
        use: how the model is going to be used.
        memory: what its experts may take.
        revision: branch, tag or commit of the model on the hub.
        stages: shows progress.

    Raises:
        OutlierError: the chip is not known, or there is no sound model that can be run, or `memory`
            does not suit it.
    """
    where = "another Mac" if given.elsewhere else "this machine"
    with ExitStack() as opened:
        of = None
        if model is not None:
            with stages("reading headers", "files") as progress:
                source = opened.enter_context(headers(model, revision, progress)).source
            config = describe(open_config(source.folder))
            tensors, local = read_shards(source.folder), Path(model).exists()
            of = Model(source.name, source.folder, config, tensors, use, memory, local)
        machine, speed = _machine(given, of, stages)
        if of is None:
            return Report(where, machine)
        about = model_findings(of, budget(given.ram_gb), speed)
        return Report(where, machine, of.name, [*about])


def _machine(given: Given, model: Model | None, stages: Stages) -> tuple[list[Finding], Speed]:
    """Findings about the machine, and what it does in a second."""
    chip = _chip(given)
    speed = _speed(chip, given, model, stages)
    disk = _disk(given, model, stages)
    found = [*_chip_findings(chip, given, speed), *_memory(chip, given), disk]
    if not given.elsewhere:
        found += [*_versions(), *_tested(stages)]
    return found, replace(speed, machine=replace(speed.machine, disk_gb_s=disk.value))


def _chip(given: Given) -> Chip:
    if given.chip is not None:
        return named_chip(given.chip, None if given.ram_gb is None else round(given.ram_gb))
    if given.elsewhere:
        return Chip("another Mac", "gpu", note="the chip is not known: give --chip or --bandwidth")
    return this_chip()


def _speed(chip: Chip, given: Given, model: Model | None, stages: Stages) -> Speed:
    if given.bandwidth_gb_s is not None:
        gb_s = given.bandwidth_gb_s
        return Speed(Machine(gb_s), GIVEN, f"memory of {gb_s:g} GB/s")
    if given.elsewhere and chip.bandwidth_gb_s is None:
        return Speed(Machine(), "", chip.note or "")
    with stages("measuring products", ""):
        found = speed_here(chip, model is None or model.config.quantization is not None)
        if found.source == PUBLISHED and not given.elsewhere:
            found = replace(found, products_gb_s=products_gb_s())
        return found


def _chip_findings(chip: Chip, given: Given, speed: Speed) -> Iterator[Finding]:
    source = GIVEN if given.elsewhere else REPORTED
    yield Finding("chip", "chip", chip.name, f"{chip.name}, {chip.device.upper()}", source)
    if chip.gpu_cores is not None:
        cores = chip.gpu_cores
        yield Finding("gpu_cores", "GPU cores", cores, str(cores), source)
    key, name = "bandwidth_gb_s", "memory bandwidth"
    gb_s, rate = speed.machine.bandwidth_gb_s, speed.machine.weights_per_s
    if gb_s is not None:
        about = "docs/bench.md has the pages" if speed.source == PUBLISHED else ""
        about = speed.about if speed.source == MEASURED else about
        yield Finding(key, name, gb_s, f"{gb_s:.4g} GB/s", speed.source, about)
        if speed.source == PUBLISHED and (read := speed.products_gb_s) is not None:
            about = f"{read / gb_s:.0%} of that; with 4-bit weights that no cache holds"
            name = "products read"
            yield Finding("products_gb_s", name, read, f"{read:.4g} GB/s", MEASURED, about)
    elif rate is not None:
        shown = f"{rate / 1e9:.3g} billion weights/s"
        yield Finding(
            "weights_per_s", "products", rate, shown, MEASURED, "with one vector, on the CPU"
        )
    else:
        yield unknown(key, name, speed.about)


def _memory(chip: Chip, given: Given) -> Iterator[Finding]:
    if given.elsewhere and given.ram_gb is None:
        yield unknown("memory_gb", "memory", "give --ram")
        return
    gb = given.ram_gb if given.ram_gb is not None else chip.memory_gb
    if gb is None:
        yield unknown("memory_gb", "memory", "the system does not say")
    else:
        source = GIVEN if given.elsewhere else REPORTED
        yield Finding("memory_gb", "memory", gb, f"{gb:g} GB (of 2^30 bytes)", source)
    key, name = "gpu_limit_bytes", "GPU limit"
    if given.elsewhere:
        limit = budget(given.ram_gb).nbytes
        about = f"{GPU_SHARE:.0%} of the memory, macOS's default"
        yield Finding(key, name, limit, size(limit), COMPUTED, about)
        return
    limit_here, left = gpu_limit(), free()
    if limit_here is not None:
        yield Finding(key, name, limit_here, size(limit_here), REPORTED)
    if left is not None:
        about = "free, or in the page cache"
        yield Finding("free_bytes", "free now", left.nbytes, size(left.nbytes), REPORTED, about)


def _disk(given: Given, model: Model | None, stages: Stages) -> Finding:
    """The disk's speed: of the model's own experts, or of a file written beside it."""
    key, name = "disk_gb_s", "disk"
    if given.disk_gb_s is not None:
        return Finding(key, name, given.disk_gb_s, f"{given.disk_gb_s:g} GB/s", GIVEN)
    if given.elsewhere:
        return unknown(key, name, "give --disk GB/s")
    pieces, folder = [], Path()
    if model is not None and model.local:
        pieces, folder = expert_pieces(model.tensors), model.folder.resolve().parent
    try:
        with stages("measuring the disk", "") as progress:
            if are_enough(pieces):
                found = measure_pieces(pieces, "the model's own experts", progress)
            else:
                found = measure_folder(folder, progress)
    except (NotMeasuredError, OSError) as error:  # as where no file may be written
        return unknown(key, name, str(error))
    except OutlierError as error:
        return unknown(key, name, "", f"the disk cannot be read: {error}")
    depths = ", ".join(f"{gb_s:.3g} at {depth}" for depth, gb_s in found.by_depth.items())
    about = (
        f"first quartile of random reads of {size(found.piece_bytes)}, {found.depth} at a time:"
        f" {depths}; {found.what}"
    )
    return Finding(key, name, found.gb_s, f"{found.gb_s:.3g} GB/s", MEASURED, about)


def _versions() -> Iterator[Finding]:
    for one in installed_versions():
        key = one.name.replace("-", "_")
        if one.installed is None:
            yield unknown(
                key, one.name, "", f"{one.name} is not installed: {pip_install(one.wanted)}"
            )
            continue
        about = f"tested from {one.tested} on" if one.tested else f"{PACKAGE} is not installed"
        age = f"older than {one.tested}, which was tested" if one.is_old else None
        age = "newer than what was tested" if one.is_new else age
        problem = age and f"{one.name} {one.installed} is {age}: {pip_install(one.wanted, '-U')}"
        yield Finding(key, one.name, one.installed, one.installed, REPORTED, about, problem)


def _tested(stages: Stages) -> Iterator[Finding]:
    with stages("testing", "results") as progress:
        found = self_test(progress)
    wrong, total = found.wrong, len(found.checks)
    problem = None
    if wrong:
        some = listed((f"{check.name} ({check.error})" for check in wrong), _NAMED)
        problem = (
            f"{len(wrong)} of {total} results are wrong on this machine: {some}; do not use models"
            " here; another version of mlx may help: report it with `outlier-mlx doctor --json`"
        )
    about = "MLX's quantized products and a layer of experts against NumPy"
    if found.kernels:
        about += f"; {found.kernels} launches of kernels against plain MLX"
    else:
        about += "; kernels do not run here, without Metal: layers were tested on the plain path"
    shown = f"{total - len(wrong)} of {total} results are right"
    value = {"right": total - len(wrong), "of": total, "kernels": found.kernels}
    yield Finding("self_test", "self-test", value, shown, MEASURED, about, problem)
