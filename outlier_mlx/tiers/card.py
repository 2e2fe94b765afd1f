"""The model card of a tier, made from the tier's own folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from outlier_mlx.checkpoints.info import Info, inspect
from outlier_mlx.errors import CheckpointError, OutlierError, listed, one_line
from outlier_mlx.measure.eval_results import Evaluation
from outlier_mlx.measure.measured import read_measured
from outlier_mlx.models.tier_fields import MODEL_FILE
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.texts import read_json
from outlier_mlx.tiers.card_tables import as_metadata, memory, results
from outlier_mlx.writing.card import Card, Origin, code, plain, with_own_code
from outlier_mlx.writing.licences import licence_of

#: What the parts that `tune` trains are called in a card.
TUNED = {
    "alphas": "the alphas",
    "rows": "the scales of the experts' rows",
    "routers": "the routers",
    "base": "the scales, biases and norms of the base",
}


def model_card(
    folder: Path,
    name: str,
    licence: str | None = None,
    evaluations: Sequence[Evaluation] = (),
) -> str:
    """The text of a tier's card.

    Args:
        folder: the tier, with its manifest.
        name: what the card's commands call it: a repository or a folder.
        licence: the hub's identifier of the licence of sources that state none.
        evaluations: scores of this very tier.

    Raises:
        CheckpointError: the folder is no sound tier.
        OutlierError: an evaluation is of another model.
    """
    manifest, config = (read_json(inside(folder, name)) for name in ("tier.json", "config.json"))
    recipe = _mapping(manifest.get("recipe"))
    info, measured, sources = inspect(folder), read_measured(folder), origins(manifest)
    check_scores(folder, info, evaluations)
    name = one_line(name)
    commands, warning = with_own_code(name, MODEL_FILE)
    if "model_file" not in config:
        commands, warning = [each.replace(" --trust-remote-code", "") for each in commands], ""
    return Card(
        name=name,
        introduction=_introduction(manifest, recipe),
        commands=commands,
        after_commands=warning,
        origins=sources,
        contained="base: contained in the overlay" if len(sources) == 1 else "",
        based_on=sources[-1:],
        relation="quantized" if recipe.get("base_bits") is not None else "finetune",
        tags=["mlx", "moe", "ternary"],
        rows=info.rows,
        after_sizes=memory(info),
        sections=results(measured, evaluations),
        changes=[*_changes(folder, config, recipe), *_noted(manifest), *_tuning(manifest)],
        manifest="tier.json",
        given=licence,
        metadata=as_metadata(name.rsplit("/", 1)[-1], measured),
    ).text(folder)


def origins(manifest: dict) -> list[Origin]:
    """The sources that a manifest names.

    Raises:
        CheckpointError: it names none.
    """
    found = []
    for role in ("overlay", "base"):
        entry = _mapping(manifest.get(role))
        name, revision = entry.get("name"), entry.get("revision")
        if isinstance(name, str) and (revision is None or isinstance(revision, str)):
            found.append(Origin(role, name, revision, licence_of(entry)))
    if not found or found[0].role != "overlay":
        raise CheckpointError("tier.json: does not name the overlay that the tier was made from")
    return found


def check_scores(
    folder: Path, info: Info, evaluations: Sequence[Evaluation], what: str = "tier"
) -> None:
    """Check that scores are of the model in a folder, by the bytes that it takes.

    Raises:
        OutlierError: an evaluation is of another model.
    """
    for one in evaluations:
        if one.bytes_in_memory != info.nbytes:
            raise OutlierError(
                f"{folder}: the scores of {one.model} are not of this {what}: it has"
                f" {info.nbytes} bytes of tensors, that had {one.bytes_in_memory}"
            )


def _introduction(manifest: dict, recipe: dict) -> str:
    name, dtype = code(recipe.get("name")), plain(recipe.get("dtype"))
    return f"""\
An Outlier model for MLX: a frozen base with ternary experts beside its feed-forward layers.
Converted by {plain(manifest.get("producer"))}, recipe {name}
({dtype})."""


def _changes(folder: Path, config: dict, recipe: dict) -> Iterator[str]:
    """What the conversion changed."""
    bits, group, dtype = (recipe.get(name) for name in ("base_bits", "group_size", "dtype"))
    if bits is None:
        yield f"the base's weights were converted to {dtype}"
    else:
        more = ", the most sensitive ones to 6 bits" if recipe.get("mixed") else ""
        yield (
            f"the base's matrices were quantized to {bits} bits in groups of {group}{more}, as"
            f" MLX does it; its other weights were converted to {dtype}"
        )
    if recipe.get("portable"):
        yield (
            "the experts' trits were stored in MLX's affine 2-bit format with the alphas folded"
            f" into the down projections, all scales in {dtype}"
        )
        yield (
            "rows of the query and key projections were reordered and zero biases added, as the"
            f" model type {code(config.get('model_type'))} has them"
        )
    else:
        form = "repacked, five to a byte"
        if recipe.get("experts") == "affine2":
            form = "stored in MLX's affine 2-bit format"
        yield f"the experts' trits were {form}, their values unchanged, with float32 scales"
    if "alpha" in recipe:
        yield f"alphas are not the overlay's present ones, but from {code(recipe['alpha'])}"
    yield "`config.json` was rewritten"
    if (folder / "tokenizer_config.json").exists():
        yield "`tokenizer_config.json` was rewritten without references to code"


def _noted(manifest: dict) -> list[str]:
    """What the conversion said of itself."""
    notes = manifest.get("notes")
    return [plain(note) for note in notes] if isinstance(notes, list) else []


def _tuning(manifest: dict) -> Iterator[str]:
    """What `tune` changed."""
    tuned = _mapping(manifest.get("tuned"))
    parts = tuned.get("parts")
    if isinstance(parts, list) and parts:
        names = listed([TUNED[part] for part in parts if part in TUNED], last="and")
        target = "its next tokens"
        if tuned.get("teacher") is not None:
            target = f"the predictions of {code(tuned['teacher'])}"
        yield f"{names} were trained on {code(tuned.get('text'))}, towards {target}"


def _mapping(value: object) -> dict:
    return value if isinstance(value, dict) else {}
