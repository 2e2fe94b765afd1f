"""Commands that measure, on a ternary model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outlier_mlx.imports import import_model
from outlier_mlx.measure.measured import read_measured
from outlier_mlx.tiers.verify import verify_tier
from tests.damage import edit_json
from tests.program import assert_refused, run
from tests.ternary_sources import mlx_pack


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ternary")
    return import_model(mlx_pack().write(folder / "model"), folder / "rows").path


def test_perplexity(rows: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the cat " * 8)
    options = ("--text", text, "--window", 16, "--windows", 2, "--json")
    ours = run("perplexity", rows, *options).json["perplexity"]
    theirs = run("perplexity", rows.parent / "model", *options).json["perplexity"]
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_a_recorded_perplexity_is_for_the_card(tmp_path: Path):
    pack = mlx_pack()
    folder = import_model(pack.write(tmp_path / "model"), tmp_path / "rows").path
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the cat " * 8)
    before = verify_tier(folder)
    command = ("perplexity", folder, "--text", text, "--window", 16, "--windows", 2)
    value = run(*command, "--record", "--json").json["perplexity"]
    assert [one.perplexity for one in read_measured(folder)] == [value]
    assert verify_tier(folder) == before
    pushed = run("push", folder, "owner/rows", "--license", "mit", "--dry-run")
    assert f"| {value:.4f} |" in pushed.out
    edit_json(folder / "checksums.json", producer="another")
    assert read_measured(folder) == []
    refused = run("perplexity", tmp_path / "model", "--text", text, "--record", code=1)
    assert_refused(refused, "model", "results cannot be saved")


def test_bench(rows: Path):
    result = run("bench", rows, "-p", 4, "-g", 2, "-n", 1, "--json").json
    assert result["generation_tokens_per_s"]["median"] > 0


def test_eval(rows: Path, tmp_path: Path):
    pytest.importorskip("lm_eval")
    lines = [{"q": "a cat is", "choices": ["big", "small"], "answer": n % 2} for n in range(4)]
    data = tmp_path / "pets.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = tmp_path / "pets.yaml"
    task.write_text(
        f"task: pets\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
    )
    found = []
    for folder in (rows, rows.parent / "model"):
        results = run("eval", folder, "--tasks", task, "--json").json["results"]
        found.append({(r["task"], r["metric"]): (r["value"], r["n"]) for r in results})
    assert found[0] == found[1] and found[0]["pets", "acc"][1] == 4
