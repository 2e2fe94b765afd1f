"""What `info` says of a GGUF model, from its metadata and its list of tensors."""

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from outlier_mlx.checkpoints.headers import Headers
from outlier_mlx.checkpoints.ternary_info import Deep, TernaryInfo, survey_gguf
from outlier_mlx.models.summary import SummaryRow, summarize
from outlier_mlx.storage.gguf_model import GgufModel, read_model
from outlier_mlx.storage.paths import entries

_KINDS = (
    ("/token_embd", "embeddings"),
    ("/output.weight", "head"),
    ("_norm", "norms"),
    ("_exps", "experts"),
    ("gate_inp", "router"),
    (".attn_", "attention"),
    (".ssm_", "attention"),
    (".ffn_", "dense FFN"),
)


def holds_gguf(place: Path) -> bool:
    """Whether a place is a GGUF file, or a folder with GGUF files and no config.json."""
    if place.is_file():
        return place.suffix.lower() == ".gguf"
    return bool(entries(place, "*.gguf")) and not (place / "config.json").exists()


def read_gguf_info(
    place: Path,
    file: str | None,
    found: Headers | None = None,
    deep: Deep | None = None,
) -> tuple[dict[str, Any], TernaryInfo | None]:
    """The fields of an `Info` that a GGUF model has, and what is known of its quantized matrices.

    Args:
        place: a file, or a folder.
        file: name of a file in the folder.
        found: the model if `place` has only headers.
        deep: how to read the codes; None: they are not read.

    Raises:
        CheckpointError: see `gguf_model.read_model`.
    """
    model = read_model(place, file)
    if found is not None:
        model = replace(model, tensors=found.readable(model.tensors))
    rows = _rows(model)
    said = model.fields
    name = said.get("general.architecture")
    licence = said.get("general.license")

    def number(key: str) -> int | None:
        value = said.get(f"{name}.{key}")
        return value if type(value) is int else None

    moe = {name.split(".")[1] for name in model.tensors if "_exps." in name}
    embedding = model.tensors.get("token_embd.weight")
    fields = {
        "kind": "model",
        "form": "GGUF " + "+".join(dict.fromkeys(t.kind for t in model.tensors.values())),
        "params": rows[-1].params,
        "active_params": rows[-1].params,
        "nbytes": rows[-1].nbytes,
        "rows": rows,
        "architecture": name if isinstance(name, str) else None,
        "layers": number("block_count"),
        "moe_layers": len(moe),
        "experts": number("expert_count") or 0,
        "experts_per_token": number("expert_used_count"),
        "context_length": number("context_length"),
        "vocab": embedding.rows if embedding is not None else None,
        "chat_template": "tokenizer.chat_template" in said,
        "licence": licence if isinstance(licence, str) else None,
    }
    return fields, survey_gguf(model, deep)


def _rows(model: GgufModel) -> list[SummaryRow]:
    return summarize(
        (
            next((kind for sign, kind in _KINDS if sign in f"/{name}"), "norms"),
            prod(tensor.shape),
            tensor.nbytes,
        )
        for name, tensor in model.tensors.items()
    )
