"""A run's pipeline: how its library divides the layers, what it refuses, and which ranks differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from memplan.catalogue.pipeline import ENGINES, Engine, most_in_flight, split
from memplan.degrees import WHOLE, Degrees
from memplan.errors import SpecError
from memplan.graph import built, elements, first_alike, weights_of
from memplan.program import Pipe, Structure
from memplan.spec import Parallelism


class Piped(NamedTuple):
    """What of a run is a pipeline's: which layers each rank has, and how microbatches pass through."""

    degrees: Degrees
    pipe: Pipe
    keeps_sent: bool


def piped(p: Parallelism, layers: int, engine: str, microbatches: int) -> Piped:
    """The pipeline of a model with so many `layers`, as an `engine` of `memplan.catalogue.pipeline` has it.

    Raises SpecError, naming every factor, for what the engine does not run.
    """
    if p.pp == 1:
        return Piped(WHOLE, Pipe(), False)
    row = ENGINES[engine]
    schedule = p.schedule or row.schedules[0]
    _check(p, row, schedule, microbatches)
    parts = split(row, layers, p.pp, p.virtual_stages, p.first_stage_layers, p.last_stage_layers)
    degrees = Degrees(pp=p.pp, stage=p.stage or 0, virtual_stages=p.virtual_stages, layers=parts)
    return Piped(degrees, Pipe(engine, schedule, microbatches), row.keeps)


def _check(p: Parallelism, engine: Engine, schedule: str, microbatches: int) -> None:
    if schedule not in engine.schedules:
        raise SpecError(
            f"parallelism.schedule: {engine.title} has no {schedule}; it has {', '.join(engine.schedules)}",
            "parallelism.schedule",
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


def idle(structure: Structure) -> float:
    """How long a rank waits while a pipeline fills and drains, as a share of what it computes.

    Source: Narayanan et al. 2021 (arXiv:2104.04473), 2.2.
    """
    d, m = structure.graph.degrees, structure.pipe.microbatches
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
