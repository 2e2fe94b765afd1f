"""Damaged bases, pairs that do not fit, and bad arguments: refused in one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.damage import (
    drop_tensor,
    truncate,
)
from tests.refusals import (
    FIRST,
    HIDDEN,
    VOCAB,
    Site,
    changed,
    config,
    linked_out,
    refuse,
    remove,
    run,
    shape,
    tensor,
)

# A damaged base, and pairs that do not fit

BASES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ("base", "config.json")),
    "no shards": (lambda f: remove(f, "*.safetensors"), ("base",)),
    "truncated": (lambda f: truncate(f / FIRST, 1), (FIRST, "truncated")),
    "another hidden size": (
        config(hidden_size=128),
        ("different models", "hidden", "64", "128"),
    ),
    "another vocabulary": (config(vocab_size=300), ("different models", "vocab", "288", "300")),
    "another depth": (config(num_hidden_layers=3), ("different models", "layers", "2", "3")),
    "a tensor missing": (
        lambda f: drop_tensor(f, "model.layers.0.mlp.gate_proj.weight"),
        ("base", "model.layers.0.mlp.gate_proj.weight", "(64, 64)", "missing"),
    ),
    "a tensor of another shape": (
        tensor("lm_head.weight", shape(VOCAB, HIDDEN + 1)),
        ("safetensors", "lm_head.weight", "(288, 65)", "(288, 64)"),
    ),
    "NaN": (
        lambda f: changed(f, "lm_head.weight", (-1, -1), np.nan),
        ("safetensors", "lm_head.weight", "NaN"),
    ),
    "a shard that links out": (lambda f: linked_out(f, FIRST), (FIRST, "links out")),
}


@pytest.mark.parametrize("name", BASES)
def test_a_damaged_base_is_refused(site: Site, name: str) -> None:
    damage, words = BASES[name]
    damage(site.base)
    command = ("convert", site.bare, "--base", site.base, "--out", site.outputs / "tier")
    refuse(site, *command, words=words)


def test_a_base_that_changes_a_tensor_of_the_overlay_is_refused(site: Site) -> None:
    changed(site.base, "model.norm.weight", (5,), 3.0)
    command = ("convert", site.overlay, "--base", site.base, "--out", site.outputs / "tier")
    refuse(site, *command, words=("model.norm.weight", "differs", "base"))


# Arguments

# Placeholders are replaced by the site's paths.
ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "no such overlay": (("convert", "{root}/nowhere"), ("nowhere", "no such folder")),
    "no such overlay, nor repository": (("convert", "no/such/place"), ("no/such/place", "OWNER")),
    "a file for an overlay": (("convert", "{outputs}/note"), ("note: a file;", "a folder")),
    "an empty folder": (("convert", "{root}/empty"), ("empty", "not an overlay")),
    "a base for an overlay": (("convert", "{base}"), ("base", "not an overlay", "--base names")),
    "an overlay to import": (
        ("import", "{overlay}"),
        ("overlay: an overlay; `outlier-mlx convert",),
    ),
    "a base to export": (
        ("export", "{base}", "--out", "{outputs}/x"),
        ("base: neither a tier nor an overlay",),
    ),
    "a tier for an overlay": (("convert", "{tier}"), ("tier", "tier already")),
    "no base": (("convert", "{bare}"), ("bare", "--base")),
    "no such base": (("convert", "{bare}", "--base", "{root}/nowhere"), ("nowhere", "folder")),
    "a tier for a base": (("convert", "{bare}", "--base", "{tier}"), ("tier", "a base model")),
    "revision of a folder": (("convert", "{overlay}", "--revision", "main"), ("no revision",)),
    "no such alphas": (("convert", "{overlay}", "--alpha", "{root}/a.json"), ("a.json", "No such")),
    "alphas that are no JSON": (
        ("convert", "{overlay}", "--alpha", "{outputs}/note"),
        ("note", "not valid JSON"),
    ),
    "a width that affine2 cannot hold": (
        ("convert", "{overlay}", "--experts", "affine2"),
        ("safetensors", "down_ternary", "40", "affine2", "tq1_0"),
    ),
    "an overlay for a tier": (
        ("generate", "--model", "{overlay}", "--prompt", "x"),
        ("overlay", "an overlay", "outlier-mlx convert"),
    ),
    "no such tier": (("generate", "--model", "{root}/nowhere", "--prompt", "x"), ("nowhere",)),
    "KV cache in groups that do not divide": (
        ("generate", "--model", "{tier}", "--prompt", "x", "--kv-bits", "4"),
        ("--kv-group-size 64", "16"),
    ),
    "KV cache quantized and bounded": (
        ("generate", "--model", "{tier}", "--prompt", "x", "--kv-bits", "4", "--max-kv-size", "8"),
        ("--kv-bits", "--max-kv-size"),
    ),
    "nothing to describe": (("info", "{outputs}"), ("outputs", "config.json")),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments_are_refused(site: Site, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (site.root / "empty").mkdir()
    monkeypatch.chdir(site.outputs)
    command, words = ARGUMENTS[name]
    paths = {n: getattr(site, n) for n in ("root", "overlay", "bare", "base", "tier", "outputs")}
    refuse(site, *(word.format(**paths) for word in command), words=words)


@pytest.mark.parametrize(
    "command",
    [
        ("convert",),
        ("convert", "x", "--tier", "q5"),
        ("convert", "x", "--group-size", "48"),
        ("convert", "x", "--unknown"),
        ("generate", "--prompt", "x"),
        ("generate", "--model", "x", "--prompt", "x", "--max-tokens", "0"),
        ("generate", "--model", "x", "--prompt", "x", "--temp", "-1"),
        ("generate", "--model", "x", "--prompt", "x", "--top-p", "1.5"),
        ("generate", "--model", "x", "--prompt", "x", "--kv-bits", "7"),
        ("generate", "--model", "x", "--prompt", "x", "--kv-group-size", "48"),
        ("info",),
        ("unknown",),
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(command: tuple[str, ...]) -> None:
    result = run(*command, code=2)
    assert result.out == "" and result.err.count("\n") == 1
    assert re.fullmatch(r"error: .* \(see outlier-mlx.* --help\)\n", result.err)
