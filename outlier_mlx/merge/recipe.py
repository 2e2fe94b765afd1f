"""Merge recipes: the YAML of mergekit-moe, parsed strictly.

Format: https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md. Keys of our own are
`no_positive`, and an expert's `texts` and `held_out`.
"""

import difflib
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from outlier_mlx.errors import OutlierError

GATE_MODES = ("hidden", "hidden_avg", "cheap_embed", "random", "uniform_random", "trained")
#: These need no prompts.
RANDOM_MODES = ("random", "uniform_random")
NO_POSITIVE = ("error", "bos", "zero")
DTYPES = ("bfloat16", "float16", "float32")
ARCHITECTURES = {"mixtral": "mixtral", "qwen": "qwen2_moe", "qwen2_moe": "qwen2_moe"}
MAX_RECIPE_BYTES = 1_000_000
MAX_EXPERTS = 256
_MAX_KEYS = 1000


@dataclass(frozen=True)
class ExpertRecipe:
    """One expert.

    Attributes:
        source: folder or hub repository of the model whose FFNs it gets.
        positive: prompts that it should serve.
        negative: prompts that it should not serve.
        texts: files of text that it should serve, for `gate_mode: trained`.
        held_out: prompts that routing is measured on; nothing is fitted to them.
        noise_scale: standard deviation of normal noise that is added to its weights.
        residual_scale: its down projection is multiplied by this.
    """

    source: str
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    texts: tuple[Path, ...] = ()
    held_out: tuple[str, ...] = ()
    noise_scale: float = 0.0
    residual_scale: float = 1.0


@dataclass(frozen=True)
class MergeRecipe:
    """A merge.

    Attributes:
        base: folder or hub repository of the model that gives everything but the FFNs.
        experts: the routed experts, in order.
        shared: the expert that serves every token, if there is one.
        gate_mode: how the routers come about, one of `GATE_MODES`.
        no_positive: what an expert without positive prompts means, one of `NO_POSITIVE`.
        experts_per_token: experts that serve a token.
        dtype: of the output; None is the base's.
        architecture: "mixtral" or "qwen2_moe"; None leaves it to the models.
        raw: the recipe as it was written.
    """

    base: str
    experts: tuple[ExpertRecipe, ...]
    shared: ExpertRecipe | None = None
    gate_mode: str = "hidden"
    no_positive: str = "error"
    experts_per_token: int = 2
    dtype: str | None = None
    architecture: str | None = None
    raw: dict = field(default_factory=dict)

    @property
    def held_out(self) -> bool:
        """Whether there are prompts to measure routing on."""
        return any(expert.held_out for expert in self.experts)

    def with_held_out(self, file: Path) -> "MergeRecipe":
        """The recipe with the prompts of a file: YAML, a list of prompts for each expert in order.

        Raises:
            OutlierError: it holds something else.
        """
        lists = read_yaml(file)
        if not isinstance(lists, list) or len(lists) != len(self.experts):
            raise OutlierError(
                f"{file.name}: expected a list with a list of prompts for each of the"
                f" {len(self.experts)} experts"
            )
        experts = []
        for number, (expert, prompts) in enumerate(zip(self.experts, lists, strict=True)):
            fields = _Fields({"held_out": prompts}, file.name, f"expert {number}", ("held_out",))
            experts.append(replace(expert, held_out=fields.texts("held_out")))
        if not any(expert.held_out for expert in experts):
            raise OutlierError(f"{file.name}: no prompts in it")
        return replace(self, experts=tuple(experts))


def read_recipe(file: Path, *, no_positive: str | None = None) -> MergeRecipe:
    """Read a recipe. Paths in it are relative to its folder.

    Args:
        file: the YAML.
        no_positive: wins over the recipe's own.

    Raises:
        OutlierError: it cannot be read, a key is unknown or missing, or a value is not what it
            should be; the message names the key.
    """
    raw = read_yaml(file)
    known = ("base_model", "gate_mode", "dtype", "experts_per_token", "architecture")
    fields = _Fields(raw, file.name, "", (*known, "no_positive", "experts", "shared_experts"))
    folder = file.absolute().parent
    experts = tuple(_expert(entry, folder) for entry in fields.entries("experts", EXPERT_KEYS))
    if not 1 <= len(experts) <= MAX_EXPERTS:
        raise fields.error("experts", f"{len(experts)} experts, expected 1 to {MAX_EXPERTS}")
    shared_keys = tuple(key for key in EXPERT_KEYS if key not in ("texts", "held_out"))
    shared = [_expert(entry, folder) for entry in fields.entries("shared_experts", shared_keys)]
    if len(shared) > 1:
        raise fields.error("shared_experts", f"{len(shared)} experts, expected one at most")
    architecture = fields.choice("architecture", ARCHITECTURES, None)
    recipe = MergeRecipe(
        base=_place(fields.text("base_model"), folder),
        experts=experts,
        shared=shared[0] if shared else None,
        gate_mode=fields.choice("gate_mode", GATE_MODES, "hidden") or "hidden",
        no_positive=no_positive or fields.choice("no_positive", NO_POSITIVE, "error") or "error",
        experts_per_token=fields.count("experts_per_token", min(2, len(experts))),
        dtype=fields.choice("dtype", DTYPES, None),
        architecture=ARCHITECTURES[architecture] if architecture else None,
        raw=raw,
    )
    if recipe.experts_per_token > len(experts):
        raise fields.error(
            "experts_per_token",
            f"{recipe.experts_per_token}, but there are {len(experts)} experts",
        )
    return recipe


EXPERT_KEYS = (
    *("source_model", "positive_prompts", "negative_prompts", "texts", "held_out"),
    *("noise_scale", "residual_scale"),
)


def _expert(fields: "_Fields", folder: Path) -> ExpertRecipe:
    texts = tuple(folder / Path(name).expanduser() for name in fields.texts("texts"))
    for path in texts:
        if not path.is_file():
            raise fields.error("texts", f"{path.name}: no such file")
    return ExpertRecipe(
        source=_place(fields.text("source_model"), folder),
        positive=fields.texts("positive_prompts"),
        negative=fields.texts("negative_prompts"),
        texts=texts,
        held_out=fields.texts("held_out"),
        noise_scale=fields.number("noise_scale", 0.0, least=0.0),
        residual_scale=fields.number("residual_scale", 1.0),
    )


def _place(name: str, folder: Path) -> str:
    """A folder beside the recipe, if there is one; else the name as it is."""
    path = folder / Path(name).expanduser()
    return str(path) if path.is_dir() or name.startswith((".", "/", "~")) else name


class _Fields:
    """A mapping of the recipe, whose keys are known and whose values are checked as they are read.

    Args:
        value: the mapping, if it is one.
        file: name of the recipe.
        place: where in it, as in "experts[2]"; empty at the top.
        known: the keys that there may be.

    Raises:
        OutlierError: it is no mapping, or holds another key.
    """

    def __init__(self, value: Any, file: str, place: str, known: Iterable[str]) -> None:
        self.file, self.place = file, place
        if not isinstance(value, dict):
            raise OutlierError(f"{file}: {place or 'the recipe'}: expected keys with values")
        known = tuple(known)
        for key in value:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
                raise OutlierError(
                    f"{self._at(str(key)[:80])}: no such key; the nearest there is: {close[0]}"
                )
        self.value = value

    def _at(self, key: str) -> str:
        return f"{self.file}: {self.place + '.' if self.place else ''}{key}"

    def error(self, key: str, problem: str) -> OutlierError:
        """What is wrong with the value of a key."""
        return OutlierError(f"{self._at(key)}: {problem}")

    def text(self, key: str) -> str:
        """A text that has to be there."""
        value = self.value.get(key)
        if not isinstance(value, str) or not value or "\0" in value:
            raise self.error(key, f"{_short(value)}, expected text")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; empty if the key is missing."""
        value = self.value.get(key)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self.error(key, f"{_short(value)}, expected a list of texts")
        for item in value:
            if not isinstance(item, str):
                raise self.error(key, f"{_short(item)} is no text; put it in quotation marks")
        return tuple(value)

    def choice(self, key: str, choices: Iterable[str], default: str | None) -> str | None:
        """One of some words."""
        value = self.value.get(key)
        if value is None:
            return default
        if value not in tuple(choices):
            raise self.error(key, f"{_short(value)}, expected one of {', '.join(choices)}")
        return value

    def count(self, key: str, default: int) -> int:
        """A whole number of 1 or more."""
        value = self.value.get(key, default)
        if type(value) is not int or value < 1:
            raise self.error(key, f"{_short(value)}, expected a whole number of 1 or more")
        return value

    def number(self, key: str, default: float, least: float = -math.inf) -> float:
        """A finite number; YAML reads 1e-3 as text, which is understood."""
        value = self.value.get(key, default)
        try:
            number = math.nan if isinstance(value, bool | list | dict) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or number < least:
            wanted = f"a number of {least:g} or more" if math.isfinite(least) else "a number"
            raise self.error(key, f"{_short(value)}, expected {wanted}")
        return number

    def entries(self, key: str, known: Iterable[str]) -> list["_Fields"]:
        """A list of mappings; empty if the key is missing."""
        value = self.value.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(key, f"{_short(value)}, expected a list of experts")
        return [_Fields(v, self.file, f"{key}[{n}]", known) for n, v in enumerate(value)]


# PyYAML lets through what Python raises at texts like "!!int ''" or "!!timestamp x".
_YAML_ERRORS = (
    *(yaml.YAMLError, ValueError, RecursionError),
    *(AttributeError, LookupError, TypeError, ArithmeticError),
)


class _UniqueKeys(yaml.SafeLoader):
    """YAML of plain values, without a key twice in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """A mapping, as PyYAML makes it once its keys were seen to differ."""
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice, times = max(names.items(), key=lambda item: item[1], default=("", 0))
        if times > 1:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {str(twice)[:80]!r} is there twice", node.start_mark
            )
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put the keys of `<<` into a mapping, where a few lines could ask for any number."""
        super().flatten_mapping(node)
        if len(node.value) > _MAX_KEYS:
            raise yaml.constructor.ConstructorError(
                None, None, f"more than {_MAX_KEYS} keys", node.start_mark
            )


def read_yaml(file: Path) -> Any:
    """The value of a small YAML file; only plain values are made.

    Raises:
        OutlierError: it cannot be read, is too large, or is no such YAML.
    """
    try:
        if file.stat().st_size > MAX_RECIPE_BYTES:
            raise OutlierError(f"{file.name}: larger than {MAX_RECIPE_BYTES} bytes")
        return yaml.load(file.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise OutlierError(f"{file}: {error.strerror}") from None
    except _YAML_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise OutlierError(f"{file.name}: not valid YAML: {reason}") from None


def _short(value: object) -> str:
    if value is None:
        return "is missing"
    text = repr(value) if not isinstance(value, list | dict) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
