"""`bench --trace`: replays against slow models, bounds, times, and the command."""

import re
from dataclasses import replace
from functools import cache
from itertools import combinations, zip_longest
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache

from outlier_mlx.cli.showcase import FOLDER
from outlier_mlx.engine.loading import load_model
from outlier_mlx.engine.paging.budget import ExpertMemory
from outlier_mlx.engine.paging.paged import store_of
from outlier_mlx.engine.paging.policies import DEFAULT_POLICY, POLICIES, Lru
from outlier_mlx.measure.expert_recorder import recording, trace_about
from outlier_mlx.measure.expert_trace import About, read_trace
from outlier_mlx.measure.replay import (
    Counts,
    Guesses,
    LookAhead,
    Needs,
    budget_slots,
    guesses_of,
    least_slots,
    needs_of,
    replay,
    replay_belady,
)
from outlier_mlx.measure.replay_speed import decode_seconds
from outlier_mlx.storage.hub import resolve
from tests.engine import tier_of
from tests.library import Library
from tests.program import ROOT, run
from tests.test_expert_trace import ABOUT, random_trace
from tests.test_paging_policies import Model, made

LAYERS, EXPERTS, K = 3, 4, 2
DOMAINS = "kitchen", "market", "old", "sea", "sky"


def needs_of_passes(chunks: bool = True) -> st.SearchStrategy[Needs]:
    """Passes of tokens, and of chunks of a prompt, which may need all experts."""
    most = EXPERTS if chunks else K
    experts = st.sets(st.integers(0, EXPERTS - 1), max_size=most)
    layer = experts.map(sorted).map(tuple)
    of_pass = st.lists(layer, min_size=LAYERS, max_size=LAYERS)
    return st.lists(of_pass, min_size=1, max_size=15)


slots_there_are = st.integers(max(K * LAYERS, EXPERTS), LAYERS * EXPERTS)


class Naive:
    """Slots in a list, the victim found by going through all of them."""

    def __init__(self, name: str, slots: int) -> None:
        self.name, self.model = name, Model()
        self.slots: list[tuple[int, int] | None] = [None] * slots

    def read(self, key: tuple[int, int], held: set[tuple[int, int]]) -> bool:
        if None not in self.slots:
            victim = self.model.victim(self.name, key[0], held)
            if victim is None:
                return False
            self.slots[self.slots.index(victim)] = None
            del self.model.events[victim]
        self.slots[self.slots.index(None)] = key
        self.model.event(key)
        return True


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=40, deadline=None)
@given(
    needs=needs_of_passes(), guessed=needs_of_passes(), slots=slots_there_are, ahead=st.booleans()
)
def test_a_replay_is_what_a_naive_simulation_counts(
    name: str, needs: Needs, guessed: Needs, slots: int, ahead: bool
) -> None:
    guesses: Guesses = [guessed[number % len(guessed)] for number in range(len(needs))]
    found = replay(needs, slots, made(name), guesses if ahead else None)
    naive = Naive(name, slots)
    for number, of_pass in enumerate(needs):
        for layer, experts in enumerate(of_pass):
            naive.model.use(layer, set(experts))
            missing = [e for e in experts if (layer, e) not in naive.slots]
            for expert in missing:
                assert naive.read((layer, expert), set())
            assert found.needed[number, layer] == len(experts)
            assert found.missed[number, layer] == len(missing)
            early = 0
            if ahead and layer + 1 < LAYERS and (guess := guesses[number]) is not None:
                held = {(layer, expert) for expert in range(EXPERTS)}
                for expert in guess[layer + 1]:
                    if (layer + 1, expert) not in naive.slots:
                        early += naive.read((layer + 1, expert), held)
                assert found.early[number, layer + 1] == early
                assert 0 <= found.useful[number, layer + 1] <= early


def fewest(needs: Needs, slots: int) -> int:
    """The fewest misses, by trying all sets of experts that could stay."""
    flat = [
        frozenset((layer, expert) for expert in experts)
        for of_pass in needs
        for layer, experts in enumerate(of_pass)
    ]

    @cache
    def least(at: int, resident: frozenset) -> int:
        if at == len(flat):
            return 0
        now = flat[at]
        others = resident - now
        keep = min(len(others), slots - len(now))
        rest = [least(at + 1, now | frozenset(some)) for some in combinations(sorted(others), keep)]
        return len(now - resident) + min(rest)

    return least(0, frozenset())


@settings(max_examples=60, deadline=None)
@given(
    needs=st.lists(
        st.lists(
            st.sets(st.integers(0, 2), max_size=2).map(sorted).map(tuple), min_size=2, max_size=2
        ),
        min_size=1,
        max_size=6,
    ),
    slots=st.integers(3, 4),
)
def test_beladys_bound_is_the_fewest_misses_there_can_be(needs: Needs, slots: int) -> None:
    assert replay_belady(needs, slots).missed.sum() == fewest(needs, slots)


@settings(max_examples=150, deadline=None)
@given(needs=needs_of_passes(), slots=slots_there_are)
def test_no_policy_reads_less_than_beladys(needs: Needs, slots: int) -> None:
    bound = int(replay_belady(needs, slots).missed.sum())
    for make in POLICIES.values():
        assert replay(needs, slots, make()).missed.sum() >= bound
        ahead = replay(needs, slots, make(), list(needs))
        assert ahead.missed.sum() + ahead.early.sum() >= bound
        assert (ahead.useful == ahead.early).all()
        # The first layer is never foreseen. With a slot for each expert, all others are.
        if slots == LAYERS * EXPERTS:
            assert ahead.missed[:, 1:].sum() == 0


def test_all_in_memory_misses_each_expert_once() -> None:
    needs = needs_of(random_trace(tokens=60))
    assert len({(layer, e) for of in needs for layer, some in enumerate(of) for e in some}) == 8
    for make in POLICIES.values():
        assert replay(needs, 8, make()).missed.sum() == 8


def test_what_has_no_weight_is_not_needed() -> None:
    trace = random_trace(tokens=4)
    weights = trace.weights.copy()
    weights[trace.experts == 3] = 0
    trace = replace(trace, weights=weights, passes=np.array([3, 1], np.uint32))
    needs = needs_of(trace)
    assert trace.foreseen is not None
    idle = [{3} if 3 in trace.experts[:, layer] else set() for layer in range(2)]
    assert idle[0]
    recorded, perfect = (guesses_of(trace, look) for look in ("recorded", "perfect"))
    for number, tokens in enumerate([slice(0, 3), slice(3, 4)]):
        for layer in range(2):
            used = set(trace.experts[tokens, layer].ravel().tolist()) - {3}
            assert needs[number][layer] == tuple(sorted(used))
            foreseen = set(trace.foreseen[tokens, layer].ravel().tolist()) - idle[layer]
            assert (recorded[number] or [])[layer] == tuple(sorted(foreseen))
    assert perfect == needs and guesses_of(trace, "off") == [None, None]
    with pytest.raises(ValueError):
        guesses_of(replace(trace, foreseen=None), "recorded")


@pytest.mark.parametrize("look_ahead", ["off", "recorded", "perfect"])
def test_a_prompt_reads_all_of_the_next_layer_early(look_ahead: LookAhead) -> None:
    """From four (token, expert) pairs for each expert on, as a running model does."""
    trace = replace(random_trace(tokens=16), passes=np.array([8, 7, 1], np.uint32))
    guesses = guesses_of(trace, look_ahead)
    assert guesses[0] == [(0, 1, 2, 3)] * 2
    assert (guesses[1:] == [None, None]) == (look_ahead == "off")
    counts = replay(needs_of(trace), 8, Lru(), guesses)
    assert counts.early[0].tolist() == [0, 4] and counts.missed[0, 1] == 0


def test_budgets() -> None:
    """k a layer, and room for one whole layer, at least."""
    large = About("m", "", "t", tuple(range(28)), 8, 2, 1, 1, 0)
    assert least_slots(large) == 56
    assert [budget_slots(large, percent) for percent in (10, 25, 30, 50, 100)] == [
        *(56, 56, 67, 112, 224)
    ]
    assert least_slots(replace(large, layers=(3,), experts=64)) == 64


# Times

# A 14B overlay at 1.6 bits.
LARGE = About("m", "", "t", tuple(range(28)), 8, 2, 42_600_000, 7_860_000_000, 0)


@pytest.mark.parametrize(
    ("disk", "expected"), [(5, (0.14, 0.28, 0.44, 0.61)), (17, (0.35, 0.57, 0.73, 0.84))]
)
def test_the_share_of_its_speed_that_is_left(disk: float, expected: tuple[float, ...]) -> None:
    """Without a shared FFN beside which to read, as in the formula's derivation."""
    layers = 28
    resident = 1 / 26.6
    for hit_rate, share in zip((0.5, 0.8, 0.9, 0.95), expected, strict=True):
        tokens = 20  # in so many tokens, the misses are a whole number
        missed = np.zeros((tokens, layers), np.uint16)
        missed.ravel()[: round((1 - hit_rate) * 2 * missed.size)] = 1
        counts = Counts(np.full_like(missed, 2), missed, 0 * missed, 0 * missed)
        seconds = decode_seconds(counts, LARGE, 273, disk).mean()
        assert resident / seconds == pytest.approx(share, abs=0.006)


def slow_clock(layers: list[dict[str, int]], about: About, memory: float, disk: float) -> float:
    """One token, read by read: what is missing first, then the queue, in its order."""
    byte, read = 1e-9 / memory, about.expert_bytes * 1e-9 / disk
    own = (about.base_bytes - about.shared_bytes) / len(layers) * byte
    shared = about.shared_bytes / len(layers) * byte
    now = disk_at = 0.0
    queue: list[tuple[int, float]] = []  # layer that needs it, or -1, and seconds
    for number, layer in enumerate(layers):
        now += own
        while queue and disk_at < now:
            of, rest = queue.pop(0)
            if rest > now - disk_at:
                queue.insert(0, (of, rest - (now - disk_at)))
                rest = now - disk_at
            disk_at += rest
        disk_at = max(disk_at, now) + layer["missed"] * read
        waits = layer["missed"] > 0 or number in [of for of, _ in queue]
        while number in [of for of, _ in queue]:
            disk_at += queue.pop(0)[1]
        for above in layers[number + 1 : number + 2]:
            queue += [(number + 1, read)] * above["useful"]
            queue += [(-1, read)] * (above["early"] - above["useful"])
        now = max(now + shared, disk_at if waits else 0.0)
        now += layer["needed"] * about.expert_bytes * byte
    return now


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.tuples(*[st.integers(0, 4)] * 4), min_size=3, max_size=3),
        min_size=1,
        max_size=5,
    ),
    rates=st.tuples(st.floats(1, 1000), st.floats(0.1, 1000)),
    shared=st.integers(0, 900),
)
def test_times_are_those_of_a_slow_clock(
    rows: list, rates: tuple[float, float], shared: int
) -> None:
    about = replace(ABOUT, layers=(0, 1, 2), shared_bytes=shared)
    counted = np.array(rows, np.uint16)  # (passes, layers, 4)
    counted[:, 0, 2] = 0  # nothing is read early for the first layer
    counted[..., 3] = np.minimum(counted[..., 2], counted[..., 3])
    names = "needed", "missed", "early", "useful"
    seconds = decode_seconds(Counts(*np.moveaxis(counted, 2, 0)), about, *rates)
    for one, row in zip(seconds, counted.tolist(), strict=True):
        layers = [dict(zip(names, layer, strict=True)) for layer in row]
        assert one == pytest.approx(slow_clock(layers, about, *rates), rel=1e-9)


def test_perfect_look_ahead_costs_no_time() -> None:
    """Where the disk is fast enough to read all of it beside the layer before."""
    about = replace(ABOUT, layers=(0, 1))
    needed, early = np.array([[2, 2]], np.uint16), np.array([[0, 2]], np.uint16)
    none = np.zeros_like(needed)
    resident = decode_seconds(Counts(needed, none, none, none), about, 100, 1)
    foreseen = decode_seconds(Counts(needed, none, early, early), about, 100, 40)
    in_vain = decode_seconds(Counts(needed, none, early, none), about, 100, 0.01)
    demanded = decode_seconds(Counts(needed, early, none, none), about, 100, 40)
    assert foreseen == pytest.approx(resident) and in_vain == pytest.approx(resident)
    assert demanded > resident


# A running model


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [6, 14])
def test_a_replay_counts_what_the_running_model_counted(
    policy: str, slots: int, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short prompt, then tokens; with 14 slots, some layers have all of their experts."""
    monkeypatch.setattr("outlier_mlx.engine.paging.paged.DEFAULT_POLICY", policy)
    tier = library.demo_tier("q4")
    model, _ = load_model(tier, expert_memory=ExpertMemory(slots=slots), always_page=True)
    model.layers[1].mlp.switch_mlp.lookahead.probe.decide(False)
    with recording(model) as recorder:
        cache = make_prompt_cache(model)
        x = mx.array([[7 * number % 200 + 5 for number in range(11)]])
        for _ in range(30):
            x = mx.argmax(model(x, cache=cache)[:, -1:], axis=-1)
            mx.eval(x)
    trace = recorder.trace(trace_about(resolve(tier), model, "t", 1))
    assert trace.passes.tolist() == [11, *[1] * 29]
    layers, guesses = trace.about.layers, guesses_of(trace, "off")
    found = replay(needs_of(trace), slots, POLICIES[policy](), guesses, layers)
    store = store_of(model)
    assert store is not None
    store._tell_policy()  # of layers that did not have to wait
    counted = store.statistics
    assert counted.hits + counted.misses == found.needed.sum()
    assert (counted.misses, counted.early) == (found.missed.sum(), 0)
    assert counted.misses > 20
    assert counted.hit_rate == found.hit_rate(np.ones(30, bool))


def test_what_a_trace_foresees_is_what_a_running_model_foresees(library: Library) -> None:
    tier = library.demo_tier("q4")
    model, _ = load_model(tier, expert_memory=ExpertMemory(slots=6), always_page=True)
    lookahead = model.layers[1].mlp.switch_mlp.lookahead
    assert lookahead.possible
    lookahead.probe.decide(True)
    cache = make_prompt_cache(model)
    with recording(model) as recorder:
        for token in range(5, 65):
            mx.eval(model(mx.array([[token]]), cache=cache))
    trace = recorder.trace(trace_about(resolve(tier), model, "t", 1))
    store = store_of(model)
    assert store is not None and store.statistics.early > 0
    assert store.statistics.guessed == 60 * 2 * 2  # of the two layers above the first
    assert trace.recall == pytest.approx(store.statistics.foreseen / store.statistics.guessed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", "sea"])
def test_the_table_of_the_page_and_the_default_policy(name: str, tmp_path: Path) -> None:
    """Hit rates on held-out text; on the mixed text none is better than the default by 0.2."""
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w*) *\| (\d+)% \|(.+)\|$", page, re.MULTILINE)
    start = next(number for number, row in enumerate(rows) if row[0] == name)
    end = next(n for n, row in enumerate(rows) if n > start and row[0])
    texts = [(FOLDER / "heldout" / f"{one}.txt").read_text().splitlines() for one in DOMAINS]
    lines = ["\n".join(line) for line in zip_longest(*texts, fillvalue="")]
    text = tmp_path / f"{name}.txt"
    sea = (FOLDER / "heldout" / "sea.txt").read_text()
    text.write_text("\n".join(lines) + "\n" if name == "mixed" else sea)
    tier = tier_of(FOLDER / "overlay", FOLDER / "base", tmp_path / "tier", tier="q4")
    command = ["routing", tier, "--text", text, "--window", 256, "--windows", 32]
    run(*command, "--quiet", "--trace", tmp_path / "x.trace")
    trace = read_trace(tmp_path / "x.trace")
    needs, layers = needs_of(trace), trace.about.layers
    for _, percent, cells in rows[start:end]:
        slots = round(int(percent) * 24 / 100)
        found = [replay(needs, slots, make(), None, layers) for make in POLICIES.values()]
        rates = [100 * c.missed.sum() for c in [*found, replay_belady(needs, slots)]]
        rates = [100 - rate / found[0].needed.sum() for rate in rates]
        expected = [float(cell.strip(" *")) for cell in cells.split("|")]
        assert rates == pytest.approx(expected, abs=0.3)
        if name == "mixed":
            default = rates[list(POLICIES).index(DEFAULT_POLICY)]
            assert default > max(rates[:-1]) - 0.2
