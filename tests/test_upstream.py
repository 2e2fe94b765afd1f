"""Names of other libraries that these do not document: where they are used, and what is expected.

If a new version of a library breaks something, these tests say which name it was.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import tomllib
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import outlier_mlx
from outlier_mlx import upstream
from outlier_mlx.errors import OutlierError
from tests.program import ROOT, load_script

PACKAGE = Path(outlier_mlx.__file__).parent
oldest = load_script("oldest")
OLDEST = ROOT / ".venv" / "oldest"
#: Whose names are looked at.
LIBRARIES = ("huggingface_hub", "lm_eval", "mlx", "mlx_lm", "safetensors", "transformers", "typer")
#: Modules that these libraries document.
DOCUMENTED = {
    *("mlx", "mlx.core", "mlx.nn", "mlx.optimizers", "mlx.utils", "mlx_lm"),
    *("huggingface_hub", "huggingface_hub.errors", "huggingface_hub.hf_api"),
    *("huggingface_hub.utils", "safetensors", "safetensors.numpy", "transformers"),
    *("typer", "typer.core"),
    *(
        "lm_eval",
        "lm_eval.api",
        "lm_eval.api.model",
        "lm_eval.api.registry",
        "lm_eval.models.utils",
    ),
    *("lm_eval.tasks", "lm_eval.tasks.manager", "lm_eval.utils"),
}
PARAMETERS = {
    "ArraysCache": ("size",),
    "BitLinear": ("in_features", "out_features"),
    "CacheList": ("caches",),
    "Entry": ("name", "kind", "yaml_path", "cfg", "tags"),
    "GenerationResponse": (
        *("text", "token", "logprobs", "from_draft", "prompt_tokens", "prompt_tps"),
        *("generation_tokens", "generation_tps", "peak_memory", "finish_reason"),
    ),
    "KVCache": (),
    "MLXLM": ("path_or_hf_repo", "max_tokens"),
    "QuantizedKVCache": ("group_size", "bits"),
    "QuantizedSwitchLinear": ("input_dims", "output_dims", "num_experts"),
    "RotatingKVCache": ("max_size", "keep"),
    "StreamingDetokenizer": (),
    "SwitchGLU": ("input_dims", "hidden_dims", "num_experts"),
    "SwitchLinear": ("input_dims", "output_dims", "num_experts"),
    "SwitchMLP": ("input_dims", "hidden_dims", "num_experts"),
    "TaskIndex": ("meta",),
    "TextStateMachine": ("transitions",),
    "TokenBuffer": ("tokens",),
    "TokenizerWrapper": (
        *("tokenizer", "detokenizer_class", "eos_token_ids", "chat_template"),
        *("tool_call_start", "tool_call_end", "tool_parser", "response_format"),
    ),
    "_get_classes": ("config",),
    "_infer_tool_parser": ("tokenizer",),
    "_tokenizer_defaults": ("model_path",),
    "apply_min_p": ("logprobs", "min_p"),
    "apply_top_k": ("logprobs", "top_k"),
    "apply_top_p": ("logprobs", "top_p"),
    "apply_xtc": ("logits", "xtc_probability", "xtc_threshold", "xtc_special_tokens"),
    "can_trim_prompt_cache": ("cache",),
    "get_total_parameters": ("model",),
    "greedy_sampler": ("logprobs",),
    "http_get": (
        *("url", "temp_file", "resume_size", "headers", "expected_size", "displayed_filename"),
        "tqdm_class",
    ),
    "load_model": (
        *("model_path", "lazy", "strict", "model_config", "get_model_classes"),
        "trust_remote_code",
    ),
    "load_prompt_cache": ("file_name", "return_metadata"),
    "load_yaml": ("path", "resolve_func"),
    "make_logits_processors": (
        *("logit_bias", "repetition_penalty", "repetition_context_size", "presence_penalty"),
        *("presence_context_size", "frequency_penalty", "frequency_context_size"),
    ),
    "make_prompt_cache": ("model", "max_kv_size"),
    "make_sampler": (
        *("temp", "top_p", "min_p", "min_tokens_to_keep", "top_k"),
        *("xtc_probability", "xtc_threshold", "xtc_special_tokens"),
    ),
    "make_text_state_machine": ("tokenizer",),
    "maybe_quantize_kv_cache": (
        *("prompt_cache", "quantized_kv_start", "kv_group_size", "kv_bits"),
    ),
    "save_prompt_cache": ("file_name", "cache", "metadata"),
    "swiglu": ("gate", "x"),
    "trim_prompt_cache": ("cache", "num_tokens"),
    "wired_limit": ("model", "streams"),
}


@cache
def trees() -> dict[Path, ast.Module]:
    """The syntax trees of all modules but `upstream`, by their path in the package."""
    files = {file.relative_to(PACKAGE): file for file in PACKAGE.rglob("*.py")}
    del files[Path("upstream.py")]
    return {path: ast.parse(file.read_text(encoding="utf-8")) for path, file in files.items()}


def undocumented(tree: ast.Module) -> set[tuple[str, str]]:
    """Module and name of each import that is not of the documented ones."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            imports = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in imports:
            ours = module.partition(".")[0] in LIBRARIES
            if ours and (module not in DOCUMENTED or name.startswith("_")):
                found.add((module, name))
    return found


def private_attributes(tree: ast.Module) -> set[str]:
    """Attributes with an underscore that no class or function of the module can have made."""
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    used = set()
    for node in ast.walk(tree):
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)):
                own.add(name)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name):
                own.add(name)
            case ast.Attribute(attr=name) if re.match("_[^_]", name):
                used.add(name)
            case ast.Call(func=ast.Name(id="getattr" | "setattr"), args=[_, name, *_]):
                if isinstance(name, ast.Constant) and re.match("_[^_]", str(name.value)):
                    used.add(str(name.value))
    return used - own - {"_exit", "_replace", "_asdict", "_fields"}


def test_undocumented_names_come_through_one_module() -> None:
    for path, tree in trees().items():
        if path.parts[0] != "runtime":
            found = undocumented(tree)
            assert not found, f"{path}: take {found} from outlier_mlx/upstream.py"
        attributes = private_attributes(tree)
        assert not attributes, f"{path}: {attributes} need a function in outlier_mlx/upstream.py"


def test_in_runtime_each_has_one_module() -> None:
    """What is joined into a tier's code imports such a name once; others take it from there."""
    owners: dict[tuple[str, str], Path] = {}
    for path, tree in trees().items():
        if path.parts[0] == "runtime":
            for name in undocumented(tree):
                assert name not in owners, f"{path}: take {name} from {owners.get(name)}"
                owners[name] = path
    assert owners


def test_parts_of_a_tokenizer_have_one_module() -> None:
    """Also in a class that inherits them, where they are attributes of `self`."""
    own = set(re.findall(r"wrapper\.(_\w+)", inspect.getsource(upstream)))
    for path, tree in trees().items():
        for cls in [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]:
            if any(ast.unparse(base) == "TokenizerWrapper" for base in cls.bases):
                used = {node.attr for node in ast.walk(cls) if isinstance(node, ast.Attribute)}
                assert not used & own, path
    assert {"_tokenizer", "_chat_template", "_think_start_tokens"} <= own


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, all in upstream.NAMES.items() for name in all]
)
def test_name(module: str, name: str) -> None:
    """It exists, and has the parameters that are passed."""
    if module.startswith("lm_eval") or name == "MLXLM":
        pytest.importorskip("lm_eval")
    found = getattr(upstream, name)
    if name == "generation_stream":
        return
    parameters = inspect.signature(found).parameters
    assert set(PARAMETERS[name]) <= set(parameters), f"{module}.{name} has only {list(parameters)}"


def runtime_names() -> list[tuple[str, str]]:
    """What `runtime/` uses, as `upstream.found` takes it."""
    names = [undocumented(tree) for path, tree in trees().items() if path.parts[0] == "runtime"]
    return sorted(set().union(*names))


@pytest.mark.parametrize(("module", "name"), runtime_names())
def test_name_of_runtime(module: str, name: str) -> None:
    if module == "mlx_lm.models":  # the name is a module of it
        upstream.module_of(module, name)
    else:
        assert upstream.found(module, name) is not None


@pytest.mark.parametrize("package", upstream.PACKAGES)
def test_package(package: str) -> None:
    """There are modules in it."""
    example = {"chat_templates": "deepseek_v32", "models": "qwen2", "tool_parsers": "json_tools"}
    upstream.module_of(package, example[package.rpartition(".")[2]])


def test_a_tool_parser() -> None:
    parser = upstream.module_of("mlx_lm.tool_parsers", "json_tools")
    assert {"parse_tool_call", "tool_call_start", "tool_call_end"} <= set(dir(parser))


def test_the_wired_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [upstream.found(module, upstream.WIRING) for module in upstream.WIRING_MODULES]
    assert len(set(before)) == 1 and not inspect.signature(before[0]).parameters
    for module in upstream.WIRING_MODULES:
        monkeypatch.setattr(import_module(module), upstream.WIRING, before[0])

    def wire() -> int | None:
        return None

    upstream.replace_wiring(wire)
    assert all(
        upstream.found(module, upstream.WIRING) is wire for module in upstream.WIRING_MODULES
    )


def test_parts_of_a_tokenizer(tier: Path) -> None:
    _, tokenizer = outlier_mlx.load(tier)
    own = upstream.inner_tokenizer(tokenizer)
    assert own.decode(own.encode("The heron")) and upstream.detokenizer(tokenizer) is not None
    assert upstream.own_template(tokenizer) is None or callable(upstream.own_template(tokenizer))
    begin, end = upstream.thinking_tokens(thinking(own))
    assert begin and end and all(isinstance(token, int) for token in begin + end)


def thinking(own: Any) -> Any:
    """mlx-lm's wrapper of a tokenizer with marks of thinking."""
    own = type(own).from_pretrained(own.name_or_path, trust_remote_code=False)
    own.add_tokens(["<think>", "</think>"])
    return upstream.TokenizerWrapper(own)


def test_a_module_in_training() -> None:
    import mlx.nn as nn

    outer = nn.Sequential(nn.Linear(2, 2))
    outer.eval()
    upstream.set_training(outer)
    assert outer.training and not outer.layers[0].training


def test_what_decodes_plainly() -> None:
    from transformers import PreTrainedTokenizerFast

    class Other(PreTrainedTokenizerFast):
        def _decode(self, *args: Any, **options: Any) -> str:
            return ""

    assert upstream.decodes_plainly(PreTrainedTokenizerFast)
    assert not upstream.decodes_plainly(Other) and not upstream.decodes_plainly(object)


def test_a_missing_name_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "requirement", lambda package: f"{package}<9")
    about = f"mlx-lm {version('mlx-lm')} has no"
    with pytest.raises(OutlierError, match=f"^{about} mlx_lm.utils.gone, which .* 'mlx-lm<9'$"):
        upstream.found("mlx_lm.utils", "gone")
    with pytest.raises(OutlierError, match=f"^{about} mlx_lm.gone, which"):
        upstream.found("mlx_lm.gone", "name")
    with pytest.raises(ModuleNotFoundError):
        upstream.found("not_installed_here", "name")


@pytest.mark.parametrize(
    ("has_pip", "file", "expected"),
    [
        (True, None, "pip install -U 'a>=1'"),
        (False, "uv-receipt.toml", "uv pip install --python '{prefix}' -U 'a>=1'"),
        (True, "pipx_metadata.json", "pipx runpip outlier-mlx install -U 'a>=1'"),
    ],
)
def test_what_installs_a_package_here(
    has_pip: bool, file: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an environment of one's own, of `uv tool`, which has no pip, and of pipx."""
    prefix = tmp_path / "my tools"
    prefix.mkdir()
    if file is not None:
        (prefix / file).touch()
    monkeypatch.setattr(sys, "prefix", str(prefix))
    monkeypatch.setattr(upstream, "find_spec", lambda name: has_pip or None)
    assert upstream.pip_install("a>=1", "-U") == expected.format(prefix=prefix)


def test_the_allowed_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["mlx-lm<0.33,>=0.32.1", "mlx[cpu] <0.33,>=0.32 ; sys_platform == 'linux'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines)
    assert upstream.requirement("mlx-lm") == "mlx-lm<0.33,>=0.32.1"
    assert upstream.requirement("mlx") == "mlx<0.33,>=0.32"
    assert upstream.requirement("numpy") == "numpy"


def test_the_oldest_versions() -> None:
    """What `scripts/test-oldest` installs: the lower bound of each dependency, on each system."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    linux, mac = (oldest.oldest(dependencies, system) for system in ("linux", "darwin"))
    assert len(linux) == len(mac) == len(dependencies) - 1
    assert [line.replace("[cpu]", "") for line in linux] == mac
    for line in linux:
        assert any(wanted.startswith(line.replace("==", ">=")) for wanted in dependencies)
    with pytest.raises(ValueError, match=r"'rich<2' has no lower bound"):
        oldest.oldest(["rich<2"], "linux")


def test_the_oldest_versions_are_tested() -> None:
    """With all fast tests, at the end of `scripts/test --full`."""
    oldest_only, both = ((ROOT / "scripts" / name).read_text() for name in ("test-oldest", "test"))
    command = oldest_only.splitlines()[-1]
    assert command.startswith("exec python -m pytest -n auto ")
    assert command.endswith(' -m "not slow" "$@"') and "tests/" not in command
    assert both.endswith('\n[ -z "$full" ] || ./scripts/test-oldest\n')


@pytest.mark.skipif(Path(sys.prefix) != OLDEST, reason="about .venv/oldest")
def test_the_oldest_versions_are_those_that_run() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for line in oldest.oldest(dependencies, sys.platform):
        name, _, wanted = line.partition("==")
        assert version(name.partition("[")[0]) == wanted
    assert (OLDEST / "bin" / "outlier-mlx").exists()


def test_bounds_from_above() -> None:
    """Each library whose undocumented names are used has one, and so does mlx itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    libraries = {module.partition(".")[0] for module in upstream.NAMES} | {"mlx", "transformers"}
    for library in libraries | {"typer"}:
        name = library.replace("_", "-") if library != "huggingface_hub" else library
        pattern = re.compile(rf"{name}(\[\w+\])?[<>=]")
        lines = [
            line
            for group in (project["dependencies"], *extras.values())
            for line in group
            if pattern.match(line)
        ]
        assert lines and all(">=" in line and "<" in line for line in lines), library
