"""Which rows of which GGUF tensors a module of MLX's model is made of.

Names are llama.cpp's (`gguf/constants.py`). Experts come in three layouts: one tensor for all of a
layer (since April 2024), one for each expert (before), and gate and up in one tensor (since 2026).
Files of the architecture `llama` have the rows of q and k in another order.
"""

import re
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from outlier_mlx.errors import CheckpointError
from outlier_mlx.imports.gguf_config import ROPE_FREQS
from outlier_mlx.imports.gguf_file import GgufModel
from outlier_mlx.models.plain import Module, head_dim
from outlier_mlx.storage.gguf import GgufTensor

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
_LAYER = re.compile(r"model\.layers\.([0-9]+)\.(.+)")
_EXPERTS = re.compile(r"block_sparse_moe\.switch_mlp\.(gate|up|down)_proj")
_OF_EXPERT = re.compile(r"blk\.([0-9]+)\.ffn_(gate|up|down)\.([0-9]+)\.weight")
# Made from the config anew; old files hold them.
_IGNORED = re.compile(r"blk\.[0-9]+\.attn_rot_embd(\.weight)?|" + re.escape(ROPE_FREQS))


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor that follow each other in MLX's model.

    Attributes:
        tensor: the tensor.
        start: its first row.
        count: how many.
        head: rows of a head whose rotary pairs are interleaved and are to be put apart; 0: none.
    """

    tensor: GgufTensor
    start: int
    count: int
    head: int = 0

    @property
    def nbytes(self) -> int:
        """Their size on disk."""
        return self.count * self.tensor.row_bytes

    def read(self, start: int, stop: int) -> np.ndarray:
        """Some of them as stored, (rows, row_bytes) uint8; whole heads where they are reordered.

        Row 2 j + r of a head of the file is row r * head / 2 + j of transformers' and MLX's.
        """
        raw = self.tensor.read(self.start + start, self.start + stop)
        if not self.head:
            return raw
        pairs = raw.reshape(-1, self.head // 2, 2, raw.shape[-1])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(raw.shape)


class Names:
    """The tensors of a model by what MLX's model calls them.

    Args:
        model: its files.
        config: as `gguf_config.read_config` returns it.
        permuted: whether rows of q and k are interleaved.
    """

    def __init__(self, model: GgufModel, config: dict, *, permuted: bool) -> None:
        self.model, self.config = model, config
        self._head = head_dim(config) if permuted else 0
        self._used: set[str] = set()
        self._by_expert: dict[tuple[str, str], dict[int, GgufTensor]] = {}
        for name, tensor in model.tensors.items():
            if match := _OF_EXPERT.fullmatch(name):
                found = self._by_expert.setdefault((match[1], match[2]), {})
                if found.setdefault(int(match[3]), tensor) is not tensor:
                    raise CheckpointError(f"{tensor.where}: expert {int(match[3])} is there twice")

    def weight(self, module: Module) -> tuple[Rows, ...]:
        """The rows of a module's weight, of each expert in turn.

        Raises:
            CheckpointError: a tensor is missing, of another shape, or there in two layouts.
        """
        layer, place = _place(module.path)
        if match := _EXPERTS.fullmatch(place):
            return self._experts(module, layer, match[1])
        tensor = self._tensor(f"{_prefix(layer)}{_NAMES[place]}.weight", module.shape)
        return (self._rows(tensor, place),)

    def bias(self, module: Module) -> tuple[Rows, ...]:
        """The bias of a module that has one, as rows of one element; see `weight`."""
        layer, place = _place(module.path)
        tensor = self._tensor(f"{_prefix(layer)}{_NAMES[place]}.bias", module.shape[:1])
        return (self._rows(replace(tensor, shape=(*tensor.shape, 1)), place),)

    def check_all_used(self) -> None:
        """Refuse tensors that no module took.

        Raises:
            CheckpointError: names the first.
        """
        for name, tensor in self.model.tensors.items():
            if name not in self._used and not _IGNORED.fullmatch(name):
                raise CheckpointError(
                    f"{tensor.where}: not a tensor of a {self.config['model_type']} model"
                    f" of {self.config['num_hidden_layers']} layers"
                )

    def _rows(self, tensor: GgufTensor, place: str) -> Rows:
        head = self._head if place in ("self_attn.q_proj", "self_attn.k_proj") else 0
        count = 1 if len(tensor.shape) == 1 else tensor.rows
        return Rows(tensor, 0, count, head)

    def _tensor(self, name: str, shape: tuple[int, ...]) -> GgufTensor:
        tensor = self.model.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.model.where}: the tensor {name} {shape} is missing")
        if tensor.shape != shape:
            raise CheckpointError(f"{tensor.where}: shape {tensor.shape}, expected {shape}")
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
                f"{self.model.where}: layer {layer} has {projection} experts as {where[0]} and as"
                f" {where[1]}"
            )
        if split:
            return self._split(module, layer, projection, split)
        # A file without any of them is told of the layout of today.
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
    """The number of a module's layer, if it is in one, and its name within."""
    match = _LAYER.fullmatch(path)
    return ("", path) if match is None else (match[1], match[2])


def _prefix(layer: str) -> str:
    return f"blk.{layer}." if layer else ""
