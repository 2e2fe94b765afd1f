"""The harness's tasks by name, and the user's own tasks from files, whose code is not run.

A task file can bring Python along: functions (`!function`), classes, metrics that the package
`evaluate` fetches, and Jinja templates that reach into Python's internals or never end. Unless the
user trusts the file, the first three are refused and templates are rendered in Jinja's sandbox,
within limits of time and memory. Data sets are data alone from datasets 5 on, which neither runs
scripts nor unpickles.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import lm_eval.utils
import yaml
from lm_eval.api import metrics  # noqa: F401 - it fills the registry
from lm_eval.api.registry import metric_registry
from lm_eval.tasks import TaskManager
from lm_eval.tasks.manager import TaskDict

from outlier_mlx.engine.bounded import TemplateError, render_within_limits
from outlier_mlx.errors import OutlierError, did_you_mean, one_line
from outlier_mlx.storage.paths import files_below
from outlier_mlx.storage.texts import compose_yaml
from outlier_mlx.upstream import Entry, TaskIndex, load_yaml

#: Shows a text while something runs.
Working = Callable[[str], AbstractContextManager[Any]]

_TRUST = "--trust-tasks runs it"
_ALLOW = "--trust-tasks allows it"
#: Tags of plain YAML; any other names something that the harness would import.
_PLAIN = "tag:yaml.org,2002:"
# Largest task file that is not trusted; the harness's own have less than a hundredth of it.
_MAX_BYTES = 16 << 20
# Values in a task file, those of aliases counted wherever they stand: ten lines of them can stand
# for billions, or for themselves.
_MAX_VALUES = 1 << 17
# Task files that one includes, counted wherever they are included.
_MAX_INCLUDES = 64


def load_tasks(specs: Sequence[str], working: Working, *, trust: bool = False) -> TaskDict:
    """Find tasks and load their data.

    Args:
        specs: names of the harness's tasks, groups and tags; task files (.yaml); folders of them.
        working: shows a text while something runs.
        trust: run Python that task files bring along.

    Returns:
        What `lm_eval.evaluate` takes.

    Raises:
        OutlierError: an unknown task, a file that is not a sound task or would run code, or data
            that cannot be loaded.
    """
    local, wanted = _local_tasks([spec for spec in specs if is_path(spec)], trust=trust)
    wanted += [spec for spec in specs if not is_path(spec)]
    if all(name in local for name in _named(local, wanted)):
        manager = TaskManager(include_defaults=False)
    else:
        # The harness reads all of its ten thousand files, whatever is asked for.
        with working("reading the harness's tasks"):
            manager = TaskManager()
    for name in manager.task_index.keys() & local.keys():
        raise OutlierError(f"task {name!r} of a file has the name of one of the harness's")
    manager.task_index.update(local)
    for name in wanted:
        if name not in manager.task_index:
            raise OutlierError(_no_such(name, manager.all_tasks))
    loaded = TaskDict(tasks={}, groups={}, group_map={})
    for name in dict.fromkeys(wanted):
        found = _load(manager, name)
        for task in found["tasks"].keys() & loaded["tasks"].keys():
            raise OutlierError(f"task {task!r} is asked for twice: by itself, and by {name!r}")
        for part in ("tasks", "groups", "group_map"):
            loaded[part] |= found[part]
    return loaded


def is_path(spec: str) -> bool:
    """Whether a task is given as a file or folder, not by name."""
    return "/" in spec or spec.endswith((".yaml", ".yml"))


def _no_such(name: str, known: list[str]) -> str:
    hint = did_you_mean(name, known) or "; task files are named by path (./my.yaml)"
    return f"{name}: no task of the harness{hint}"


def _load(manager: TaskManager, name: str) -> TaskDict:
    try:
        return manager.load([name])
    except Exception as error:  # a task may be wrong in any way, and the hub out of reach
        raise OutlierError(f"task {name}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        return f"its data cannot be read: {_reason(error.__cause__)}"
    said = one_line(str(error))
    if isinstance(error, ConnectionError):
        # The message of `datasets` ends in the name of the error that caused it.
        return re.sub(r" \(\w+\)$", "", said) + ", and it is not in the local cache"
    if isinstance(error, StopIteration):
        return "its data has no documents"
    return (
        said
        if isinstance(error, OSError | OutlierError) and said
        else f"{type(error).__name__}: {said}"
    )


def _local_tasks(paths: list[str], *, trust: bool) -> tuple[dict[str, Entry], list[str]]:
    """An index of the tasks in files and folders, and the names of those in no group."""
    index: dict[str, Entry] = {}
    for path in map(Path, paths):
        files = files_below(path, "*.yaml") if path.is_dir() else [path]
        before = len(index)
        for file in files:
            folder = path if path.is_dir() else path.parent
            _add(file, folder, index, trust=trust, may_skip=path.is_dir())
        if len(index) == before:
            raise OutlierError(f"{path}: no task in it")
    members = {name for entry in index.values() for name in _members(entry.cfg)}
    names = [name for name, entry in index.items() if entry.cfg is not None]
    return index, [name for name in names if name not in members]


def _add(file: Path, folder: Path, index: dict[str, Entry], *, trust: bool, may_skip: bool) -> None:
    try:
        if not trust:
            _refuse_functions(file, folder)
        config = load_yaml(file, resolve_func=trust)
    except OutlierError:
        raise
    except OSError as error:
        raise OutlierError(f"{file}: {error.strerror or error}") from None
    except Exception as error:  # what trusted code raises is of any kind
        raise OutlierError(f"{file}: not a sound task file: {_reason(error)}") from error
    name = config.get("group", config.get("task"))
    if not isinstance(name, str):
        if may_skip:  # a template that others include
            return
        raise OutlierError(f"{file}: not a task file: it has neither `task` nor `group`")
    if name in index:
        raise OutlierError(f"{file}: there is another task {name!r}")
    if not trust:
        _refuse_code(file, config)
    _find_data(file.parent, config)
    TaskIndex.process_cfg(config, file, index)
    index[name].yaml_path = None  # so that the harness uses `cfg` and reads no file again


def _refuse_functions(file: Path, folder: Path) -> None:
    """Refuse tags that are not plain YAML, in a file and in the files that it includes."""
    todo: list[tuple[Path, tuple[Path, ...]]] = [(file, ())]
    for number in count():
        if not todo:
            return
        if number > _MAX_INCLUDES:
            raise OutlierError(f"{file}: includes more than {_MAX_INCLUDES} files; {_ALLOW}")
        path, above = todo.pop()
        here = path.resolve()
        if here in above:
            raise OutlierError(f"{path}: includes itself")
        if above and not here.is_relative_to(folder.resolve()):
            raise OutlierError(f"{file}: includes {path}, which is outside {folder}; {_ALLOW}")
        todo += [(included, (*above, here)) for included in _includes(path)]


def _includes(file: Path) -> list[Path]:
    """The files that a task file includes. Refuses tags that are not plain YAML, and huge files."""
    if file.exists() and not file.is_file():
        raise OutlierError(f"{file}: not a file")
    if file.stat().st_size > _MAX_BYTES:
        raise OutlierError(f"{file}: too large for a task file; {_ALLOW}")
    root = compose_yaml(file.read_bytes(), f"{file}: not a sound task file")
    if not isinstance(root, yaml.MappingNode):
        raise OutlierError(f"{file}: not a task file: no mapping")
    for number, node in enumerate(_nodes(root)):
        if number > _MAX_VALUES:
            raise OutlierError(f"{file}: too many values, those of aliases counted; {_ALLOW}")
        if not node.tag.startswith(_PLAIN) or "python" in node.tag:
            line = node.start_mark.line + 1
            raise OutlierError(f"{file}, line {line}: {node.tag} is code; {_TRUST}")
    found: list[Path] = []
    for key, value in root.value:
        if key.value == "include":
            items = value.value if isinstance(value, yaml.SequenceNode) else [value]
            found += [file.parent / str(item.value) for item in items]
    return found


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    """A node and all nodes below it; aliases are followed everywhere."""
    todo = [root]
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, yaml.MappingNode):
            todo += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            todo += node.value


def _refuse_code(file: Path, config: Any) -> None:
    """Refuse keys by which the harness imports or downloads code."""
    if isinstance(config, list):
        for item in config:
            _refuse_code(file, item)
    if not isinstance(config, dict):
        return
    for key in ("class", "use_prompt"):
        if config.get(key) is not None:
            raise OutlierError(f"{file}: `{key}` may load code; {_TRUST}")
    metric = config.get("metric")
    if isinstance(metric, str) and (metric not in metric_registry or config.get("hf_evaluate")):
        raise OutlierError(f"{file}: metric {metric!r} is code from elsewhere; {_TRUST}")
    for value in config.values():
        _refuse_code(file, value)


def _find_data(folder: Path, config: dict) -> None:
    """Make the names of data files beside the task file absolute.

    The harness would look for them in the working directory.
    """

    def beside(name: Any) -> Any:
        if isinstance(name, list):
            return [beside(item) for item in name]
        if isinstance(name, dict):
            return {key: beside(item) for key, item in name.items()}
        found = folder / str(name)
        return str(found.resolve()) if found.exists() else name

    listed = config.get("task")
    for inline in listed if isinstance(listed, list) else []:
        if isinstance(inline, dict):
            _find_data(folder, inline)
    options = config.get("dataset_kwargs")
    if isinstance(options, dict):
        for key in ("data_files", "data_dir"):
            if options.get(key):
                options[key] = beside(options[key])


def _members(config: dict | None) -> Iterator[str]:
    """The tasks and groups that a group names, also in nested groups."""
    listed = (config or {}).get("task")
    for item in listed if isinstance(listed, list) else []:
        if isinstance(item, dict):
            yield from _members(item)
            item = item.get("task") if "dataset_path" not in item else None
        if isinstance(item, str):
            yield item


def _named(local: dict[str, Entry], wanted: list[str]) -> Iterator[str]:
    """All names of tasks and groups that are needed."""
    yield from wanted
    for entry in local.values():
        yield from _members(entry.cfg)


@contextmanager
def sandboxed(trust: bool) -> Iterator[None]:
    """Render the harness's Jinja templates within limits, unless tasks are trusted."""
    plain = lm_eval.utils.env
    if trust:
        yield
        return
    lm_eval.utils.env = _Bounded()
    try:
        yield
    finally:
        lm_eval.utils.env = plain


class _Bounded:
    """Takes the place of the harness's Jinja environment."""

    def from_string(self, text: str) -> "_Template":
        return _Template(text)


@dataclass(frozen=True)
class _Template:
    text: str

    def render(self, **document: Any) -> str:
        try:
            return render_within_limits(self.text, document, "task")
        except TemplateError as error:
            raise OutlierError(f"the task's template failed: {error}") from None
