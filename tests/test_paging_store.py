"""The store of paged experts: what is in which slot, through faults and interruptions."""

import random
import struct
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from outlier_mlx.engine.paging.policies import POLICIES, Key
from outlier_mlx.engine.paging.slots import MATRICES, Pool
from outlier_mlx.engine.paging.store import ExpertStore, needed
from outlier_mlx.errors import OutlierError

LAYERS, EXPERTS, WIDTH = (1, 2, 5), 6, 16


class FakeReading:
    """A read that ends when it is waited for."""

    def __init__(self, files: "FakeFiles", key: Key, buffers: Sequence[memoryview]) -> None:
        self.files, self.key, self.buffers, self.done = files, key, buffers, False

    def wait(self, meanwhile: object = None) -> None:
        if self.done:
            return
        self.buffers[0][:1] = b"\xff"  # half of it
        for failing in self.files.failing.pop(self.key, ()):
            self.done = not isinstance(failing, TimeoutError)
            raise failing
        for buffer in self.buffers:
            fill = struct.pack("<f", 100 * self.key[0] + self.key[1])
            buffer[:] = fill * (len(buffer) // 4)
        self.done = True


class FakeFiles:
    """Experts whose bytes say which they are; those in `failing` cannot be read once."""

    layers, experts, nbytes = LAYERS, EXPERTS, 1000

    def __init__(self, equal: Mapping[Key, Key] | None = None) -> None:
        self.equal = equal or {}
        self.failing: dict[Key, list[BaseException]] = {}
        self.started: list[Key] = []
        self.readings: list[FakeReading] = []

    def start(
        self, layer: int, expert: int, buffers: Sequence[memoryview], *, early: bool = False
    ) -> FakeReading:
        self.started.append((layer, expert))
        self.readings.append(FakeReading(self, (layer, expert), buffers))
        return self.readings[-1]


def store_of(slots: int, files: FakeFiles | None = None, policy: str = "lru") -> ExpertStore:
    pool = Pool(slots, WIDTH, WIDTH, packed=True)
    found: Any = files or FakeFiles()
    return ExpertStore(pool, found, POLICIES[policy])


def contents(store: ExpertStore, layer: int) -> list[float]:
    """What each expert of a layer is multiplied with."""
    slots = store.tables.of(layer)
    scales = [np.array(store.pool.arrays[name][1][slots]) for name in MATRICES]
    assert all((one == one[:, :1]).all() for one in scales)
    assert (scales[0] == scales[1]).all() and (scales[0] == scales[2]).all()
    return [float(row[0]) for row in scales[0]]


def use(store: ExpertStore, layer: int, experts: set[int]) -> None:
    store.enter(layer)
    store.ensure(layer, experts)


def check(store: ExpertStore, layer: int, experts: set[int], equal: Mapping[Key, Key]) -> None:
    found = contents(store, layer)
    for expert in experts:
        of, number = equal.get((layer, expert), (layer, expert))
        assert found[expert] == 100 * of + number


@pytest.mark.parametrize("slots", [6, 7, 10, 18])
def test_hits_are_those_of_a_plain_simulation(slots: int) -> None:
    """LRU, counted with a list: the first is the next to go, but never the layer's own."""
    draw, files = random.Random(slots), FakeFiles()
    store = store_of(slots, files)
    order: list[Key] = []
    hits = misses = 0
    read = []
    for _ in range(60):
        for layer in LAYERS:
            experts = set(draw.sample(range(EXPERTS), draw.choice((1, 2, 2, 2, 6))))
            keys = [(layer, expert) for expert in sorted(experts)]
            for key in [key for key in keys if key in order]:
                order.remove(key)
                order.append(key)
                hits += 1
            for key in [key for key in keys if key not in order]:
                if len(order) == slots:
                    order.remove(next(old for old in order if old[0] != layer))
                order.append(key)
                read.append(key)
                misses += 1
            use(store, layer, experts)
            check(store, layer, experts, {})
    assert (store.statistics.hits, store.statistics.misses) == (hits, misses)
    assert files.started == read
    assert store.statistics.bytes_read == 1000 * misses
    assert store.statistics.hit_rate == hits / (hits + misses)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_leaves_the_right_experts_in_slots(policy: str) -> None:
    equal = {(2, 0): (1, 0), (5, 0): (1, 0), (5, 3): (1, 0), (5, 5): (2, 4)}
    draw = random.Random(policy)
    store = store_of(7, FakeFiles(equal), policy)
    for _ in range(100):
        for layer in LAYERS:
            experts = set(draw.sample(range(EXPERTS), draw.choice((1, 2, 2, 6))))
            use(store, layer, experts)
            check(store, layer, experts, equal)
            if layer != LAYERS[-1] and draw.random() < 0.5:
                later = LAYERS[LAYERS.index(layer) + 1]
                store.read_early(later, draw.sample(range(EXPERTS), 3), layer)
                check(store, layer, experts, equal)


def test_equal_experts_share_a_slot() -> None:
    files = FakeFiles({(1, 3): (1, 0), (2, 1): (1, 0)})
    store = store_of(18, files)
    use(store, 1, {0, 3})
    assert files.started == [(1, 0)]
    assert store.statistics.misses == 1
    use(store, 2, {1})
    assert files.started == [(1, 0)]
    for layer in LAYERS:
        use(store, layer, set(range(EXPERTS)))
    assert len(files.started) == 16
    assert store.tables.complete


def test_a_read_that_fails_leaves_no_half_expert() -> None:
    files = FakeFiles()
    store = store_of(6, files)
    use(store, 1, {0, 1})
    files.failing[2, 4] = [OutlierError("model.safetensors: cannot be read")]
    with pytest.raises(OutlierError, match="cannot be read"):
        use(store, 2, {3, 4, 5})
    check(store, 1, {0, 1}, {})
    assert not store.tables.resident(2)
    use(store, 2, {3, 4, 5})  # the next request tries again
    check(store, 2, {3, 4, 5}, {})
    assert files.started.count((2, 4)) == 2
    for layer in LAYERS:
        use(store, layer, set(range(EXPERTS)))  # no slot is lost
        check(store, layer, set(range(EXPERTS)), {})


def test_an_early_read_that_fails_is_read_again_when_it_is_needed() -> None:
    files = FakeFiles()
    store = store_of(12, files)
    use(store, 1, {0})
    files.failing[2, 2] = [OutlierError("a bad sector")]
    store.read_early(2, [2, 3], 1)
    assert store.statistics.early == 2
    with pytest.raises(OutlierError, match="a bad sector"):
        use(store, 2, {2, 3})
    use(store, 2, {2, 3})
    check(store, 2, {2, 3}, {})
    assert files.started == [(1, 0), (2, 2), (2, 3), (2, 2)]


def test_what_may_still_be_written_to_is_no_slot() -> None:
    """A read that timed out has its slot for as long as it may go on."""
    files = FakeFiles()
    store = store_of(7, files)
    files.failing[1, 0] = [TimeoutError()]
    with pytest.raises(TimeoutError):
        use(store, 1, {0, 1})
    wedged = files.readings[0]
    taken = {int(slot) for layer in LAYERS for slot in _slots(store, layer, set(range(6)))}
    assert len(taken) == 6
    assert bytes(wedged.buffers[0][:1]) == b"\xff"  # nothing else was put there
    wedged.done = True
    for layer in LAYERS:
        taken |= _slots(store, layer, set(range(6)))
    assert len(taken) == 7


def _slots(store: ExpertStore, layer: int, experts: set[int]) -> set[int]:
    use(store, layer, experts)
    check(store, layer, experts, {})
    found: Any = store.tables.of(layer).tolist()
    return set(found)


def test_an_interruption_anywhere_leaves_a_sound_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a read is begun, or waited for, or an expert is settled."""
    files = FakeFiles()
    store = store_of(8, files)
    draw = random.Random(0)
    start, settle = files.start, store.pool.settle
    holes: dict[str, Any] = {"start": start, "settle": settle}

    def interrupted(name: str) -> Any:
        def call(*given: Any, **how: Any) -> Any:
            result = holes[name](*given, **how) if draw.random() < 0.5 else None
            if (result is None and name == "start") or draw.random() < 0.2:
                raise KeyboardInterrupt
            return result

        return call

    for _ in range(200):
        layer = draw.choice(LAYERS)
        experts = set(draw.sample(range(EXPERTS), 2))
        name = draw.choice(("start", "settle", "wait", "none"))
        with monkeypatch.context() as patch:
            if name == "start":
                patch.setattr(files, "start", interrupted("start"))
            elif name == "settle":
                patch.setattr(store.pool, "settle", interrupted("settle"))
            elif name == "wait":
                files.failing[layer, min(experts)] = [KeyboardInterrupt()]
            try:
                use(store, layer, experts)
            except (KeyboardInterrupt, OutlierError):
                continue
            finally:
                files.failing.clear()
        if name == "none":
            check(store, layer, experts, {})


def test_outputs_of_earlier_passes_are_computed_before_a_slot_is_overwritten() -> None:
    """They still have to read it."""
    store = store_of(6)
    use(store, 1, {0, 1})
    rows = store.pool.arrays["gate_proj"][1]
    late = rows[store.tables.of(1)[:2]] * 1
    store.outputs.leave(late)
    use(store, 1, {0, 2, 3, 4, 5})
    use(store, 2, set(range(EXPERTS)))
    assert np.array(late)[:, 0].tolist() == [100, 101]


def test_outputs_of_a_thread_that_is_gone_are_left_alone() -> None:
    store = store_of(6)

    def run() -> None:
        use(store, 1, {0, 1})
        store.outputs.leave(store.pool.arrays["gate_proj"][1][store.tables.of(1)] * 1)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    use(store, 1, set(range(EXPERTS)))
    use(store, 2, set(range(EXPERTS)))
    check(store, 2, set(range(EXPERTS)), {})


def test_outputs_are_not_kept_for_long() -> None:
    store = store_of(6)
    for _ in range(50):
        use(store, 1, {0})
        store.outputs.leave(mx.zeros((1 << 20,)))
    assert len(store.outputs) <= 8


def test_experts_with_weight_0_are_not_needed() -> None:
    indices = mx.array([[[0, 3], [2, 0]]], mx.uint32)
    weights = mx.array([[[0.5, 0.0], [-0.0, 0.25]]])
    assert needed(indices, weights) == {0}


def test_alphas_of_0_are_known() -> None:
    store = store_of(6)
    alpha = mx.array([1.0, 0, 0, -0.5, 0, 0])
    store.tables.use_alphas(2, alpha)
    assert store.tables.needable(2) == {0, 3}
    use(store, 2, {0, 3})
    assert store.tables.resident(2)
    store.tables.use_alphas(2, mx.ones((6,)))
    assert not store.tables.resident(2)
