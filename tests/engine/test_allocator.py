"""The model of torch's caching allocator, and the allocation sequences replayed through it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan import RunSpec, estimate
from memplan.engine.allocator import OutOfMemoryError, PythonAllocator
from memplan.engine.events import FREED
from memplan.engine.native import new_allocator
from memplan.engine.record import AllocationTrace, record, record_inference
from memplan.engine.step import ExecutionOptions
from memplan.engine.walk import size
from memplan.estimate.training_peaks import training_peaks
from memplan.program.graph import operations_of
from memplan.program.sharding.choice import sharding_of
from memplan.program.structure import Structure
from memplan.program.training.passes import recorded_options
from memplan.program.training.replay import STREAMS, pass_of, replay_steps, steps_of
from memplan.resolve.decide import decide
from tests.estimate.test_laws import laws, runs
from tests.sampling import examples, sampled
from tests.tiny import TINY
from tests.walks import walk

MIB = 2**20


def test_requests_round_to_512_bytes_and_small_ones_share_2_mib_segments() -> None:
    a = PythonAllocator()
    for asked in (1, 512, 513):
        a.alloc(asked)
    assert (a.allocated, a.reserved) == (512 + 512 + 1024, 2 * MIB)
    a.alloc(MIB)
    assert a.reserved == 2 * MIB
    a.alloc(MIB)  # the rest of the segment is smaller
    assert a.reserved == 4 * MIB


def test_medium_requests_share_20_mib_segments_and_larger_ones_have_their_own() -> None:
    """Requests up to 10 MiB share segments of 20 MiB; larger ones have their own, rounded up to 2 MiB."""
    a = PythonAllocator()
    a.alloc(MIB + 1)
    a.alloc(9 * MIB)
    a.alloc(9 * MIB)
    assert a.reserved == 20 * MIB
    a.alloc(9 * MIB)
    a.alloc(10 * MIB)
    assert a.reserved == (20 + 20) * MIB
    assert a.allocated == (20 + 20) * MIB  # at most 1 MiB remained of each, too little to split off
    a.alloc(10 * MIB)
    assert a.reserved == (20 + 20 + 10) * MIB
    a.alloc(10 * MIB + 1)
    assert a.reserved == (20 + 20 + 10 + 12) * MIB


def test_a_block_is_split_if_more_than_1_mib_remains() -> None:
    a = PythonAllocator()
    a.free(a.alloc(40 * MIB))
    whole = a.alloc(39 * MIB)  # 1 MiB would remain, too little to split off
    assert a.allocated == 40 * MIB
    a.free(whole)
    a.alloc(39 * MIB - 512)
    assert a.allocated == 39 * MIB - 512
    a.alloc(MIB + 512)
    assert a.reserved == 40 * MIB


def test_the_smallest_block_that_holds_a_request_serves_it_and_neighbours_merge() -> None:
    a = PythonAllocator()
    blocks = [a.alloc(n * MIB) for n in (64, 32, 48)]
    for block in blocks:
        a.free(block)
    a.alloc(30 * MIB)
    a.alloc(46 * MIB)
    assert a.reserved == (64 + 32 + 48) * MIB
    a.alloc(64 * MIB)
    assert a.reserved == (64 + 32 + 48) * MIB
    b = PythonAllocator()
    b.free(b.alloc(64 * MIB))
    halves = [b.alloc(32 * MIB), b.alloc(32 * MIB)]
    for block in halves:
        b.free(block)
    b.alloc(64 * MIB)
    assert b.reserved == 64 * MIB


def test_a_full_card_releases_only_fully_free_segments() -> None:
    a = PythonAllocator(capacity=100 * MIB)
    a.free(a.alloc(60 * MIB))
    a.alloc(80 * MIB)
    assert (a.reserved, a.peak_reserved) == (80 * MIB, 80 * MIB)
    b = PythonAllocator(capacity=100 * MIB)
    b.free(b.alloc(60 * MIB))
    b.alloc(2 * MIB)  # a piece of the 60
    with pytest.raises(OutOfMemoryError):
        b.alloc(80 * MIB)


def test_expandable_segments_grow_by_pages_and_leave_nothing_over() -> None:
    a = PythonAllocator(expandable=True)
    a.free(a.alloc(60 * MIB))
    a.alloc(50 * MIB)
    a.alloc(30 * MIB)  # 10 remain, and one more page makes 30
    assert (a.allocated, a.reserved) == (80 * MIB, 80 * MIB)
    last = a.alloc(41 * MIB)
    assert a.reserved == (80 + 60) * MIB
    a.free(last)
    a.release()
    assert a.reserved == 80 * MIB


@pytest.mark.parametrize(("capacity", "lives"), [(61, False), (62, True)])
def test_a_full_card_uses_the_free_end_of_an_expandable_segment(capacity: int, lives: bool) -> None:
    a = PythonAllocator(expandable=True, capacity=capacity * MIB)
    a.free(a.alloc(30 * MIB))  # two pages of 20, both free
    a.alloc(MIB)  # a page of 2 in the small pool
    if lives:  # the two pages are released, and three new ones mapped
        assert a.alloc(45 * MIB).size == 45 * MIB
        assert a.reserved == 62 * MIB
    else:
        with pytest.raises(OutOfMemoryError):
            a.alloc(45 * MIB)


class Plain:
    """The allocator's rules, written plainly; a segment is a list of pieces: their size and whether they are free."""

    def __init__(self, expandable: bool, capacity: int | None) -> None:
        self.expandable, self.capacity = expandable, capacity
        self.pools: dict[bool, list[list[list[int]]]] = {True: [], False: []}  # True: the small pool
        self.peak = 0

    @property
    def reserved(self) -> int:
        return sum(size for segments in self.pools.values() for pieces in segments for size, _ in pieces)

    def alloc(self, asked: int) -> list[int]:
        size = -(-asked // 512) * 512
        is_small = size <= MIB
        pieces, piece = self.fitting(is_small, size) or self.given(is_small, size)
        rest = piece[0] - size
        if rest > MIB or (rest and (is_small or self.expandable)):
            pieces.insert(pieces.index(piece) + 1, [rest, True])
            piece[0] = size
        piece[1] = False
        return piece

    def fitting(self, is_small: bool, size: int) -> tuple[list[list[int]], list[int]] | None:
        every = ((pieces, piece) for pieces in self.pools[is_small] for piece in pieces)
        found = ((pieces, piece) for pieces, piece in every if piece[1] and piece[0] >= size)
        return min(found, key=lambda one: one[1][0], default=None)  # the first of several

    def given(self, is_small: bool, size: int) -> tuple[list[list[int]], list[int]]:
        more = self.needed(is_small, size)
        if self.capacity is not None and self.reserved + more > self.capacity:
            self.release()
            more = self.needed(is_small, size)
            if self.reserved + more > self.capacity:
                raise OutOfMemoryError
        if not self.expandable or not self.pools[is_small]:
            self.pools[is_small].append([])
        pieces = self.pools[is_small][-1]
        if not pieces or not pieces[-1][1]:
            pieces.append([0, True])
        pieces[-1][0] += more
        self.peak = max(self.peak, self.reserved)
        return pieces, pieces[-1]

    def needed(self, is_small: bool, size: int) -> int:
        if self.expandable:
            pages = (2 if is_small else 20) * MIB
            *_, (free, is_free) = self.pools[is_small][-1] if any(self.pools[is_small]) else [[0, True]]
            return -(-(size - free * is_free) // pages) * pages
        return 2 * MIB if is_small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB

    def free(self, piece: list[int]) -> None:
        piece[1] = True
        for pieces in (pieces for pool in self.pools.values() for pieces in pool):
            for i in reversed(range(1, len(pieces))):
                if pieces[i][1] and pieces[i - 1][1]:
                    pieces[i - 1][0] += pieces.pop(i)[0]

    def release(self) -> None:
        for is_small, pool in self.pools.items():
            for pieces in list(pool):
                if not self.expandable and len(pieces) == 1 and pieces[0][1]:
                    pool.remove(pieces)
                elif self.expandable and pieces and pieces[-1][1]:
                    pieces[-1][0] %= (2 if is_small else 20) * MIB
                    if not pieces[-1][0]:
                        pieces.pop()


@settings(laws, max_examples=examples(60))
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 64 * MIB) | st.integers(1, 2 * MIB)), max_size=60),
    st.booleans(),
    st.none() | st.integers(20, 400).map(MIB.__mul__),
)
def test_every_block_is_placed_by_the_rules(
    calls: list[tuple[bool, int]], expandable: bool, capacity: int | None
) -> None:
    allocator, plain = PythonAllocator(expandable, capacity), Plain(expandable, capacity)
    out: list[tuple[Any, list[int]]] = []
    for frees, asked in calls:
        if frees and out:
            block, piece = out.pop(asked % len(out))
            allocator.free(block)
            plain.free(piece)
            continue
        try:
            piece = plain.alloc(asked)
        except OutOfMemoryError:
            with pytest.raises(OutOfMemoryError):
                allocator.alloc(asked)
            return
        out.append((allocator.alloc(asked), piece))
        assert [block.size for block, _ in out] == [size for _, (size, _) in out]
        assert (allocator.reserved, allocator.peak_reserved) == (plain.reserved, plain.peak)


@laws
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 64 * MIB)), max_size=60), st.booleans())
def test_allocations_never_exceed_reserved_memory_and_are_all_freed(
    calls: list[tuple[bool, int]], expandable: bool
) -> None:
    a = PythonAllocator(expandable)
    out: list[Any] = []
    for free, asked in calls:
        if free and out:
            a.free(out.pop(asked % len(out)))
        else:
            out.append(a.alloc(asked))
            assert out[-1].size >= asked
        assert sum(block.size for block in out) == a.allocated <= a.reserved <= a.peak_reserved
        spans = sorted((block.pool.is_small, block.start, block.start + block.size) for block in out)
        assert all(end <= start for (pool, _, end), (other, start, _) in pairwise(spans) if pool == other)
    for block in out:
        a.free(block)
    assert a.allocated == 0
    a.release()
    assert a.reserved == 0


def sizes_of(structure: Structure, axes: dict[str, int], events: Any, keys: Any) -> list[tuple[int, int]]:
    """Return every event as a storage and the bytes it adds; negative when it is freed."""
    numbers = {**operations_of(structure.graph)[1], **axes}
    bytes_: dict[int, int] = {}
    out: list[tuple[int, int]] = []
    for number, key in events:
        if key != FREED:
            assert number not in bytes_
            bytes_[number] = size(keys[key][0], keys[key][1], numbers)[1]
            out.append((number, bytes_[number]))
        else:
            out.append((number, -bytes_.pop(number)))
    return out


@laws
@given(runs())
def test_a_pass_replays_to_the_peak_of_its_moments_and_leaves_gradients(run: dict[str, Any]) -> None:
    decided = decide(RunSpec(**run))
    walked = training_peaks(decided)
    structure, p = decided.structure, walked.program
    sequence = pass_of(structure, later=False)
    live = highest = 0
    for _, bytes_ in sizes_of(structure, walked.axes, sequence.unrolled(), sequence.sizes):
        live += bytes_
        highest = max(highest, live)
    passed = walked.phases[1 : 1 + len(p.passing)]
    moments = [phase.peak - (phase.phase == "backward" or phase.step is None) * walked.workspace for phase in passed]
    fixed = p.parameters + p.buffered + p.scaler + walked.workspace
    if not structure.accumulates:
        assert highest == max(moments) - fixed
    assert live == p.gradients


def anonymous(made: AllocationTrace) -> list[tuple[Any, list[int]]]:
    """Return the storages in order of creation, each with those freed before the next."""
    order: dict[int, int] = {}
    out: list[tuple[Any, list[int]]] = []
    for number, key in made.unrolled():
        if key == FREED:
            out[-1][1].append(order[number])
        else:
            order[number] = len(order)
            out.append(((made.sizes[key], made.streams[key]), []))
    return [(what, sorted(freed)) for what, freed in out]


EVERY = 10**5  # copies at either end of a run: none is skipped


def recorded(structure: Structure, later: bool, reach: int | None = None) -> AllocationTrace:
    """Return the recording of a pass, as `pass_of` makes it."""
    graph, asked = structure.graph, recorded_options(structure, later)
    stack, axes = operations_of(graph)
    return record(
        stack,
        {r.times: axes[r.times] for r in stack.runs},
        ExecutionOptions(
            graph.recipe.compute if graph.recipe.autocast else None,
            graph.checkpoint,
            graph.reentrant,
            graph.input_requires_grad,
            graph.to_host,
        ),
        grads_exist=asked.grads_exist,
        updates=dict(asked.updates),
        division=asked.division,
        late=sharding_of(structure).late_gradients(),
        reach=reach,
    )


def assert_skipped_copies_equal_the_others(structure: Structure, later: bool = False) -> None:
    few, every = recorded(structure, later), recorded(structure, later, EVERY)
    assert anonymous(few) == anonymous(every)
    for part in ("forward", "loss", "backward", "end"):
        lengths = [len([*trace.unrolled(getattr(trace, part))]) for trace in (few, every)]
        assert lengths[0] == lengths[1]
    assert [few.sizes[key] for _, key in few.left] == [every.sizes[key] for _, key in every.left]


@settings(laws, max_examples=examples(5))
@given(runs())
def test_skipped_copies_give_the_same_sequence_as_running_all(run: dict[str, Any]) -> None:
    assert_skipped_copies_equal_the_others(decide(RunSpec(**run)).structure)


@settings(laws, max_examples=examples(24))
@given(
    st.integers(1, 14),
    st.sampled_from(["pre", "post", "none"]),
    st.booleans(),
    st.sampled_from([None, False]),
    st.sampled_from(["none", "full"]),
    st.booleans(),
)
def test_skipped_copies_free_gathered_weights_like_the_others(
    layers: int, backward: str, forward: bool, reshards: bool | None, checkpointing: str, later: bool
) -> None:
    """With `post` and prefetching in forward, a unit is freed two copies after it was gathered."""
    asked = {
        "model": {"config": {"model_type": "llama", **TINY["llama"], "num_hidden_layers": layers}},
        "parallelism": {
            "world": 2,
            "dp": 2,
            "strategy": "fsdp",
            "reshard_after_forward": reshards,
            "backward_prefetch": backward,
            "forward_prefetch": forward,
        },
        "kernels": {"checkpointing": checkpointing},
        "batch": {"sequence": 64, "accumulation": 2},
    }
    structure = decide(RunSpec.model_validate(asked)).structure
    assert_skipped_copies_equal_the_others(structure, later)
    assert steps_of(structure).storages


@pytest.mark.parametrize(
    "asked",
    [
        {"model": "qwen2-0.5b"},
        {"model": "gemma-3-1b", "generation": {"cache_implementation": "static"}},
        {"model": "t5-base"},
        {"model": "granite-4.0-h-micro"},
        {"model": "qwen1.5-moe-a2.7b", "profile": "transformers-4.48"},
    ],
)
def test_skipped_copies_of_an_inference_pass_equal_the_others(asked: dict[str, Any]) -> None:
    run = RunSpec.model_validate({"task": "generate", **asked})
    for graph in {each.step.graph for each in walk(run).passes}:
        stack, axes = operations_of(graph)
        depth = {r.times: axes[r.times] for r in stack.runs}
        assert anonymous(record_inference(stack, depth)) == anonymous(record_inference(stack, depth, reach=EVERY))


@laws
@given(runs())
def test_a_run_stays_within_the_bound_that_saves_a_replay(run: dict[str, Any]) -> None:
    answer = estimate(RunSpec(**run))
    usage = answer._usage
    assert answer.bytes.allocated <= answer.bytes.reserved
    assert answer.bytes.allocated <= usage.enough
    assert answer.walk.reserved(usage.enough) is not None


@settings(laws, max_examples=examples(6))
@given(runs())
def test_roomy_cards_do_not_limit_replays_and_cards_below_the_tensors_fail(run: dict[str, Any]) -> None:
    decided = decide(RunSpec(**run))
    w = training_peaks(decided)

    def peak_on(capacity: int | None) -> int:
        allocator = new_allocator(capacity=capacity, streams=STREAMS)
        replay_steps(w.program, w.axes, w.workspace, allocator)
        return allocator.peak_reserved

    free = peak_on(None)
    assert peak_on(free) == free
    with pytest.raises(OutOfMemoryError):
        peak_on(max(p.peak for p in w.phases[1:]) - 2 * w.workspace - 1)


@pytest.mark.parametrize("model_type", sampled(list(TINY), 4))
def test_every_familys_pass_frees_its_tensors_exactly_once(model_type: str) -> None:
    model = {"config": {"model_type": model_type, **TINY[model_type]}}
    run = RunSpec(model=model, batch={"sequence": 64})
    structure = decide(run).structure
    recording = pass_of(structure, later=False)
    assert sizes_of(structure, {"b": 1, "s": 64}, recording.unrolled(), recording.sizes)
    stack, _ = operations_of(structure.graph)
    for ops in (stack.before, stack.after, *(block.ops for part in stack.runs for block in part.blocks)):
        weights = {weight.name for op in ops for weight in op.weights}
        assert weights.isdisjoint(tensor.name for op in ops for tensor in op.writes)
