"""The model card of a tier (`README.md`), made from the tier's own folder."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from outlier_mlx.checkpoints.info import Info, inspect
from outlier_mlx.errors import CheckpointError, OutlierError, listed, one_line
from outlier_mlx.measure.eval_results import Evaluation
from outlier_mlx.measure.measured import Measured, read_measured
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.safetensors import read_json
from outlier_mlx.tiers.card_tables import code, perplexities, plain, scores, sizes
from outlier_mlx.writing.assets import base_variant, is_legal
from outlier_mlx.writing.licences import CARD, Licence, combine, licence_of


@dataclass(frozen=True)
class Origin:
    """What a tier was made from, as its manifest says.

    Attributes:
        role: "overlay" or "base".
        name: the repository, or a folder's name.
        revision: the commit on the hub; None for a folder.
        licence: what its model card stated.
    """

    role: str
    name: str
    revision: str | None
    licence: Licence | None


@dataclass(frozen=True)
class Facts:
    """What a card tells of.

    Attributes:
        folder: the tier.
        name: what commands call it: a repository or a folder.
        manifest: `tier.json`.
        config: `config.json`.
        info: sizes.
        origins: the overlay, and the base if it was another checkpoint.
        measured: perplexities.
        given: identifier of the licence of origins that state none.
        evaluations: scores.
    """

    folder: Path
    name: str
    manifest: dict
    config: dict
    info: Info
    origins: list[Origin]
    measured: list[Measured]
    given: str | None
    evaluations: Sequence[Evaluation]

    @property
    def recipe(self) -> dict:
        """How the tier is stored."""
        return _mapping(self.manifest.get("recipe"))

    @property
    def licence(self) -> Licence | None:
        """The tier's licence, if that of all origins is known."""
        return combine([origin.licence for origin in self.origins], self.given)


def write_card(folder: Path, name: str) -> None:
    """Write the card of a tier that is otherwise complete."""
    (folder / CARD).write_text(model_card(folder, name), encoding="utf-8")


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
    manifest = read_json(inside(folder, "tier.json"))
    facts = Facts(
        folder,
        one_line(name),
        manifest,
        read_json(inside(folder, "config.json")),
        inspect(folder),
        origins(manifest),
        read_measured(folder),
        licence,
        evaluations,
    )
    for one in evaluations:
        if one.bytes_in_memory != facts.info.nbytes:
            raise OutlierError(
                f"{folder}: the scores of {one.model} are not of this tier: it has"
                f" {facts.info.nbytes} bytes of tensors, that had {one.bytes_in_memory}"
            )
    sections = [
        f"---\n{_metadata(facts)}\n---",
        _introduction(facts),
        sizes(facts.info),
        *([perplexities(facts.measured)] if facts.measured else []),
        *([scores(facts.evaluations)] if facts.evaluations else []),
        _changes(facts),
        _licences(facts),
    ]
    return "\n\n".join(sections) + "\n"


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


def _metadata(facts: Facts) -> str:
    """The YAML at the head, as the hub reads it."""
    from huggingface_hub import EvalResult, ModelCardData

    base = facts.origins[-1]
    quantized = facts.recipe.get("base_bits") is not None
    licence = facts.licence
    stated = licence.as_json() if licence else {}
    if licence and not _leads_somewhere(facts.folder, licence.link):
        stated.pop("license_link", None)
    title = facts.name.rsplit("/", 1)[-1]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=one.text,
            dataset_revision=one.sha256,
            metric_type="perplexity",
            metric_value=one.perplexity,
            metric_args={"window": one.window, "tokens": one.tokens, "dtype": one.dtype},
        )
        for one in facts.measured
    ]
    data = ModelCardData(
        **stated,
        library_name="mlx",
        pipeline_tag="text-generation",
        base_model=base.name if base.revision else None,
        base_model_relation=("quantized" if quantized else "finetune") if base.revision else None,
        tags=["mlx", "moe", "ternary"],
        model_name=title if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _introduction(facts: Facts) -> str:
    title = facts.name.rsplit("/", 1)[-1]
    own_code = "model_file" in facts.config
    flag = " --trust-remote-code" if own_code else ""
    warning = "\n\nThe second command runs `outlier_moe.py` from here; the first never does."
    recipe = facts.recipe
    return f"""# {title}

An Outlier model for MLX: a frozen base with ternary experts beside its feed-forward layers.
Converted by {plain(facts.manifest.get("producer"))}, recipe {code(recipe.get("name"))}
({plain(recipe.get("dtype"))}).

```
outlier-mlx generate --model {facts.name} --prompt "Once upon a time"
mlx_lm.generate --model {facts.name}{flag} --prompt "Once upon a time"
```{warning if own_code else ""}"""


def _changes(facts: Facts) -> str:
    sources = "".join(
        f"- {origin.role} {code(origin.name)}"
        + (f", revision {code(origin.revision)}" if origin.revision else "")
        + "\n"
        for origin in facts.origins
    )
    if len(facts.origins) == 1:
        sources += "- base: contained in the overlay\n"
    changes = "".join(f"- {line}\n" for line in _what_changed(facts))
    return f"""## Modifications

Made from

{sources}
The files here are not the originals. Modified in the conversion:

{changes}
`tier.json` lists size and SHA-256 of every file that changes results.""".rstrip()


def _what_changed(facts: Facts) -> Iterator[str]:
    recipe = facts.recipe
    bits, group, dtype = (recipe.get(name) for name in ("base_bits", "group_size", "dtype"))
    if bits is None:
        yield f"the base's weights were converted to {dtype}"
    else:
        more = ", the most sensitive ones to 6 bits" if recipe.get("mixed") else ""
        yield (
            f"the base's matrices were quantized to {bits} bits in groups of {group}{more}, as MLX"
            f" does it; its other weights were converted to {dtype}"
        )
    if recipe.get("portable"):
        yield (
            "the experts' trits were stored in MLX's affine 2-bit format with the alphas folded"
            f" into the down projections, all scales in {dtype}"
        )
        yield (
            "rows of the query and key projections were reordered and zero biases added, as the"
            f" model type {code(facts.config.get('model_type'))} has them"
        )
    else:
        form = "packed anew, five to a byte"
        if recipe.get("experts") == "affine2":
            form = "stored in MLX's affine 2-bit format"
        yield f"the experts' trits were {form}, their values unchanged, with float32 scales"
    if "alpha" in recipe:
        yield f"alphas are not the overlay's present ones, but from {code(recipe['alpha'])}"
    yield "`config.json` was written anew"
    if (facts.folder / "tokenizer_config.json").exists():
        yield "`tokenizer_config.json` was rewritten without references to code"


def _licences(facts: Facts) -> str:
    lines = ["## Licence", "", "What the model cards of the sources state:", ""]
    for origin in facts.origins:
        lines.append(f"- {origin.role} {code(origin.name)}: {_stated(origin.licence)}")
    silent = [f"the {origin.role}" for origin in facts.origins if origin.licence is None]
    if silent and facts.given:
        lines += [
            "",
            f"For those that state none, the publisher of this tier names {code(facts.given)}.",
        ]
    elif silent:
        lines += ["", f"Of {listed(silent)} no licence is known; none is assumed."]
    names = sorted(path.name for path in facts.folder.iterdir() if is_legal(path.name))
    if names:
        lines += ["", f"Files that came with them: {', '.join(map(code, names))}."]
    return "\n".join(lines)


def _stated(licence: Licence | None) -> str:
    if licence is None:
        return "none stated"
    text = ", ".join(code(value) for value in licence.ids)
    if licence.name:
        text += f" ({code(licence.name)})"
    return text + (f", {code(licence.link)}" if licence.link else "")


def _leads_somewhere(folder: Path, link: str | None) -> bool:
    """Whether a licence's link is an address, or a licence file in the folder."""
    if link is None or link.startswith(("https://", "http://")):
        return True
    return (
        is_legal(link) and (folder / link).is_file() and not (folder / base_variant(link)).exists()
    )


def _mapping(value: object) -> dict:
    return value if isinstance(value, dict) else {}
