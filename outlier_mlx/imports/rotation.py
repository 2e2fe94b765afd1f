"""Rotations that PrismML's converters fold into weights, as metadata says: `prism.hadamard.*`.

Such weights are W H diag(s): the input of the layer is multiplied by the signs s, then by the
normalized Walsh-Hadamard matrix H of each block of its columns. Keys and rules:
PrismML-Eng/llama.cpp, src/llama-model.cpp and conversion/base.py.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.models.fields import short
from outlier_mlx.models.ternary_fields import Rotation, signs_name
from outlier_mlx.writing.ternary_parts import Signs

PREFIX = "prism.hadamard."
EMBEDDING = "token_embd.weight"
_TEXTS = {
    "transform": "normalized-sylvester-walsh-hadamard",
    "axis": "input-last-dimension",
}
_FLAGS = ("gdn_v_grouped", "tied_output")
_MAX_BLOCK = 1 << 20


@dataclass(frozen=True)
class Hadamard:
    """What the metadata says.

    Attributes:
        where: the file, for messages.
        version: 1, or 2 where the head is the rotated embedding.
        block: columns that are transformed together.
        signs: int8 vectors by width of the input; None: all signs are 1.
        weights: names of the rotated tensors.
        inverse: names of rotated embeddings, whose rows are rotated back.
        grouped: whether the value heads of linear attention are in the order of the key heads.
        tied: whether the head is the embedding, rotated.
    """

    where: str
    version: int
    block: int
    signs: Mapping[int, np.ndarray] | None
    weights: tuple[str, ...]
    inverse: tuple[str, ...]
    grouped: bool
    tied: bool

    def signs_of(self, name: str, width: int) -> np.ndarray | None:
        """The signs for the input of a rotated tensor; None: all are 1.

        Raises:
            CheckpointError: the block does not divide the width, or there are none for it.
        """
        if width % self.block:
            raise CheckpointError(
                f"{self.where}: {PREFIX}block_size {self.block} does not divide the input width"
                f" {width} of {name}"
            )
        if self.signs is None:
            return None
        if width not in self.signs:
            raise CheckpointError(
                f"{self.where}: {PREFIX}sign_widths has no signs for the input width {width} of"
                f" {name}"
            )
        return self.signs[width]


def read_hadamard(fields: Mapping[str, Any], where: str) -> Hadamard | None:
    """Read and check the metadata of a file; None if it has none of these keys.

    Raises:
        CheckpointError: names the key that is missing or not as it should be.
    """
    given = {k.removeprefix(PREFIX): v for k, v in fields.items() if k.startswith(PREFIX)}
    if not given:
        return None
    where_key = f"{where}: {PREFIX}"
    version = given.get("version")
    if version is None:
        raise CheckpointError(f"{where_key}version is missing, but other {PREFIX} keys are there")
    if type(version) is not int or version not in (1, 2):
        raise CheckpointError(f"{where_key}version {short(version)}, expected 1 or 2")
    for key, expected in _TEXTS.items():
        if given.get(key) != expected:
            raise CheckpointError(
                f"{where_key}{key} {short(given.get(key))}, expected {expected!r}"
            )
    block = given.get("block_size")
    if type(block) is not int or not 1 < block <= _MAX_BLOCK or block & (block - 1):
        raise CheckpointError(f"{where_key}block_size {short(block)}, expected a power of two")
    for key in _FLAGS:
        if not isinstance(given.get(key, False), bool):
            raise CheckpointError(f"{where_key}{key} {short(given[key])}, expected a boolean")
    tied = given.get("tied_output", False)
    if tied != (version == 2):
        raise CheckpointError(
            f"{where_key}version {version} with tied_output {str(tied).lower()}: version 2 is for"
            " models whose head is the rotated embedding, and only for them"
        )
    return Hadamard(
        where,
        version,
        block,
        sign_vectors(given, where_key),
        _names(given, "weight_names", where_key),
        _names(given, "inverse_weight_names", where_key),
        given.get("gdn_v_grouped", False),
        tied,
    )


def sign_vectors(given: Mapping[str, Any], where: str) -> dict[int, np.ndarray] | None:
    """The vectors of signs, int8, by width; None if all signs are 1.

    Args:
        given: the metadata, by keys without the prefix.
        where: what stands before a key in messages.

    Raises:
        CheckpointError: names the key that is not as it should be.
    """
    mode = given.get("sign_mode")
    if mode == "identity":
        return None
    if mode != "explicit":
        raise CheckpointError(f"{where}sign_mode {short(mode)}, expected 'explicit' or 'identity'")
    arrays = []
    for key in ("sign_widths", "sign_values"):
        try:
            values = np.asarray(given.get(key, []))
        except ValueError:  # lists in it, of different lengths
            values = np.empty((0, 0))
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
            raise CheckpointError(f"{where}{key}: expected a list of integers")
        arrays.append(values.astype(np.int64))
    widths, values = arrays
    if (widths <= 0).any() or len(set(widths.tolist())) < len(widths):
        raise CheckpointError(f"{where}sign_widths: expected different widths, all above 0")
    if widths.sum() != len(values):
        raise CheckpointError(
            f"{where}sign_values has {len(values)} values, but sign_widths add up to {widths.sum()}"
        )
    wrong = values[np.abs(values) != 1]
    if len(wrong):
        raise CheckpointError(f"{where}sign_values holds {wrong[0]}, expected 1 or -1")
    ends = np.cumsum(widths).tolist()
    signs = values.astype(np.int8)
    return {w: signs[end - w : end] for w, end in zip(widths.tolist(), ends, strict=True)}


def _names(given: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    names = given.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        if not (isinstance(names, np.ndarray) and not names.size):
            raise CheckpointError(f"{where}{key}: expected a list of names")
        names = []
    for name, count in Counter(names).items():
        if count > 1:
            raise CheckpointError(f"{where}{key}: {short(name)} is listed {count} times")
    return tuple(names)


@dataclass
class Rotations:
    """The distinct rotations of a model, in the order in which they were asked for."""

    found: list[tuple[Rotation, np.ndarray | None]] = field(default_factory=list)
    _numbers: dict[tuple[int, int, bytes], int] = field(default_factory=dict)

    def number(self, width: int, block: int, signs: np.ndarray | None) -> int:
        """The number of a rotation.

        Args:
            width: width of the input.
            block: columns that are transformed together.
            signs: (width,) int8, or None where all are 1.
        """
        key = (width, block, b"" if signs is None else signs.astype(np.int8).tobytes())
        if key not in self._numbers:
            self._numbers[key] = len(self.found)
            self.found.append((Rotation(width, block, signs is not None), signs))
        return self._numbers[key]

    @property
    def rotations(self) -> tuple[Rotation, ...]:
        """Without the signs."""
        return tuple(rotation for rotation, _ in self.found)

    def parts(self) -> list[Signs]:
        """The tensors of their signs."""
        return [
            Signs(f"rotations.{n}", "norms", signs_name(n), signs)
            for n, (_, signs) in enumerate(self.found)
            if signs is not None
        ]
