"""Find the rows of GGUF tensors for each module of the mlx-lm model.

Names are llama.cpp's (`gguf/constants.py`). There are three layouts of experts: one tensor for all
experts of a layer (since April 2024), one tensor for each expert (before), and gate and up in one
tensor (since 2026). In files of the architecture `llama`, the rows of q and k are in another order.
"""

import re
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.imports.gguf_config import ROPE_FREQS
from outlier_mlx.models.config import ModelConfig
from outlier_mlx.models.gguf_names import GGUF_NAMES
from outlier_mlx.models.modules import Module
from outlier_mlx.storage.gguf import GgufTensor
from outlier_mlx.storage.gguf_model import GgufModel

_NAMES = {
    **GGUF_NAMES,
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
_LAYER = re.compile(r"model\.layers\.([0-9]+)\.(.+)")
_EXPERTS = re.compile(r"block_sparse_moe\.switch_mlp\.(gate|up|down)_proj")
_OF_EXPERT = re.compile(r"blk\.([0-9]+)\.ffn_(gate|up|down)\.([0-9]+)\.weight")
# Tensors that follow from the config.
_IGNORED = re.compile(r"blk\.[0-9]+\.attn_rot_embd(\.weight)?|" + re.escape(ROPE_FREQS))


@dataclass(frozen=True)
class Rows:
    """Successive rows of a tensor.

    Attributes:
        tensor: the tensor.
        start: number of the first row.
        count: number of rows.
        head: rows of one attention head if their rotary pairs are interleaved, else 0.
    """

    tensor: GgufTensor
    start: int
    count: int
    head: int = 0

    @property
    def nbytes(self) -> int:
        """Size of the rows on disk in bytes."""
        return self.count * self.tensor.row_bytes

    @property
    def multiple(self) -> int:
        """Ranges begin and end at multiples of this."""
        return self.head or 1

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read stored rows: (rows, row_bytes) uint8.

        If `head` is not 0, the range must consist of whole heads, and the rows of each are put into
        the order of transformers and MLX: row 2 j + r in the file becomes row r * head / 2 + j.

        Args:
            start: first row, counted from the start of this range.
            stop: end of the rows, exclusive.
        """
        raw = self.tensor.read(self.start + start, self.start + stop)
        if not self.head:
            return raw
        pairs = raw.reshape(-1, self.head // 2, 2, raw.shape[-1])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(raw.shape)


@dataclass(frozen=True)
class Tiled:
    """Rows of a tensor, some of which are blocks in another order.

    Attributes:
        tensor: the tensor, as a matrix.
        fixed: rows at the beginning that stay where they are.
        unit: rows of a block.
        order: for each block, its number in the file.
    """

    tensor: GgufTensor
    fixed: int
    unit: int
    order: tuple[int, ...]

    start = 0
    head = 0
    multiple = 1

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.fixed + self.unit * len(self.order)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.count * self.tensor.row_bytes

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows as they are stored, (rows, row_bytes) uint8, in the new order."""
        pieces = []
        while start < stop:
            if start < self.fixed:
                source, count = start, self.fixed - start
            else:
                block, within = divmod(start - self.fixed, self.unit)
                source = self.fixed + self.order[block] * self.unit + within
                count = self.unit - within
            count = min(count, stop - start)
            pieces.append(self.tensor.read(source, source + count))
            start += count
        return np.concatenate(pieces)


AnyRows = Rows | Tiled


class Names:
    """Finds the GGUF tensors of mlx-lm's modules.

    Args:
        model: the GGUF model.
        config: the config that `gguf_config.read_config` returns.
        permuted: whether the rows of q and k are interleaved.
    """

    def __init__(self, model: GgufModel, config: ModelConfig, *, permuted: bool) -> None:
        self.model, self.config = model, config
        self._head = config.head_dim if permuted else 0
        self._used: set[str] = set()
        self._by_expert: dict[tuple[str, str], dict[int, GgufTensor]] = {}
        for name, tensor in model.tensors.items():
            if match := _OF_EXPERT.fullmatch(name):
                found = self._by_expert.setdefault((match[1], match[2]), {})
                if found.setdefault(int(match[3]), tensor) is not tensor:
                    raise CheckpointError(f"{tensor.where}: duplicate expert {int(match[3])}")

    def weight(self, module: Module) -> tuple[Rows, ...]:
        """The rows of a module's weight; of several experts, one after another.

        Raises:
            CheckpointError: a tensor is missing, has a wrong shape, or is there in two layouts.
        """
        layer, place = _place(module.path)
        if match := _EXPERTS.fullmatch(place):
            return self._experts(module, layer, match[1])
        tensor = self._tensor(f"{_prefix(layer)}{_NAMES[place]}.weight", module.shape)
        return (self._rows(tensor, place),)

    def bias(self, module: Module) -> tuple[Rows, ...]:
        """The bias of a module as rows of one element; raises like `weight`."""
        layer, place = _place(module.path)
        tensor = self._tensor(f"{_prefix(layer)}{_NAMES[place]}.bias", module.shape[:1])
        return (self._rows(replace(tensor, shape=(*tensor.shape, 1)), place),)

    def factor(self, module: Module) -> GgufTensor | None:
        """The tensor with the number that a weight is multiplied by, where there is one."""
        layer, place = _place(module.path)
        name = f"{_prefix(layer)}{_NAMES.get(place)}.scale"
        return self._tensor(name, (1,)) if name in self.model.tensors else None

    def check_all_used(self) -> None:
        """Refuse tensors that no module uses.

        Raises:
            CheckpointError: there is one; the message names the first.
        """
        for name, tensor in self.model.tensors.items():
            if name not in self._used and not _IGNORED.fullmatch(name):
                raise CheckpointError(
                    f"{tensor.where}: unknown tensor for a {self.config.family} model"
                    f" of {self.config.layers} layers"
                )

    def _rows(self, tensor: GgufTensor, place: str) -> Rows:
        head = self._head if place in ("self_attn.q_proj", "self_attn.k_proj") else 0
        count = 1 if len(tensor.shape) == 1 else tensor.rows
        return Rows(tensor, 0, count, head)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> GgufTensor:
        tensor = self.model.need(name, shape)
        self._used.add(name)
        return tensor

    def _experts(self, module: Module, layer: str, projection: str) -> tuple[Rows, ...]:
        experts, out, width = module.shape
        stacked = f"blk.{layer}.ffn_{projection}_exps.weight"
        fused = f"blk.{layer}.ffn_gate_up_exps.weight"
        split = self._by_expert.get((layer, projection), {})
        found = [name for name in (stacked, fused) if name in self.model.tensors]
        if projection == "down" and fused in found:
            found.remove(fused)
        if len(found) + bool(split) > 1:
            where = [*found, *(tensor.name for tensor in split.values())]
            raise CheckpointError(
                f"{self.model.where}: layer {layer} has its {projection} experts twice: as"
                f" {where[0]} and as {where[1]}"
            )
        if split:
            return self._split(module, layer, projection, split)
        # If there is none, the error names the current layout.
        tensor = self.model.tensors.get(found[0] if found else stacked)
        if tensor is not None and tensor.shape[0] != experts:
            raise CheckpointError(
                f"{tensor.where}: {tensor.shape[0]} experts, but expert_count is {experts}"
            )
        if found == [fused]:
            tensor = self._tensor(fused, (experts, 2 * out, width))
            first = 0 if projection == "gate" else out
            return tuple(Rows(tensor, 2 * out * e + first, out) for e in range(experts))
        return (Rows(self._tensor(stacked, module.shape), 0, prod(module.shape[:2])),)

    def _split(
        self, module: Module, layer: str, projection: str, split: dict[int, GgufTensor]
    ) -> tuple[Rows, ...]:
        experts, *shape = module.shape
        extra = sorted(number for number in split if number >= experts)
        if extra:
            raise CheckpointError(
                f"{split[extra[0]].where}: expert {extra[0]}, but expert_count is {experts}"
            )
        missing = next((number for number in range(experts) if number not in split), None)
        if missing is not None:
            raise CheckpointError(
                f"{self.model.where}: blk.{layer}.ffn_{projection}.{missing}.weight is missing;"
                f" expert_count is {experts}"
            )
        tensors = [self._tensor(split[number].name, tuple(shape)) for number in range(experts)]
        return tuple(Rows(tensor, 0, tensor.rows) for tensor in tensors)


def _place(path: str) -> tuple[str, str]:
    """The module's layer number as text ("" outside of layers), and its path inside the layer."""
    match = _LAYER.fullmatch(path)
    return ("", path) if match is None else (match[1], match[2])


def _prefix(layer: str) -> str:
    return f"blk.{layer}." if layer else ""
