"""Tasks for the command eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# A token a character, so that every text is one that can be written and read back.
DIMS: dict[str, Any] = {
    "hidden": 32,
    "intermediate": 64,
    "expert_intermediate": 32,
    "layers": 2,
    "moe_layers": (1,),
    "vocab": 100,
    "base_dtype": "F32",
    "seed": 1,
}
BASE_DIMS = {k: v for k, v in DIMS.items() if k not in ("expert_intermediate", "moe_layers")}


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], text: str) -> Path:
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    head = f"task: {name}\ndataset_path: json\ntest_split: test\n"
    data = f"dataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}\n"
    (folder / f"{name}.yaml").write_text(head + data + text, encoding="utf-8")
    return folder / f"{name}.yaml"


def metrics(**directions: str) -> str:
    """A metric_list: each name with its aggregation, "-" before it where lower is better."""
    lines = [
        f"  - {{metric: {name}, aggregation: {how.lstrip('-')},"
        f" higher_is_better: {str(not how.startswith('-')).lower()}}}\n"
        for name, how in directions.items()
    ]
    return "metric_list:\n" + "".join(lines)


GENERATE = (
    'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
    "generation_kwargs: {until: [%s], max_gen_toks: 6, do_sample: false}\n"
) + metrics(exact_match="mean")
