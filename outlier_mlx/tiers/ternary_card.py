"""The model card of a ternary model for the hub, made from its own folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from outlier_mlx.checkpoints.info import inspect
from outlier_mlx.errors import CheckpointError, listed, one_line
from outlier_mlx.measure.eval_results import Evaluation
from outlier_mlx.measure.measured import read_measured
from outlier_mlx.models.tier_fields import TERNARY_FILE
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.texts import read_json
from outlier_mlx.tiers.card import check_scores
from outlier_mlx.tiers.card_tables import as_metadata, memory, results
from outlier_mlx.writing.card import Card, Origin, code, plain, with_own_code
from outlier_mlx.writing.licences import licence_of


def ternary_card(
    folder: Path,
    name: str,
    licence: str | None = None,
    evaluations: Sequence[Evaluation] = (),
) -> str:
    """The text of the card of an imported ternary model.

    Args:
        folder: the model, with its manifest.
        name: what the card's commands call it: a repository or a folder.
        licence: the hub's identifier of the licence of a source that states none.
        evaluations: scores of this very model.

    Raises:
        CheckpointError: the folder is no sound model, or its manifest names no source.
        OutlierError: an evaluation is of another model.
    """
    manifest = read_json(inside(folder, "checksums.json"))
    (source,), entry = imported_origins(manifest), manifest["source"]
    form = entry.get("form")
    info, measured = inspect(folder), read_measured(folder)
    check_scores(folder, info, evaluations, "model")
    name = one_line(name)
    commands, warning = with_own_code(name, TERNARY_FILE)
    return Card(
        name=name,
        introduction="A ternary model for MLX: most weights are -s, 0 or s, and take 1.6 bits.\n"
        f"Imported by {plain(manifest.get('producer'))} from a model in {plain(form)}.",
        commands=commands,
        after_commands=warning,
        origins=[source],
        based_on=[source],
        relation="quantized",
        tags=["mlx", "ternary"],
        rows=info.rows,
        after_sizes=memory(info),
        sections=results(measured, evaluations),
        changes=list(_changes(entry)),
        given=licence,
        metadata=as_metadata(name.rsplit("/", 1)[-1], measured),
    ).text(folder)


def imported_origins(manifest: dict) -> list[Origin]:
    """The source that the manifest of an imported model names.

    Raises:
        CheckpointError: it names none.
    """
    found = manifest.get("source")
    entry = found if isinstance(found, dict) else {}
    name, revision = (entry.get(key) for key in ("name", "revision"))
    if not isinstance(name, str) or not isinstance(revision, str | None):
        raise CheckpointError("checksums.json: does not name the model that was imported")
    return [Origin("source", name, revision, licence_of(entry))]


def _changes(entry: dict) -> Iterator[str]:
    """What importing changed."""
    kept = entry.get("kept")
    yield "ternary weights were repacked, five to a byte; weights and scales have the same values"
    if isinstance(kept, list) and kept:
        names = listed(map(code, kept), 4)
        yield f"quantized matrices that are not ternary stayed as they were: {names}"
    yield "`config.json` is new"
