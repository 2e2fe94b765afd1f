"""Choosing: what each recipe would take, and which is the best that fits."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from outlier_mlx.checkpoints import open_overlay
from outlier_mlx.checkpoints.base import WholeModel, join, open_base
from outlier_mlx.checkpoints.headers import headers
from outlier_mlx.engine.machine import UNLIMITED, Budget, budget
from outlier_mlx.errors import CheckpointError, OutlierError
from outlier_mlx.models.sizes import kv_bytes
from outlier_mlx.storage.remote import fill
from outlier_mlx.terminal import size
from outlier_mlx.tiers.plan import make_plan, settle_dtype
from outlier_mlx.tiers.portable import make_portable_plan
from outlier_mlx.tiers.presets import RECIPES, Recipe, make_recipe

CONTEXTS = (4096, 32768)
KV_BITS = (None, 8, 4)
# Below the unquantized recipe in the checkpoint's own dtype, from the best to the smallest.
_QUANTIZED = ("q8", "q4-mixed", "q4")


@dataclass(frozen=True)
class Choice:
    """A recipe, and what its tier would take.

    Attributes:
        name: name of the recipe.
        nbytes: bytes of all weights; 0 if the recipe does not suit the overlay.
        memory: bytes of weights and KV cache, by tokens and bits of the cache (None: 16).
        fits: whether the smallest context fits with the cache in 16 bits.
        reason: why the recipe does not suit the overlay.
        notes: see `Plan`.
    """

    name: str
    nbytes: int
    memory: dict[tuple[int, int | None], int]
    fits: bool
    reason: str | None = None
    notes: Sequence[str] = ()


def list_choices(
    overlay: str | Path,
    base: str | Path | None = None,
    *,
    ram_gb: float | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> tuple[list[Choice], Budget]:
    """Predict sizes and memory of every recipe; only headers are read, and of repositories fetched.

    Args:
        overlay: the overlay's folder or hub repository.
        base: the base's; None where the overlay contains it.
        ram_gb: choose for a Mac with this many gigabytes rather than for this machine.
        revision: the overlay's revision on the hub.
        base_revision: the base's.
        changes: arguments of `make_recipe` for every recipe.

    Returns:
        The choices, from the best to the smallest and then those that are there for other reasons
        than size; and the memory that they were held against.

    Raises:
        CheckpointError: overlay or base is not valid, whatever the recipe.
    """
    available = budget(ram_gb)
    with ExitStack() as stack:
        found = stack.enter_context(headers(overlay, revision))
        opened = open_overlay(found.source.folder)
        fill(opened.alpha_tensors.values(), found.files)
        opened_base = None
        if base is not None:
            found = stack.enter_context(headers(base, base_revision))
            opened_base = open_base(found.source.folder)
        model = join(opened, opened_base)
        opened.alphas()  # if they are not valid, no recipe can be made
        recipes = _recipes(model, changes or {})
        return [_choice(name, r, model, available) for name, r in recipes.items()], available


def _recipes(model: WholeModel, changes: Mapping[str, Any]) -> dict[str, Recipe]:
    """Recipes by name: those to choose from, the best first, then the others."""
    halves = ["bf16", "f16"]
    if settle_dtype(model, Recipe()).dtype == RECIPES["f16"].dtype:
        halves.reverse()
    names = (halves[0], *_QUANTIZED, halves[1], "f32")
    recipes = {name: make_recipe(name, **changes) for name in names}
    if not changes.get("portable"):
        recipes["q4 --portable"] = make_recipe("q4", **{**changes, "portable": True})
    return recipes


def best(choices: list[Choice], available: Budget) -> str:
    """The name of the best recipe that fits.

    Raises:
        OutlierError: none does.
    """
    for choice in choices:
        if choice.fits and choice.name in RECIPES:
            return choice.name
    least = min((c.memory[CONTEXTS[0], None] for c in choices if c.memory), default=None)
    if least is None:
        raise OutlierError(str(choices[0].reason))
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
        plan = planned(model, recipe)
    except CheckpointError as error:
        return Choice(name, 0, {}, fits=False, reason=str(error))
    nbytes = plan.nbytes
    memory = {
        (tokens, bits): nbytes + kv_bytes(model.config, tokens, bits)
        for tokens in CONTEXTS
        for bits in KV_BITS
    }
    fits = memory[CONTEXTS[0], None] <= available.nbytes
    return Choice(name, nbytes, memory, fits, notes=plan.notes)
