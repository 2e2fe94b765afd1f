"""Load tiers and plain MLX models as mlx-lm models. Code in a model folder is never run."""

import re
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from outlier_mlx.checkpoints.stored_model import StoredModel, check_ends, open_config, open_stored
from outlier_mlx.engine.distributed.loaded import classes_to_load
from outlier_mlx.engine.distributed.ranks import one_dtype
from outlier_mlx.engine.limits import keep_to
from outlier_mlx.engine.model_tensors import check_ternary
from outlier_mlx.engine.paging.budget import ALL, ExpertMemory
from outlier_mlx.engine.plan import Plan, plan
from outlier_mlx.engine.prompts import embedding_rows
from outlier_mlx.engine.quantized import checked_classes, unchecked, with_methods
from outlier_mlx.engine.tokenizer import Tokenizer
from outlier_mlx.errors import CheckpointError, CheckpointWarning, OutlierError, one_line
from outlier_mlx.models.config import (
    check_plain,
    describe,
    describe_args,
    is_ternary_model,
    is_tier,
    parse_config,
)
from outlier_mlx.models.families import family
from outlier_mlx.models.spelling import lifted
from outlier_mlx.models.token_ids import check_tokenizer, end_ids
from outlier_mlx.runtime.model import Model, ModelArgs, classes_on
from outlier_mlx.runtime.variants import chip_name
from outlier_mlx.storage.hub import resolve
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.rounding import all_finite
from outlier_mlx.storage.texts import read_json
from outlier_mlx.terminal import quiet_transformers
from outlier_mlx.upstream import _get_classes
from outlier_mlx.upstream import load_model as mlx_lm_load_model
from outlier_mlx.writing.assets import GENERATION, has_tokenizer

#: Forms of overlays whose activations overflow float16, or may overflow it.
OVERFLOWING = ("real", "toy", "toy dense", "packed", "monolith")
# Files that mlx-lm and transformers read beside config.json and the vocabulary.
_TEXTS = (GENERATION, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load(
    path_or_repo: str | Path,
    revision: str | None = None,
    *,
    dtype: str | None = None,
    expert_memory: str | ExpertMemory | Plan | None = None,
    expert_skip: float = 0.0,
) -> tuple[nn.Module, Tokenizer]:
    """Load a tier, or any model that stock mlx-lm loads.

    Args:
        path_or_repo: folder or hub repository.
        revision: branch, tag or commit on the hub.
        dtype: "bfloat16", "float16" or "float32" for activations and unquantized weights. Default:
            on a GPU, the model's own dtype (float16 instead of bfloat16 if the chip has no
            bfloat16; see `suited_dtype`); on the CPU, float32, because halves are slow there.
        expert_memory: memory for routed experts, such as "4GB", "4GiB" or "50%"; those that are not
            in it are read from the model's files when they are needed, and results are the same.
            Default, and "all": all are loaded. "auto": all, or as many as memory allows, with a
            KV cache of 4096 tokens. A plan (`engine.plan`) says it, and for what use.
        expert_skip: leave out an expert that would have to be read if its share of the weight of a
            token's experts is below this. With more than 0, results depend on what is in memory.

    Returns:
        The model, called as `model(tokens, cache=None)` with tokens (batch, length) for logits
        (batch, length, vocab), and the tokenizer.

    Raises:
        CheckpointError: there is no model, it is damaged, or its embedding has no row for a token
            of the tokenizer.
        OutlierError: experts need more memory, or the model has none that could be paged; or
            `expert_skip` is not at least 0 and less than 1.
    """
    folder = resolve(path_or_repo, revision).folder
    if isinstance(expert_memory, str):
        expert_memory = ExpertMemory.parse(expert_memory)
    model, config = load_model(folder, dtype=dtype, expert_memory=expert_memory)
    if expert_skip:
        from outlier_mlx.engine.paging.paged import skip_experts

        skip_experts(model, expert_skip)
    tokenizer = load_tokenizer(folder, config)
    _check_tokenizer(folder, tokenizer, model)
    return model, tokenizer


def load_model(
    folder: Path,
    *,
    dtype: str | None = None,
    expert_memory: ExpertMemory | Plan | None = None,
    always_page: bool = False,
) -> tuple[nn.Module, dict]:
    """Load the model in a local folder; see `load`. Returns the model and its config.

    With `always_page`, experts are kept in slots even if all of them fit into `expert_memory`.
    """
    config = check_model(folder)
    planned = expert_memory
    if not isinstance(planned, Plan):
        planned = plan(folder, memory=planned or ALL)
    both = _classes, _concrete_classes
    classes = classes_to_load(*both, folder, planned, always_page=always_page)
    if dtype == "float16" and _squares(config):
        warnings.warn(
            f"{folder.name}: squared activations may overflow float16",
            CheckpointWarning,
            stacklevel=3,
        )
    dtype = one_dtype(dtype or suited_dtype(folder, config))
    keep_to(planned)
    try:
        tier, ternary = is_tier(config), is_ternary_model(config)
        own = tier or ternary
        model, config = mlx_lm_load_model(
            folder,
            lazy=not own,
            model_config=_given(config) | ({"activation_dtype": dtype} if own else {}),
            get_model_classes=classes if tier else checked_classes(classes),
            trust_remote_code=False,
        )
        if not tier:
            unchecked(model)
        if not own:
            if dtype is None and mx.default_device() == mx.cpu:
                dtype = "float32"
            if dtype is not None:
                model.set_dtype(getattr(mx, dtype))
            mx.eval(model.parameters())
        _check_rounded(folder, model, dtype)
        return model, config
    except (OSError, MemoryError, OutlierError):
        raise
    except Exception as error:
        # mlx-lm and MLX raise many types of errors for a bad config or tensor.
        reason = f"{type(error).__name__}: {one_line(str(error))}"[:300]
        raise CheckpointError(f"{folder}: invalid model: {reason}") from error


def _check_rounded(folder: Path, model: nn.Module, dtype: str | None) -> None:
    """Check what was converted to a dtype of 16 bits.

    Raises:
        CheckpointError: a number became infinite, or was so already.
    """
    if dtype not in ("float16", "bfloat16"):
        return
    parameters: Any = tree_flatten(model.parameters())
    for name, value in parameters:
        if value.dtype == getattr(mx, dtype):
            bits = np.array(value.view(mx.uint16), copy=False)
            if not all_finite(bits, dtype):
                raise CheckpointError(
                    f"{folder}: {name}: holds numbers too large for {dtype}; --dtype float32 keeps"
                    " them"
                )


def _given(config: dict) -> dict:
    """What mlx-lm gets in place of the fields of a folder's config.json."""
    if is_tier(config):
        return {"model_file": None}
    # Let mlx-lm take eos_token_id from generation_config.json, if it is there.
    given = {key: value for key, value in config.items() if key != "eos_token_id"}
    return given | ({"model_file": None} if is_ternary_model(config) else {})


def _classes(config: dict) -> tuple[type, type]:
    """The classes of a model and of its arguments: this project's own, or mlx-lm's.

    Raises:
        ValueError: mlx-lm has no such model.
    """
    if is_tier(config):
        return Model, ModelArgs
    if is_ternary_model(config):
        from outlier_mlx.runtime.ternary_model import TernaryModelArgs, ternary_model_on

        return ternary_model_on(_plain_classes(config)[0]), TernaryModelArgs
    return _plain_classes(config)


def _plain_classes(config: dict) -> tuple[type, type]:
    # Import only here: few models need them.
    if config.get("model_type") == "qwen2_moe" and config.get("norm_topk_prob"):
        from outlier_mlx.runtime.qwen2_moe import RenormalisedQwen2Moe, qwen2_moe

        return RenormalisedQwen2Moe, qwen2_moe.ModelArgs
    if config.get("model_type") == "ternary_mixtral":
        from outlier_mlx.runtime.mixtral import TernaryMixtral, TernaryMixtralArgs

        return TernaryMixtral, TernaryMixtralArgs
    return _get_classes(config)


def suited_dtype(folder: Path, config: dict) -> str | None:
    """The dtype to use on this chip instead of the model's own dtype, or None to keep it.

    The GPUs of M1 and M2 have no bfloat16 arithmetic (Metal's feature set tables list it from
    family Apple9 on, which is M3), so float16 is used there. Exceptions are tiers of V1 and V2
    checkpoints, whose activations overflow float16, and of packed forms, which can hold any
    version; and BitNet models, whose activations are squared.
    """
    if not mx.metal.is_available() or mx.default_device() == mx.cpu:
        return None
    if not re.match(r"Apple M[12]\b", chip_name()) or config.get("dtype") != "bfloat16":
        return None
    if _squares(config):
        return None
    manifest = read_json(inside(folder, "tier.json")) if (folder / "tier.json").exists() else {}
    overlay = manifest.get("overlay")
    form = overlay.get("form") if isinstance(overlay, dict) else None
    # With newer alphas, the name of the form has a suffix.
    return None if str(form).split(" + ")[0] in OVERFLOWING else "float16"


def _squares(config: dict) -> bool:
    """Whether a model's activation is the square of ReLU, as BitNet's is unless it says another."""
    default = "relu2" if config.get("model_type") == "bitnet" else None
    return lifted(config).get("hidden_act", default) == "relu2"


def check_loads(folder: Path) -> None:
    """Check that a model could be loaded from what is in a folder, before its tensors are there.

    An empty model is made as `load_model` makes it, and the tokenizer is loaded, if there is one.

    Raises:
        CheckpointError: it could not be; the message does not name the folder, which is that of a
            run. A tokenizer that needs a package that is not installed gives a warning.
    """
    empty = {"load_weights": lambda self, *_, **__: self}
    try:
        with warnings.catch_warnings():  # they were given when the sources were read
            warnings.simplefilter("ignore", CheckpointWarning)
            config = _checked_config(folder)
        if (vocab := describe(config).vocab) is not None:
            check_ends(folder, config, vocab)
        _, config = mlx_lm_load_model(
            folder,
            lazy=True,
            strict=False,
            model_config=_given(config),
            get_model_classes=with_methods(_concrete_classes, lambda _: empty),
            trust_remote_code=False,
        )
        if has_tokenizer(folder):
            load_tokenizer(folder, config)
    except Exception as error:  # as in `load_model` and `load_tokenizer`
        said = (
            str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        )
        for name in (f"{folder}: ", f"{folder}/", f"{folder.name}/"):
            said = said.replace(name, "")
        message = f"the model could not be loaded: {one_line(said)[:300]}"
        if not isinstance(error.__cause__, ImportError):
            raise CheckpointError(message) from error
        warnings.warn(message, CheckpointWarning, stacklevel=3)


def _concrete_classes(config: dict) -> tuple[type, type]:
    """The classes of a model that others can inherit from."""
    model, args = _classes(config)
    return (
        classes_on(str(config.get("base_model_type", "qwen2"))) if model is Model else (model, args)
    )


def check_model(folder: Path) -> dict:
    """Check a tier or a plain MLX model from its config and the headers of its files.

    Returns:
        The config; for a plain model, with the field names of `normalised`.

    Raises:
        CheckpointError: see `open_stored`.
    """
    return open_model(folder).raw


def open_model(folder: Path) -> StoredModel:
    """Check a model that is loaded or verified; only its config, headers and texts are read.

    Raises:
        CheckpointError: see `open_stored`; or a text beside it is no JSON.
    """
    _checked_config(folder)
    stored = open_stored(folder)
    if stored.ternary is not None:
        try:
            check_ternary(stored.raw, stored.ternary, stored.tensors, folder.name)
        except CheckpointError as error:
            raise CheckpointError(f"{folder}: {error}") from None
    return stored


def _checked_config(folder: Path) -> dict:
    """The config of `check_model`, but for what depends on tensors; warns of ignored fields."""
    _check_texts(folder)
    config = open_config(folder)
    if is_tier(config):
        known = parse_config(config)
        notes = family(known.family).notes(known, own=True)
    else:
        notes = check_plain(config, f"{folder.name}/config.json")
    for note in notes:
        warnings.warn(f"{folder.name}: {note}", CheckpointWarning, stacklevel=5)
    return config


def _check_texts(folder: Path) -> None:
    """Read what mlx-lm and transformers will read as strictly as everything else."""
    for name in (*_TEXTS, "chat_template.json"):
        if (folder / name).exists():
            content = read_json(inside(folder, name))
            if name == GENERATION:
                end_ids(content.get("eos_token_id"), name)


def load_tokenizer(folder: Path, config: dict) -> Tokenizer:
    """Load the tokenizer in a model folder.

    Raises:
        CheckpointError: there is no tokenizer, or it cannot be loaded.
    """
    # What generation_config.json says, if there is one.
    ends = end_ids(config.get("eos_token_id"), "config.json") or list(describe(config).eos_ids)
    try:
        with quiet_transformers():
            return Tokenizer.load(folder, ends or None)
    except Exception as error:
        reason = one_line(str(error))[:300]
        raise CheckpointError(f"{folder}: no usable tokenizer: {reason}") from error


def _check_tokenizer(folder: Path, tokenizer: Tokenizer, model: nn.Module) -> None:
    """Check that the embedding has rows for all tokens; see `token_ids.check_tokenizer`.

    Models of unknown families are only warned of: some have placeholders, such as that of an image
    in Gemma 3, which no text needs. Prompts with such tokens are refused.
    """
    rows = embedding_rows(model)
    if rows is None:
        return
    # What the model cannot write ends no text; MLX would use it as the index of a log probability.
    tokenizer.eos_token_ids = {end for end in tokenizer.eos_token_ids if 0 <= end < rows}
    # Reading the files again would take long, and is rarely needed.
    if max(tokenizer.get_vocab().values(), default=0) < rows:
        return
    try:
        check_tokenizer(folder, rows)
    except CheckpointError as error:
        if describe_args(getattr(model, "args", None)).family is not None:
            raise CheckpointError(f"{folder}: {error}") from None
        warnings.warn(f"{folder.name}: {error}", CheckpointWarning, stacklevel=3)
