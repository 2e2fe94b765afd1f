"""What a model is and how large, from its config and the headers of its files alone."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from outlier_mlx.checkpoints import Overlay, open_overlay
from outlier_mlx.checkpoints.gguf_info import holds_gguf, read_gguf_info
from outlier_mlx.checkpoints.headers import Headers, headers
from outlier_mlx.checkpoints.ternary_info import (
    Deep,
    Reading,
    TernaryInfo,
    examine_rows,
    silently,
    survey_folder,
)
from outlier_mlx.checkpoints.ternary_model import open_ternary_model
from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.config import (
    Description,
    describe,
    is_overlay,
    is_ternary_model,
    is_tier,
    parse_config,
    raw_config,
    stated_base,
)
from outlier_mlx.models.sizes import add_up, context_length, kv_bytes
from outlier_mlx.models.stored import stored_params
from outlier_mlx.models.summary import SummaryRow, kind_of, summarize
from outlier_mlx.storage.gguf_model import patterns
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.terminal import Progress, no_progress
from outlier_mlx.writing.assets import has_chat_template
from outlier_mlx.writing.licences import CARD, stated_licence
from outlier_mlx.writing.runs import name_leftovers

# What says something of a model besides its config and tensors.
_ABOUT = (CARD, "tokenizer_config.json", "chat_template.*")


@dataclass(frozen=True)
class Info:
    """What `outlier-mlx info` says.

    Attributes:
        name: the folder's or repository's name.
        kind: "tier", "overlay" or "model".
        form: the overlay's form, or how a tier stores its experts.
        params: parameters in all.
        active_params: parameters that a token uses.
        nbytes: bytes of all tensors.
        kv_bytes_per_token: bytes that the KV cache grows by with each token, in 16 bits; None: not
            known.
        rows: parameters and bytes by kind of part, the total last.
        architecture: the config's `model_type`.
        base_architecture: that of the base of a tier, or of an overlay that says it.
        layers: decoder layers.
        moe_layers: how many of them have experts; None: not known.
        experts: routed experts of a MoE layer; 0: there are none.
        experts_per_token: how many of them a token uses.
        context_length: tokens of context that it was made for.
        vocab: rows of its embedding.
        dtype: dtype of activations and unquantized weights.
        quantization: bits and group size of what is quantized, but for a tier's experts.
        chat_template: whether its tokenizer has one.
        licence: as its model card states it.
        ternary: whether its quantized matrices are ternary; None if none is quantized.
    """

    name: str
    kind: str
    form: str
    params: int
    active_params: int
    nbytes: int
    kv_bytes_per_token: int | None
    rows: list[SummaryRow]
    architecture: str | None
    base_architecture: str | None
    layers: int | None
    moe_layers: int | None
    experts: int
    experts_per_token: int | None
    context_length: int | None
    vocab: int | None
    dtype: str | None
    quantization: dict[str, int] | None
    chat_template: bool
    licence: str | None
    ternary: TernaryInfo | None = None

    def as_json(self) -> dict:
        """Everything, with the bits per weight of each row."""
        rows = [asdict(row) | {"bits_per_weight": row.bits_per_weight} for row in self.rows]
        values = asdict(self) | {"rows": rows}
        if self.ternary is None:
            del values["ternary"]
            return values
        return values | {"ternary": self.ternary.as_json()}


def inspect(
    path_or_repo: str | Path,
    revision: str | None = None,
    progress: Progress = no_progress,
    *,
    file: str | None = None,
    deep: bool = False,
    reading: Reading = silently,
) -> Info:
    """Describe a tier, an overlay or a plain model; weights are read only with `deep`.

    Args:
        path_or_repo: a folder, a `.gguf` file, or a repository on the hub.
        revision: branch, tag or commit on the hub.
        file: name of a GGUF file in the folder or repository.
        deep: read the codes of matrices that may be ternary; from the hub, only these.
        reading: called with how many bytes this reads at most, before the first is read; shows the
            progress. See `ternary_info.Reading`.
        progress: called with how many files on the hub have been asked for, and how many will be.

    Raises:
        CheckpointError: there is no model, or its files are not valid.
        OutlierError: the hub cannot be reached.
    """
    place, how = Path(path_or_repo), Deep(reading) if deep else None
    if place.is_file() and holds_gguf(place):
        if file is not None or revision is not None:
            raise CheckpointError(f"{place}: a file: --file and --revision are for folders")
        return _inspect_gguf(place, place.name, None, None, how)
    name_leftovers(place)
    besides = _ABOUT if file is None else (*_ABOUT, *patterns(file))
    with headers(path_or_repo, revision, progress, besides=besides) as found:
        folder, name = found.source.folder, found.source.name
        how = replace(how, remote=found.remote) if how is not None else None
        if file is not None or (folder.is_dir() and holds_gguf(folder)):
            return _inspect_gguf(folder, name, file, found, how)
        if not place.exists() and not (folder / "config.json").exists():
            raise CheckpointError(f"{name}: no config.json; name a GGUF file with --file")
        return _inspect_folder(folder, name, found, how)


def _inspect_gguf(
    place: Path, name: str, file: str | None, found: Headers | None, deep: Deep | None
) -> Info:
    fields, ternary = read_gguf_info(place, file, found, deep)
    others: dict[str, Any] = dict.fromkeys(("kv_bytes_per_token", "base_architecture", "dtype"))
    return Info(name=name, quantization=None, ternary=ternary, **others, **fields)


def _inspect_folder(folder: Path, name: str, found: Headers, deep: Deep | None) -> Info:
    config = _read(name, raw_config(folder))
    if is_overlay(config.raw):
        overlay = open_overlay(folder)
        return _describe(config, folder, name, overlay_sizes(overlay), overlay.form)
    tensors = found.readable(read_shards(folder))
    rows = None
    if is_ternary_model(config.raw):
        rows = open_ternary_model(folder, config.raw, tensors)
        if deep is not None:
            examine_rows(rows, deep)
    info = _describe(config, folder, name, tensor_sizes(name, config, tensors), None)
    if is_tier(config.raw):
        return info
    return replace(info, ternary=survey_folder(config.raw, tensors, rows, deep))


#: Kind of part, parameters and bytes.
Sizes = Iterable[tuple[str, int, int]]


def _describe(config: Description, folder: Path, name: str, sizes: Sizes, form: str | None) -> Info:
    rows = summarize(sizes)
    total = rows[-1]
    counted = add_up(((row.kind, row.params) for row in rows[:-1]), config)
    kind, base = "model", None
    if is_overlay(config.raw):
        kind, base = "overlay", stated_base(config.raw)
    if is_tier(config.raw):
        kind, base = "tier", config.family
        form = str(config.raw["ternary"].get("format", "?"))
    elif is_ternary_model(config.raw):
        form = f"ternary {config.model_type or '?'}"
    first = kv_bytes(config, 1)
    return Info(
        name=name,
        kind=kind,
        form=form or config.model_type or "?",
        params=total.params,
        active_params=counted.active,
        nbytes=total.nbytes,
        kv_bytes_per_token=None if first is None else first - (kv_bytes(config, 0) or 0),
        rows=rows,
        architecture=config.model_type,
        base_architecture=base,
        layers=config.layers,
        moe_layers=None if config.moe_layers is None else len(config.moe_layers),
        experts=config.experts,
        experts_per_token=config.top_k if config.experts else None,
        context_length=context_length(config),
        vocab=config.vocab,
        dtype=config.dtype,
        quantization=_quantization(config),
        chat_template=has_chat_template(folder),
        licence=_licence(folder),
    )


def _read(name: str, raw: dict) -> Description:
    """What a config says: checked if it is an overlay's or a tier's, but for a tier's type."""
    known = describe(raw)
    if not is_overlay(raw) and not is_tier(raw):
        return known
    try:
        checked = parse_config(raw | {"model_type": "outlier_moe"} if is_tier(raw) else raw)
        return replace(checked, model_type=known.model_type)
    except CheckpointError as error:
        reason = str(error).removeprefix("config.json: ")
        raise CheckpointError(f"{name}: config.json does not describe a model: {reason}") from None


def overlay_sizes(overlay: Overlay) -> Sizes:
    """Kind, parameters and bytes of everything that an overlay holds, whatever its form."""
    moe_layers = overlay.config.moe_layers
    for name, tensor in overlay.base.items():
        shared = ".mlp." in name and int(name.split(".")[2]) in moe_layers
        kind = "shared FFN" if shared else kind_of(name)
        yield kind, prod(tensor.shape), tensor.nbytes
    for router in [*overlay.routers.values(), *overlay.alpha_tensors.values()]:
        yield "router", prod(router.shape), router.nbytes
    for expert in (expert for experts in overlay.experts.values() for expert in experts):
        for _, matrix in expert:
            scale = matrix.scale.nbytes if isinstance(matrix.scale, TensorRef) else 0
            yield "experts", prod(matrix.trits.shape), matrix.trits.nbytes + scale


def tensor_sizes(name: str, config: Description, tensors: Mapping[str, TensorRef]) -> Sizes:
    """Kind, parameters and bytes of the tensors of a tier or plain model; `name` is for errors."""
    for key, tensor in tensors.items():
        yield kind_of(key), stored_params(key, tensors, config, name), tensor.nbytes


def _quantization(config: Description) -> dict[str, int] | None:
    how = config.quantization.default if config.quantization is not None else None
    return None if how is None else {"bits": how.bits, "group_size": how.group_size}


def _licence(folder: Path) -> str | None:
    """The licence that a model card states: its identifiers, or its name where that is "other"."""
    stated = stated_licence(folder)
    if stated is None:
        return None
    return ", ".join(stated.name if one == "other" and stated.name else one for one in stated.ids)
