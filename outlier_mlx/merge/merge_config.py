"""Merge configurations: mergekit-moe's YAML format, parsed strictly.

Format: https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md. This project adds the keys
`no_positive`, and `texts` and `held_out` of an expert.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outlier_mlx.errors import OutlierError, did_you_mean, listed
from outlier_mlx.storage.texts import read_yaml

GATE_MODES = ("hidden", "hidden_avg", "cheap_embed", "random", "uniform_random", "trained")
#: Gate modes that need no prompts.
RANDOM_MODES = ("random", "uniform_random")
NO_POSITIVE = ("error", "bos", "zero")
DTYPES = ("bfloat16", "float16", "float32")
ARCHITECTURES = {"mixtral": "mixtral", "qwen": "qwen2_moe", "qwen2_moe": "qwen2_moe"}
MAX_EXPERTS = 256


@dataclass(frozen=True)
class ExpertConfig:
    """One expert of a merge configuration.

    Attributes:
        source: folder or hub repository of the model that its FFNs come from.
        positive: prompts that should be routed to it.
        negative: prompts that should not be routed to it.
        texts: text files that should be routed to it, for `gate_mode: trained`.
        held_out: prompts to measure routing on; routers are not made from them.
        noise_scale: standard deviation of the normal noise that is added to its weights.
        residual_scale: factor of its down projections.
    """

    source: str
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    texts: tuple[Path, ...] = ()
    held_out: tuple[str, ...] = ()
    noise_scale: float = 0.0
    residual_scale: float = 1.0


@dataclass(frozen=True)
class MergeConfig:
    """A merge configuration.

    Attributes:
        base: folder or hub repository of the model that everything but the FFNs comes from.
        experts: the routed experts, in order.
        shared: the expert that every token goes through, or None.
        gate_mode: how the routers are made, one of `GATE_MODES`.
        no_positive: what to do for an expert without positive prompts, one of `NO_POSITIVE`.
        experts_per_token: number of experts that each token is routed to.
        dtype: dtype of the output; None: the base's.
        architecture: "mixtral" or "qwen2_moe"; None: the one that fits the models.
    """

    base: str
    experts: tuple[ExpertConfig, ...]
    shared: ExpertConfig | None = None
    gate_mode: str = "hidden"
    no_positive: str = "error"
    experts_per_token: int = 2
    dtype: str | None = None
    architecture: str | None = None

    @property
    def held_out(self) -> bool:
        """Whether any expert has prompts to measure routing on."""
        return any(expert.held_out for expert in self.experts)

    def with_held_out(self, file: Path) -> "MergeConfig":
        """Add the held-out prompts of a YAML file: a list of prompts for each expert, in order.

        Raises:
            OutlierError: the file has another content.
        """
        lists = read_yaml(file)
        if not isinstance(lists, list) or len(lists) != len(self.experts):
            raise OutlierError(
                f"{file.name}: expected a list of {len(self.experts)} lists: the prompts of each"
                " expert"
            )
        experts = []
        for number, (expert, prompts) in enumerate(zip(self.experts, lists, strict=True)):
            fields = _Fields({"held_out": prompts}, file.name, f"expert {number}", ("held_out",))
            experts.append(replace(expert, held_out=fields.texts("held_out")))
        if not any(expert.held_out for expert in experts):
            raise OutlierError(f"{file.name}: no prompts")
        return replace(self, experts=tuple(experts))


def read_merge_config(file: Path, *, no_positive: str | None = None) -> MergeConfig:
    """Read a merge configuration. Its paths are relative to its folder.

    Args:
        file: the YAML file.
        no_positive: used instead of the configuration's `no_positive`.

    Raises:
        OutlierError: the file cannot be read, a key is unknown or missing, or a value is wrong; the
            message names the key.
    """
    known = ("base_model", "gate_mode", "dtype", "experts_per_token", "architecture", "no_positive")
    fields = _Fields(read_yaml(file), file.name, "", (*known, "experts", "shared_experts"))
    folder = file.absolute().parent
    experts = tuple(_expert(entry, folder) for entry in fields.entries("experts", EXPERT_KEYS))
    if not 1 <= len(experts) <= MAX_EXPERTS:
        raise fields.error("experts", f"{len(experts)} experts, expected 1 to {MAX_EXPERTS}")
    shared_keys = tuple(key for key in EXPERT_KEYS if key not in ("texts", "held_out"))
    shared = [_expert(entry, folder) for entry in fields.entries("shared_experts", shared_keys)]
    if len(shared) > 1:
        raise fields.error("shared_experts", f"{len(shared)} experts, expected at most one")
    architecture = fields.choice("architecture", ARCHITECTURES, None)
    merge_config = MergeConfig(
        base=_folder_or_repository(fields.text("base_model"), folder),
        experts=experts,
        shared=shared[0] if shared else None,
        gate_mode=fields.choice("gate_mode", GATE_MODES, "hidden") or "hidden",
        no_positive=no_positive or fields.choice("no_positive", NO_POSITIVE, "error") or "error",
        experts_per_token=fields.count("experts_per_token", min(2, len(experts))),
        dtype=fields.choice("dtype", DTYPES, None),
        architecture=ARCHITECTURES[architecture] if architecture else None,
    )
    if merge_config.experts_per_token > len(experts):
        raise fields.error(
            "experts_per_token",
            f"{merge_config.experts_per_token}, but there are {len(experts)} experts",
        )
    return merge_config


EXPERT_KEYS = (
    *("source_model", "positive_prompts", "negative_prompts", "texts", "held_out"),
    *("noise_scale", "residual_scale"),
)


def _expert(fields: "_Fields", folder: Path) -> ExpertConfig:
    texts = tuple(folder / Path(name).expanduser() for name in fields.texts("texts"))
    for path in texts:
        if not path.is_file():
            raise fields.error("texts", f"{path.name}: no such file")
    return ExpertConfig(
        source=_folder_or_repository(fields.text("source_model"), folder),
        positive=fields.texts("positive_prompts"),
        negative=fields.texts("negative_prompts"),
        texts=texts,
        held_out=fields.texts("held_out"),
        noise_scale=fields.number("noise_scale", 0.0, minimum=0.0),
        residual_scale=fields.number("residual_scale", 1.0),
    )


def _folder_or_repository(name: str, folder: Path) -> str:
    """The path of a folder beside the configuration if it exists; else the unchanged name."""
    path = folder / Path(name).expanduser()
    return str(path) if path.is_dir() or name.startswith((".", "/", "~")) else name


class _Fields:
    """A mapping of the configuration. Its values are checked when they are read.

    Args:
        value: the parsed YAML.
        file: file name of the configuration.
        place: the mapping's place in the configuration, such as "experts[2]"; empty at the top.
        known: the allowed keys.

    Raises:
        OutlierError: the value is not a mapping, or has an unknown key.
    """

    def __init__(self, value: Any, file: str, place: str, known: Iterable[str]) -> None:
        self.file, self.place = file, place
        if not isinstance(value, dict):
            raise OutlierError(f"{file}: {place or 'the configuration'}: expected keys with values")
        known = tuple(known)
        for key in value:
            if key not in known:
                hint = did_you_mean(str(key), known) or f"; known are {listed(known)}"
                raise OutlierError(f"{self._at(str(key)[:80])}: unknown key{hint}")
        self.value = value

    def _at(self, key: str) -> str:
        return f"{self.file}: {self.place + '.' if self.place else ''}{key}"

    def error(self, key: str, problem: str) -> OutlierError:
        """An error about the value of a key, with the key's place in the file."""
        return OutlierError(f"{self._at(key)}: {problem}")

    def text(self, key: str) -> str:
        """A required string that is not empty."""
        value = self.value.get(key)
        if not isinstance(value, str) or not value or "\0" in value:
            raise self.error(key, f"{_short(value)}, expected a string")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty if the key is missing."""
        value = self.value.get(key)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self.error(key, f"{_short(value)}, expected a list of strings")
        for item in value:
            if not isinstance(item, str):
                raise self.error(key, f"{_short(item)} is not a string; put it in quotation marks")
        return tuple(value)

    def choice(self, key: str, choices: Iterable[str], default: str | None) -> str | None:
        """One of the given strings."""
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

    def number(self, key: str, default: float, minimum: float = -math.inf) -> float:
        """A finite number. A string such as "1e-3" is accepted: YAML reads it as a string."""
        value = self.value.get(key, default)
        try:
            number = math.nan if isinstance(value, bool | list | dict) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or number < minimum:
            bound = f" of {minimum:g} or more" if math.isfinite(minimum) else ""
            raise self.error(key, f"{_short(value)}, expected a number{bound}")
        return number

    def entries(self, key: str, known: Iterable[str]) -> list["_Fields"]:
        """A list of mappings; empty if the key is missing."""
        value = self.value.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(key, f"{_short(value)}, expected a list of experts")
        return [_Fields(v, self.file, f"{key}[{n}]", known) for n, v in enumerate(value)]


def _short(value: object) -> str:
    if value is None:
        return "is missing"
    text = repr(value) if not isinstance(value, list | dict) else type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
