"""A run's pipeline: how its library divides the layers, what it refuses, and which ranks differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from memplan.catalogue.parallelism.pipeline import ENGINES, Engine, dealt, most_in_flight, split
from memplan.core.errors import SpecError
from memplan.core.ir import Op, Weight
from memplan.core.units import ITEMSIZE
from memplan.engine.walk import size
from memplan.program.graph import Graph, built, elements, first_alike, weights_of
from memplan.program.training.program import Pipe, Structure
from memplan.spec.parallelism import Parallelism

_AT_ONCE = 3  # chunks that torch 2.13 has unsharded: schedules.py _add_unshard_reshard max_active_stages


def piped(graph: Graph, p: Parallelism, profiles: str, microbatches: int) -> tuple[Graph, Pipe]:
    """A stage of the graph's pipeline, and how microbatches pass through. `profiles` is the row of
    `memplan.catalogue.parallelism.pipeline` that the profile has.

    Raises SpecError, naming every factor, for what is not run so.
    """
    if p.pp == 1:
        return graph, Pipe()
    row = ENGINES[_engine(p, profiles)]
    schedule = p.schedule or row.schedules[0]
    _check(p, row, schedule, microbatches)
    if row.moves:
        parts = _dealt(graph, p)
    else:
        ends = p.first_stage_layers, p.last_stage_layers, p.ends_as_layers
        parts = split(row, len(graph.model.layers), p.pp, p.virtual_stages, *ends)
    stages = len(parts) // p.virtual_stages
    if p.stage is not None and p.stage >= stages:
        raise SpecError(
            f"parallelism.stage: {row.title} deals layers to {stages} of pp {p.pp} GPUs; stages are 0 to {stages - 1}",
            "parallelism.stage",
        )
    if stages == 1:
        return graph, Pipe()
    degrees = graph.degrees._replace(pp=stages, stage=p.stage or 0, virtual_stages=p.virtual_stages, layers=parts)
    graph = graph._replace(degrees=degrees, keeps_sent=row.keeps, moves_sent=row.moves)
    return graph, Pipe(row.name, schedule, microbatches)


def _engine(p: Parallelism, profiles: str) -> str:
    """What runs the pipeline: where the profile has device_map and more is asked than that does, torch."""
    if profiles != "device_map" or p.schedule == "device_map":
        return profiles
    uneven = p.first_stage_layers or p.last_stage_layers or p.ends_as_layers is not None
    more = p.schedule or uneven or p.world != p.pp or p.virtual_stages > 1
    return "torch" if more else profiles


def _dealt(graph: Graph, p: Parallelism) -> tuple[int, ...]:
    """The layers that a device_map gives to each GPU; to as many as it gives any.

    Raises SpecError for what it cannot do, or memplan not yet.
    """
    field = "parallelism.schedule"
    if p.world != p.pp:
        raise SpecError(
            f"{field}: device_map is one process on pp {p.pp} GPUs, not a world of {p.world}; 1f1b is run by several",
            field,
        )
    if graph.model.tie_word_embeddings:
        raise SpecError(
            f"{field}: device_map has a tied head on the first GPU, with the embeddings, which is not supported yet; "
            "supported: 1f1b, gpipe",
            field,
        )
    stack, axes = built(graph)
    stored = graph.recipe.quantization
    if stored not in ("", "nf4", "fp4", "int8"):
        raise SpecError(f"{field}: device_map is not supported yet with {stored}; supported: nf4, fp4, int8", field)

    def bytes_of(ops: Iterable[Op]) -> dict[str, int]:
        found = {w.name: w for op in ops for w in op.weights}
        return {name: _loaded(w, graph, axes) for name, w in found.items()}

    inside = [bytes_of(block.ops) for run in stack.runs for _ in range(axes[run.times]) for block in run.blocks]
    before, after = bytes_of(stack.before), bytes_of((*stack.after, *stack.loss))
    leaf = max(n for ones in (before, after, *inside) for n in ones.values())
    ends = [n for name, n in after.items() if name not in before]
    found = dealt(sum(before.values()), [sum(ones.values()) for ones in inside], ends, leaf, p.pp, bool(stored))
    if not found.embeds_first or not found.ends_last:
        raise SpecError(
            f"parallelism.pp: device_map leaves one of {p.pp} GPUs without layers but with embeddings or the head, "
            "which is not supported yet",
            "parallelism.pp",
        )
    return found.layers


def _loaded(w: Weight, graph: Graph, axes: Mapping[str, int]) -> int:
    """Bytes of a weight as it is loaded; of a quantised one its numbers alone."""
    if w.group in ("adapter", "buffer"):
        return 0
    if w.stored:
        return size(w.stored[0].shape, w.stored[0].dtype, axes)[1]
    return elements(w, axes) * ITEMSIZE[graph.recipe.weights]


def _check(p: Parallelism, engine: Engine, schedule: str, microbatches: int) -> None:
    if schedule not in engine.schedules:
        raise SpecError(
            f"parallelism.schedule: {engine.title} has no {schedule}; it has {', '.join(engine.schedules)}",
            "parallelism.schedule",
        )
    if p.virtual_stages > 1 and not engine.interleaves:
        raise SpecError(
            f"parallelism.virtual_stages: {engine.title} runs one chunk of layers on each GPU, not {p.virtual_stages}; "
            "schedule 1f1b interleaves several",
            "parallelism.virtual_stages",
        )
    if p.strategy == "fsdp2" and p.dp * p.cp > 1 and not engine.buffers:
        raise SpecError(
            f"parallelism.strategy: {engine.title} do not run fsdp2 in pp {p.pp} stages; torch.distributed.pipelining "
            "does (profile torchtitan)",
            "parallelism.strategy",
        )
    if p.strategy == "fsdp2" and p.dp * p.cp > 1 and p.virtual_stages > _AT_ONCE:
        raise SpecError(
            f"parallelism.virtual_stages: {p.virtual_stages} are not supported yet with fsdp2, as torch gathers "
            f"{_AT_ONCE} chunks at once; supported: 1 to {_AT_ONCE}",
            "parallelism.virtual_stages",
        )
    if schedule == "gpipe" and p.virtual_stages > 1:
        raise SpecError(
            f"parallelism.virtual_stages: {p.virtual_stages} are not supported yet with gpipe; 1f1b interleaves them",
            "parallelism.virtual_stages",
        )
    few = f"batch.accumulation: a step of {microbatches} microbatches has fewer than pp {p.pp}"
    if p.virtual_stages > 1 and engine.even and microbatches % p.pp:
        raise SpecError(
            f"batch.accumulation: {microbatches} microbatches a step are no multiple of pp {p.pp}, which "
            f"virtual_stages {p.virtual_stages} takes with {engine.title}",
            "batch.accumulation",
        )
    if p.virtual_stages == 1 and schedule == "1f1b" and engine.fills and microbatches < p.pp:
        raise SpecError(
            f"{few}, which {engine.title} does not run as 1f1b; say as many, or schedule gpipe", "batch.accumulation"
        )
    rounds = max(1, microbatches // p.pp)
    if p.virtual_stages > 1 and microbatches % rounds:
        raise SpecError(
            f"batch.accumulation: {microbatches} microbatches a step do not divide into {rounds} equal rounds through "
            f"pp {p.pp} x virtual_stages {p.virtual_stages}",
            "batch.accumulation",
        )


def in_flight(structure: Structure) -> int:
    """How many microbatches are in flight on a rank, or passes of one through a chunk, at most."""
    d, pipe = structure.graph.degrees, structure.pipe
    return most_in_flight(pipe.schedule, d.pp, d.stage, d.virtual_stages, pipe.microbatches) if pipe.engine else 1


def one_process(structure: Structure) -> bool:
    """Whether one process has all stages, each on a GPU of its own."""
    return bool(structure.pipe.engine) and ENGINES[structure.pipe.engine].moves


def idle(structure: Structure) -> float:
    """How long a rank waits while a pipeline fills and drains, as a share of what it computes.

    Source: Narayanan et al. 2021 (arXiv:2104.04473), 2.2.
    """
    d, m = structure.graph.degrees, structure.pipe.microbatches
    if one_process(structure):
        return d.pp - 1
    return (d.pp - 1) / (d.virtual_stages * m)


def layers_of(structure: Structure) -> int:
    """How many of the model's layers a rank has."""
    d = structure.graph.degrees
    return sum(d.layers[d.stage :: d.pp])


def parameters_of(structure: Structure) -> int:
    """How many of the model's parameters a rank has, adapters not counted."""
    _, axes = built(structure.graph)
    own = (pair for pair in weights_of(structure.graph) if pair[0].group not in ("adapter", "buffer"))
    return sum(elements(w, axes) * n for w, n, _ in own)


def stage_of(structure: Structure, stage: int) -> Structure:
    """The same run on the ranks of another stage."""
    graph = structure.graph
    return structure._replace(graph=graph._replace(degrees=graph.degrees._replace(stage=stage)))


def every_stage(structure: Structure) -> Iterator[Structure]:
    """The run on each stage of its pipeline: the ranks that differ."""
    for stage in range(structure.graph.degrees.pp):
        yield stage_of(structure, stage)


def may_be_worst(structure: Structure) -> Iterator[Structure]:
    """The stages of which one holds most: of those that are alike, the first, which has most in flight."""
    seen: set[object] = set()
    for one in every_stage(structure):
        d = one.graph.degrees
        ends = d.stage in (0, d.pp - 1)
        alike = d.stage if ends or d.virtual_stages > 1 else first_alike(one.graph).degrees.stage
        if d.virtual_stages > 1 and not ends:
            alike = d.layers[d.stage :: d.pp]
        if alike not in seen:
            seen.add(alike)
            yield one
