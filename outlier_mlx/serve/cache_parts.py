"""KV caches in parts: what some tokens left in each layer, cut out of a cache and joined again."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import mlx.core as mx

from outlier_mlx.upstream import ArraysCache, CacheList, KVCache, QuantizedKVCache, RotatingKVCache

# mlx-lm lengthens caches by this many tokens.
STEP = 256
#: Caches that have a row for each token, so that any run of tokens can be cut out.
CUT = {"KVCache": KVCache, "QuantizedKVCache": QuantizedKVCache}
#: Numbers that belong to the state of the others. Only states of these are written to files.
STATES: dict[str, tuple[str, ...]] = {
    "RotatingKVCache": ("offset", "keep", "max_size", "_idx"),
    "ArraysCache": (),
}


@dataclass(frozen=True)
class LayerForm:
    """What all parts of a layer's cache have in common.

    Attributes:
        kind: the name of mlx-lm's class.
        numbers: of a quantized cache, its group size and bits.
        arrays: shape without the axis of tokens, and dtype, of each array that has one; None: the
            cache is a state, which is known only where it was kept.
    """

    kind: str
    numbers: tuple[int, ...] = ()
    arrays: tuple[tuple[tuple[int, ...], str], ...] | None = None


@dataclass(frozen=True)
class Form:
    """The form of a model's cache.

    Attributes:
        nesting: for each layer None, or the nesting of its caches if it has several.
        layers: the form of each cache, in order.
    """

    nesting: tuple[Any, ...]
    layers: tuple[LayerForm, ...]

    @property
    def has_states(self) -> bool:
        """Whether the cache can be continued only where it was kept."""
        return any(layer.arrays is None for layer in self.layers)


@dataclass(frozen=True)
class State:
    """A cache that cannot be cut, at the end of some token.

    Attributes:
        arrays: its arrays; one that is not there yet is None.
        numbers: see `STATES`.
        whole: a copy of the cache, if it is of no kind that is known here.
    """

    arrays: tuple[mx.array | None, ...] = ()
    numbers: tuple[int, ...] = ()
    whole: Any = None

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        if self.whole is not None:
            return int(self.whole.nbytes)
        return sum(array.nbytes for array in self.arrays if array is not None)


#: For each layer that can be cut, its arrays. The axis before the last is that of tokens.
Rows = list[tuple[mx.array, ...]]


def form_of(cache: Sequence[Any], count: int) -> Form:
    """The form of a cache that holds `count` tokens."""
    return Form(_nesting(cache), tuple(_layer_form(layer, count) for layer in _flat(cache)))


def cut(cache: Sequence[Any], form: Form, start: int, stop: int) -> Rows:
    """Copies of the rows of tokens `start` to `stop`, not yet evaluated."""
    layers = zip(_flat(cache), form.layers, strict=True)
    copied = partial(_copied, start=start, stop=stop)
    return [
        tuple(map(copied, _arrays(layer))) if shape.arrays else ()
        for layer, shape in layers
        if shape.arrays is not None
    ]


def states_of(cache: Sequence[Any], form: Form) -> list[State]:
    """The states of a cache, which stay as they are if the cache is continued."""
    layers = zip(_flat(cache), form.layers, strict=True)
    return [_state(layer) for layer, shape in layers if shape.arrays is None]


def join(form: Form, rows: Sequence[Rows], states: Sequence[State], room: int) -> list[Any]:
    """A cache that nothing else shares, from parts that follow each other.

    Args:
        form: the form of all parts.
        rows: the parts; together they have the first tokens of a text.
        states: the states after these tokens.
        room: number of tokens that the cache has room for at least, before it is made longer.

    Returns:
        mlx-lm's cache of each layer, not yet evaluated.
    """
    cut_layers, whole = iter(range(len(rows[0]) if rows else 0)), iter(states)
    made = []
    for layer in form.layers:
        if layer.arrays is None:
            made.append(_continued(layer.kind, next(whole)))
            continue
        number = next(cut_layers)
        made.append(_joined(layer, [part[number] for part in rows], room))
    return _nested(form.nesting, iter(made))


def _joined(form: LayerForm, parts: list[tuple[mx.array, ...]], room: int) -> Any:
    cache = CUT[form.kind](*form.numbers)
    if not form.arrays:
        return cache
    count = sum(part[0].shape[-2] for part in parts)
    length = (max(room, count + 1) + STEP - 1) // STEP * STEP
    arrays = []
    for number, (_, name) in enumerate(form.arrays):
        pieces = [part[number] for part in parts]
        shape = list(pieces[0].shape)
        shape[-2] = length - count
        free = mx.zeros(shape, getattr(mx, name))
        arrays.append(mx.concatenate([*pieces, free], axis=-2))
    half = len(arrays) // 2
    if form.kind == "KVCache":
        cache.keys, cache.values = arrays
    else:  # lists, because a quantized cache replaces their items
        cache.keys, cache.values = arrays[:half], arrays[half:]
    cache.offset = count
    return cache


def _flat(cache: Sequence[Any]) -> Iterator[Any]:
    for layer in cache:
        if isinstance(layer, CacheList):
            yield from _flat(layer.caches)
        else:
            yield layer


def _nesting(cache: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_nesting(c.caches) if isinstance(c, CacheList) else None for c in cache)


def _nested(nesting: tuple[Any, ...], caches: Iterator[Any]) -> list[Any]:
    return [
        next(caches) if inner is None else CacheList(*_nested(inner, caches)) for inner in nesting
    ]


def _arrays(layer: Any) -> list[mx.array]:
    """The arrays of a cache that can be cut; a quantized one has three of keys and of values."""
    if isinstance(layer, QuantizedKVCache):
        return [*cast(Any, layer.keys), *cast(Any, layer.values)]
    return [layer.keys, layer.values]


def _layer_form(layer: Any, count: int) -> LayerForm:
    kind = type(layer).__name__
    known = type(layer) is CUT.get(kind)
    if not known or layer.offset != (0 if layer.keys is None else count):
        return LayerForm(kind)
    numbers = (layer.group_size, layer.bits) if kind == "QuantizedKVCache" else ()
    if layer.keys is None:
        return LayerForm(kind, numbers, ())
    arrays = _arrays(layer)
    forms = ((tuple(a.shape[:-2] + a.shape[-1:]), str(a.dtype).split(".")[-1]) for a in arrays)
    return LayerForm(kind, numbers, tuple(forms))


def _copied(array: mx.array, start: int, stop: int) -> mx.array:
    if start == 0 and stop == array.shape[-2]:
        return mx.contiguous(array)
    # A part of an array can be a view, and keep all of its memory. What is joined is new.
    middle = (start + stop) // 2
    halves = [array[..., start:middle, :], array[..., middle:stop, :]]
    return mx.concatenate(halves, axis=-2)


def _state(layer: Any) -> State:
    if type(layer) is RotatingKVCache and not layer.empty():
        numbers = tuple(getattr(layer, name) for name in STATES["RotatingKVCache"])
        return State(
            tuple(mx.contiguous(cast(Any, array)) for array in (layer.keys, layer.values)), numbers
        )
    if type(layer) is ArraysCache and layer.left_padding is None and layer.lengths is None:
        return State(
            tuple(None if array is None else mx.contiguous(array) for array in layer.cache)
        )
    return State(whole=copy.deepcopy(layer))


def _continued(kind: str, state: State) -> Any:
    if state.whole is not None:
        return copy.deepcopy(state.whole)
    # mlx-lm writes into the arrays of a cache: these are others, of the same memory until then.
    arrays = [None if array is None else array[...] for array in state.arrays]
    if kind == "ArraysCache":
        cache = ArraysCache(len(arrays))
        cache.cache = cast(Any, arrays)
        return cache
    return RotatingKVCache.from_state((*arrays, *state.numbers))
