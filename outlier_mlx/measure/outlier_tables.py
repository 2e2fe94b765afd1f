"""The output of `outliers`, on stdout."""

from typing import Any

from outlier_mlx.errors import counted, one_line
from outlier_mlx.measure.outlier_report import short_count
from outlier_mlx.terminal import print_columns, stdout


def print_outliers(entries: list[dict[str, Any]]) -> None:
    """Print a row per model, and how each was measured (dicts of `outlier_report.describe`)."""
    console = stdout()
    print_columns(
        console,
        [
            *("model", "params", "active", "layers\n%", "positions\n%"),
            *("outliers", "dims", "pooled\ndims", "perplexity"),
        ],
        [_row(entry) for entry in entries],
        title=f"Outlier features: magnitude {entries[0]['thresholds']['magnitude']:g} and up",
    )
    for entry in entries:
        console.print(one_line(_how(entry)), soft_wrap=True)
        for note in entry["notes"]:
            console.print(one_line(f"note: {note}"), soft_wrap=True)


def _row(entry: dict[str, Any]) -> list[str]:
    blog = entry["blog"]
    return [
        one_line(entry["model"]),
        short_count(entry["total_params"]),
        short_count(entry["active_params"]),
        f"{blog['layer_pct']:.1f}",
        f"{blog['seq_pct']:.1f}",
        str(blog["num_outliers"]),
        str(len(blog["unique_dims"])),
        str(entry["pooled"]["num_outliers"]),
        f"{entry['perplexity']:.2f}",
    ]


def _how(entry: dict[str, Any]) -> str:
    rounded = "" if entry["hold"] == entry["dtype"] else f" rounded to {entry['hold']}"
    return (
        f"{entry['model']}: {counted(entry['sequences'], 'sequence')} of {entry['length']} tokens"
        f" ({entry['tokens_sha256'][:12]}), {entry['probes']} probes, activations in"
        f" {entry['dtype']}{rounded}, {entry['weights_bits']:.2f} bits per weight"
    )
