"""Models of many modules: the time of an estimate grows no faster than their number, and nothing is left out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from operator import ge, mul
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan import RunSpec, estimate
from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import find_gpu
from memplan.core.errors import ConfigError
from memplan.engine import walk
from memplan.engine.allocator import AllocatorBlock, OutOfMemoryError, PythonAllocator
from memplan.engine.events import FREED, Event, Events, EventSpan
from memplan.engine.record import AllocationTrace
from memplan.engine.walk import ONE, Term, Variable, chain, largest, prune, rows, size, values, without_midpoints
from memplan.estimate.usage import Replay, Usage, run_overhead
from memplan.program.graph import operations_of
from memplan.program.training.passes import PHASES, pass_of
from memplan.program.training.replay import LONG_PASS
from memplan.program.training.replay import pass_of as recording_of
from memplan.resolve.decide import decide
from tests.encoders import SMALL
from tests.estimate.test_laws import laws
from tests.sampling import examples
from tests.tiny import TINY

MIB, GIB = 2**20, 2**30


def mixture(experts: int) -> RunSpec:
    """Return a run of a small mixture with experts as modules and adapters on every linear layer."""
    config = {"model_type": "qwen3_moe", **TINY["qwen3_moe"], "num_experts": experts}
    fields = {"profile": "llamafactory-0.9", "method": {"kind": "lora"}, "batch": {"sequence": 64}}
    return RunSpec.model_validate({"model": {"config": config}, **fields})


def candidates(run: RunSpec) -> dict[str, int]:
    """Return the number of moments of each phase that are compared with each other."""
    structure = decide(run).structure
    low, axes = pass_of(structure), operations_of(structure.graph)[1]
    sizes = [size(key[0], key[1], axes) for key in low.sizes]
    variables = (ONE, *sorted({v for v, _ in sizes} - {ONE}))
    every = rows(low.moments, low.runs, axes, sizes, variables)
    of_phase: dict[str, dict[tuple[int, ...], None]] = {phase: {} for phase in PHASES}
    for row, moment in zip(every, low.moments, strict=True):
        of_phase[moment.phase][row] = None
    return {phase: len(without_midpoints(list(distinct))) for phase, distinct in of_phase.items()}


def test_experts_in_a_loop_add_no_candidates_for_the_peak() -> None:
    few, many = candidates(mixture(16)), candidates(mixture(64))
    assert all(many[phase] <= few[phase] for phase in PHASES)


def stored(recording: AllocationTrace) -> int:
    """Return the number of a recording's forward events in memory."""
    return sum({span.first: span.length for span in recording.spans_of(recording.forward)}.values())


def forward(recording: AllocationTrace) -> int:
    """Return the number of a recording's forward events."""
    return len([*recording.unrolled(recording.forward)])


def test_experts_that_keep_nothing_are_recorded_once() -> None:
    few, many = (recording_of(decide(mixture(n)).structure, later=False) for n in (8, 64))
    assert stored(few) == stored(many)
    assert forward(many) > 4 * forward(few)


def test_layers_left_out_are_recorded_once() -> None:
    config = {"model_type": "llama", **TINY["llama"]}
    runs = (RunSpec.model_validate({"model": {"config": {**config, "num_hidden_layers": n}}}) for n in (8, 80))
    few, many = (recording_of(decide(run).structure, later=False) for run in runs)
    assert stored(few) == stored(many)
    assert forward(many) > 8 * forward(few)


def test_moments_of_differing_layers_share_live_tensors() -> None:
    """Counts of live tensors in other layers are stored once for many moments."""
    held: list[int] = []
    for n in (24, 48):
        kinds = ["full_attention" if i * i % 7 < 3 else "sliding_attention" for i in range(n)]
        config = {"model_type": "gemma3_text", **TINY["gemma3_text"], "num_hidden_layers": n, "layer_types": kinds}
        low = pass_of(decide(RunSpec.model_validate({"model": {"config": config}})).structure)
        shared = {id(c): len(c) for m in low.moments for c in (m.shared, m.events, *m.per_copy.values())}
        held.append(sum(shared.values()))
    assert held[1] < 3 * held[0]


GEMMA = {"model_type": "gemma3_text", **TINY["gemma3_text"]}
IN_NO_ORDER = ["full_attention" if i * i * i % 11 < 5 else "sliding_attention" for i in range(900)]
MODULES = {"model_type": "qwen3_moe", **TINY["qwen3_moe"], "experts_implementation": "modules"}
TOO_MANY: dict[str, tuple[dict[str, Any], str, str]] = {
    "layers": ({"num_hidden_layers": 1_001}, "num_hidden_layers", "from 1 to 1,000, not 1001"),
    "layers that differ": (
        {"num_hidden_layers": 900, "layer_types": [kind for kind in IN_NO_ORDER for _ in range(2)][:900]},
        "num_hidden_layers",
        "of the 900 layers repeat no pattern; at most 192",
    ),
    "experts in a layer": ({**MODULES, "num_experts": 513}, "num_experts", "513 in each of 2 layers"),
    "experts in all": ({**MODULES, "num_experts": 500, "num_hidden_layers": 40}, "num_experts", "16,384 in all"),
    "decoder layers": (
        {"model_type": "t5", **SMALL["t5"], "num_decoder_layers": 2_000},
        "num_decoder_layers",
        "from 1 to 1,000",
    ),
}


@pytest.mark.parametrize(("config", "field", "text"), TOO_MANY.values(), ids=TOO_MANY)
def test_more_than_can_be_estimated_one_by_one_is_refused_by_name(
    config: dict[str, Any], field: str, text: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        estimate(RunSpec.model_validate({"model": {"config": {**GEMMA, **config}}, "batch": {"sequence": 64}}))
    assert refused.value.field == field
    assert text in str(refused.value)


# Loops, replayed


CALLS = st.lists(st.tuples(st.booleans(), st.integers(1, 24 * MIB)), max_size=40)


def run_calls(allocator: PythonAllocator, calls: list[tuple[bool, int]]) -> list[AllocatorBlock]:
    """Allocate, or free one of the remaining blocks."""
    alive: list[AllocatorBlock] = []
    for frees, asked in calls:
        if frees and alive:
            allocator.free(alive.pop(asked % len(alive)))
        else:
            alive.append(allocator.alloc(asked))
    return alive


def loop_of(calls: list[tuple[bool, int]]) -> tuple[tuple[Event, ...], list[int]]:
    """Draw the events of a loop body that frees all it allocates, and its sizes."""
    events: list[Event] = []
    alive: list[int] = []
    bytes_: list[int] = []
    for frees, asked in calls:
        if frees and alive:
            events.append((alive.pop(asked % len(alive)), FREED))
        else:
            alive.append(len(bytes_))
            events.append((alive[-1], len(bytes_)))
            bytes_.append(asked)
    return (*events, *((number, FREED) for number in alive)), bytes_


@laws
@given(CALLS, CALLS, st.integers(2, 6), st.booleans(), st.none() | st.integers(100, 600))
def test_a_loop_leaves_the_allocator_as_all_its_iterations_would(
    before: list[tuple[bool, int]], body: list[tuple[bool, int]], times: int, expandable: bool, mib: int | None
) -> None:
    events, bytes_ = loop_of(body)
    streams = [0] * len(bytes_)
    loop, written_out = Events((), streams), Events((event for _ in range(times) for event in events), streams)
    loop.append_span(EventSpan(loop.store(*zip(*events, strict=True)) if events else 0, len(events), times=times))
    found: list[Any] = []
    for every in (loop, written_out):
        allocator = PythonAllocator(expandable, mib and mib * MIB)
        try:
            run_calls(allocator, before)
            allocator.replay(every, bytes_, allocator.live_blocks(len(bytes_)))
            found.append((allocator.allocated, allocator.reserved, allocator.peak_reserved))
            found[-1] += tuple((block.start, block.size) for block in run_calls(allocator, before))
        except OutOfMemoryError:
            found.append((allocator.allocated, allocator.peak_reserved))
    assert found[0] == found[1]


# Moments that cannot be the peak

VARIABLES = (ONE, Variable(("b", "s")), Variable(("b", "s"), 3, 2), Variable(("b", "s"), 1, 4, 3), Variable(("x",)))
ROW = st.tuples(*[st.integers(-3, 12)] * len(VARIABLES))


@st.composite
def moments(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Draw moments, some in loops whose iterations each add the same, which may be nothing."""
    out: list[tuple[int, ...]] = []
    for body in draw(st.lists(st.lists(ROW, min_size=1, max_size=3), max_size=5)):
        times, more = draw(st.sampled_from([1, 1, 2, 5])), draw(ROW | st.just((0,) * len(VARIABLES)))
        out += [tuple(n + i * m for n, m in zip(row, more, strict=True)) for i in range(times) for row in body]
    return out or [draw(ROW)]


def compared_with_all(candidates: list[tuple[int, ...]]) -> list[int]:
    """Return the moments that no earlier one, in the order of `prune`, dominates."""
    products = chain(VARIABLES)
    on_chain = [v.axes in products and v.per == 1 for v in VARIABLES]

    def sums(row: tuple[int, ...]) -> list[int]:
        linear = [0] * len(products)
        for v, inside, n in zip(VARIABLES, on_chain, row, strict=True):
            if inside:
                linear[products.index(v.axes)] += n * v.factor * (v.itemsize or 1)
        return [*accumulate(linear)]

    def at_least(large: tuple[int, ...], small: tuple[int, ...]) -> bool:
        of_both = list(zip(VARIABLES, on_chain, large, small, strict=True))
        slack = 511 * sum(max(0, n - m) for v, inside, m, n in of_both if inside and v.itemsize)
        apart = all(m >= n for _, inside, m, n in of_both if not inside)
        return apart and all(map(ge, sums(large), sums(small))) and sums(large)[-1] >= sums(small)[-1] + slack

    in_order = sorted(dict.fromkeys(candidates), key=sums, reverse=True)
    return [
        candidates.index(row)
        for i, row in enumerate(in_order)
        if not any(at_least(other, row) for other in in_order[:i])
    ]


@laws
@given(st.lists(ROW, min_size=1, max_size=12, unique=True))
def test_pruning_equals_pairwise_comparison(candidates: list[tuple[int, ...]]) -> None:
    kept = [term.moment for term in prune(((row, i) for i, row in enumerate(candidates)), VARIABLES)]
    if len(without_midpoints(candidates)) == len(candidates):
        assert kept == compared_with_all(candidates)


@settings(laws, max_examples=examples(200))
@given(moments(), st.sampled_from([1, 2, 5, 2048]), st.integers(1, 4), st.integers(1, 999), st.integers(0, 9))
def test_pruning_keeps_the_first_of_the_largest_moments(
    candidates: list[tuple[int, ...]], at_once: int, b: int, s: int, x: int
) -> None:
    every = {i: candidates[i] for i in compared_with_all(candidates)}
    numbers = values(VARIABLES, {"b": b, "s": s, "x": x})
    totals = {i: sum(map(mul, row, numbers)) for i, row in every.items()}
    with patch.object(walk, "_AT_ONCE", at_once):
        terms: tuple[Term, ...] = prune(((row, i) for i, row in enumerate(candidates)), VARIABLES)
    most = max(totals.values())
    assert largest(terms, numbers) == (most, next(i for i, total in totals.items() if total == most))


class CountedRow(tuple[int, ...]):
    """A row that counts how many of them exist."""

    __slots__ = ()
    existing = 0

    def __init__(self, _: tuple[int, ...]) -> None:
        CountedRow.existing += 1

    def __del__(self) -> None:
        CountedRow.existing -= 1


def test_pruning_holds_few_of_the_moments_at_a_time() -> None:
    existing: list[int] = []

    def candidates() -> Iterator[tuple[tuple[int, ...], int]]:
        for i in range(100):
            yield CountedRow((i,)), i
            existing.append(CountedRow.existing)

    with patch.object(walk, "_AT_ONCE", 10):
        assert prune(candidates(), (ONE,)) == (Term((99,), 99),)
    assert max(existing) <= 1 + 10 + 10  # the one that is kept, those before and the next ones


class Long(Replay):
    """Allocations with a long replay: 20 GiB are reserved on a card with room."""

    is_long = True
    resident = load = 8 * GIB

    def __init__(self, gpu: GPU, tensors: int) -> None:
        self.gpu, self._tensors = gpu, tensors

    @property
    def peak(self) -> int:
        return self._tensors

    def reserved(self, capacity: int | None = None) -> int | None:
        assert capacity is None, "a full card is not replayed"
        return 20 * GIB

    def free_in_other_streams(self) -> int:
        return 10 * GIB


@pytest.mark.parametrize(
    ("card", "tensors", "answer"), [("3090", 10, "fits"), ("t4", 10, "tight"), ("t4", 15, "does not fit")]
)
def test_a_long_replay_runs_only_without_capacity_and_smaller_cards_are_tight(
    card: str, tensors: int, answer: str
) -> None:
    gpu = find_gpu(card)
    usage = Usage(Long(gpu, tensors * GIB))
    assert usage.answer == answer
    assert usage.reserved == (gpu.usable - run_overhead(gpu, (), None).context if answer == "tight" else 20 * GIB)


def test_adapters_on_thousands_of_experts_are_long_replays_unlike_dense_models() -> None:
    dense, mixture = (
        recording_of(decide(RunSpec(model=model, method="lora")).structure, later=False).length
        for model in ("qwen2-7b", "deepseek-moe-16b")
    )
    assert 5 * dense < LONG_PASS < mixture
