"""The compiled allocator equals the one in Python."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan import RunSpec, estimate
from memplan.engine import native
from memplan.engine.allocator import Allocator, LiveBlocks, OutOfMemoryError, PythonAllocator
from memplan.engine.capacities import ReservedPeak, by_capacity
from memplan.engine.events import FREED, RELEASED, Event, Events, EventSpan
from memplan.engine.native import NativeAllocator
from memplan.estimate.training import reserved
from tests.estimate.test_laws import laws, runs
from tests.sampling import examples

MIB = 2**20
STREAMS = 4

pytestmark = pytest.mark.skipif(native.library() is None, reason="memplan was installed without a C compiler")

SIZES = st.lists(
    st.integers(0, 2 * MIB) | st.integers(0, 64 * MIB) | st.integers(0, 48).map((MIB // 2).__mul__),
    min_size=1,
    max_size=12,
)


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Event], list[int], list[int]]:
    """Draw events, and the sizes and streams that they index."""
    sizes = draw(SIZES)
    streams = draw(st.lists(st.integers(0, STREAMS - 1), min_size=len(sizes), max_size=len(sizes)))
    events: list[Event] = []
    alive: list[int] = []
    for number, (key, choice) in enumerate(draw(st.lists(st.tuples(st.integers(0, 25), st.integers(0)), max_size=150))):
        if key == 25:
            events.append((0, RELEASED))
        elif key > 12 and alive:
            events.append((alive.pop(choice % len(alive)), FREED))
        else:
            alive.append(number)
            events.append((number, key % len(sizes)))
    return events, sizes, streams


def counters(allocator: Allocator, live: LiveBlocks) -> tuple[int, ...]:
    peaks = allocator.peak_allocated, allocator.peak_reserved
    number_of_live = sum(block not in (None, native.NONE) for block in live)
    return allocator.allocated, allocator.reserved, *peaks, allocator.requests, allocator.refused, number_of_live


def shifted(events: list[Event], streams: list[int], shift: int, times: int = 1) -> Events:
    """Return events as one span of storages with higher numbers."""
    out = Events((), streams, shift + 1 + max(number for number, _ in events))
    out.append_span(EventSpan(out.store(*zip(*events, strict=True)), len(events), shift, times))
    return out


@settings(laws, max_examples=examples(1500))
@given(programs(), st.booleans(), st.none() | st.integers(20, 400).map(MIB.__mul__), st.integers(0, 999))
def test_every_event_has_the_same_result(
    program: tuple[list[Event], list[int], list[int]], expandable: bool, capacity: int | None, shift: int
) -> None:
    events, sizes, streams = program
    both = PythonAllocator(expandable, capacity, STREAMS), NativeAllocator(expandable, capacity, STREAMS)
    live = [allocator.live_blocks(shift + len(events)) for allocator in both]
    for event in events:
        messages = ["", ""]
        for i, allocator in enumerate(both):
            try:
                allocator.replay(shifted([event], streams, shift), sizes, live[i])
            except OutOfMemoryError as error:
                messages[i] = str(error)
        assert messages[0] == messages[1]
        assert counters(both[0], live[0]) == counters(both[1], live[1])
        if messages[0]:
            return


@pytest.mark.parametrize("seed", range(6))
def test_many_free_blocks_of_few_sizes_are_taken_in_the_same_order(seed: int) -> None:
    random, alive, events = Random(seed), list[int](), list[Event]()
    sizes = [MIB // 2 * halves for halves in random.sample(range(1, 40), 4)]
    for number in range(4000):
        if alive and random.random() < (0.6 if len(alive) > 400 else 0.4):
            events.append((alive.pop(random.randrange(len(alive))), FREED))
        else:
            alive.append(number)
            events.append((number, random.randrange(len(sizes))))
        if number % 400 == 399:
            events.append((0, RELEASED))
    both = PythonAllocator(seed % 2 == 0), NativeAllocator(seed % 2 == 0)
    live = [allocator.live_blocks(len(events)) for allocator in both]
    for first in range(0, len(events), 50):
        part = Events(events[first : first + 50], [0] * len(sizes), len(events))
        for allocator, blocks in zip(both, live, strict=True):
            allocator.replay(part, sizes, blocks)
        assert counters(both[0], live[0]) == counters(both[1], live[1])


@pytest.mark.parametrize("kind", [PythonAllocator, NativeAllocator])
def test_unknown_storages_are_refused_and_known_ones_handed_over(kind: Callable[[], Allocator]) -> None:
    allocator = kind()
    live = allocator.live_blocks(20)
    allocator.replay(shifted([(7, 0), (8, 0)], [0], 10), [MIB], live)
    allocator.free(live[18])
    assert allocator.allocated == MIB
    with pytest.raises(KeyError, match="15"):
        allocator.replay(shifted([(5, FREED)], [], 10), [], live)
    live[3] = allocator.alloc(2 * MIB)
    allocator.replay(shifted([(3, 0)], [0], 0), [5 * MIB], live)
    assert allocator.allocated == 3 * MIB  # a storage that is live already is not allocated again


@settings(laws, max_examples=examples(500))
@given(programs(), st.integers(1, 4), st.none() | st.integers(20, 400).map(MIB.__mul__))
def test_repeated_events_have_the_same_result(
    program: tuple[list[Event], list[int], list[int]], times: int, capacity: int | None
) -> None:
    events, sizes, streams = program
    alive = {number for number, key in events if key >= 0} - {number for number, key in events if key == FREED}
    events += [(number, FREED) for number in sorted(alive)]
    if not events:
        return
    repeated, found = shifted(events, streams, 3, times), list[tuple[object, ...]]()
    for allocator in (PythonAllocator(False, capacity, STREAMS), NativeAllocator(False, capacity, STREAMS)):
        live = allocator.live_blocks(repeated.storages)
        try:
            allocator.replay(repeated, sizes, live)
            found.append(counters(allocator, live))
        except OutOfMemoryError as error:
            found.append((str(error), *counters(allocator, live)))
    assert found[0] == found[1]


@settings(laws, max_examples=examples(500))
@given(programs(), st.booleans(), st.lists(st.integers(0, 400).map(MIB.__mul__), min_size=2, max_size=6))
def test_one_replay_serves_the_capacities_of_many_cards(
    program: tuple[list[Event], list[int], list[int]], expandable: bool, capacities: list[int]
) -> None:
    events, sizes, streams = program

    def peak_of(_: int, capacity: int | None) -> ReservedPeak:
        allocator = NativeAllocator(expandable, capacity, STREAMS)
        live = allocator.live_blocks(len(events))
        try:
            allocator.replay(Events(events, streams, len(events)), sizes, live)
        except OutOfMemoryError:
            return ReservedPeak.of([allocator], survived=False)
        return ReservedPeak.of([allocator], survived=True)

    replayed = by_capacity(peak_of)
    with_room = peak_of(0, None).bytes or 0
    for capacity in capacities:
        assert replayed.within(0, capacity) == (with_room if with_room <= capacity else None)
        peak = replayed.peak(0, capacity)
        for edge in (capacity, peak.least, *((int(peak.below) - 1, int(peak.below)) if peak.below < inf else ())):
            assert replayed(0, edge) == peak_of(0, edge).bytes


def test_beyond_64_bits_a_replay_runs_in_python() -> None:
    @native.exact
    def reserved_by(*sizes: int) -> tuple[int, type]:
        allocator = native.new_allocator()
        for size in sizes:
            allocator.alloc(size)
        allocator.replay(shifted([(0, 0)], [0], 0), [sizes[0]], allocator.live_blocks(1))
        return allocator.reserved, type(allocator)

    assert reserved_by(2 * MIB) == (20 * MIB, NativeAllocator)
    assert reserved_by(2**70) == (2**71, PythonAllocator)
    assert reserved_by(*[2**60] * 3) == (2**62, PythonAllocator)  # each fits, but not their sum
    assert reserved_by(2 * MIB) == (20 * MIB, NativeAllocator)


@settings(laws, max_examples=examples(10))
@given(runs())
def test_runs_reserve_the_same_without_the_compiled_library(run: dict[str, Any]) -> None:
    replay, replay_again = estimate(RunSpec(**run)).walk.replay, reserved.__wrapped__
    compiled = replay_again(replay, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        assert replay_again(replay, None) == compiled
