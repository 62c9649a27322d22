"""A run's program: one model, method and set of kernels, lowered once. Batch and sequence are filled in afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod

from memplan.catalogue.degrees import WHOLE
from memplan.catalogue.kernels.wiring import GENERATING
from memplan.catalogue.optimizers.states import GRAD_SCALER, OptimizerMemory
from memplan.core.collection import without_collection
from memplan.core.once import once
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE, gib
from memplan.engine.walk import alive
from memplan.program.graph import is_optimized, operations_of, total_bytes, weights_of
from memplan.program.sharding.choice import sharding_of
from memplan.program.structure import Structure, chunks_of
from memplan.program.training.passes import PHASES, Moments, pass_of, pass_options, step_moments
from memplan.program.training.pipeline_moments import rank_moments, schedule_positions
from memplan.program.weight_sizes import active_elements, elements


class ParameterCounts(NamedTuple):
    """Numbers of parameters of the entire model.

    total      without adapters
    trainable  parameters that train
    active     parameters that one token uses, without adapters
    """

    total: int
    trainable: int
    active: int


class Program(NamedTuple):
    """A structure with its model's numbers filled in. Moments are linear in their variables; other bytes are constant.

    structure         the structure
    moments           moments of a step that can be its peak
    parameters        bytes of weights and buffers
    loading           peak bytes while loading
    gradients         bytes of all gradients when backward is done
    buffered          bytes of gradients with buffers of their own that exist throughout
    accumulated       bytes of gradients that exist throughout a phase of a later micro-batch, by phase
    reducing          bytes that gradient reduction holds throughout
    passing           bytes that ranks hold during a phase of a pass, by phase
    optimizer         memory of the optimizer without its states, which would outweigh the rest (`Sharding.optimizer`)
    states            bytes of optimizer states on the GPU
    scaler            bytes of the gradient scaler
    host              bytes of optimizer states and offloaded parts in host memory
    host_activations  activations kept in host memory: shape, dtype and count
    clipping          bytes between backward and the update
    counts            numbers of parameters
    """

    structure: Structure
    moments: Moments
    parameters: int
    loading: int
    gradients: int
    buffered: int
    accumulated: dict[str, int]
    reducing: int
    passing: dict[str, int]
    optimizer: OptimizerMemory
    states: int
    scaler: int
    host: int
    host_activations: tuple[tuple[str, str, int], ...]
    clipping: int
    counts: ParameterCounts

    def between_steps(self, workspace: int) -> int:
        """Return the bytes allocated between two steps. `workspace` is cuBLAS's for one handle."""
        return self.parameters + self.buffered + self.reducing + self.scaler + self.states + 2 * workspace


@lru_cache(maxsize=512)
@once
@without_collection
def program(structure: Structure) -> Program:
    """Lower the structure and fill in its model's numbers. Takes milliseconds, then is cached."""
    sharding = sharding_of(structure)
    if structure.engine:  # of any size, by the run's lengths and its card
        alone = program(structure._replace(engine=()))
        weights = alone.parameters + total_bytes(structure.engine)
        loading = max(alone.loading, sharding.broadcasting(weights))
        return alone._replace(structure=structure, parameters=weights, loading=loading)
    optimizer = sharding.optimizer()
    weights, consumed = total_bytes(sharding.weights()), sharding.frees_gradients or sharding.gradients_in_buckets
    gradients = 0 if consumed else total_bytes(sharding.gradients())
    accumulated = sharding.accumulated_bytes()
    trainer = structure.graph.trainer
    has_reference = trainer is not None and trainer.has_reference_pass
    present = {"forward", "loss", "backward", *(("reference",) if has_reference else ()), *dict(structure.graph.roles)}
    phases = [phase for phase in PHASES if phase in present]
    once = ("reference",) if trainer is not None and trainer.name in GENERATING else ()  # before all micro-batches
    return Program(
        structure=structure,
        moments=_moments(structure),
        parameters=weights,
        loading=max(sharding.loading_peak(), sharding.broadcasting(weights)),
        gradients=0 if structure.grads else gradients,
        buffered=gradients if structure.grads else 0,
        accumulated={
            phase: accumulated if phase not in once and sharding.accumulates_in(phase) else 0 for phase in phases
        },
        reducing=total_bytes(sharding.reduction_buffers()),
        passing={phase: total_bytes(sharding.held_in(phase)) for phase in phases},
        optimizer=optimizer._replace(states=()),
        states=sum(s.bytes * s.count for s in optimizer.states if not s.host),
        scaler=sum(s.bytes for s in GRAD_SCALER) if structure.scales else 0,
        host=total_bytes(sharding.host()) + sum(s.bytes * s.count for s in optimizer.states if s.host),
        host_activations=tuple(_offloaded_activations(structure)),
        clipping=sharding.clipping(),
        counts=_parameter_counts(structure),
    )


def _moments(structure: Structure) -> Moments:
    if structure.pipe.engine:
        return rank_moments(structure)
    options = tuple(pass_options(structure, later) for later in (False, True)[: 1 + structure.accumulates])
    return step_moments(structure.graph, options, structure.holds_outputs)


def _parameter_counts(structure: Structure) -> ParameterCounts:
    whole = structure.graph._replace(degrees=WHOLE)
    weights, axes = tuple(weights_of(whole)), operations_of(whole)[1]
    total = trainable = active = 0
    for w, count, _ in weights:
        number = elements(w, axes) * count
        if w.group not in ("adapter", "buffer"):
            total += number
            active += active_elements(w, axes) * count if w.chosen else number
        if w.idle or is_optimized(w, whole):
            trainable += number
    return ParameterCounts(total, trainable, active)


def _offloaded_activations(structure: Structure) -> Iterator[tuple[str, str, int]]:
    """Yield the activations kept in host memory for all microbatches in flight: shape, dtype and count."""
    chunks, most = (structure,), [1]
    if structure.pipe.engine:
        chunks, positions = chunks_of(structure), schedule_positions(structure)
        most = [max(m.others[i] + (m.chunk == i) for m in positions) for i in range(len(chunks))]
    for chunk, flights in zip(chunks, most, strict=True):
        low = pass_of(chunk)
        for key, count in alive(low.host, low.runs, operations_of(chunk.graph)[1]).items():
            shape, dtype, *_ = low.sizes[key]
            yield shape, dtype, count * flights


def host_bytes(program: Program, axes: Mapping[str, int]) -> int:
    """Return the bytes in host memory of the optimizer and of passes, for a run with these `axes`. Not rounded."""
    if not program.host_activations:
        return program.host
    numbers = {**operations_of(program.structure.graph)[1], **axes}

    def bytes_of(shape: str, dtype: str) -> int:
        return ITEMSIZE[dtype] * prod(int(t) if t.isdigit() else numbers[t] for t in shape.split())

    return program.host + sum(bytes_of(shape, dtype) * count for shape, dtype, count in program.host_activations)


def host_notes(structure: Structure, node: int) -> Iterator[str]:
    """Yield a note on what is offloaded to host memory, which the ranks of a node of `node` GPUs share."""
    sharding = sharding_of(structure)
    by_name: dict[str, int] = {}
    for h in sorted(sharding.host(), key=lambda h: -h.bytes * h.copies):
        what = sharding.host_name(h)
        by_name[what] = by_name.get(what, 0) + h.bytes * h.copies
    if by_name:
        total, node = sum(by_name.values()), min(structure.ranks.world, node)
        largest = "; ".join(f"{what} {gib(bytes_)}" for what, bytes_ in [*by_name.items()][:5])
        yield f"host memory: {gib(total)} a rank, {gib(node * total)} for {node} ranks of a node: {largest}"


class PhaseOffset(NamedTuple):
    """A phase after loading, and its bytes apart from those that batch and sequence decide.

    step   1 or 2; None if all steps are equal
    where  which part of a step's end takes more memory, `optimizer` or the `clipping` before it; empty within a pass
    """

    phase: str
    step: int | None
    bytes: int
    where: str = ""


@lru_cache(maxsize=512)
def phase_offsets(structure: Structure, workspace: int) -> tuple[PhaseOffset, ...]:
    """Return every phase after loading, in order. `workspace` is cuBLAS's for one handle."""
    p = program(structure)
    fixed = p.parameters + p.buffered + p.reducing + p.scaler + workspace
    out: list[PhaseOffset] = []
    for step in steps(p):
        states = _states(p, step)
        for phase in p.passing:
            second = workspace if phase == "backward" or step != 1 else 0
            out.append(PhaseOffset(phase, step, fixed + second + states + p.passing[phase]))
        update, clipping = _update(p, step), states + p.clipping
        where = "optimizer" if update >= clipping else "clipping"
        out.append(PhaseOffset("step", step, fixed + workspace + p.gradients + max(update, clipping), where))
    return tuple(out)


def steps(program: Program) -> tuple[int | None, ...]:
    """Return (1, 2) if the first step differs from later ones, else (None,)."""
    creates_states = program.states and not program.optimizer.at_once
    return (1, 2) if creates_states or program.optimizer.first != program.optimizer.later else (None,)


def _states(program: Program, step: int | None) -> int:
    """Return the bytes of optimizer states before the update."""
    return program.states if step == 2 or program.optimizer.at_once else 0


def _update(program: Program, step: int | None) -> int:
    """Return the bytes of optimizer states and of the update's temporaries."""
    optimizer = program.optimizer
    return program.states + (optimizer.first if step == 1 else optimizer.later)
