"""KV caches of what was read and generated before, found by the tokens they begin with.

They are kept as a tree. A node has the rows of some tokens that follow those of its parent, or of
the first tokens of its parent; so what several conversations begin with is kept once, and a reply
adds only its own tokens. A new request gets a copy of the rows on its way through the tree.
"""

import threading
import time
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count as counter
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from outlier_mlx.serve.cache_folder import CacheFolder
from outlier_mlx.serve.cache_parts import Form, Rows, State, cut, form_of, join, states_of
from outlier_mlx.serve.options import ServeOptions
from outlier_mlx.serve.prefix_tree import (
    Node,
    below,
    has_states,
    is_end,
    is_short,
    until,
    value,
    walk,
    within,
)

Kind = Literal["system", "user", "assistant"]

# A long text is kept in nodes of this many tokens, so that not all of it goes at once.
LONGEST = 2048
# Conversations that are kept if nothing else limits them.
CONVERSATIONS = 10


def open_prefixes(
    options: ServeOptions, log: Callable[[str], None], warn: Callable[[str], None]
) -> "PrefixCache":
    """The kept caches of a server.

    Args:
        options: the server's options.
        log: called with a line that says how much is on disk.
        warn: called with a line for whatever is wrong there.

    Raises:
        OutlierError: the folder for them cannot be used.
    """
    size = options.prompt_cache_size
    if size is None and options.prompt_cache_bytes is None:
        size = CONVERSATIONS
    where, folder = options.cache_dir, None
    if where is not None:
        folder = CacheFolder(where, warn)
        taken, limit = folder.nbytes / 1e9, where.nbytes / 1e9
        log(f"{where.path}: {taken:.1f} GB of KV caches, of {limit:.1f} GB at most")
    start = options.quantized_kv_start
    return PrefixCache(size, options.prompt_cache_bytes, quantized_from=start, folder=folder)


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
            rows = [until(step, stop) for step, stop in zip(path, stops, strict=True)]
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
            node, count = walk(root, row)
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
            needed = 0
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
                    # Until the request has a copy, it has not taken the memory that is for that.
                    needed += step.nbytes
                    self._shrink(None if limit is None else max(0, limit) + needed)

    def clear(self) -> None:
        """Let go of all caches in memory."""
        self.make_room(0)

    def close(self, seconds: float) -> None:
        """Write what waits to be written, for so long at most, and end the thread that writes."""
        if self._folder is not None:
            self._folder.close(seconds)

    def _longest(self, row: np.ndarray, *, in_memory: bool) -> tuple[Node | None, int]:
        """The node in which the longest usable prefix ends, and the prefix's length."""
        best: tuple[Node | None, int] = None, 0
        for form, root in self._roots.items():
            node, count = walk(root, row)
            path = node.path()[1:]
            missing = next((n for n, step in enumerate(path) if step.rows is None), len(path))
            if in_memory and missing < len(path):
                count, path = path[missing].start, path[:missing]
            if form.has_states:
                # States at the end of a node, and those within its tokens.
                ends = [*path, *(step.children[key] for step in path for key in within(step))]
                held = [step for step in ends if step.end <= count and has_states(step, in_memory)]
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
        elif count < len(row) and is_short(node) and count == node.end and node.parent is not None:
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
        for gone in below(node):
            self._nbytes -= gone.nbytes
            gone.rows = gone.states = None
            if gone.file is not None and self._folder is not None:
                self._folder.remove(gone.file)

    def _use(self, path: list[Node]) -> None:
        for step in path:
            step.used = self._now()

    def _shrink(self, nbytes: int | None) -> None:
        """Let go of what is worth least, until the rest is not larger."""
        if not self._is_too_much(nbytes):
            return
        order: list[tuple[float, int, Node]] = []
        numbers = counter()
        for root in self._roots.values():
            for node in below(root):
                if is_end(node) or node.states is not None:
                    heappush(order, (value(node), next(numbers), node))
        while order and self._is_too_much(nbytes):
            node, end = order[0][2], is_end(order[0][2])
            heappop(order)
            parent = node.parent
            self._release(node, rows=end)
            if end and parent is not None and parent.parent is not None and is_end(parent):
                heappush(order, (value(parent), next(numbers), parent))

    def _is_too_much(self, nbytes: int | None) -> bool:
        if nbytes is not None and self._nbytes > max(0, nbytes):
            return True
        return self._size is not None and self._conversations() > self._size

    def _conversations(self) -> int:
        return sum(is_end(node) for root in self._roots.values() for node in below(root))
