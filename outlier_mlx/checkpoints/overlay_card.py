"""The model card of an overlay that this project trained, made from the overlay's own folder."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from outlier_mlx.checkpoints.info import inspect
from outlier_mlx.errors import CheckpointError, listed, one_line
from outlier_mlx.models.config import raw_config
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.texts import read_json
from outlier_mlx.writing.card import Card, Origin, code, in_shell, plain
from outlier_mlx.writing.licences import licence_of

#: The manifest's field that says how an overlay was trained.
UPCYCLED = "upcycled"
# Files of a corpus that a card names.
_NAMED = 4
# What stands in the place of a figure that there is not.
_NONE = "–"


def is_upcycled(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is that of an overlay that this project trained."""
    return isinstance(manifest.get(UPCYCLED), dict)


def upcycled_origins(manifest: Mapping[str, Any]) -> list[Origin]:
    """The base that the manifest of a trained overlay names.

    Raises:
        CheckpointError: it names none.
    """
    entry = _mapping(manifest.get("source"))
    name, revision = entry.get("name"), entry.get("revision")
    if not isinstance(name, str) or not isinstance(revision, str | None):
        raise CheckpointError("checksums.json: does not name the base of the overlay")
    return [Origin("base", name, revision, licence_of(entry))]


def overlay_card(folder: Path, name: str, licence: str | None = None) -> str:
    """The text of the card of an overlay that this project trained.

    Args:
        folder: the overlay, with its manifest.
        name: what the card's commands call it: a repository or a folder.
        licence: the hub's identifier of the licence of a base that states none.

    Raises:
        CheckpointError: the folder is no sound overlay, or its manifest does not name its base.
    """
    manifest = read_json(inside(folder, "checksums.json"))
    made = _mapping(manifest.get(UPCYCLED))
    (base,) = upcycled_origins(manifest)
    name = one_line(name)
    tier = in_shell(f"./{name.rstrip('/').rsplit('/', 1)[-1]}-tier")
    return Card(
        name=name,
        introduction=_introduction(manifest, raw_config(folder), base),
        commands=[
            f"outlier-mlx convert {in_shell(name)} --base {in_shell(base.name)} --out {tier}",
            f'outlier-mlx generate --model {tier} --prompt "Once upon a time"',
        ],
        origins=[base],
        based_on=[base],
        relation="adapter",
        tags=["mlx", "moe", "ternary"],
        rows=inspect(folder).rows,
        sections=[_perplexities(made), _data(made), _training(made)],
        changes=[
            "ternary experts, routers and alphas were trained beside the base's feed-forward"
            " layers; no weight of the base was changed, and none is contained",
            "`config.json` is the base's, with fields about the experts",
        ],
        given=licence,
    ).text(folder)


def _introduction(manifest: Mapping[str, Any], config: dict, base: Origin) -> str:
    layers = config.get("moe_layer_indices")
    count = len(layers) if isinstance(layers, list) else 0
    return f"""\
Ternary experts for the frozen base {code(base.name)}, which is needed beside them:
{plain(config.get("n_experts"))} experts in each of {count} layers, {plain(config.get("top_k"))} of
them for a token. Trained by {plain(manifest.get("producer"))} (`upcycle`)."""


def _perplexities(made: Mapping[str, Any]) -> str:
    """A table of held-out perplexities."""
    before, after = _mapping(made.get("before")), _mapping(made.get("after"))
    rows = [
        (plain(name), _number(before[name], ".3f"), _number(after.get(name), ".3f"))
        for name in before
    ]
    head = ("text", "base", "with the experts")
    note = (
        "Perplexity on half of the text that was held out of the training, by which nothing was"
        " chosen, measured with the base unquantized."
        " `keep` is text that the base shall not forget."
    )
    return "\n".join(["## Held-out text", "", note, "", *_table(head, rows)])


def _data(made: Mapping[str, Any]) -> str:
    """A table of what was trained on."""
    rows = []
    for corpus in _mappings(made.get("data")):
        files = corpus.get("files")
        names = listed(map(code, files), _NAMED) if isinstance(files, list) else _NONE
        numbers = [
            _number(corpus.get(key), ",")
            for key in ("documents", "train_windows", "held_out_windows", "tokens")
        ]
        rows.append((plain(corpus.get("name")), names, *numbers))
    head = ("text", "files", "documents", "windows", "held out", "tokens")
    note = (
        f"Windows of {_number(made.get('window'), ',')} tokens, no two of them equal; tokens are"
        " those of the windows that were trained on."
    )
    return "\n".join(["## Data", "", note, "", *_table(head, rows, left=2)])


def _training(made: Mapping[str, Any]) -> str:
    """The settings, and a table of stages."""
    settings = [
        f"`{plain(key)}` {plain(_setting(value))}"
        for key, value in _mapping(made.get("settings")).items()
    ]
    lines = ["## Training", "", f"Settings: {', '.join(settings)}."]
    if made.get("teacher") is not None:
        lines[-1] += f" The teacher was {code(made['teacher'])}."
    rows = list(_stages(made))
    if rows:
        head = ("stage", "steps", "held-out perplexities", "kept")
        note = "A stage is kept only if the other half of the held-out text says so."
        if any(" of " in steps for _, steps, *_ in rows):
            note += " The training was ended before all steps were made."
        lines += ["", note, "", *_table(head, rows)]
    return "\n".join(lines)


def _stages(made: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for stage in _mappings(made.get("stages")):
        before, after = _mapping(stage.get("before")), _mapping(stage.get("after"))
        figures = (
            f"{plain(name)} {_number(before[name], '.3f')} → {_number(after.get(name), '.3f')}"
            for name in before
        )
        kept = _setting(stage.get("kept"))
        steps, planned = (_number(stage.get(key), ",") for key in ("steps", "planned"))
        if planned not in (steps, _NONE):
            steps = f"{steps} of {planned}"
        yield plain(stage.get("name")), steps, ", ".join(figures), kept


def _setting(value: object) -> str:
    """A setting as a card shows it."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None or isinstance(value, bool):
        return "yes" if value else "no" if value is False else "none"
    return str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def _number(value: object, spec: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _NONE
    return format(value, spec)


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _mappings(value: object) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
