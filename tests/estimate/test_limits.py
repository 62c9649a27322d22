"""Every number of a run, at its limits, gives an answer or an error line; closed forms equal the loops they replace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memplan import Estimate, MemplanError, RunSpec, estimate
from memplan.catalogue.inference.quantized_caches import CacheQuantization
from memplan.catalogue.parallelism import pipeline
from memplan.engine import native
from memplan.engine.allocator import AllocatorBlock, PythonAllocator
from memplan.estimate import training
from memplan.models.cards import find_model
from memplan.program.inference import replay as replays
from memplan.program.serving.layer_ranges import by_card
from memplan.program.serving.sglang import prefill_graphs
from memplan.program.sharding import zero
from memplan.program.training import replay as segments
from memplan.resolve.assisted import MOST_PROPOSED
from memplan.resolve.caches import WAITING_PARTS, cache_storage
from memplan.resolve.refusals.side_tasks import KEPT_BATCHES
from memplan.spec.generation import CacheConfig, Generation
from memplan.spec.run import Batch
from tests.sampling import examples
from tests.tiny import TINY

MODEL: Any = {"config": {"model_type": "llama", **TINY["llama"]}}
A_CARD = {"gpu": "3090"}
GPUS, MOST = 2**20, 2**40

laws = settings(max_examples=examples(40), deadline=None, suppress_health_check=list(HealthCheck))


# --- limits of every number of a run


class Number(NamedTuple):
    """A number field of a run, with its path and its limits in the schema."""

    path: tuple[str, ...]
    least: float | None
    most: float | None
    whole: bool

    @property
    def values(self) -> list[Any]:
        """Return its limits, the neighbours of the smallest value, and some values between."""
        if not self.whole:
            return [n for n in (self.least, 0.001, 0.5, 1.0, self.most) if n is not None]
        assert self.least is not None
        assert self.most is not None
        low, high = int(self.least), int(self.most)
        return [low, low + 1, 1000, 2**16, high]


def numbers(schema: Mapping[str, Any], node: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[Number]:
    """Yield the number fields at and below a node of a run's JSON Schema."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    for name, inner in node.get("properties", {}).items():
        yield from numbers(schema, inner, (*path, name))
    for inner in (*node.get("anyOf", ()), *node.get("allOf", ()), *node.get("prefixItems", ()), node.get("items")):
        if inner:
            yield from numbers(schema, inner, path)
    if node.get("type") in ("integer", "number") and "enum" not in node and "const" not in node:
        least = node.get("minimum", node.get("exclusiveMinimum"))
        yield Number(path, least, node.get("maximum", node.get("exclusiveMaximum")), node["type"] == "integer")


SCHEMA = RunSpec.model_json_schema()
NUMBERS = list(dict.fromkeys(numbers(SCHEMA, SCHEMA)))


def test_every_number_has_a_minimum_and_every_integer_a_maximum() -> None:
    assert len(NUMBERS) > 60
    assert {n.path for n in NUMBERS if n.least is None} == set()
    assert {n.path for n in NUMBERS if n.whole and n.most is None} == set()


# Runs, each of which uses some of the numbers.
GENERATES = {"task": "generate", "batch": {"sequence": 64, "new_tokens": 16}}
RUNS: list[dict[str, Any]] = [
    {"method": "lora", **A_CARD},
    {"also": {"evaluation": {"micro": 2, "kept_batches": 3, "accumulation": 2}, "saving": {}}},
    *({"parallelism": {"world": 4, "dp": 4, "strategy": s}} for s in ("zero1", "zero2", "zero3", "fsdp", "fsdp2")),
    {"parallelism": {"world": 2, "tp": 2}},
    *(
        {
            "profile": "torchtitan",
            "parallelism": {"world": 2, "pp": 2, "schedule": schedule},
            "batch": {"sequence": 64, "accumulation": 2},
        }
        for schedule in ("1f1b", "gpipe")
    ),
    {**GENERATES, **A_CARD, "parallelism": {"world": 2, "device_map": "auto"}},
    {**GENERATES, "generation": {"cache_implementation": "quantized", "prefill_chunk_size": 32}},
    {**GENERATES, "generation": {"assistant_model": MODEL, "num_assistant_tokens_schedule": "heuristic"}},
    *({**GENERATES, **A_CARD, "profile": engine} for engine in ("vllm", "sglang", "tgi", "llama.cpp")),
]
# Fields changed along with another one, so that runs are not refused only for the product of degrees.
FOLLOWS = {"dp": "world", "tp": "world", "pp": "world", "world": "dp"}


def changed(run: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """Return the run with another value of a number."""
    name, *rest = path
    inner = run.get(name, {})
    inner = {"kind": inner} if isinstance(inner, str) else inner
    made = {**run, name: changed(inner, tuple(rest), value) if rest else value}
    if not rest and name in FOLLOWS and "world" in made:
        made[FOLLOWS[name]] = value
    return made


def check(answer: Estimate) -> None:
    """Check that everything in an answer can be computed and nothing is negative."""
    bytes_, band = answer.bytes, answer.band
    assert 0 < bytes_.allocated <= bytes_.reserved <= bytes_.used
    assert 0 <= band.low <= band.high
    assert all(line.bytes >= 0 and line.count > 0 for line in answer.ledger)
    assert sum(line.bytes for line in answer.ledger) == bytes_.allocated
    assert all(phase.peak >= 0 for phase in (*answer.phases, *answer.timeline))
    assert answer.host_bytes >= 0
    assert all(rank.bytes.used > 0 for rank in answer.ranks)


MOST_ALLOCATIONS = 500_000  # per answer: about a second


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count replayed allocations, and fail a test that replays too many."""
    count, alloc = [0], PythonAllocator.alloc

    def counted(self: PythonAllocator, size: int, stream: int = 0) -> AllocatorBlock:
        count[0] += 1
        assert count[0] < MOST_ALLOCATIONS
        return alloc(self, size, stream)

    monkeypatch.setattr(PythonAllocator, "alloc", counted)
    monkeypatch.setattr(native, "library", lambda: None)
    return count


@pytest.fixture
def few_microbatches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "GPIPE_EVENTS", 20_000)
    monkeypatch.setattr(segments, "MICROBATCHES", 2_000)


@laws
@given(st.data())
@pytest.mark.usefixtures("few_microbatches")
def test_a_number_at_its_limits_gets_an_answer_or_a_line(allocations: list[int], data: st.DataObject) -> None:
    run = data.draw(st.sampled_from(RUNS))
    parts = ("batch", *run) if "profile" not in run or run["profile"] == "torchtitan" else ("batch", "serving")
    number = data.draw(st.sampled_from([n for n in NUMBERS if n.path[0] in parts]))
    value = data.draw(st.sampled_from(number.values))
    allocations[0] = 0
    try:
        answer = estimate(RunSpec(**changed({"model": MODEL, "batch": {"sequence": 64}, **run}, number.path, value)))
    except MemplanError:
        return
    check(answer)


# --- limits in messages


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"parallelism": {"world": GPUS + 1}}, "must be at most 1,048,576"),
        ({"also": {"evaluation": {"kept_batches": KEPT_BATCHES + 1}}}, "memplan counts at most 32,768"),
        (
            {"also": {"evaluation": {"kept_batches": MOST, "accumulation": KEPT_BATCHES + 1}}},
            "also.evaluation.accumulation: keeps the logits of 32,769 batches",
        ),
        (
            {
                **GENERATES,
                "batch": {"sequence": 64, "new_tokens": MOST},
                "generation": {"assistant_model": MODEL, "num_assistant_tokens": MOST_PROPOSED + 1},
            },
            "generation.num_assistant_tokens: up to 16,385 tokens would be proposed",
        ),
        (
            {
                **GENERATES,
                "batch": {"sequence": 64, "new_tokens": 2**30},
                "generation": {"assistant_model": MODEL, "num_assistant_tokens_schedule": "heuristic"},
            },
            "use constant",
        ),
        (
            {
                **GENERATES,
                "batch": {"sequence": MOST, "new_tokens": 1},
                "generation": {
                    "cache_implementation": "quantized",
                    "prefill_chunk_size": 1,
                    "cache_config": {"residual_length": WAITING_PARTS + 1},
                },
            },
            "generation.prefill_chunk_size: 1 takes 4,097 passes",
        ),
        (
            {"parallelism": {"world": 2, "pp": 2, "schedule": "device_map", "virtual_stages": 2}},
            "runs one chunk of layers on each GPU, not 2",
        ),
        ({**GENERATES, "profile": "vllm", "serving": {"memory_utilization": 1e-7}}, "must be at least 0.001"),
        (
            {**GENERATES, **A_CARD, "profile": "sglang", "serving": {"max_num_batched_tokens": MOST}},
            "serving.max_num_batched_tokens: a step of 1,099,511,627,776 tokens leaves SGLang none",
        ),
        (
            {**GENERATES, "profile": "llama.cpp", "method": {"quantization": {"format": "nf4", "block_size": -1}}},
            "method.quantization.block_size: nf4 has no blocks of -1",
        ),
    ],
)
def test_a_number_beyond_a_limit_is_refused_in_a_line(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(MemplanError, match=says):
        estimate(RunSpec(**{"model": MODEL, "batch": {"sequence": 64}, **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {"also": {"evaluation": {"kept_batches": KEPT_BATCHES, "preprocess": "argmax"}}},
        {"also": {"evaluation": {"kept_batches": MOST, "accumulation": 2}}},
        {"also": {"evaluation": {"kept_batches": MOST, "batch_metrics": True}}},
        {**GENERATES, "generation": {"assistant_model": MODEL, "num_assistant_tokens": MOST}},
        {
            **GENERATES,
            "batch": {"sequence": MOST, "new_tokens": MOST},
            "generation": {"cache_implementation": "quantized", "prefill_chunk_size": 2},
        },
        {
            "profile": "torchtitan",
            "parallelism": {"world": 2, "pp": 2, "schedule": "gpipe"},
            "batch": {"sequence": 64, "accumulation": MOST},
        },
        {
            "profile": "torchtitan",
            "parallelism": {"world": 2, "pp": 2, "schedule": "1f1b"},
            "batch": {"sequence": 64, "accumulation": MOST},
        },
        {"parallelism": {"world": GPUS, "dp": GPUS, "strategy": "zero1"}},
        {**GENERATES, "parallelism": {"world": GPUS, "device_map": "auto"}},
        {**GENERATES, **A_CARD, "profile": "llama.cpp", "parallelism": {"world": GPUS, "pp": GPUS}},
        {**GENERATES, **A_CARD, "profile": "vllm", "serving": {"max_num_batched_tokens": MOST}},
    ],
)
@pytest.mark.usefixtures("few_microbatches", "allocations")
def test_a_number_at_a_limit_is_answered(fields: dict[str, Any]) -> None:
    check(estimate(RunSpec(**{"model": MODEL, "batch": {"sequence": 64}, **fields})))


# --- closed forms, next to the loops they replace


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "device_map"])
def test_distinct_passes_of_a_pipeline_have_the_moments_of_all(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> list[object]:
        steps = [
            (stages, stage, chunks, microbatches)
            for stages in (2, 3, 5)
            for stage in range(stages)
            for chunks in ((1, 2, 3) if schedule == "1f1b" else (1,))
            for microbatches in range(1, 32)
            if chunks == 1 or microbatches % max(1, microbatches // stages) == 0
        ]
        kinds = (pipeline.moments, pipeline.reductions)
        return [kind.__wrapped__(schedule, *step) for kind in kinds for step in steps]

    few = found()
    monkeypatch.setattr(pipeline, "distinct_passes", pipeline.passes)
    assert few == found()


def test_the_number_of_microbatches_does_not_add_distinct_passes() -> None:
    for schedule in ("1f1b", "gpipe", "device_map"):
        for chunks in (1, 2) if schedule == "1f1b" else (1,):
            few, many = ([*pipeline.distinct_passes(schedule, 4, 1, chunks, n)] for n in (64, MOST))
            assert len(few) == len(many)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_reserved_of_a_long_pipeline_step_equals_its_extrapolation_from_shorter_ones(
    schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunSpec(
        model="llama-3.2-1b",
        profile="torchtitan",
        batch={"sequence": 2048, "accumulation": 48},
        parallelism={"world": 2, "pp": 2, "schedule": schedule},
    )
    every = estimate(run).bytes.reserved
    monkeypatch.setattr(segments, "GPIPE_EVENTS", 70_000)
    monkeypatch.setattr(segments, "MICROBATCHES", 32)
    training.reserved.cache_clear()
    assert estimate(run).bytes.reserved == pytest.approx(every, rel=0.02)
    training.reserved.cache_clear()


sizes_of_weights = st.lists(st.integers(1, 300), min_size=1, max_size=8)


@laws
@given(sizes_of_weights, st.integers(1, 100), st.integers(1, 1000), st.booleans())
def test_a_bucket_is_copied_as_one_slice_after_another_fills_it(
    sizes: list[int], own: int, bucket: int, backward: bool
) -> None:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    weights = [*zip(starts, sizes, strict=True)][:: -1 if backward else 1]
    slices: list[list[int]] = []
    for start, numbers in weights:
        for rank in range(start // own, (start + numbers - 1) // own + 1):
            here = min(start + numbers, (rank + 1) * own) - max(start, rank * own)
            if slices and slices[-1][0] == rank:
                slices[-1][1] += here
            else:
                slices.append([rank, here])
    most = held = count = 0
    for _, numbers in slices:
        held, count = held + numbers, count + 1
        most = max(most, held if count > 1 else 0)
        if held > bucket:
            held = count = 0
    assert zero._copied(weights, own, bucket) == most


@laws
@given(sizes_of_weights, st.integers(1, 100))
def test_the_rank_that_owns_most_gradients_is_found_at_weight_boundaries(sizes: list[int], own: int) -> None:
    starts = {i: sum(sizes[:i]) for i in range(len(sizes))}
    owned: dict[int, int] = {}
    for i, start in starts.items():
        for rank in range(start // own, (start + sizes[i] - 1) // own + 1):
            owned[rank] = owned.get(rank, 0) + sizes[i]
    assert zero._most_owned(starts, sizes, own) == max(owned.values())


@laws
@given(st.sampled_from(["quanto", "fp8"]), st.integers(1, 40), st.integers(1, 100), st.integers(1, 100))
def test_a_quantised_cache_after_some_chunks_equals_feeding_them_one_by_one(
    backend: Any, residual: int, prompt: int, part: int
) -> None:
    how = CacheQuantization(backend, residual=residual)
    quantized = waiting = 0
    for i, past in enumerate(range(0, prompt, part)):
        assert how.quantized_of(i, part) == quantized
        quantized, waiting = how.after(quantized, waiting, min(part, prompt - past))
    assert quantized + waiting == prompt


def refused(run: Mapping[str, Any], new_tokens: int) -> str:
    """Return the first refusal of a quantised cache's groups as new tokens arrive, if any."""
    config = CacheConfig(backend="hqq", residual_length=run["residual"], q_group_size=run["group"], nbits=run["bits"])
    batch = Batch(sequence=run["sequence"], new_tokens=new_tokens)
    try:
        cache_storage(Generation(cache_implementation="quantized", cache_config=config), find_model("gpt2"), batch)
    except MemplanError as error:
        return str(error)
    return ""


@laws
@given(
    st.fixed_dictionaries(
        {
            "residual": st.integers(1, 12),
            "group": st.integers(1, 4096),
            "bits": st.sampled_from([1, 2, 4, 8]),
            "sequence": st.integers(1, 64),
        }
    )
)
def test_groups_that_come_out_even_twice_do_so_for_all_new_tokens(run: Mapping[str, Any]) -> None:
    one_more = [refused({**run, "sequence": run["sequence"] + i * run["residual"]}, 1) for i in range(8)]
    assert refused(run, 7 * run["residual"] + 1) == next(filter(None, one_more), "")


def test_sglang_records_as_many_steps_as_its_list_has() -> None:
    sizes = [
        *range(4, 33, 4),
        *range(48, 257, 16),
        *range(288, 513, 32),
        *range(576, 1025, 64),
        *range(1280, 4097, 256),
    ]
    sizes += range(4608, 9000, 512)
    for tokens in range(9000):
        assert prefill_graphs(tokens) == sum(size <= tokens for size in sizes)


@laws
@given(
    st.integers(1, 40),
    st.integers(0, 42),
    st.integers(1, 60),
    st.lists(st.sampled_from([0.0, 0.25, 1.0, 7.5]), max_size=4),
)
def test_a_card_of_llama_cpp_has_the_layers_of_its_proportion(
    layers: int, offloaded: int, cards: int, split: list[float]
) -> None:
    shares = split[:cards] if any(split[:cards]) else [1.0] * cards
    start, count = max(layers + 1 - offloaded, 0), min(offloaded, layers + 1)
    ends = [sum(shares[: card + 1]) / sum(shares) for card in range(len(shares))]
    of = [
        next(card for card, end in enumerate(ends) if round(end, 9) > round((i - start) / count, 9))
        for i in range(start, layers + 1)
    ]
    found = by_card(layers, offloaded, cards, split[:cards] if any(split[:cards]) else ())
    assert [card.number for card in found for _ in range(card.layers + card.headed)] == of
    assert found[0].number == 0
    assert all(card.receives_hidden == any(other < card.number for other in of) for card in found)


def test_layers_on_many_cards_are_searched_only_on_cards_with_layers() -> None:
    assert len(by_card(32, 33, GPUS, ())) == 34


@laws
@given(st.data())
def test_tensors_at_the_start_of_a_pass_match_by_shape_and_size(data: st.DataObject) -> None:
    keys = st.tuples(st.sampled_from(["b kv", "b past", "b h"]), st.sampled_from(["fp16", "fp32"]))
    tensors = st.tuples(keys, st.integers(1, 3))
    left = data.draw(st.lists(tensors))
    wanted = data.draw(st.lists(tensors, max_size=len(left)))
    waiting, places = list(range(len(left))), list[int]()
    for key, bytes_ in wanted:
        alike = [i for i in waiting if replays._kind(left[i][0]) == replays._kind(key)]
        places.append(next((i for i in alike if left[i][1] == bytes_), (alike or waiting)[0]))
        waiting.remove(places[-1])

    def of(drawn: list[tuple[tuple[str, str], int]]) -> tuple[replays.Storages, tuple[int, ...]]:
        storages = replays.Storages([key for key, _ in drawn], [(i, i) for i in range(len(drawn))])
        return storages, tuple(bytes_ for _, bytes_ in drawn)

    assert replays._places(*of(left), *of(wanted)) == places


def test_gpus_with_only_equal_layers_are_answered_like_each_alone() -> None:
    config = {"model_type": "gemma2", **TINY["gemma2"], "num_hidden_layers": 12}
    fields: dict[str, Any] = {"model": {"config": config}, **GENERATES}
    ranks = estimate(RunSpec(**fields, parallelism={"world": 4, "device_map": "auto"})).ranks
    assert len({rank.peak.where for rank in ranks}) == 4
    for rank in ranks:
        alone = estimate(RunSpec(**fields, parallelism={"world": 4, "device_map": "auto", "stage": rank.stage}))
        assert (rank.bytes.allocated, rank.bytes.reserved, rank.bytes.used) == (
            alone.bytes.allocated,
            alone.bytes.reserved,
            alone.bytes.used,
        )
        assert rank.peak == alone.peak
