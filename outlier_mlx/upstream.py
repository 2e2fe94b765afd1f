"""Names of other libraries that these do not document: all that this package uses, in one place.

They can go or change in any release. So `pyproject.toml` bounds these libraries from above, and
`tests/test_upstream.py` holds each name to what is expected of it. (`runtime/` is joined into the
model code of tiers and cannot import this module; there, one module imports such a name, and the
others take it from there.)
"""

import re
import shlex
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from outlier_mlx.errors import OutlierError

#: Module -> its names. Nothing is imported before it is used.
NAMES = {
    "huggingface_hub.file_download": ("http_get",),
    "lm_eval.tasks._index": ("Entry", "TaskIndex"),
    "lm_eval.tasks._yaml_loader": ("load_yaml",),
    "mlx_lm.evaluate": ("MLXLM",),
    "mlx_lm.generate": (
        *("GenerationResponse", "TextStateMachine", "generation_stream"),
        *("make_text_state_machine", "maybe_quantize_kv_cache", "wired_limit"),
    ),
    "mlx_lm.models.activations": ("swiglu",),
    "mlx_lm.models.bitlinear_layers": ("BitLinear",),
    "mlx_lm.models.cache": (
        *("ArraysCache", "CacheList", "KVCache", "QuantizedKVCache", "RotatingKVCache"),
        *("TokenBuffer", "can_trim_prompt_cache", "load_prompt_cache", "make_prompt_cache"),
        *("save_prompt_cache", "trim_prompt_cache"),
    ),
    "mlx_lm.models.switch_layers": (
        *("QuantizedSwitchLinear", "SwitchGLU", "SwitchLinear", "SwitchMLP"),
    ),
    "mlx_lm.sample_utils": (
        *("apply_min_p", "apply_top_k", "apply_top_p", "apply_xtc"),
        *("greedy_sampler", "make_logits_processors", "make_sampler"),
    ),
    "mlx_lm.tokenizer_utils": ("StreamingDetokenizer", "TokenizerWrapper", "_infer_tool_parser"),
    "mlx_lm.utils": ("_get_classes", "_tokenizer_defaults", "get_total_parameters", "load_model"),
}
#: Packages of mlx-lm of which modules are imported by a name that a file gives.
PACKAGES = ("mlx_lm.chat_templates", "mlx_lm.models", "mlx_lm.tool_parsers")
#: mlx-lm's function that raises the wired limit, and the modules that use it by this name.
WIRING = "maybe_set_recommended_wired_limit"
WIRING_MODULES = ("mlx_lm.utils", "mlx_lm.generate")

_PLACES = {name: module for module, names in NAMES.items() for name in names}
_DISTRIBUTIONS = {"lm_eval": "lm-eval", "mlx_lm": "mlx-lm"}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found(_PLACES[name], name)


def found(module: str, name: str) -> Any:
    """A name of a module of another library.

    Raises:
        OutlierError: the library that is installed does not have it.
        ModuleNotFoundError: the library is not installed.
    """
    library = module.partition(".")[0]
    try:
        return getattr(import_module(module), name)
    except AttributeError as error:
        raise _missing(library, f"{module}.{name}") from error
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(f"{library}."):
            raise
        raise _missing(library, module) from error


def _missing(library: str, name: str) -> OutlierError:
    """The error that says which versions would do."""
    from importlib.metadata import version

    package = _DISTRIBUTIONS.get(library, library)
    return OutlierError(
        f"{package} {version(package)} has no {name}, which outlier-mlx uses: "
        f"{pip_install(requirement(package))}"
    )


def requirement(package: str) -> str:
    """The versions of a package that this one allows, as "mlx-lm<0.33,>=0.32.1".

    Without an installation of this package, which has that information, only the package's name.
    """
    from importlib.metadata import PackageNotFoundError, requires

    try:
        needed = requires("outlier-mlx") or []
    except PackageNotFoundError:
        needed = []
    for line in needed:
        if found := re.match(rf"{package}(\[[\w,-]+\])?\s*([<>=!~][^;]*)", line):
            return package + found[2].replace(" ", "")
    return package


def pip_install(wanted: str, *options: str) -> str:
    """The command that installs a package where this program runs.

    Environments of `uv tool` have no pip, and that of pipx is not on the PATH.

    Args:
        wanted: a requirement, such as "outlier-mlx[plots]".
        options: of pip.
    """
    if (Path(sys.prefix) / "pipx_metadata.json").exists():
        command = ["pipx", "runpip", "outlier-mlx", "install"]
    elif find_spec("pip") is None:
        command = ["uv", "pip", "install", "--python", sys.prefix]
    else:
        command = ["pip", "install"]
    return shlex.join([*command, *options, wanted])


def module_of(package: str, name: object) -> Any:
    """A module of one of `PACKAGES`.

    Args:
        package: one of `PACKAGES`.
        name: what a file gives; it can be anything.

    Raises:
        ValueError: the package has no such module.
    """
    path = f"{package}.{name}"
    if not isinstance(name, str) or not name.isidentifier() or find_spec(path) is None:
        raise ValueError(f"{name!r} is not one of {package}")
    return import_module(path)


def replace_wiring(wire: Callable[[], int | None]) -> None:
    """Let mlx-lm call this function to raise the wired limit; it returns the limit before."""
    for module in WIRING_MODULES:
        found(module, WIRING)  # it is here
        setattr(import_module(module), WIRING, wire)


# The parts of objects that their classes keep to themselves.


def inner_tokenizer(wrapper: Any) -> Any:
    """The tokenizer of transformers in a `TokenizerWrapper`."""
    return wrapper._tokenizer


def own_template(wrapper: Any) -> Any:
    """A `TokenizerWrapper`'s function in the place of transformers' chat template, or None."""
    return wrapper._chat_template


def set_own_template(wrapper: Any, template: Callable[..., str]) -> None:
    """Set what `own_template` gives."""
    wrapper._chat_template = template


def detokenizer(wrapper: Any) -> Any:
    """The detokenizer that a `TokenizerWrapper` copies for each text."""
    return wrapper._detokenizer


def set_detokenizer(wrapper: Any, made: object) -> None:
    """Set what `detokenizer` gives."""
    wrapper._detokenizer = made


def thinking_tokens(wrapper: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The token ids with which thinking begins and ends, of a `TokenizerWrapper` that knows it."""
    return tuple(wrapper._think_start_tokens), tuple(wrapper._think_end_tokens)


def decodes_plainly(kind: type) -> bool:
    """Whether a class of transformers' tokenizers decodes with the tokenizers library alone."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    return (
        getattr(kind, "decode", None) is PreTrainedTokenizerBase.decode
        and getattr(kind, "_decode", None) is PreTrainedTokenizerFast._decode
    )


def set_training(module: Any) -> None:
    """Put an MLX module in training mode, but not the modules in it, as `train` does."""
    module._training = True


def set_reader(parameter: Any, reader: object) -> None:
    """Let an object read the text of one of typer's parameters."""
    parameter._runtime_param = reader
