"""Models share what does not depend on them: a lowering between depths, resolved dtypes between equal layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from memplan import RunSpec
from memplan.catalogue import build
from memplan.catalogue.kernels.rewriting import checked
from memplan.core.arithmetic import ONE_RUN
from memplan.core.errors import InternalError
from memplan.core.ir import Op, Stack, Tensor
from memplan.engine import dtypes, lowered, record, step
from memplan.engine.events import FREED, packed
from memplan.engine.likeness import Likeness
from memplan.engine.lowered import Lowered
from memplan.engine.moments import Moment, PassMoments
from memplan.engine.record import AllocationTrace
from memplan.engine.repeats import RepeatingTape
from memplan.engine.walk import alive, bytes_at_each, counts_at_each, size
from memplan.program import graph
from memplan.program.axes import run_axes
from memplan.program.graph import operations_of
from memplan.program.inference.steps import steps_of
from memplan.program.training.passes import pass_of
from memplan.program.training.program import program
from memplan.program.training.replay import pass_of as recording_of
from memplan.resolve.decide import decide
from tests.encoders import SMALL
from tests.tiny import TINY

FAMILIES: dict[str, dict[str, Any]] = {**TINY, **SMALL}
SHARDED = {"world": 2, "dp": 2, "strategy": "fsdp2"}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("llama", {}),
    "checkpointed": ("llama", {"method": "lora", "kernels": {"checkpointing": "full"}}),
    "reentrant": ("qwen2", {"method": "qlora", "kernels": {"checkpointing": "full", "reentrant": True}}),
    "sharded": ("llama", {"method": "full", "parallelism": SHARDED}),
    "windows": ("gemma3_text", {"kernels": {"checkpointing": "none"}}),
    "mixed": ("jamba", {"method": "lora"}),
    "two stacks": ("t5", {}),
}
ALIKE = {
    **RUNS,
    "kept": ("llama", {"method": "lora", "kernels": {"checkpointing": "none"}}),
    "all kept": ("qwen2", {"precision": {"weights": "fp32", "autocast": True}, "kernels": {"checkpointing": "none"}}),
    "more and more sums": ("kimi_linear", {"kernels": {"checkpointing": "full"}, "method": "lora"}),
}
SUMS = {"attn_res_block_size": 2, "hidden_act": "situ", "activation_situ_beta": 4.0}


def deep(kind: str, layers: int, fields: dict[str, Any]) -> RunSpec:
    config = {"model_type": kind, **FAMILIES[kind], "num_hidden_layers": layers}
    config |= {"num_layers": layers, "num_decoder_layers": layers + 7} if kind == "t5" else {}
    config.pop("layer_types", None)
    if kind == "kimi_linear":
        kinds = ["linear_attention", "linear_attention", "full_attention"]
        config |= {**SUMS, "layer_types": [kinds[i % 3] for i in range(layers)], "mlp_layer_types": ["sparse"] * layers}
    return RunSpec.model_validate({"model": {"config": config}, **fields})


@pytest.mark.parametrize("case", RUNS)
def test_a_deep_model_has_the_moments_of_its_own_depth(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, fields = RUNS[case]
    structure = decide(deep(kind, 160, fields)).structure
    axes = operations_of(structure.graph)[1]
    shared = pass_of(structure)
    monkeypatch.setattr(lowered, "_FEW", 1_000)
    graph._lowered.cache_clear()  # pyright: ignore[reportPrivateUsage]
    own = pass_of(structure)
    assert shared is not own
    assert (shared.sizes, shared.runs) == (own.sizes, own.runs)
    for one, other in zip((*shared.moments, shared.kept), (*own.moments, own.kept), strict=True):
        assert (one.phase, one.where) == (other.phase, other.where)
        assert alive(one, shared.runs, axes) == alive(other, own.runs, axes)


def named(recording: AllocationTrace) -> list[tuple[int, object]]:
    """Return the events, each key as what it stands for."""
    keys = [*zip(recording.sizes, recording.streams, strict=True)]
    return [(number, key if key == FREED else keys[key]) for number, key in recording.unrolled()]


def shared_and_own(
    monkeypatch: pytest.MonkeyPatch, lowered_once: Callable[[], tuple[Lowered, AllocationTrace]]
) -> Iterator[tuple[Lowered, AllocationTrace]]:
    """Yield a lowering and a recording whose blocks repeat others, and those of a tape that runs each of its blocks."""
    caches = dtypes._resolved, step._lowered, step._inferred, record._recorded  # pyright: ignore[reportPrivateUsage]
    of_graphs = graph._lowered, graph._recorded, graph._inferred, graph._recorded_inference  # pyright: ignore[reportPrivateUsage]
    for runs_alike in (RepeatingTape._runs_alike, lambda tape, frame: False):  # pyright: ignore
        for cache in (*caches, *of_graphs):
            cache.cache_clear()
        monkeypatch.setattr(RepeatingTape, "_runs_alike", runs_alike)
        yield lowered_once()
        monkeypatch.setattr(Likeness, "of", lambda first, ops, inputs: None)


def assert_equal(one: tuple[Lowered, AllocationTrace], other: tuple[Lowered, AllocationTrace]) -> None:
    (shared, recorded), (own, alone) = one, other
    assert shared is not own
    assert recorded is not alone
    assert ([*shared.moments], shared[1:]) == ([*own.moments], own[1:])
    assert named(recorded) == named(alone)
    assert [number for number, _ in recorded.left] == [number for number, _ in alone.left]


@pytest.mark.parametrize("case", ALIKE)
def test_a_block_that_repeats_what_another_did_has_its_own_moments(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, fields = ALIKE[case]
    structure = decide(deep(kind, 19, fields)).structure
    assert_equal(*shared_and_own(monkeypatch, lambda: (pass_of(structure), recording_of(structure, later=False))))


@pytest.mark.parametrize("kind", ["llama", "jamba", "gemma3_text", "t5"])
def test_a_generating_block_that_repeats_another_has_its_own_moments(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in steps_of(decide(deep(kind, 19, {"task": "generate"}))):
        make = partial(lambda of: (graph.lower_inference(of), graph.recorded_inference(of)), each.graph)
        assert_equal(*shared_and_own(monkeypatch, make))
        monkeypatch.undo()


@pytest.mark.parametrize("case", RUNS)
def test_runs_that_differ_in_rank_or_checkpointing_share_their_operations(case: str) -> None:
    kind, fields = RUNS[case]
    own = decide(deep(kind, 6, fields)).structure.graph
    stack, axes = operations_of(own)
    assert (stack, axes) == graph._built(own)  # pyright: ignore[reportPrivateUsage] (as it is without sharing)
    other, others_axes = operations_of(own._replace(rank=own.rank + 8, checkpoint=not own.checkpoint, reentrant=False))
    assert others_axes == {**axes, "r": own.rank + 8}
    for run, others in zip(stack.runs, other.runs, strict=True):
        assert all(block.ops is same.ops for block, same in zip(run.blocks, others.blocks, strict=True))


@pytest.mark.parametrize(
    ("model", "shares"),
    [("qwen2-7b", True), ("gemma-3-4b", True), ("kimi-linear-48b-a3b", True), ("internlm2-20b", False)],
)
def test_the_first_and_the_last_decoding_pass_are_lowered_once(model: str, shares: bool) -> None:
    """Unless the prompt is cached as it is, which only the pass after it finds."""
    _, first, last = steps_of(decide(RunSpec(model=model, task="generate")))
    assert (first.graph == last.graph) == shares
    assert first.graph.inference is not None
    marked = first.graph._replace(inference=first.graph.inference._replace(first=True))
    same = graph._built(marked) == graph._built(last.graph)  # pyright: ignore[reportPrivateUsage]
    assert same == shares


@pytest.mark.parametrize("case", RUNS)
def test_a_deep_model_has_the_allocations_of_its_own_depth(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, fields = RUNS[case]
    structures = [decide(deep(kind, layers, fields)).structure for layers in (96, 144)]
    recording_of(structures[0], later=False)
    misses = record._recorded.cache_info().misses  # pyright: ignore[reportPrivateUsage]
    shared = recording_of(structures[1], later=False)
    assert record._recorded.cache_info().misses == misses  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(record, "_DIFFERENT", 1_000)
    graph._recorded.cache_clear()  # pyright: ignore[reportPrivateUsage]
    own = recording_of(structures[1], later=False)
    assert record._recorded.cache_info().misses > misses  # pyright: ignore[reportPrivateUsage]
    assert [*shared.unrolled()] == [*own.unrolled()]
    assert (shared.sizes, [*shared.streams], shared.left) == (own.sizes, [*own.streams], own.left)
    assert (shared.forward, shared.loss, shared.backward) == (own.forward, own.loss, own.backward)


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])  # values as wide as the keys, or not
def test_a_run_and_the_facts_of_its_model_need_one_stack(kind: str) -> None:
    asked = deep(kind, 11, {"method": "lora"})
    misses = build.cache_info().misses
    decide(asked)
    assert build.cache_info().misses == misses + 1


@pytest.mark.parametrize("method", ["full", "lora", "dora", "lokr"])
def test_models_that_differ_in_sizes_share_operations_unless_these_depend_on_sizes(method: str) -> None:
    small = {"model_type": "llama", **TINY["llama"]}
    large = {**small, "hidden_size": 2 * small["hidden_size"], "intermediate_size": 3 * small["intermediate_size"]}
    graphs = [decide(RunSpec.model_validate(run_of(config, method))).structure.graph for config in (small, large)]
    assert len({id(build(graph.model, graph.wiring)) for graph in graphs}) == 1
    (stack, axes), (other, other_axes) = map(operations_of, graphs)
    assert (stack is other) == (method != "lokr")
    assert (2 * axes["h"], 3 * axes["f"]) == (other_axes["h"], other_axes["f"])
    tied = {**small, "tie_word_embeddings": not small.get("tie_word_embeddings", False)}
    assert operations_of(decide(RunSpec.model_validate(run_of(tied, method))).structure.graph)[0] != stack


def run_of(config: dict[str, Any], method: str) -> dict[str, Any]:
    return {"model": {"config": config}, "method": method}


def test_models_that_differ_in_depth_are_lowered_once() -> None:
    runs = [decide(deep("llama", layers, {})).structure for layers in (20, 30)]
    pass_of(runs[0])
    misses = step._lowered.cache_info().misses  # pyright: ignore[reportPrivateUsage] (that it is shared is the point)
    few, many = map(pass_of, runs)
    assert step._lowered.cache_info().misses == misses  # pyright: ignore[reportPrivateUsage]
    assert few.sizes is many.sizes
    for low, last in ((few, 19), (many, 29)):
        layers = {m.where.split(".")[2] for m in low.moments if m.where.startswith("model.layers.")}
        assert layers == {"0", "1", str(last)} or layers == {"0", str(last)}


def test_moments_walked_in_order_are_those_looked_up_one_by_one() -> None:
    decided = decide(deep("gemma3_text", 14, {"kernels": {"checkpointing": "none"}}))
    p, low = program(decided.structure), pass_of(decided.structure)
    axes = {**operations_of(decided.structure.graph)[1], **run_axes(p, 3, 70, True, True, ONE_RUN)}
    sizes = [size(key[0], key[1], axes)[1] for key in low.sizes]
    live = [alive(moment, low.runs, axes) for moment in low.moments]
    totals = [sum(n * sizes[key] for key, n in counts.items()) for counts in live]
    assert [*bytes_at_each(low.moments, low.runs, axes, sizes)] == totals
    assert [*bytes_at_each(reversed(low.moments), low.runs, axes, sizes)] == totals[::-1]
    for counts, total in zip(counts_at_each(low.moments, low.runs, axes, sizes), totals, strict=True):
        assert sum(bytes_ * n for bytes_, n in counts.items()) == total


def test_moments_in_columns_are_a_sequence() -> None:
    events = [0, ~0]
    each = [Moment("forward", f"layer.op{i}", {i: 1}, packed(events), i, {}) for i in range(3)]
    moments = PassMoments(events)
    for phase, where, shared, _, at, per_copy in each:
        layer, dot, name = where.partition(".")
        moments.extend((phase,), (layer + dot,), (name,), (shared,), (at,), (per_copy,))
    moments = moments.packed()
    assert [*moments] == each
    assert (len(moments), moments[1], moments[-1], [*moments[1:]]) == (3, each[1], each[2], each[1:])
    assert [m.where for m in moments.renamed(str.upper)] == ["LAYER.OP0", "LAYER.OP1", "LAYER.OP2"]
    assert (len(PassMoments(())), [*PassMoments(())]) == (0, [])


def test_a_mistake_in_the_catalogue_is_named_for_every_model() -> None:
    bad = Stack((Op("first", (), (Tensor("embeds"),)),), (), (Op("last", ("missing",)),))
    for model_type in ("llama", "mistral"):
        with pytest.raises(InternalError, match=f"in {model_type} after, last uses missing, which nothing writes"):
            checked(bad, model_type)
