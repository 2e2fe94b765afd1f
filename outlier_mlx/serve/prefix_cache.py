"""KV caches of what was read and generated before, found by the tokens they begin with.

They are kept as a tree. A node has the rows of some tokens that follow those of its parent, or of
the first tokens of its parent; so what several conversations begin with is kept once, and a reply
adds only its own tokens. A new request gets a copy of the rows on its way through the tree.
"""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from outlier_mlx.serve.cache_folder import CacheFolder, worth
from outlier_mlx.serve.cache_parts import Form, Rows, State, cut, form_of, join, states_of

Kind = Literal["system", "user", "assistant"]

# A long text is kept in nodes of this many tokens, so that not all of it goes at once.
LONGEST = 2048
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
        return [*(self.parent.path() if self.parent else []), self]


class PrefixCache:
    """KV caches of prefixes of conversations.

    `fetch` and `keep` are called in the thread that generates, the others from any thread.

    Args:
        size: largest number of conversations; None: any.
        nbytes: largest size of all caches in memory; None: no limit.
        quantized_from: from how many tokens on a quantized cache may be used.
        folder: where caches are kept on disk, too.
        now: gives seconds.
    """

    def __init__(
        self,
        size: int | None,
        nbytes: int | None,
        *,
        quantized_from: int = 0,
        folder: CacheFolder | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._size, self._limit = size, nbytes
        self._quantized_from = quantized_from
        self._now = now
        self._folder = folder
        self._lock = threading.RLock()
        self._reading = threading.Lock()
        self._roots: dict[Form, Node] = {}
        self._nbytes = 0
        if folder is not None:
            self._add_stored(folder)

    @property
    def nbytes(self) -> int:
        """Size of all caches in memory, in bytes."""
        return self._nbytes

    def fetch(self, tokens: list[int]) -> tuple[list[Any] | None, int]:
        """A copy of the cache of the longest known prefix of a prompt.

        Args:
            tokens: the prompt's, at least one.

        Returns:
            The cache of each layer, or None, and the number of tokens in it. The number is less
            than that of the prompt's tokens, because generation starts from one that is not cached.
        """
        with self._lock:
            node, count = self._longest(np.array(tokens[:-1], np.int32), in_memory=True)
            if node is None or not count:
                return None, 0
            path = node.path()[1:]
            self._use(path)
            node.ended = self._now()
            if self._folder is not None:
                self._folder.touch([step.file for step in path if step.file])
            stops = [step.start for step in path[1:]] + [count]
            rows = [_until(step, stop) for step, stop in zip(path, stops, strict=True)]
            return join(node.form, rows, node.states or [], len(tokens)), count

    def keep(self, tokens: list[int], cache: list[Any], kind: Kind) -> None:
        """Keep what is new in a cache.

        Args:
            tokens: the tokens in it.
            cache: the cache of each layer, which nobody changes any more.
            kind: what ends here: the system prompt, the user's message or the reply.
        """
        if not tokens:
            return
        row = np.array(tokens, np.int32)
        with self._lock:
            form = form_of(cache, len(row))
            root = self._roots.setdefault(form, Node(form, None, 0, row[:0]))
            node, count = _walk(root, row)
            for step in node.path()[1:]:
                if step.rows is None and step.end <= count:
                    self._hold(step, cut(cache, form, step.start, step.end), None)
            node = self._extend(node, count, row, cache)
            if form.has_states:
                self._hold(node, node.rows or [], states_of(cache, form))
            path = node.path()[1:]
            self._use(path)
            node.ended = self._now()
            self._shrink(self._limit)
            if self._folder is not None and kind == "assistant":
                for step in path:
                    self._folder.write(step)

    def make_room(self, nbytes: int | None) -> None:
        """Let go of caches until those that are kept are not larger; None: keep all."""
        with self._lock:
            self._shrink(nbytes)

    def bring(self, tokens: list[int], rest: int | None) -> None:
        """Read what is on disk of a prompt's longest known prefix, in the calling thread.

        Args:
            tokens: the prompt's.
            rest: bytes that caches in memory may take in all; None: no limit.
        """
        if self._folder is None:
            return
        row = np.array(tokens[:-1], np.int32)
        limit = min((n for n in (self._limit, rest) if n is not None), default=None)
        with self._reading:
            with self._lock:
                node, count = self._longest(row, in_memory=False)
                if node is None or count <= self._longest(row, in_memory=True)[1]:
                    return
                path = node.path()[1:]
                self._use(path)
            for step in path:
                ends = step is node and step.form.has_states
                if step.rows is not None and (step.states is not None or not ends):
                    continue
                found = self._folder.read(step)
                with self._lock:
                    if found is None:
                        self._forget(step)
                        return
                    self._hold(step, found[0], found[1] if ends else None)
                    self._shrink(limit)
                    if step.rows is None:  # there is no room
                        return

    def close(self, seconds: float) -> None:
        """Write what waits to be written, for so long at most, and end the thread that writes."""
        if self._folder is not None:
            self._folder.close(seconds)

    def _longest(self, row: np.ndarray, *, in_memory: bool) -> tuple[Node | None, int]:
        """The node in which the longest usable prefix ends, and the prefix's length."""
        best: tuple[Node | None, int] = None, 0
        for form, root in self._roots.items():
            node, count = _walk(root, row)
            path = node.path()[1:]
            missing = next((n for n, step in enumerate(path) if step.rows is None), len(path))
            if in_memory and missing < len(path):
                count, path = path[missing].start, path[:missing]
            if form.has_states:
                # States at the end of a node, and those within its tokens.
                ends = [*path, *(step.children[key] for step in path for key in _within(step))]
                held = [step for step in ends if step.end <= count and _has_states(step, in_memory)]
                node = max(held, key=lambda step: step.end, default=root)
                count = node.end
            elif path:
                node = path[-1]
            quantized = any(layer.kind == "QuantizedKVCache" for layer in form.layers)
            if count > best[1] and not (quantized and count < self._quantized_from):
                best = node, count
        return best

    def _extend(self, node: Node, count: int, row: np.ndarray, cache: list[Any]) -> Node:
        """Add nodes for the tokens from `count` on; returns the last one."""
        form, start = node.form, count
        if form.has_states:
            if count == len(row) and count < node.end:
                node = self._add(Node(form, node, count, row[:0]), cache)
        elif count < len(row) and _is_short(node) and count == node.end and node.parent is not None:
            start, short, node = node.start, node, node.parent
            self._forget(short)
        longest = len(row) if form.has_states else LONGEST
        while start < len(row):
            stop = min(len(row), start + longest)
            node = self._add(Node(form, node, start, row[start:stop]), cache)
            start = stop
        return node

    def _add(self, node: Node, cache: list[Any]) -> Node:
        assert node.parent is not None
        known = node.parent.children.setdefault(node.key, node)
        if known is node:
            self._hold(node, cut(cache, node.form, node.start, node.end), None)
        return known

    def _add_stored(self, folder: CacheFolder) -> None:
        """Add what is in files."""
        known: dict[str, Node] = {}
        for file, part in folder.stored():
            root = self._roots.setdefault(part.form, Node(part.form, None, 0, part.tokens[:0]))
            parent = root if file.parent == "root" else known.get(file.parent)
            # Servers that share a folder may have divided a text in different ways.
            if parent is None or not parent.start <= file.start <= parent.end:
                continue
            node = Node(part.form, parent, file.start, part.tokens, used=file.used, ended=file.used)
            node.file, node.stored_states = file.path.name, part.ends
            if parent.children.setdefault(node.key, node) is node:
                known[file.key] = node

    def _hold(self, node: Node, rows: Rows, states: list[State] | None) -> None:
        """Have rows and states in memory, evaluated."""
        before = node.nbytes
        node.rows, node.states = rows, states or node.states
        mx.eval(rows, [state.arrays for state in node.states or []])
        self._nbytes += node.nbytes - before

    def _release(self, node: Node, *, rows: bool) -> None:
        """Let go of states, and of rows; of all of the node, if it is not in a file."""
        before = node.nbytes
        node.states = None
        if rows:
            node.rows = None
        self._nbytes += node.nbytes - before
        if rows and node.file is None:
            self._forget(node)

    def _forget(self, node: Node) -> None:
        """Take a node out of the tree, with all that follows it."""
        if node.parent is not None:
            node.parent.children.pop(node.key, None)
        for gone in _below(node):
            self._nbytes -= gone.nbytes
            gone.rows = gone.states = None
            if gone.file is not None and self._folder is not None:
                self._folder.remove(gone.file)

    def _use(self, path: list[Node]) -> None:
        for step in path:
            step.used = self._now()

    def _shrink(self, nbytes: int | None) -> None:
        """Let go of what is worth least, until the rest is not larger."""
        while self._size is not None and self._conversations() > self._size:
            self._release_least()
        while nbytes is not None and self._nbytes > nbytes:
            if not self._release_least():
                return

    def _conversations(self) -> int:
        return sum(_is_end(node) for root in self._roots.values() for node in _below(root))

    def _release_least(self) -> bool:
        """Let go of the end of a text, or of states within one; whether there was any."""
        least: tuple[float, Node, bool] | None = None
        for root in self._roots.values():
            for node in _below(root):
                if node.rows is None:
                    continue
                inner = not _is_end(node)
                if inner and node.states is None:
                    continue
                value = worth(node.end, node.ended if inner else node.used)
                if least is None or value < least[0]:
                    least = value, node, not inner
        if least is not None:
            self._release(least[1], rows=least[2])
        return least is not None


def _walk(root: Node, row: np.ndarray) -> tuple[Node, int]:
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


def _below(node: Node) -> Iterator[Node]:
    """A node and all that follow it, without the beginning of all."""
    waiting = [node]
    while waiting:
        found = waiting.pop()
        waiting += found.children.values()
        if found.parent is not None:
            yield found


def _is_end(node: Node) -> bool:
    """Whether it is in memory, and nothing that follows it."""
    return node.rows is not None and all(child.rows is None for child in node.children.values())


def _is_short(node: Node) -> bool:
    return len(node.tokens) < SHORTEST and not node.children


def _within(node: Node) -> list[tuple[int, int]]:
    """The keys of children that only have states."""
    return [key for key in node.children if key[1] == -1]


def _has_states(node: Node, in_memory: bool) -> bool:
    return node.states is not None or (not in_memory and node.stored_states)


def _until(node: Node, stop: int) -> Rows:
    """A node's rows up to a token of the text."""
    if stop == node.end:
        return node.rows or []
    count = stop - node.start
    return [tuple(array[..., :count, :] for array in layer) for layer in node.rows or []]
