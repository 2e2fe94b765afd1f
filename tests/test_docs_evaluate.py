"""Every command on the page about evaluation runs as it stands there, and what it claims is so."""

import json
from pathlib import Path

import pytest
import yaml

from outlier_mlx.cli.showcase import FOLDER
from tests.pages import ROOT, blocks_in, run_block

PAGE = "docs/evaluate.md"
TASKS = FOLDER / "tasks"


@pytest.mark.slow
def test_commands(tmp_path: Path) -> None:
    (tmp_path / "outlier_mlx").symlink_to(ROOT / "outlier_mlx")
    (task,) = blocks_in("yaml", PAGE)
    (tmp_path / "capitals.yaml").write_text(task, encoding="utf-8")
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    printed = ""
    for commands in blocks_in("sh", PAGE):
        done = run_block("sh", commands, tmp_path, **settings)
        assert "warning" not in done.err
        printed += done.out
    assert (tmp_path / "scores.png").stat().st_size > 1000
    found = {
        name: {
            (row["task"], row["metric"]): row["value"]
            for row in json.loads((tmp_path / f"{name}.json").read_text())["results"]
        }
        for name in ("q4", "base")
    }
    assert found["q4"]["ending_new", "acc"] > found["base"]["ending_new", "acc"]
    assert found["q4"]["text_new", "bits_per_byte"] < found["base"]["text_new", "bits_per_byte"]
    assert "ending_new, acc (higher is better)" in printed and '"capitals"' in printed


@pytest.mark.parametrize("name", ["known", "new"])
def test_the_demo_s_questions_are_held_out_documents(name: str) -> None:
    rows = [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text().splitlines()]
    asked = [f"{row['text']} {row['endings'][row['answer']]}" for row in rows]
    domains = ["old"] if name == "known" else ["kitchen", "market", "sea", "sky"]
    held_out = [
        line
        for domain in domains
        for line in (FOLDER / "heldout" / f"{domain}.txt").read_text().splitlines()
    ]
    assert asked == held_out
    answers = [row["answer"] for row in rows]
    assert [answers.count(n) for n in range(4)] == [len(rows) // 4] * 4
    for row in rows:
        wrong = [e for n, e in enumerate(row["endings"]) if n != row["answer"]]
        same = [other for other in rows if other["domain"] == row["domain"]]
        assert len(set(row["endings"])) == 4
        assert all(any(o["text"] + " " + e in asked for o in same) for e in wrong)
    assert yaml.safe_load((TASKS / f"ending_{name}.yaml").read_text())["task"] == f"ending_{name}"
