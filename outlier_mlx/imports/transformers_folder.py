"""Tiers found again in what `export --format transformers` wrote.

Codes and trits are read off the weights with the scales, biases and alphas that the export kept,
and every weight is computed anew from what was found: it must be the stored one, to the bit. So the
tier has the same tensors as before. Only where a scale is so small beside its bias that two codes
give the same float32 may another of them be found.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from outlier_mlx.checkpoints.export_shared import FromSlabs, slabs
from outlier_mlx.checkpoints.export_transformers import (
    CONFIG,
    KEPT,
    ORIGIN,
    TOKENIZER,
    TRANSFORMERS,
)
from outlier_mlx.checkpoints.hf_layout import HfClass, hf_class, hf_config
from outlier_mlx.checkpoints.hf_tensors import Times, expert_path, folded_scales, hf_shapes
from outlier_mlx.errors import CheckpointError
from outlier_mlx.imports.codes import pack_codes
from outlier_mlx.imports.opened import Opened
from outlier_mlx.models.config import is_tier, parse_config, raw_config
from outlier_mlx.models.description import ModelConfig
from outlier_mlx.models.quantization import Affine
from outlier_mlx.models.stored import Expected, expected_tensors
from outlier_mlx.models.summary import kind_of
from outlier_mlx.models.tier_fields import check_fields
from outlier_mlx.storage.output import write_json
from outlier_mlx.storage.paths import inside
from outlier_mlx.storage.rounding import narrowed, widened
from outlier_mlx.storage.safetensors import TensorRef
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.storage.tensors import Derived, FloatTensor, row_ranges
from outlier_mlx.storage.texts import read_json
from outlier_mlx.ternary import pack_rows
from outlier_mlx.writing.assets import copy_assets, tidy_tokenizer_config
from outlier_mlx.writing.float_parts import SAFETENSORS_NAMES, SLAB_BYTES
from outlier_mlx.writing.manifest import find_manifest
from outlier_mlx.writing.parts import Chunk, Part, ahead
from outlier_mlx.writing.writer import TensorSpec

_CHANGED = "not what `export` wrote; only unchanged exports become tiers again"


def is_export(folder: Path) -> bool:
    """Whether `export --format transformers` wrote a folder.

    Raises:
        CheckpointError: it did, and rounded.
    """
    if (folder / KEPT / CONFIG).exists():
        return True
    manifest = find_manifest(folder)
    if manifest is not None and manifest.content.get("format") == TRANSFORMERS:
        raise CheckpointError(
            f"{folder.name}: was exported in a dtype that rounds; only an export in float32 becomes"
            " a tier again"
        )
    return False


def open_export(folder: Path, raw: dict) -> Opened:
    """Open a folder for which `is_export` holds; only headers and small tensors are read.

    Args:
        folder: the export's.
        raw: its config.json.

    Raises:
        CheckpointError: a file was changed, is damaged or is missing.
    """
    content = raw_config(folder / KEPT)
    if not is_tier(content):
        raise CheckpointError(f"{folder.name}/{KEPT}/{CONFIG}: not the config of a tier")
    config = parse_config(content, where=f"{KEPT}/{CONFIG}")
    check_fields(config)
    known = hf_class(config, folder.name)
    if raw != hf_config(config, known, "float32"):
        raise CheckpointError(f"{folder.name}/{CONFIG}: {_CHANGED}")
    tensors = read_shards(folder)
    _check(tensors, hf_shapes(config, known), folder.name)
    kept = read_shards(folder / KEPT, required=False)
    tier = _Tier(config, known, tensors, kept)
    parts = [tier.part(name, said) for name, said in expected_tensors(config, kept).items()]
    return Opened(
        source_format="a tier for transformers",
        parts=parts,
        config=content,
        assets=partial(_copy_assets, folder),
        notes=list,
        details={},
        tier=read_json(inside(folder / KEPT, ORIGIN)),
    )


def _copy_assets(folder: Path, target: Path) -> None:
    copy_assets([folder], target)
    (target / TOKENIZER).unlink(missing_ok=True)
    if (folder / KEPT / TOKENIZER).exists():
        path = inside(folder / KEPT, TOKENIZER)
        write_json(target / TOKENIZER, tidy_tokenizer_config(read_json(path), str(path)))


def _check(
    tensors: Mapping[str, TensorRef], shapes: Mapping[str, tuple[int, ...]], where: str
) -> None:
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{where}: the tensor {name} {shape} is missing")
        tensor.require(shape, "F32")
        if name.endswith(".shared_expert_gate.weight") and tensor.read().any():
            raise CheckpointError(f"{tensor.where}: {_CHANGED}: expected zeros")
    for name, tensor in tensors.items():
        if name not in shapes:
            raise CheckpointError(f"{tensor.where}: not a tensor of this model")


@dataclass(frozen=True)
class Block:
    """Some rows (axis 0) or columns (axis 1) of a matrix, from `start` to `stop`."""

    tensor: FloatTensor
    axis: int
    start: int
    stop: int
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        shape = list(self.tensor.shape)
        shape[self.axis] = self.stop - self.start
        return tuple(shape)

    @property
    def where(self) -> str:
        """File and key, for messages."""
        return self.tensor.where

    def read_float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of the block."""
        if self.axis == 1:
            return self.tensor.read_float32(start, stop)[:, self.start : self.stop]
        stop = self.shape[0] if stop is None else stop
        return self.tensor.read_float32(self.start + start, self.start + stop)


@dataclass(frozen=True)
class Repeated(Derived):
    """A matrix that other tensors repeat."""

    others: tuple[FloatTensor, ...]

    def read_float32(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop`.

        Raises:
            CheckpointError: another has other numbers.
        """
        rows = self.tensor.read_float32(start, stop)
        for other in self.others:
            if not np.array_equal(rows, other.read_float32(start, stop)):
                raise CheckpointError(f"{other.where}: {_CHANGED}: differs from {self.where}")
        return rows


@dataclass(frozen=True)
class Kept(FromSlabs):
    """A tensor that the export kept as it was."""

    @property
    def params(self) -> int:
        """Elements of the tensor, but for what belongs to codes."""
        codes = self.spec.dtype in ("U8", "U32")
        beside = self.spec.name.endswith((".scales", ".biases"))
        return 0 if codes or beside else super().params


@dataclass(frozen=True)
class Found(Part):
    """A tensor of the tier that is found in weights.

    Attributes:
        spec: what is written.
        weights: where it is found: (out, in) each, one after the other; or (width,).
        find: makes the bytes of rows (start, stop) of one of them, given its number and its rows.
    """

    spec: TensorSpec
    weights: tuple[FloatTensor, ...]
    find: Callable[[int, int, np.ndarray], np.ndarray]

    @property
    def params(self) -> int:
        """Weights."""
        return sum(prod(weight.shape) for weight in self.weights)

    @property
    def source_bytes(self) -> int:
        """Bytes that are read: four for each weight."""
        return 4 * self.params

    def specs(self) -> list[TensorSpec]:
        """The name, dtype and shape of its only tensor."""
        return [self.spec]

    def chunks(self, pool: ThreadPoolExecutor) -> Iterator[Chunk]:
        """The bytes, slab by slab, from the pool's threads."""

        def found(number: int, start: int, stop: int) -> tuple[memoryview, int]:
            rows = self.weights[number].read_float32(start, stop)
            made = np.ascontiguousarray(self.find(number, start, rows))
            return made.data.cast("B"), 4 * rows.size

        calls = (
            partial(found, number, *rows)
            for number, weight in enumerate(self.weights)
            for rows in row_ranges(weight.shape[0], 4 * prod(weight.shape[1:]), SLAB_BYTES)
        )
        for data, used in ahead(pool, calls):
            yield self.spec.name, data, used


@dataclass(frozen=True)
class _Tier:
    """The tensors of a tier, as an export has them."""

    config: ModelConfig
    known: HfClass
    tensors: Mapping[str, TensorRef]
    kept: Mapping[str, TensorRef]

    def part(self, name: str, expected: Expected) -> Part:
        """How a tensor of the tier is made.

        Raises:
            CheckpointError: what was kept of it has another shape or dtype.
        """
        shape, dtypes = expected
        path, _, leaf = name.rpartition(".")
        if name in self.kept:
            return _kept(self.kept[name], expected)
        if leaf in ("scales", "biases", "alpha"):
            raise CheckpointError(f"{KEPT}: the tensor {name} {shape} is missing")
        if ".switch_mlp." in path:
            return Found(path, "experts", TensorSpec(name, dtypes[0], shape), *self._trits(path))
        source = self._source(name)
        if dtypes == ("U32",):
            find = self._codes(path, source.where)
        else:
            router = path.endswith(".mlp.gate")
            dtype = "float32" if router else self.config.raw["dtype"]
            dtypes, find = (SAFETENSORS_NAMES[dtype],), partial(_floats, dtype, source.where)
        return Found(path, kind_of(name), TensorSpec(name, dtypes[0], shape), (source,), find)

    def _source(self, name: str) -> FloatTensor:
        """A tensor of the base, or a router."""
        if ".shared_expert." not in name:
            return self.tensors[name]
        if not self.known.folded:
            tensor = self.tensors[name]
            # Exact, but for the smallest floats.
            return Times(tensor, 0.5) if ".down_proj." in name else tensor
        switch = name.replace(".shared_expert.", ".switch_mlp.").removesuffix(".weight")
        first, *others = (self._block(switch, n, base=True) for n in range(self.config.experts))
        return Repeated(first, tuple(others))

    def _block(self, switch: str, expert: int, *, base: bool) -> FloatTensor:
        """An expert's own weights, or those of the base that stand before them."""
        tensor = self.tensors[f"{expert_path(switch, expert)}.weight"]
        if not self.known.folded:
            return tensor
        axis, cut = int(switch.endswith(".down_proj")), self.config.intermediate
        return Block(tensor, axis, *((0, cut) if base else (cut, tensor.shape[axis])))

    def _trits(
        self, path: str
    ) -> tuple[tuple[FloatTensor, ...], Callable[[int, int, np.ndarray], np.ndarray]]:
        """The weights of all experts, and what finds their trits."""
        count = self.config.experts
        weights = tuple(self._block(path, expert, base=False) for expert in range(count))
        alphas, name = np.ones(count, np.float32), f"{path.split('.switch_mlp.')[0]}.alpha"
        if path.endswith(".down_proj"):
            alphas = self.kept[name].read_float32()
        scales = self.kept[f"{path}.scales"]
        own = scales.read_float32().reshape(*scales.shape[:2], -1)[..., 0]
        folded = [folded_scales(own[n], float(alphas[n]), scales.where) for n in range(count)]
        affine = f"{path}.biases" in self.kept

        def find(number: int, start: int, rows: np.ndarray) -> np.ndarray:
            factors = folded[number][start : start + len(rows), None]
            trits = (np.sign(rows) * np.sign(factors)).astype(np.int8)
            if not np.array_equal(trits * factors, rows):
                raise CheckpointError(f"{weights[number].where}: {_CHANGED}: not ternary")
            return pack_codes((trits + 1).view(np.uint8), 2) if affine else pack_rows(trits)

        return weights, find

    def _codes(self, path: str, where: str) -> Callable[[int, int, np.ndarray], np.ndarray]:
        """What finds the codes of a quantized matrix of the base."""
        scales, biases = self.kept[f"{path}.scales"], self.kept[f"{path}.biases"]
        how = self.config.quantization.of(path) if self.config.quantization else None
        assert isinstance(how, Affine)  # `expected_tensors` has seen to that

        def find(_: int, start: int, rows: np.ndarray) -> np.ndarray:
            stop = start + len(rows)
            scale, bias = (t.read_float32(start, stop)[..., None] for t in (scales, biases))
            weights = rows.reshape(*scale.shape[:2], -1)
            with np.errstate(divide="ignore", invalid="ignore"):
                codes = np.rint((weights - bias.astype(np.float64)) / scale)
            codes = np.clip(np.nan_to_num(codes), 0, 2**how.bits - 1).astype(np.uint8)
            if not np.array_equal(codes * scale + bias, weights):
                raise CheckpointError(f"{where}: {_CHANGED}: not codes of {how.bits} bits")
            return pack_codes(codes.reshape(rows.shape), how.bits)

        return find


def _floats(dtype: str, where: str, _: int, __: int, rows: np.ndarray) -> np.ndarray:
    """Rows in the tier's dtype, which held them before."""
    stored = narrowed(rows, dtype, where)
    if not np.array_equal(widened(stored, dtype), rows):
        raise CheckpointError(f"{where}: {_CHANGED}: not numbers of {dtype}")
    return stored


def _kept(tensor: TensorRef, expected: Expected) -> Kept:
    shape, dtypes = expected
    if tensor.shape != shape or tensor.dtype not in dtypes:
        raise CheckpointError(
            f"{KEPT}/{tensor.where}: {tensor.dtype} {tensor.shape}, expected {dtypes[0]} {shape}"
        )
    spec = TensorSpec(tensor.name, tensor.dtype, shape)
    path = tensor.name.rpartition(".")[0]
    return Kept(path, kind_of(tensor.name), spec, partial(slabs, tensor))
