"""The tree of kept KV caches: which tokens follow which, and what each node is worth."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import log2

import numpy as np

from outlier_mlx.serve.cache_parts import Form, Rows, State

#: What would take longest to read again stays; this is worth half as much after so many seconds.
HALF_LIFE = 900.0
# A shorter node becomes part of what follows it.
SHORTEST = 512


@dataclass(eq=False)
class Node:
    """The rows of some tokens.

    Attributes:
        form: the form of the whole cache.
        parent: the node before it; None for the beginning of a text.
        start: number of tokens before its own.
        tokens: its own; none, if it only has states within its parent's.
        rows: their rows; None: they are only in a file.
        states: the states at its end; None: there are none, or they are only in a file.
        used: when it was last on the way of a request, in seconds.
        ended: when its states were last of use.
        children: nodes that follow its last token or an earlier one, by `key`.
        file: its file's name, if there is one.
        stored_states: whether that has the states, too.
    """

    form: Form
    parent: "Node | None"
    start: int
    tokens: np.ndarray
    rows: Rows | None = None
    states: list[State] | None = None
    used: float = 0.0
    ended: float = 0.0
    children: dict[tuple[int, int], "Node"] = field(default_factory=dict)
    file: str | None = None
    stored_states: bool = False

    @property
    def end(self) -> int:
        """Number of tokens up to its last."""
        return self.start + len(self.tokens)

    @property
    def key(self) -> tuple[int, int]:
        """Where it begins and its first token, or -1: no two children of a node have the same."""
        return self.start, int(self.tokens[0]) if len(self.tokens) else -1

    @property
    def nbytes(self) -> int:
        """Size in memory, in bytes."""
        rows = sum(array.nbytes for layer in self.rows or [] for array in layer)
        return rows + self.states_nbytes

    @property
    def states_nbytes(self) -> int:
        """Size of its states in memory, in bytes."""
        return sum(state.nbytes for state in self.states or [])

    def path(self) -> "list[Node]":
        """The nodes from the beginning of the text to this one."""
        found, node = [self], self.parent
        while node is not None:
            found.append(node)
            node = node.parent
        return found[::-1]


def walk(root: Node, row: np.ndarray) -> tuple[Node, int]:
    """The node in which the longest known prefix of some tokens ends, and its length."""
    node, count = root, 0
    while count < len(row):
        child = node.children.get((count, int(row[count])))
        if child is None:
            break
        span = min(len(child.tokens), len(row) - count)
        differ = np.flatnonzero(child.tokens[:span] != row[count : count + span])
        node, count = child, count + int(differ[0] if len(differ) else span)
    return node, count


def below(node: Node) -> Iterator[Node]:
    """A node and all that follow it, without the beginning of all."""
    waiting = [node]
    while waiting:
        found = waiting.pop()
        waiting += found.children.values()
        if found.parent is not None:
            yield found


def is_end(node: Node) -> bool:
    """Whether it is in memory, and nothing that follows it."""
    return node.rows is not None and all(child.rows is None for child in node.children.values())


def value(node: Node) -> float:
    """What a node is worth if it ends a text in memory, or else its states."""
    return worth(node.end, node.used if is_end(node) else node.ended)


def worth(end: int, used: float) -> float:
    """How much tokens up to `end`, last used at `used` seconds, are worth to be kept: a logarithm.

    Reading a text again takes as long as it is; the chance that it is needed halves with time.
    """
    return log2(max(1, end)) + used / HALF_LIFE


def is_short(node: Node) -> bool:
    """Whether it becomes part of what follows it."""
    return len(node.tokens) < SHORTEST and not node.children


def within(node: Node) -> list[tuple[int, int]]:
    """The keys of children that only have states."""
    return [key for key in node.children if key[1] == -1]


def has_states(node: Node, in_memory: bool) -> bool:
    """Whether a cache with states can be continued at its end: from memory, or also from a file."""
    return node.states is not None or (not in_memory and node.stored_states)


def until(node: Node, stop: int) -> Rows:
    """A node's rows up to a token of the text."""
    if stop == node.end:
        return node.rows or []
    count = stop - node.start
    return [tuple(array[..., :count, :] for array in layer) for layer in node.rows or []]
