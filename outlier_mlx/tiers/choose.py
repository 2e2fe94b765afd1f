"""Choosing: what each recipe would take, and which is the best that fits."""

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from outlier_mlx.checkpoints import open_overlay
from outlier_mlx.checkpoints.base import WholeModel, join, open_base
from outlier_mlx.checkpoints.headers import headers
from outlier_mlx.engine.memory import UNLIMITED, Budget, budget
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.models.sizes import kv_bytes
from outlier_mlx.storage.remote import fill
from outlier_mlx.terminal import size
from outlier_mlx.tiers.plan import make_plan
from outlier_mlx.tiers.portable import make_portable_plan
from outlier_mlx.tiers.presets import RECIPES, Recipe, make_recipe

CONTEXTS = (4096, 32768)
KV_BITS = (None, 8, 4)
# From the best to the smallest. Portable tiers and float32 are there for other reasons than size.
PREFERENCE = ("bf16", "q8", "q4-mixed", "q4")


@dataclass(frozen=True)
class Choice:
    """A recipe, and what its tier would take.

    Attributes:
        name: name of the recipe.
        nbytes: bytes of all weights; 0 if the recipe does not suit the overlay.
        memory: bytes of weights and KV cache, by tokens and bits of the cache (None: 16).
        fits: whether the smallest context fits with the cache in 16 bits.
        reason: why the recipe does not suit the overlay.
    """

    name: str
    nbytes: int
    memory: dict[tuple[int, int | None], int]
    fits: bool
    reason: str | None = None


def list_choices(
    overlay: str | Path,
    base: str | Path | None = None,
    *,
    ram_gb: float | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
) -> tuple[list[Choice], Budget]:
    """Predict sizes and memory of every recipe; only headers are read, and of repositories fetched.

    Args:
        overlay: the overlay's folder or hub repository.
        base: the base's; None where the overlay contains it.
        ram_gb: choose for a Mac with this many gigabytes rather than for this machine.
        revision: the overlay's revision on the hub.
        base_revision: the base's.

    Returns:
        The choices, and the memory that they were held against.
    """
    available = budget(ram_gb)
    recipes = {name: RECIPES[name] for name in (*PREFERENCE, "f16", "f32")}
    recipes["q4 --portable"] = make_recipe("q4", portable=True)
    with ExitStack() as stack:
        found = stack.enter_context(headers(overlay, revision))
        opened = open_overlay(found.source.folder)
        fill(opened.alpha_tensors.values(), found.files)
        opened_base = None
        if base is not None:
            found = stack.enter_context(headers(base, base_revision))
            opened_base = open_base(found.source.folder)
        model = join(opened, opened_base)
        return [_choice(name, r, model, available) for name, r in recipes.items()], available


def best(choices: list[Choice], available: Budget) -> str:
    """The name of the best recipe that fits.

    Raises:
        OutlierError: none does.
    """
    fitting = {choice.name for choice in choices if choice.fits}
    for name in PREFERENCE:
        if name in fitting:
            return name
    least = min(choice.memory[CONTEXTS[0], None] for choice in choices if choice.memory)
    raise OutlierError(f"no recipe fits: the smallest needs {size(least)}; {available}")


def as_json_object(choices: list[Choice], available: Budget) -> dict:
    """What a program would want to read of `list_choices`."""
    listed = []
    for choice in choices:
        memory = [
            {"tokens": tokens, "kv_bits": bits or 16, "bytes": nbytes}
            for (tokens, bits), nbytes in choice.memory.items()
        ]
        listed.append(asdict(choice) | {"memory": memory})
    nbytes = None if available.nbytes == UNLIMITED else available.nbytes
    return {"available_bytes": nbytes, "recipes": listed}


def _choice(name: str, recipe: Recipe, model: WholeModel, available: Budget) -> Choice:
    planned = make_portable_plan if recipe.portable else make_plan
    try:
        nbytes = planned(model, recipe).nbytes
    except CheckpointError as error:
        return Choice(name, 0, {}, fits=False, reason=str(error))
    memory = {
        (tokens, bits): nbytes + kv_bytes(model.config, tokens, bits)
        for tokens in CONTEXTS
        for bits in KV_BITS
    }
    return Choice(name, nbytes, memory, memory[CONTEXTS[0], None] <= available.nbytes)
