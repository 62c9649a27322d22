"""A run's pipeline: how its library splits the layers into stages, what it rejects, and which ranks differ."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from memplan.catalogue.parallelism.pipeline import ENGINES, PipelineEngine, most_in_flight
from memplan.catalogue.parallelism.pipeline_stages import divide_by_device_map, split
from memplan.core.errors import refused
from memplan.core.ir import Op, Weight
from memplan.core.units import ITEMSIZE
from memplan.engine.walk import size
from memplan.program.graph import Graph, first_equal_stage, operations_of, weights_of
from memplan.program.structure import Pipe, Structure
from memplan.program.weight_sizes import elements
from memplan.spec.parallelism import Parallelism

_MAX_UNSHARDED = 3  # chunks that torch 2.13 gathers at once: schedules.py _add_unshard_reshard max_active_stages


def pipeline_stage(graph: Graph, p: Parallelism, profiles: str, microbatches: int) -> tuple[Graph, Pipe]:
    """Return the graph of the run's pipeline stage, and how microbatches pass through the pipeline.

    `profiles` names the profile's engine in `memplan.catalogue.parallelism.pipeline`. Raises SpecError for a pipeline
    that the engine does not run.
    """
    row = ENGINES[_engine(p, profiles)]
    schedule = p.schedule or row.schedules[0]
    _check(p, row, schedule, microbatches)
    if row.moves_tensors:
        parts = _device_map_layers(graph, p)
    else:
        ends = p.first_stage_layers, p.last_stage_layers, p.ends_as_layers
        parts = split(row, len(graph.model.layers), p.pp, p.virtual_stages, *ends)
    stages = len(parts) // p.virtual_stages
    if p.stage is not None and p.stage >= stages:
        raise refused(
            "parallelism.stage", f"{row.title} puts layers on {stages} of pp {p.pp} GPUs; stages are 0 to {stages - 1}"
        )
    if stages == 1:
        return graph, Pipe()
    degrees = graph.degrees._replace(pp=stages, stage=p.stage or 0, virtual_stages=p.virtual_stages, layers=parts)
    graph = graph._replace(degrees=degrees, keeps_sent=row.keeps, moves_sent=row.moves_tensors)
    return graph, Pipe(row.name, schedule, microbatches)


def _engine(p: Parallelism, profiles: str) -> str:
    """Return the engine that runs the pipeline: torch if the profile has device_map and the run asks for more."""
    if profiles != "device_map" or p.schedule == "device_map":
        return profiles
    uneven = p.first_stage_layers or p.last_stage_layers or p.ends_as_layers is not None
    more = p.schedule or uneven or p.world != p.pp or p.virtual_stages > 1
    return "torch" if more else profiles


def _device_map_layers(graph: Graph, p: Parallelism) -> tuple[int, ...]:
    """Return the number of layers that device_map puts on each GPU, without GPUs that get none.

    Raises SpecError for what device_map cannot do, or memplan does not support yet.
    """
    field = "parallelism.schedule"
    if p.world != p.pp:
        raise refused(
            field, f"device_map is one process on pp {p.pp} GPUs, not a world of {p.world}; use schedule 1f1b"
        )
    if graph.model.tie_word_embeddings:
        raise refused(
            field,
            "device_map puts a tied head on the first GPU, with the embeddings, which is not supported yet; "
            "supported: 1f1b, gpipe",
        )
    stack, axes = operations_of(graph)
    stored = graph.recipe.quantization
    if stored not in ("", "nf4", "fp4", "int8"):
        raise refused(field, f"device_map is not supported yet with {stored}; supported: nf4, fp4, int8")

    def bytes_of(ops: Iterable[Op]) -> dict[str, int]:
        weights = {w.name: w for op in ops for w in op.weights}
        return {name: _loaded_bytes(w, graph, axes) for name, w in weights.items()}

    layers = [bytes_of(block.ops) for run in stack.runs for _ in range(axes[run.times]) for block in run.blocks]
    before, after = bytes_of(stack.before), bytes_of((*stack.after, *stack.loss))
    largest = max(n for weights in (before, after, *layers) for n in weights.values())
    ends = [n for name, n in after.items() if name not in before]
    by_gpu = divide_by_device_map(
        sum(before.values()), [sum(layer.values()) for layer in layers], ends, largest, p.pp, bool(stored)
    )
    if not by_gpu.embeds_first or not by_gpu.ends_last:
        raise refused(
            "parallelism.pp",
            f"device_map leaves one of {p.pp} GPUs without layers but with embeddings or the head, "
            "which is not supported yet",
        )
    return by_gpu.layers


def _loaded_bytes(w: Weight, graph: Graph, axes: Mapping[str, int]) -> int:
    """Return the bytes of a weight as it is loaded; for a quantised weight, without its scales."""
    if w.group in ("adapter", "buffer"):
        return 0
    if w.stored:
        return size(w.stored[0].shape, w.stored[0].dtype, axes)[1]
    return elements(w, axes) * ITEMSIZE[graph.recipe.weights]


def _check(p: Parallelism, engine: PipelineEngine, schedule: str, microbatches: int) -> None:
    if schedule not in engine.schedules:
        raise refused("parallelism.schedule", f"{engine.title} has no {schedule}; it has {', '.join(engine.schedules)}")
    if p.virtual_stages > 1 and not engine.interleaves:
        raise refused(
            "parallelism.virtual_stages",
            f"{engine.title} runs one chunk of layers on each GPU, not {p.virtual_stages}; "
            "schedule 1f1b interleaves several",
        )
    if p.strategy == "fsdp2" and p.dp * p.cp > 1 and not engine.buffers:
        raise refused(
            "parallelism.strategy",
            f"{engine.title} do not run fsdp2 in pp {p.pp} stages; torch.distributed.pipelining "
            "does (profile torchtitan)",
        )
    if p.strategy == "fsdp2" and p.dp * p.cp > 1 and p.virtual_stages > _MAX_UNSHARDED:
        raise refused(
            "parallelism.virtual_stages",
            f"{p.virtual_stages} are not supported yet with fsdp2, as torch gathers "
            f"{_MAX_UNSHARDED} chunks at once; supported: 1 to {_MAX_UNSHARDED}",
        )
    if schedule == "gpipe" and p.virtual_stages > 1:
        raise refused(
            "parallelism.virtual_stages", f"{p.virtual_stages} are not supported yet with gpipe; 1f1b interleaves them"
        )
    needs_full = engine.needs_full_pipeline if p.virtual_stages == 1 else engine.needs_equal_stages
    if schedule == "1f1b" and needs_full and microbatches < p.pp:
        other = ", or use schedule gpipe" if "gpipe" in engine.schedules else ""
        raise refused(
            "batch.accumulation",
            f"a step of {microbatches} microbatches has fewer than pp {p.pp}, which {engine.title} does not run "
            f"as 1f1b; accumulate at least {p.pp}{other}",
        )
    rounds = max(1, microbatches // p.pp)
    if p.virtual_stages > 1 and microbatches % rounds:
        raise refused(
            "batch.accumulation",
            f"{microbatches} microbatches a step do not divide into {rounds} equal rounds through "
            f"pp {p.pp} x virtual_stages {p.virtual_stages}",
        )


def in_flight(structure: Structure) -> int:
    """Return the most microbatches in flight on a rank; with several chunks, the most passes through a chunk."""
    return most_in_flight(*structure.schedule) if structure.pipe.engine else 1


def idle(structure: Structure) -> float:
    """Return the pipeline bubble: how long a rank waits, relative to the time it computes.

    Source: Narayanan et al. 2021 (arXiv:2104.04473), 2.2.
    """
    d, m = structure.graph.degrees, structure.pipe.microbatches
    if structure.is_one_process:
        return d.pp - 1
    return (d.pp - 1) / (d.virtual_stages * m)


def layers_of(structure: Structure) -> int:
    """Return how many of the model's layers a rank has."""
    d = structure.graph.degrees
    return sum(d.layers[d.stage :: d.pp])


def parameters_of(structure: Structure) -> int:
    """Return how many of the model's parameters a rank has, without adapters."""
    _, axes = operations_of(structure.graph)
    parameters = (weight for weight in weights_of(structure.graph) if weight[0].group not in ("adapter", "buffer"))
    return sum(elements(w, axes) * n for w, n, _ in parameters)


def stage_of(structure: Structure, stage: int) -> Structure:
    """Return the run on the ranks of another stage."""
    graph = structure.graph
    return structure._replace(graph=graph._replace(degrees=graph.degrees._replace(stage=stage)))


def every_stage(structure: Structure) -> Iterator[Structure]:
    """Yield the run on each stage of its pipeline."""
    for stage in range(structure.graph.degrees.pp):
        yield stage_of(structure, stage)


def may_be_worst(structure: Structure) -> Iterator[Structure]:
    """Yield the stages that can hold the most memory. Among equal stages that is the first, with most in flight."""
    seen: set[object] = set()
    for on_stage in every_stage(structure):
        d = on_stage.graph.degrees
        ends = d.stage in (0, d.pp - 1)
        kind = d.stage if ends or d.virtual_stages > 1 else first_equal_stage(on_stage.graph).degrees.stage
        if d.virtual_stages > 1 and not ends:
            kind = d.layers[d.stage :: d.pp]
        if kind not in seen:
            seen.add(kind)
            yield on_stage
