"""Task files that the command eval refuses, and what it says of them."""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from outlier_mlx.engine.machine import Budget
from outlier_mlx.errors import OutlierError
from tests.evaluating import BASE_DIMS, GENERATE, write_task
from tests.library import Library
from tests.program import assert_refused, run

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def base(library: Library) -> Path:
    return library.base(**BASE_DIMS).path


EVIL = """from pathlib import Path
Path(__file__).with_name("ran").touch()
def twice(documents): return documents
"""
CODE = {
    "process_docs: !function evil.twice\n": "!function is code",
    "include: more.template\n": "!function is code",
    "class: evil.Task\n": "`class` may load code",
    "use_prompt: promptsource:x\n": "`use_prompt` may load code",
    "metric_list: [{metric: ./evil.py}]\n": "code from elsewhere",
    "metric_list: [{metric: acc, hf_evaluate: true}]\n": "code from elsewhere",
    "description: \"{{ ''.__class__.__mro__[1].__subclasses__() }}\"\n": "SecurityError",
}


@pytest.mark.parametrize("line", CODE)
def test_task_files_run_no_code(base: Path, line: str, tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "b"}]
    text = GENERATE % '"never"'
    if "metric_list" in line:
        text = text.partition("metric_list")[0]
    task = write_task(tmp_path, "evil", rows, text + line)
    (tmp_path / "evil.py").write_text(EVIL)
    (tmp_path / "more.template").write_text("process_docs: !function evil.twice\n")
    done = run("eval", base, "--tasks", task, code=1)
    assert_refused(done, CODE[line])
    assert not (tmp_path / "ran").exists()
    if "function" in CODE[line]:
        assert "--trust-tasks" in done.err
        trusted = run("eval", base, "--tasks", task, "--trust-tasks", "--json")
        assert trusted.json["results"] and (tmp_path / "ran").exists()


ALIASES = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
HOSTILE = {
    "a0: &a0 [x]\n" + ALIASES: "too many values",
    "a: &a [*a]\n": "too many values",
    "include: ../outside.yaml\n": "which is outside",
    "include: link.yaml\n": "which is outside",
    "include: hostile.yaml\n": "includes itself",
    "include: [" + "twice.yaml, " * 9 + "]\n": "includes more than 64 files",
    "# " + " " * (16 << 20): "too large",
}


@pytest.mark.parametrize("line", HOSTILE, ids=range(len(HOSTILE)))
def test_task_files_that_never_end_or_lead_outside(line: str, tmp_path: Path) -> None:
    from outlier_mlx.measure.eval_tasks import load_tasks

    (tmp_path / "in").mkdir()
    (tmp_path / "outside.yaml").write_text("output_type: generate_until\n")
    (tmp_path / "in" / "link.yaml").symlink_to(tmp_path / "outside.yaml")
    (tmp_path / "in" / "twice.yaml").write_text("include: [" + "once.yaml, " * 9 + "]\n")
    (tmp_path / "in" / "once.yaml").write_text("output_type: generate_until\n")
    task = tmp_path / "in" / "hostile.yaml"
    task.write_text("task: hostile\n" + line)
    with pytest.raises(OutlierError, match=HOSTILE[line]):
        load_tasks([str(task)], nullcontext)


def test_a_hub_out_of_reach_is_told_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("Couldn't reach 'a/b' on the Hub (LocalEntryNotFoundError)")

    task = write_task(tmp_path, "far", [{"question": "a", "answer": "b"}], GENERATE % '"x"')
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    done = run("eval", base, "--tasks", task, code=1)
    assert done.err == (
        "error: task far: Couldn't reach 'a/b' on the Hub, and it is not in the local cache\n"
    )


def test_mistakes_get_one_line(base: Path, tmp_path: Path) -> None:
    good = write_task(tmp_path, "good", [{"question": "a", "answer": "b"}], GENERATE % '"x"')
    (tmp_path / "list.yaml").write_text("- task\n")
    (tmp_path / "broken.yaml").write_text("task: [")
    (tmp_path / "template.yaml").write_text("output_type: generate_until\n")
    (tmp_path / "bad.yaml").write_text(good.read_text().replace("{{question}}", "{{nothing}}"))
    (tmp_path / "empty").mkdir()
    none = write_task(tmp_path, "none", [], GENERATE % '"x"')
    garbled = write_task(tmp_path, "garbled", [], GENERATE % '"x"')
    (tmp_path / "garbled.jsonl").write_text("{")
    for tasks, said in {
        tmp_path / "missing.yaml": "missing.yaml: No such file",
        tmp_path / "list.yaml": "list.yaml: not a task file",
        tmp_path / "broken.yaml": "broken.yaml: not a sound task file",
        tmp_path / "template.yaml": "neither `task` nor `group`",
        tmp_path / "empty": "empty: no task in it",
        tmp_path / "bad.yaml": "'nothing' is undefined",
        none: "task none: its data has no documents",
        garbled: "its data cannot be read: ",
        f"{good},{good}": "there is another task 'good'",
    }.items():
        assert_refused(run("eval", base, "--tasks", tasks, code=1), said)
    run("eval", base, "--tasks", ",", code=2)
    away = run("eval", base, "--tasks", good, "--out", tmp_path / "away" / "x.json", code=1)
    assert_refused(away, "no such folder")


def test_a_model_that_does_not_fit(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = write_task(tmp_path, "one", [{"question": "a", "answer": "b"}], GENERATE % '"x"')
    monkeypatch.setattr("outlier_mlx.engine.memory.budget", lambda: Budget(1000, "this machine"))
    command = ["eval", base, "--tasks", task]
    refused = run(*command, code=1)
    assert_refused(refused, "--ignore-memory")
    run(*command, "--ignore-memory")


def test_the_extra_is_named_where_it_is_missing(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import outlier_mlx.measure

    for name in ("harness", "model", "tasks"):
        monkeypatch.delitem(sys.modules, f"outlier_mlx.measure.eval_{name}", raising=False)
        monkeypatch.delattr(outlier_mlx.measure, f"eval_{name}", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = run("eval", base, "--tasks", "arc_easy", code=1)
    assert_refused(done, "pip install 'outlier-mlx[eval]'")


@pytest.mark.slow
def test_tasks_of_the_harness_by_name(base: Path) -> None:
    wrong = run("eval", base, "--tasks", "arc_eazy", code=1)
    assert "did you mean " in wrong.err and "arc_easy" in wrong.err
    away = run("eval", base, "--tasks", "arc_easy", code=1)
    assert_refused(away, "task arc_easy: ", "reach")
