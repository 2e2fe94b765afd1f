"""What is measured, and the contents of `outliers.json` and `summary.json`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from outlier_mlx.engine.paging.budget import AUTO, ExpertMemory
from outlier_mlx.errors import counted
from outlier_mlx.measure.outlier_counts import Accumulator
from outlier_mlx.measure.outlier_definitions import blog_summary, pooled_summary
from outlier_mlx.measure.outlier_parameters import RULE
from outlier_mlx.measure.outliers import Measurement, Options, tokens_digest
from outlier_mlx.measure.pictures import SUFFIXES, Format
from outlier_mlx.models.sizes import Parameters

RESULTS = "outliers.json"
SUMMARY = "summary.json"
#: All files of a run.
FILES = (
    RESULTS,
    SUMMARY,
    *(f"{name}-*{suffix}" for name in ("heatmap", "by") for suffix in SUFFIXES),
)


@dataclass(frozen=True)
class Study:
    """The text to measure models on, and how.

    Attributes:
        text: a UTF-8 file.
        sequences: number of windows, at most.
        length: tokens in each.
        overlap: share of a window that the next one repeats.
        options: what is measured.
        dtype: activation dtype; None: the model's own.
        plots: the pictures' file format; None draws none.
        check_memory: refuse models that do not fit into memory.
        memory: what routed experts may take. Results do not depend on it.
    """

    text: Path
    sequences: int = 16
    length: int = 2048
    overlap: float = 0.0
    options: Options = field(default_factory=Options)
    dtype: str | None = None
    plots: Format | None = "png"
    check_memory: bool = True
    memory: ExpertMemory = AUTO


def describe(
    name: str,
    measured: Measurement,
    parameters: Parameters,
    bits: float,
    study: Study,
    windows: list[list[int]],
) -> dict[str, Any]:
    """All results for one model, for JSON.

    Args:
        name: name of the model.
        measured: its features and loss.
        parameters: its number of parameters.
        bits: bits per weight in its files.
        study: the text it was measured on, and what was measured.
        windows: the text's windows of tokens.
    """
    counts, thresholds = measured.counts, study.options.thresholds
    pooled = counts.pooled()
    blog = blog_summary(measured.sequences["all"])
    listed = pooled_summary(pooled, thresholds)
    dtype = ", ".join(sorted(counts.dtypes))
    entry: dict[str, Any] = {
        "model": name,
        "total_params": parameters.total,
        "active_params": parameters.active,
        "active_params_rule": RULE,
        "dtype": dtype,
        "hold": study.options.hold or dtype,
        "weights_bits": round(bits, 3),
        "layers": counts.layers,
        "probes": len(counts.probes),
        "hidden": counts.hidden,
        "sequences": len(windows),
        "length": study.length,
        "overlap": study.overlap,
        "tokens_sha256": tokens_digest(windows),
        "thresholds": {
            "magnitude": thresholds.magnitude,
            "min_layers": thresholds.layers,
            "min_seq": thresholds.positions,
        },
        "perplexity": measured.perplexity,
        "loss": measured.loss,
        "blog": blog,
        "pooled": listed,
        "inputs": _inputs(measured),
        "dims_with_hits": [pooled.describe(int(d)) for d in np.flatnonzero(pooled.probe_hits)],
        "probe_max": _probe_max(counts),
        "notes": _notes(study, len(windows)),
    }
    if counts.experts is not None:
        dims = {dim["dim"] for dim in listed["dims"]} | set(blog["unique_dims"])
        entry["per_expert"] = counts.experts.as_json(sorted(dims))
    if counts.residuals is not None:
        entry["residual"] = [found.as_json(n) for n, found in counts.residuals.items()]
    return entry


def _inputs(measured: Measurement) -> dict[str, Any]:
    """The blog's figures for each kind of probe by itself."""
    probes = measured.counts.probes
    inputs: dict[str, Any] = {}
    for kind, sequences in measured.sequences.items():
        if kind == "all":
            continue
        figures = blog_summary(sequences)
        del figures["per_sequence"]
        inputs[kind] = {"probes": sum(kind in probe.kinds for probe in probes), **figures}
    both = [p.layer for p in probes if {"routed_experts", "shared_experts"} <= set(p.kinds)]
    if both:
        # They have the same input, so their figures are equal. Say so: this is not a finding.
        inputs["same_vector_in_layers"] = both
    return inputs


def _probe_max(counts: Accumulator) -> list[dict[str, Any]]:
    return [
        {
            "probe": probe.name,
            "reads": list(probe.kinds),
            "max_magnitude": float(row.max()),
            "dim": int(row.argmax()),
            "max_magnitude_without_first": float(later.max()),
            "dim_without_first": int(later.argmax()),
        }
        for probe, row, later in zip(
            counts.probes, counts.largest, counts.largest_without_first, strict=True
        )
    ]


def _notes(study: Study, sequences: int) -> list[str]:
    notes = []
    if sequences < study.sequences:
        notes.append(
            f"the text has {counted(sequences, 'whole window')}, fewer than {study.sequences}"
        )
    if 1 / study.length >= study.options.thresholds.positions:
        notes.append(
            f"sequences are so short ({study.length}) that a hit in the first token alone suffices;"
            " first tokens often carry values in the hundreds"
        )
    if study.overlap:
        notes.append("windows overlap, so sequences are not independent")
    return notes


def summarize(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The blog's figures by model, as they were published."""
    return {
        entry["model"]: {
            "layer_pct": round(entry["blog"]["layer_pct"], 1),
            "seq_pct": round(entry["blog"]["seq_pct"], 1),
            "active_params": short_count(entry["active_params"]),
        }
        for entry in entries
    }


def short_count(number: float) -> str:
    """A number of parameters as in names of models: 1.3B, 12B, 460M."""
    for unit in ("", "K", "M", "B"):
        if number < 999.5 or unit == "B":
            break
        number /= 1000
    return f"{number:.1f}{unit}" if unit and number < 9.95 else f"{number:.0f}{unit}"


def file_name(model: str) -> str:
    """A model's name as part of a file's name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in model)[:100]
