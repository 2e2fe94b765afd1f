"""Outputs of layers that MLX may not have computed yet, and that still have to read slots.

When a layer's routing is known, everything that the layer depends on is computed: all layers below
it in the same pass. So only what was built in other passes can be left: the last outputs of those
are kept, and computed before a slot is first overwritten.
"""

import mlx.core as mx

# Outputs of passes that are kept until they are computed: at most so many, and so many numbers.
_MOST_KEPT, _MOST_NUMBERS = 8, 1 << 23


class Outputs:
    """The last output of each pass that may have to be computed.

    Attributes:
        in_hand: number of the layer that was entered, and not left.
    """

    def __init__(self) -> None:
        self.in_hand: int | None = None
        self._kept: list[mx.array] = []
        self._last: mx.array | None = None
        self._layer = -1

    def enter(self, layer: int) -> bool:
        """Begin with a layer; returns whether a new pass begins: layers ascend within one."""
        begins = layer <= self._layer
        if begins:
            self.end_pass()
        self._layer = self.in_hand = layer
        return begins

    def leave(self, output: mx.array) -> None:
        """Take the output of the layer that was entered."""
        self._last, self.in_hand = output, None

    def end_pass(self) -> None:
        """Keep the last output, for the present pass is over."""
        if self._last is None:
            return
        self._kept.append(self._last)
        self._last = None

    @property
    def full(self) -> bool:
        """Whether more are kept than should be."""
        return len(self) > _MOST_KEPT or sum(kept.size for kept in self._kept) > _MOST_NUMBERS

    def drop(self) -> None:
        """Keep the first no longer, without computing it."""
        del self._kept[0]

    def compute(self) -> None:
        """Compute the outputs of passes before the present one."""
        kept, self._kept = self._kept, []
        for output in kept:
            computed(output)

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._kept)


def computed(*arrays: mx.array) -> bool:
    """Compute arrays; returns whether this thread can.

    Only the thread that made an array can compute it. If a model is another thread's now, nobody
    does.
    """
    try:
        mx.eval(arrays)
    except RuntimeError as error:
        if "in current thread" not in str(error):
            raise
        return False
    return True
