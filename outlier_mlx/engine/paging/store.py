"""Which experts are in which slots, and how those that are needed get there.

One thread uses a store: the one that runs the model. Others only read files into slots.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import mlx.core as mx

from outlier_mlx.engine.needs import CONVERTED_TOGETHER
from outlier_mlx.engine.paging.outputs import Outputs, computed
from outlier_mlx.engine.paging.places import Place, needed
from outlier_mlx.engine.paging.policies import Key, Policy
from outlier_mlx.engine.paging.pressure import Pressure
from outlier_mlx.engine.paging.reading import Reading
from outlier_mlx.engine.paging.reads import ExpertFiles
from outlier_mlx.engine.paging.slots import Pool
from outlier_mlx.engine.paging.statistics import PagingStatistics
from outlier_mlx.engine.paging.tables import Tables
from outlier_mlx.errors import OutlierError

# Routings of resident layers that are kept until the policy is told.
_MOST_NOTES = 4096


@dataclass
class _Entry:
    """A slot that has an expert, or will have it when it is read."""

    slot: int
    known_as: Key  # what the policy calls it: of equal experts, the one that was used last
    buffers: list[memoryview]
    reading: Reading | None


class ExpertStore:
    """The experts of all MoE layers of a model that are in memory.

    Attributes:
        pool: the slots.
        layers: numbers of the MoE layers, in order.
        experts: experts of each of them.
        statistics: what they cost so far; a user may put new ones in their place.
        tables: in which slots the experts of each layer are.
        step: tokens of a prompt to process at a time, at most; None: no limit.
        meanwhile: called every few milliseconds while experts are waited for.
        pressure: the rule by which slots are given back if memory is short; None: never.
        outputs: outputs of layers that may still have to read slots. Each layer is entered before
            its experts are asked for, and left with its output.
        skip: of which share of a token's weight on experts are read; see `leave_out`.
        watch: told of the experts that a layer needs, and where they were; None: nobody asks.
    """

    def __init__(self, pool: Pool, files: ExpertFiles, policy: Callable[[], Policy]) -> None:
        """Nothing is in a slot at first.

        Args:
            pool: slots, at least as many as a layer has experts.
            files: where experts are read from.
            policy: makes what decides which expert leaves its slot.
        """
        self.pool, self._files, self._make_policy = pool, files, policy
        self.layers, self.experts = tuple(files.layers), files.experts
        self.statistics = PagingStatistics()
        self.pressure: Pressure | None = None
        self.meanwhile: Callable[[], None] | None = None
        self.step: int | None = None
        self.skip = 0.0
        self.watch: Callable[[int, dict[int, Place]], None] | None = None
        self._equal = files.equal
        self.tables = Tables(self.layers, self.experts, self._equal)
        self.outputs = Outputs()
        self._noted: list[tuple[int, mx.array, mx.array]] = []
        # Slots that something may still be written to, though nobody waits for it.
        self._abandoned: list[tuple[Reading, int]] = []
        self._starting: int | None = None
        self._lost: set[int] = set()
        self._entries: dict[Key, _Entry] = {}  # by what was read; of equal experts, the first
        self._whole = True
        self._forget()

    # -- what a layer asks ----------------------------------------------------------------------

    def enter(self, layer: int) -> None:
        """Begin with a layer; if it is not above the last one, a new pass begins."""
        if self.outputs.enter(layer):
            if self.outputs.full and self.tables.complete:  # no slot is going to be overwritten
                self.outputs.drop()
            elif self.outputs.full:
                self.outputs.compute()
            self._yield_to_pressure()

    def ensure(self, layer: int, experts: Collection[int]) -> None:
        """Bring experts of the layer that was entered into slots.

        All that its routing depends on must be computed.

        Raises:
            OutlierError: one cannot be read. All others stay usable.
        """
        self._settle_what_is_read()
        wanted = self._wanted(layer, sorted(experts))
        with self._changing():
            self._tell_policy()
            self._policy.use(layer, experts)
            for key, known in wanted.items():
                if key in self._entries:
                    self._rename(self._entries[key], known, key)
        missing = [key for key in wanted if key not in self._entries]
        self.statistics.hits += len(wanted) - len(missing)
        self.statistics.misses += len(missing)
        if not missing and not self._under_way:
            return
        begun = time.perf_counter()
        together = len(missing)
        if not self.pool.packed:  # each takes memory of its own until it is converted
            together = CONVERTED_TOGETHER
            self._settle(key for key in list(self._under_way) if key not in wanted)
        for key in missing[:together]:
            self._start(key, wanted[key])
        for number, key in enumerate(missing):
            self._finish(key)
            if number + together < len(missing):
                later = missing[number + together]
                self._start(later, wanted[later])
        for key in wanted:
            self._finish(key)
        self.statistics.waited += time.perf_counter() - begun

    def missing(self, layer: int, experts: Iterable[int]) -> set[int]:
        """Those of a layer's experts that are neither in a slot nor on their way there."""
        return {expert for expert in experts if self.place(layer, expert) == "disk"}

    def place(self, layer: int, expert: int) -> Place:
        """Where an expert of a layer is."""
        entry = self._entries.get(self._equal.get((layer, expert), (layer, expert)))
        if entry is None:
            return "disk"
        return "memory" if entry.reading is None else "early"

    def note(self, layer: int, indices: mx.array, weights: mx.array) -> None:
        """Note the routing of a resident layer for the policy, without waiting for it."""
        if self.tables.complete:
            self._noted.clear()
            return
        self._noted.append((layer, indices, weights))
        if len(self._noted) > _MOST_NOTES:
            self._tell_policy()

    def read_early(self, layer: int, experts: Iterable[int], in_hand: int) -> None:
        """Begin to read experts that a later layer may need, as far as there is room.

        Args:
            layer: the later layer.
            experts: its experts, the likeliest first.
            in_hand: the layer that was entered, whose routing is computed; its slots are left
                alone.
        """
        found = (self._entries.get(key) for key in self._wanted(in_hand, range(self.experts)))
        held = {entry.known_as for entry in found if entry is not None}
        for key, known in self._wanted(layer, experts).items():
            if key in self._entries:
                continue
            full = not self.pool.packed and len(self._under_way) >= CONVERTED_TOGETHER
            if full or not self._start(key, known, held, early=True):
                return

    # -- slots ----------------------------------------------------------------------------------

    def shrink(self, slots: int) -> None:
        """Have fewer slots, all of them empty: nothing is copied, so memory has no peak.

        Call it between passes.
        """
        self.outputs.end_pass()
        self.outputs.compute()
        self._settle(list(self._under_way))
        with self._changing():
            self._forget()
            # What nobody waits for writes to the old slots, which live as long as it does.
            self._abandoned, self._lost = [], set()
            try:
                self.pool.resize(slots)
            except BaseException:  # such as Ctrl-C: without slots, nothing could go on
                self.pool.resize(slots)
                raise
            finally:
                self._forget()

    def _yield_to_pressure(self) -> None:
        fewer = None if self.pressure is None else self.pressure.fewer(self.pool.slots)
        if fewer is not None:
            self.shrink(fewer)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Tables are being changed: if this is interrupted, all that is in slots is forgotten."""
        if not self._whole:
            self._forget()
        self._whole = False
        yield
        self._whole = True

    def _forget(self) -> None:
        """Begin with empty slots, but for those that something is being written to."""
        if self._starting is not None:
            self._lost.add(self._starting)
        for entry in self._entries.values():
            if entry.reading is not None:
                self._abandoned.append((entry.reading, entry.slot))
        self._starting = None
        self._policy = self._make_policy()
        self._entries, self._known = {}, dict[Key, Key]()
        self._under_way: dict[Key, _Entry] = {}
        taken = self._lost | {slot for _, slot in self._abandoned}
        self._free = [slot for slot in reversed(range(self.pool.slots)) if slot not in taken]
        self._noted.clear()
        self.tables.clear()
        self._whole = True

    def _wanted(self, layer: int, experts: Iterable[int]) -> dict[Key, Key]:
        """What is read for experts of a layer, of equal ones the first; and what they are here."""
        found: dict[Key, Key] = {}
        for expert in experts:
            found.setdefault(self._equal.get((layer, expert), (layer, expert)), (layer, expert))
        return found

    def _rename(self, entry: _Entry, known: Key, key: Key) -> None:
        """Let the policy know an expert that is equal to another layer's as one of this layer."""
        if entry.known_as[0] != known[0]:
            self._policy.remove(*entry.known_as)
            del self._known[entry.known_as]
            self._policy.add(*known)
            self._known[known] = key
            entry.known_as = known

    def _start(
        self, key: Key, known: Key, held: Collection[Key] = (), *, early: bool = False
    ) -> bool:
        """Begin to read an expert; returns whether there was a slot, which there is if not early.

        Raises:
            OutlierError: no slot gets free.
        """
        self.outputs.compute()
        if self._started(key, known, held, early):
            return True
        if early:
            return False
        # What is read early for other layers has taken too many.
        self._settle([k for k, e in self._under_way.items() if e.known_as[0] != known[0]])
        self._settle_what_is_read()
        if not self._started(key, known, held, early):
            raise OutlierError("no slot for an expert is free: earlier reads of others do not end")
        return True

    def _started(self, key: Key, known: Key, held: Collection[Key], early: bool) -> bool:
        with self._changing():
            slot = self._free_slot(known[0], held)
            if slot is None:
                return False
            buffers = self.pool.buffers(slot)
            self._starting = slot
            try:
                reading = self._files.start(*key, buffers, early=early)
            except Exception:
                self._starting = None  # nothing is written to it
                raise
            self._entries[key] = self._under_way[key] = _Entry(slot, known, buffers, reading)
            self._starting = None
            self._policy.add(*known)
            self._known[known] = key
            self.statistics.bytes_read += self._files.nbytes
            self.statistics.early += early
        return True

    def _free_slot(self, layer: int, held: Collection[Key]) -> int | None:
        if self._free:
            return self._free.pop()
        gone = self._policy.evict(
            layer, {entry.known_as for entry in self._under_way.values()}.union(held)
        )
        if gone is None:
            return None
        key = self._known.pop(gone)
        self.tables.remove(key)
        return self._entries.pop(key).slot

    def _finish(self, key: Key) -> None:
        """Wait until an expert is in its slot; if it cannot be read, it has none."""
        entry = self._under_way.get(key)
        if entry is None or entry.reading is None:
            return
        try:
            entry.reading.wait(self.meanwhile)
            self.pool.settle(entry.slot, entry.buffers)
        except BaseException:
            with self._changing():
                del self._entries[key], self._under_way[key], self._known[entry.known_as]
                self._policy.remove(*entry.known_as)
                self._abandoned.append((entry.reading, entry.slot))
            raise
        with self._changing():
            del self._under_way[key]
            entry.reading, entry.buffers = None, []
            self.tables.put(key, entry.slot)

    def _settle_what_is_read(self) -> None:
        """Settle what was read early, and use slots again that nothing is written to any more."""
        self._settle([key for key, e in self._under_way.items() if e.reading and e.reading.done])
        if self._abandoned:
            with self._changing():
                self._free += [slot for reading, slot in self._abandoned if reading.done]
                self._abandoned = [pair for pair in self._abandoned if not pair[0].done]

    def _settle(self, keys: Iterable[Key]) -> None:
        """Settle what was read early; it is read again if it fails and is needed."""
        for key in keys:
            with suppress(OutlierError):
                self._finish(key)

    def _tell_policy(self) -> None:
        for layer, indices, weights in self._noted:
            if not computed(indices, weights):
                continue
            experts = needed(indices, weights)
            self.statistics.hits += len(experts)
            self._policy.use(layer, experts)
        self._noted.clear()
