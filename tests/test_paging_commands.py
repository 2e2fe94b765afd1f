"""--expert-memory in every command that runs a model: the same results, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from outlier_mlx.cli.options import Loading
from tests.library import TEXT, Library
from tests.program import COMMANDS, GROUP, assert_refused, run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.mark.slow
def test_generate(demo: Path) -> None:
    command = ["generate", demo, "--prompt", "How do I find Vega?", "-m", 24]
    whole = run(*command)
    assert "experts:" not in whole.err
    for memory in "34%", "600kB":
        paged = run(*command, "--expert-memory", memory)
        assert paged.out == whole.out
        assert " of 18 experts" in paged.err and " were in memory; " in paged.err
    assert run(*command, "--expert-memory", "34%", "--quiet").err == ""
    assert run(*command, "--expert-memory", "100%").err.count("experts") == 0


def test_chat(demo: Path) -> None:
    command = ["chat", demo, "--temp", 0, "-m", 16]
    messages = "How do I find Vega?\nAnd the moon?\n"
    whole = run(*command, input=messages)
    assert run(*command, "--expert-memory", "40%", input=messages).out == whole.out
    assert len(whole.out) > 20


def test_measures(demo: Path, text: Path) -> None:
    window = "--text", text, "--window", 32, "--windows", 3, "--json"
    for command in ("perplexity", demo, *window), ("routing", demo, *window):
        whole, paged = run(*command).json, run(*command, "--expert-memory", "50%").json
        if isinstance(whole, dict):
            assert paged.pop("paging")["misses"] > 0
        assert paged == whole


@pytest.mark.slow
def test_outliers(demo: Path, text: Path, tmp_path: Path) -> None:
    how = "--text", text, "--length", 32, "--sequences", 2, "--no-plots", "--per-expert", "--json"
    found = []
    for memory in "all", "50%":
        out = tmp_path / memory
        found.append(run("outliers", demo, *how, "--out", out, "--expert-memory", memory).json)
    assert found[0] == found[1]


@pytest.mark.slow
def test_bench(demo: Path) -> None:
    how = "-p", 16, "-g", 8, "-n", 2
    found = run("bench", demo, *how, "--json", "--expert-memory", "40%").json
    paging = found["paging"]
    needed = paging["hits"] + paging["misses"]
    # Two runs; a pass needs two experts of each of three layers at least, and all at most.
    assert 2 * 8 * 6 <= needed <= 2 * 9 * 18
    assert paging["hit_rate"] == pytest.approx(paging["hits"] / needed)
    assert paging["bytes_read"] > 0 and paging["waited"] > 0
    assert run("bench", demo, *how, "--json").json["paging"] is None
    assert "were in memory" in run("bench", demo, *how, "--expert-memory", "40%").out


@pytest.mark.parametrize(
    "words",
    [
        ("tune", "--text", "{text}"),
        ("bench", "--kernels"),
        ("bench", "--settings"),
    ],
    ids=" ".join,
)
def test_what_needs_all_experts(words: tuple[str, ...], demo: Path, text: Path) -> None:
    name, *options = (word.format(text=text) for word in words)
    result = run(name, demo, *options, "--expert-memory", "50%", code=1)
    assert_refused(result, "--expert-memory 50%: ")


def test_what_has_no_experts(library: Library) -> None:
    result = run("generate", library.base().path, "-p", "a", "--expert-memory", "1GB", code=1)
    assert_refused(result, "has no experts that can be paged")


@pytest.mark.parametrize("memory", ["4", "-1GB", "0GB", "101%", "half", "1e3GB", "4TB"])
def test_wrong_amounts(memory: str, demo: Path) -> None:
    result = run("generate", demo, "-p", "a", f"--expert-memory={memory}", code=2)
    assert f"--expert-memory: {memory!r} is no amount of memory" in result.err


def test_every_command_that_loads_a_model_has_the_option() -> None:
    for name in COMMANDS:
        options = {option for parameter in GROUP.commands[name].params for option in parameter.opts}
        if "--ignore-memory" in options:
            assert "--expert-memory" in options, name
    assert Loading().expert_memory == "auto"


def test_a_file_that_changes_ends_a_request_in_one_line(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from outlier_mlx.engine.paging.reads import ExpertFiles
    from tests.folders import copy_writable

    folder = copy_writable(demo, tmp_path / "copy")
    start, shards = ExpertFiles.start, sorted(folder.glob("model*.safetensors"))

    def replaced(self: Any, *given: Any, **how: Any) -> Any:
        for shard in shards:
            shard.touch()
        return start(self, *given, **how)

    monkeypatch.setattr(ExpertFiles, "start", replaced)
    result = run("generate", folder, "-p", "a", "--expert-memory", "50%", "--quiet", code=1)
    assert_refused(result, "while the model is in use")


@pytest.mark.slow
def test_eval(demo: Path, tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "q.jsonl").write_text(
        "\n".join(json.dumps({"q": f"The heron {n}", "a": n % 2}) for n in range(4))
    )
    (tmp_path / "task.yaml").write_text(
        "task: birds\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path / 'q.jsonl'}\ntest_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: '{{q}}'\ndoc_to_target: a\ndoc_to_choice: ['waits', 'sings']\n"
        "metric_list:\n  - metric: acc\n"
    )
    command = ["eval", demo, "--tasks", tmp_path / "task.yaml", "--json"]
    found = [run(*command, *more).json for more in ((), ("--expert-memory", "40%"))]
    assert found[0]["results"] == found[1]["results"]
    lossy = run(*command, "--expert-memory", "40%", "--expert-skip", 0.4).json
    assert lossy["config"]["expert_skip"] == 0.4
