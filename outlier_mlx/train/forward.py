"""A base with blocks of experts in some layers, as training runs it."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from outlier_mlx.engine.gradients import Prepared, checkpoint
from outlier_mlx.train.experts import Current, ExpertBlock, Mode

#: Sizes of groups that share a scale when the base is rounded, best first.
_GROUPS = (64, 32)


class Place(NamedTuple):
    """Where an array of the model is."""

    module: Any
    leaf: str

    @property
    def value(self) -> mx.array:
        """The array."""
        found: mx.array = self.module[self.leaf]
        return found

    def put(self, value: mx.array) -> None:
        """Replace the array."""
        self.module[self.leaf] = value


class Rounded(NamedTuple):
    """A matrix of the base in MLX's affine format."""

    place: Place
    codes: tuple[mx.array, mx.array, mx.array]
    group: int
    bits: int

    def dense(self) -> mx.array:
        """The rounded matrix in its own dtype."""
        return mx.dequantize(*self.codes, group_size=self.group, bits=self.bits)


class TrainedModel:
    """Runs a base with experts; the base itself is never changed.

    With `recompute`, every layer keeps only its input for the gradient, and is computed again.
    Where the base is to be rounded, a layer's matrices are then there only while it is computed.

    Attributes:
        blocks: the blocks of experts by layer.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Iterable[int],
        experts: int,
        bits: int | None,
        recompute: bool = True,
    ) -> None:
        """Put blocks without experts into a base.

        Args:
            model: an mlx-lm model of a dense base; it is changed, and of no other use then.
            layers: numbers of the layers that get experts.
            experts: number of experts.
            bits: bits of the rounded base; None: it is never rounded.
            recompute: see above; without, nothing is computed twice, and all is kept.
        """
        self._now = Current()
        model.freeze()
        model.eval()
        self._model: Any = model
        self._trunk: Any = model.model
        hidden = self._trunk.norm.weight.shape[0]
        self._rounded = {n: _round(layer, bits) for n, layer in enumerate(model.layers)}
        embedding = self._trunk.embed_tokens
        self._embeddings = (embedding, embedding)
        if bits is not None and (group := _group(embedding.weight)) is not None:
            self._embeddings = (embedding, embedding.to_quantized(group_size=group, bits=bits))
        head = getattr(model, "lm_head", None)
        self._head_place = Place(embedding if head is None else head, "weight")
        self._head_rounded = _round_one(self._head_place, bits)
        self.blocks: dict[int, ExpertBlock] = {}
        for number in layers:
            layer = model.layers[number]
            layer.mlp = ExpertBlock(number, layer.mlp, hidden, experts, self._now)
            self.blocks[number] = layer.mlp
        self._trained: dict[int, list[Place]] = {}
        for number, layer in enumerate(model.layers):
            checkpoint(layer, partial(self._prepared, number), recompute=recompute)

    def numbers(
        self, wanted: Iterable[str], layers: Collection[int] | None = None
    ) -> dict[str, Place]:
        """The arrays of blocks whose names end in one of `wanted`, as "latent"; by name.

        Of all blocks, unless their layers are given.
        """
        ends = tuple(f".{name}" for name in wanted)
        found = {}
        for layer, block in self.blocks.items():
            if layers is not None and layer not in layers:
                continue
            modules = dict(block.named_modules())
            arrays: Any = tree_flatten({k: v for k, v in block.items() if k != "mlp"})
            for path, _ in arrays:
                name = f"{layer}.{path}"
                if name.endswith(ends):
                    owner, _, leaf = path.rpartition(".")
                    found[name] = Place(modules[owner], leaf)
        return found

    def train(self, numbers: Mapping[str, Place]) -> None:
        """Take gradients of these numbers from now on."""
        self._trained = {}
        for name, place in numbers.items():
            self._trained.setdefault(int(name.partition(".")[0]), []).append(place)

    def hidden(self, tokens: mx.array, mode: Mode) -> mx.array:
        """What the head gets for tokens (batch, length): (batch, length, hidden)."""
        self._trunk.embed_tokens = self._embeddings[mode.rounded]
        try:
            with self._now.running(mode):
                found: mx.array = self._trunk(tokens)
        finally:
            self._trunk.embed_tokens = self._embeddings[False]
        return found

    def head(self, rounded: bool = False) -> mx.array:
        """The matrix (vocab, hidden) of the head."""
        if rounded and self._head_rounded is not None:
            return self._head_rounded.dense()
        return self._head_place.value

    def _prepared(self, number: int) -> Prepared:
        mode = self._now.mode

        @contextmanager
        def as_now() -> Iterator[None]:
            with self._now.running(mode), self._with_rounded(number):
                yield

        return self._trained.get(number, []), as_now

    @contextmanager
    def _with_rounded(self, number: int) -> Iterator[None]:
        with ExitStack() as stack:
            for each in self._rounded[number] if self._now.mode.rounded else ():
                stack.callback(each.place.put, each.place.value)
                each.place.put(each.dense())
            yield


def _round(layer: nn.Module, bits: int | None) -> list[Rounded]:
    linears = [m for _, m in layer.named_modules() if isinstance(m, nn.Linear)]
    found = (_round_one(Place(linear, "weight"), bits) for linear in linears)
    return [each for each in found if each is not None]


def _round_one(place: Place, bits: int | None) -> Rounded | None:
    group = _group(place.value)
    if bits is None or group is None:
        return None
    weight, scales, *biases = mx.quantize(place.value, group_size=group, bits=bits)
    mx.eval(weight, scales, *biases)
    return Rounded(place, (weight, scales, biases[0]), group, bits)


def _group(matrix: mx.array) -> int | None:
    return next((size for size in _GROUPS if matrix.shape[-1] % size == 0), None)
