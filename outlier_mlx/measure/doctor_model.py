"""What `doctor` finds of a model: the plan of its memory, and the speed to expect."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from outlier_mlx.engine.machine import Budget
from outlier_mlx.engine.memory import check_fits
from outlier_mlx.engine.needs import Use, needs_of
from outlier_mlx.engine.paging.budget import ExpertMemory
from outlier_mlx.engine.plan import Plan, plan
from outlier_mlx.errors import OutlierError
from outlier_mlx.measure.expected import Expected, Work, decoding, expected_share, reading, work_of
from outlier_mlx.measure.findings import COMPUTED, Finding, unknown
from outlier_mlx.measure.speeds import Speed
from outlier_mlx.models.config import Description
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.terminal import count, size


@dataclass(frozen=True)
class Model:
    """A model and how it is going to be used.

    Attributes:
        name: the model's.
        folder: has its config and headers.
        config: what its config says.
        tensors: its tensors.
        use: how it is going to be used.
        memory: what its experts may take.
        local: whether the tensors are in the folder, too, rather than only their headers.
    """

    name: str
    folder: Path
    config: Description
    tensors: Mapping[str, TensorRef]
    use: Use
    memory: ExpertMemory
    local: bool


def model_findings(model: Model, available: Budget, speed: Speed) -> Iterator[Finding]:
    """The plan of a model, resident or paged, and the speed to expect.

    Args:
        model: the model.
        available: memory that it may take.
        speed: what the machine does in a second.

    Raises:
        CheckpointError: the model is not sound.
        OutlierError: the memory for its experts does not suit it.
    """
    planned = plan(model.folder, model.use, model.memory, available)
    yield from _memory(model, planned)
    work = work_of(model.tensors, model.config, model.use.tokens, model.name)
    if work is None:
        why = "it is not known how large the model's KV cache is"
        yield unknown("tokens_per_s", "speed", why)
        return
    absent = 0.0
    if planned.slots is not None and planned.paged is not None:
        absent = 1 - planned.slots / planned.paged.total
    yield from _reads(work, absent * work.routed_bytes)
    yield from _decoding(work, speed, absent * work.routed_bytes)
    step = needs_of(model.folder, available.on_cpu).step(planned.step)
    chunk = max(1, min(step, model.use.tokens))  # a prompt is no longer than the context
    missing = absent * work.expert_bytes * expected_share(model.config, chunk)
    yield _reading(work, speed, missing, chunk)


def _memory(model: Model, planned: Plan) -> Iterator[Finding]:
    for name, part in planned.parts.items():
        key = f"{name.replace(' ', '_').replace(chr(39), '').lower()}_bytes"
        if part.nbytes:
            yield Finding(key, name, part.nbytes, size(part.nbytes), COMPUTED, part.source)
        elif part is planned.kv_cache:  # of some kinds of attention, nothing is known
            yield unknown(key, name, part.source)
    needed, available = planned.needed, planned.available
    about = f"the sum, with {model.use.tokens} tokens in the KV cache; {available}"
    yield Finding(
        "needed_bytes", "in all", needed, size(needed), COMPUTED, about, _refusal(model, planned)
    )
    if planned.slots is not None and planned.paged is not None:
        total = planned.paged.total
        about = f"{planned.slots} of {total} experts have a slot; the others are read when needed"
        yield Finding("experts", "experts", "paged", "paged", COMPUTED, about)
        share = planned.slots / total
        yield Finding("resident_share", "in memory", share, f"{share:.0%}", COMPUTED, "of experts")
    elif planned.paged is not None:
        yield Finding("experts", "experts", "resident", "all in memory", COMPUTED)


def _refusal(model: Model, planned: Plan) -> str | None:
    """What the commands say that run a model which does not fit."""
    if planned.fits:
        return None
    try:
        check_fits(model.folder, model.use, planned.available, memory=model.memory)
    except OutlierError as error:
        return str(error)
    return None


def _reads(work: Work, missing: float) -> Iterator[Finding]:
    about = "weights and KV cache; of experts, those that a token uses"
    shown = f"{size(work.nbytes)} a token"
    yield Finding("bytes_per_token", "memory reads", work.nbytes, shown, COMPUTED, about)
    if missing:
        about = (
            "of experts, if all are used equally often; a text with favourites needs less:"
            " `outlier-mlx routing --trace`, then `bench --trace`"
        )
        nbytes = round(missing)
        shown = f"{size(nbytes)} a token"
        yield Finding("missing_bytes_per_token", "disk reads", nbytes, shown, COMPUTED, about)


def _decoding(work: Work, speed: Speed, missing: float) -> Iterator[Finding]:
    key, name = "tokens_per_s", "speed, at most"
    expected = decoding(work, speed.machine, missing)
    resident = decoding(work, speed.machine)
    if expected is None:
        why = speed.about if resident is None else "the disk's speed is not known: give --disk GB/s"
        yield unknown(key, name, why)
    else:
        yield _tokens(key, name, expected, _sum(work, speed, expected, missing))
    if speed.products_gb_s not in (None, speed.machine.bandwidth_gb_s):
        about = f"{speed.products_gb_s:.4g} GB/s, which products read"
        here = replace(speed, machine=replace(speed.machine, bandwidth_gb_s=speed.products_gb_s))
        likely = decoding(work, here.machine, missing)
        if likely is not None:
            about = _sum(work, replace(here, about=about), likely, missing)
            yield _tokens("measured_tokens_per_s", "by what products read", likely, about)
    if missing and resident is not None:
        about = _sum(work, speed, resident, 0)
        yield _tokens("resident_tokens_per_s", "with all in memory", resident, about)


def _reading(work: Work, speed: Speed, missing: float, step: int) -> Finding:
    found, key = reading(work, speed.machine, missing, step), "prompt_tokens_per_s"
    name = "prompts, at most"
    if found is None:
        why = "a prompt is limited by arithmetic, of which there are no published figures"
        return unknown(key, name, why)
    about = f"{count(work.prompt_weights)} weights a token; {speed.about}"
    if missing:
        chunk = f"{step} token{'s' if step > 1 else ''}"
        about = f"{size(round(missing))} of experts are read for {chunk}; {about}"
    return Finding(key, name, found, _rate(found), COMPUTED, about)


def _tokens(key: str, name: str, expected: Expected, about: str) -> Finding:
    found = expected.tokens_per_s
    return Finding(key, name, found, _rate(found), COMPUTED, about)


def _sum(work: Work, speed: Speed, expected: Expected, missing: float) -> str:
    """The parts of a token's time, and the speed that they are computed from."""
    each = f"of {1e6 * speed.machine.launch_seconds:.2g} µs"
    if speed.machine.weights_per_s is None:
        what, calls = size(work.nbytes), f"{work.launches} launches {each}"
    else:
        what, calls = f"{count(work.weights)} weights", f"{work.launches} operations {each}"
    parts = [f"{_ms(expected.memory)} for {what}", f"{_ms(expected.launches)} for {calls}"]
    if missing:
        parts.append(f"{_ms(expected.disk)} of waiting for the disk")
    return f"{' + '.join(parts)}; {speed.about}"


def _rate(tokens_per_s: float) -> str:
    number = f"{tokens_per_s:.3g}" if tokens_per_s < 1000 else f"{tokens_per_s:.0f}"
    return f"{number} tokens/s"


def _ms(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:.3g} ms" if milliseconds < 1000 else f"{seconds:.3g} s"
