"""The field `ternary` of a ternary model's config.json: which modules are ternary, and how.

    "ternary": {"format": "tq1_0_strided", "version": 2, "group_size": 128,
                "modules": {"model.layers.0.mlp.up_proj": {"in_features": 2560}, ...},
                "rotations": [{"block": 1024, "width": 5120}, ...]}

A module PATH is a linear layer or an embedding of mlx-lm's model, by its path there. Its tensors
are `PATH.weight`, uint8 (out, row_bytes), rows of trits as `ternary.rows` packs them; and
`PATH.scales`: float16 or bfloat16 tiles (ceil(out / 8), in / group_size, 8), as `ternary.scales`
makes them, or, where `group_size` is 0, float32 (out,). A module's own `group_size` wins over the
default. A module with `"rotation": N` has its input multiplied by the signs of rotation N, then by
the normalized Walsh-Hadamard matrix of each `block` of its columns (an embedding: its rows the
other way round). The signs are the tensor `rotations.N.signs`, int8 (width,); without it, all
are 1.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.fields import short
from outlier_mlx.models.prism_pack import NAMESPACES
from outlier_mlx.runtime.affine2 import EXPERT_FORMAT_VERSION, ROWS
from outlier_mlx.storage.ternary_matrix import GROUPS, Scales
from outlier_mlx.ternary import row_bytes
from outlier_mlx.ternary.scales import TILE_ROWS

#: Names of dtypes of scales in safetensors.
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_MAX_WIDTH = 1 << 24
_MAX_MODULES = 100_000
_PATH = re.compile(r"(?=.{1,200}\Z)\w+(\.\w+)*")


@dataclass(frozen=True)
class Rotation:
    """A rotation of the input of some modules.

    Attributes:
        width: width of the input.
        block: columns that are transformed together: a power of two that divides the width.
        signed: whether there is a vector of signs.
    """

    width: int
    block: int
    signed: bool = True


@dataclass(frozen=True)
class TernaryModule:
    """A ternary module.

    Attributes:
        width: weights of a row.
        group: weights that share a scale; 0: one scale a row.
        rotation: number of its rotation; None: it has none.
    """

    width: int
    group: int
    rotation: int | None = None


@dataclass(frozen=True)
class TernaryFields:
    """The field `ternary` of a config.

    Attributes:
        modules: the ternary modules, by path.
        rotations: the rotations that they name by number.
        schema: `schema_version` of the `prism_hadamard_qwen35` pack that it was made from; None:
            from none.
    """

    modules: Mapping[str, TernaryModule]
    rotations: tuple[Rotation, ...] = ()
    schema: int | None = field(default=None)

    def spelled(self) -> dict[str, Any]:
        """The field as it is written."""
        groups = [module.group for module in self.modules.values()]
        usual = max(set(groups), key=groups.count)
        modules = {}
        for path, module in self.modules.items():
            modules[path] = {"in_features": module.width}
            if module.group != usual:
                modules[path]["group_size"] = module.group
            if module.rotation is not None:
                modules[path]["rotation"] = module.rotation
        said = {"format": ROWS, "version": EXPERT_FORMAT_VERSION, "group_size": usual}
        if self.schema is not None:
            said["pack_schema_version"] = self.schema
        if self.rotations:
            said["rotations"] = [vars(rotation) for rotation in self.rotations]
        return said | {"modules": modules}


def signs_name(number: int) -> str:
    """The name of the tensor with a rotation's signs."""
    return f"rotations.{number}.signs"


def module_tensors(
    path: str, shape: tuple[int, ...], scales: Scales
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Names, shapes and safetensors dtypes of a ternary module's tensors.

    Args:
        path: of the module.
        shape: (out, in).
        scales: how its scales are stored.
    """
    out, width = shape
    tiles = (-(-out // TILE_ROWS), width // scales.group, TILE_ROWS) if scales.group else (out,)
    return {
        f"{path}.weight": ((out, row_bytes(width)), "U8"),
        f"{path}.scales": (tiles, _STORED[scales.dtype]),
    }


def read_ternary(raw: Mapping[str, Any]) -> TernaryFields:
    """Check and read the field in the config of a ternary model.

    Raises:
        CheckpointError: a format that is not supported, or a value that is not valid.
    """
    given, where = raw["ternary"], "config.json: ternary"
    for name, expected in (("format", ROWS), ("version", EXPERT_FORMAT_VERSION)):
        said = given.get(name)
        if type(said) is not type(expected) or said != expected:
            raise CheckpointError(f"{where}: {name} {short(said)}, expected {expected}")
    modules, rotations = given["modules"], given.get("rotations", [])
    if not isinstance(modules, dict) or not 0 < len(modules) <= _MAX_MODULES:
        raise CheckpointError(f"{where}: modules must be an object of 1 to {_MAX_MODULES} modules")
    wrong = next((path for path in modules if not _PATH.fullmatch(path)), None)
    if wrong is not None:
        raise CheckpointError(f"{where}: modules: {short(wrong)} is not the path of a module")
    if not isinstance(rotations, list):
        raise CheckpointError(f"{where}: rotations must be a list")
    schema = given.get("pack_schema_version")
    if schema is not None and (type(schema) is not int or schema not in NAMESPACES):
        raise CheckpointError(f"{where}: pack_schema_version {short(schema)}, expected 1 or 2")
    read = tuple(_rotation(item, f"{where}: rotation {n}") for n, item in enumerate(rotations))
    found = {
        path: _module(item, given.get("group_size"), read, f"{where}: {path}")
        for path, item in modules.items()
    }
    unused = set(range(len(read))) - {module.rotation for module in found.values()}
    if unused:
        raise CheckpointError(f"{where}: rotation {min(unused)}: no module has it")
    return TernaryFields(found, read, schema)


def _rotation(item: object, where: str) -> Rotation:
    values: dict[str, Any] = item if isinstance(item, dict) else {}
    said: list[Any] = [values.get(name) for name in ("width", "block", "signed")]
    width, block, signed = said
    sound = _is_size(width) and _is_size(block) and isinstance(signed, bool)
    if not sound or block < 2 or block & (block - 1) or width % block:
        raise CheckpointError(
            f"{where}: width {short(width)}, block {short(block)}, signed {short(signed)}; expected"
            " a power of two above 1 that divides the width, and true or false"
        )
    return Rotation(width, block, signed)


def _module(
    item: object, usual: object, rotations: tuple[Rotation, ...], where: str
) -> TernaryModule:
    values: dict[str, Any] = item if isinstance(item, dict) else {}
    width: Any = values.get("in_features")
    group, rotation = values.get("group_size", usual), values.get("rotation")
    if not _is_size(width):
        raise CheckpointError(f"{where}: in_features is {short(width)}, expected a width")
    if type(group) is not int or group not in (0, *GROUPS) or (group and width % group):
        raise CheckpointError(
            f"{where}: group_size is {short(group)}, expected 0, 64 or 128, a divisor of {width}"
        )
    if rotation is not None:
        known = type(rotation) is int and 0 <= rotation < len(rotations)
        if not known or rotations[rotation].width != width:
            raise CheckpointError(f"{where}: there is no rotation {short(rotation)} of its width")
    return TernaryModule(width, group, rotation)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value <= _MAX_WIDTH
