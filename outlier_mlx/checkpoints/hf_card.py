"""The model card of a tier that was exported for transformers."""

import json
from pathlib import Path

from outlier_mlx.checkpoints.export_transformers import HfExport
from outlier_mlx.errors import one_line
from outlier_mlx.storage.hub import Source
from outlier_mlx.writing.assets import has_tokenizer
from outlier_mlx.writing.card import Card, origin_of


def hf_card(folder: Path, name: str, source: Source, export: HfExport, dtype: str) -> str:
    """The text of the model card of a checkpoint for transformers; its commands are Python.

    Args:
        folder: the checkpoint's.
        name: what its commands call it.
        source: the tier.
        export: what was written.
        dtype: the dtype of the weights.
    """
    origin = origin_of("tier", source)
    architecture = export.config["architectures"][0]
    quoted = json.dumps(one_line(name), ensure_ascii=False)  # Python has no pairs of \\u
    load = f'AutoModelForCausalLM.from_pretrained({quoted}, dtype="auto")'
    commands = ["from transformers import AutoModelForCausalLM", "", f"model = {load}"]
    if has_tokenizer(folder):
        commands = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({quoted})",
            f"model = {load}",
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
            "output = model.generate(**inputs, max_new_tokens=40)",
            "print(tokenizer.decode(output[0], skip_special_tokens=True))",
        ]
    rounded = "" if dtype == "float32" else f", rounded to {dtype}"
    return Card(
        name=name,
        introduction="An Outlier model, written by outlier-mlx for stock transformers (4.57 and"
        f" 5): `{architecture}`, no code of its own.",
        commands=commands,
        language="python",
        library="transformers",
        origins=[origin],
        based_on=[origin],
        relation="quantized",
        tags=["moe", "ternary"],
        rows=export.tensors.rows,
        changes=[
            f"weights are written out as {dtype}, from the base's codes and the experts' trits"
            f"{rounded}",
            "alphas are multiplied into the experts' down projections",
            "`config.json` is new",
        ],
    ).text(folder)
