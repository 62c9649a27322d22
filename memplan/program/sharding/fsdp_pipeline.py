"""FSDP2 inside a pipeline stage: the weights and gradients that a rank holds whole for a step.

A unit's weights are gathered for the first microbatch and stay gathered for the others. Gradients accumulate whole, and
are reduced when a chunk's last microbatch has finished backward, one unit after another in the order of the model.
Source: torch 2.13 distributed/pipelining/stage.py backward_maybe_with_nosync, perform_reduce_grad; torchtitan 0.3.0
distributed/fsdp.py get_fsdp_reshard_after_forward_policy. Bytes are those of the first rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import ClassVar

from memplan.catalogue.parallelism import pipeline
from memplan.catalogue.parallelism.pipeline import GradientReduction, PipelineMoment
from memplan.core.ir import Division, Tensor, Unit
from memplan.engine.gather import AFTER, OUTSIDE
from memplan.program.graph import Graph, TensorGroup, bytes_of_kinds, tensor_group, total_bytes
from memplan.program.sharding.fsdp import FullySharded, tensor_bytes
from memplan.program.sharding.fsdp_units import Piece, division, pieces
from memplan.program.sharding.ranks import Ranks
from memplan.program.structure import chunks_of

_STAGE = "torch 2.13 distributed/pipelining/stage.py"


class ShardedStage(FullySharded):
    """One of the ranks that share a pipeline stage and shard it with FSDP2."""

    gathers_for_step: ClassVar[bool] = True

    def division(self, later: bool = False, opens: bool = False) -> Division | None:
        """Return the units that matter to a pass, or None if gradients accumulate in the dtype they are computed in.

        Otherwise a unit's gradients stay until its backward is over, and are then cast, or added to the gradients of
        earlier passes (`later`). Of the units that the first pass gathers (`opens`), the parts to send are left out:
        they are smaller than the weights copied out of the message after they are freed.
        """
        if opens:
            return self.units._replace(units=tuple((n, Unit(unit.whole, unit.message)) for n, unit in self.units.units))
        reduces = self.ranks.reduces
        if all(reduces in ("", p.sent) for p in self.pieces if p.trains):
            return None
        units: list[tuple[str, Unit]] = []
        for name, group in groupby(self.pieces, key=lambda piece: piece.unit):
            trained = [p for p in group if p.trains]
            summed = tuple(Tensor(f"{p.name}.grad, whole", str(p.made), reduces) for p in trained)
            units.append((name, Unit((), parts=() if later else summed)))
        return Division(tuple(units), self.units.outside, False, "never", _STAGE)

    def held_in(self, phase: str) -> Iterator[TensorGroup]:
        """Yield the gathered weights, which exist in addition to the rank's parts."""
        return (_whole(p, p.copies) for p in self.pieces)

    def accumulated(self) -> Iterator[TensorGroup]:
        """Yield the whole gradients that every microbatch but the last leaves."""
        return (_gradient(p, self.ranks, p.copies) for p in self.pieces if p.trains)

    def accumulates_in(self, phase: str) -> bool:
        return True

    def step_messages(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        units = [unit for _, unit in self.units.units]
        gathered = max((unit.message for unit in units), key=tensor_bytes, default=())
        return gathered, max(((*unit.joined, *unit.padded) for unit in units), key=tensor_bytes, default=())

    def reductions(self) -> tuple[GradientReduction, ...]:
        return pipeline.reductions(*self.run.schedule)

    def openings(self) -> tuple[PipelineMoment, ...]:
        """Return each chunk's first forward pass, which gathers its weights for the step. Empty if accumulated
        gradients outweigh an all-gather's output, as these moments cannot be the peak then."""
        if self.run.accumulates and total_bytes(self.accumulated()) >= total_bytes(self._message()):
            return ()
        first: dict[int, PipelineMoment] = {}
        for moment in pipeline.distinct_passes(*self.run.schedule):
            first.setdefault(moment.chunk, moment)
            if len(first) == self.graph.degrees.virtual_stages:
                break
        return tuple(first.values())

    def _message(self) -> Iterator[TensorGroup]:
        return (_tensor(t, "temp", 1) for t in self.step_messages()[0])

    def _chunks(self) -> list[ShardedStage]:
        return [ShardedStage(chunk) for chunk in chunks_of(self.run)]

    def gathered(self, moment: PipelineMoment) -> Iterator[TensorGroup]:
        """Yield the output of the all-gather for the moment's chunk. All chunks' gathers are issued at once."""
        return self._chunks()[moment.chunk]._message()

    def reduced(self, moment: PipelineMoment) -> Iterator[TensorGroup]:
        for i, chunk in enumerate(self._chunks()):
            if i == moment.chunk:
                yield from reduction(chunk.graph, chunk.ranks)
            else:
                yield from self.held_at(moment, i)

    def held_at(self, moment: PipelineMoment, chunk: int) -> Iterator[TensorGroup]:
        """Yield the whole weights and gradients of the rank's `chunk` at a moment. Once the chunk is done, only the
        rank's part of its gradients is left."""
        own = self._chunks()[chunk]
        if moment.done[chunk]:
            yield from own.gradients()
            return
        yield from own.held_in("forward")
        if moment.has_gradient[chunk] and self.run.accumulates:
            yield from own.accumulated()

    def released(self) -> Counter[str]:
        """Return the bytes that reducing a chunk's gradients releases: whole weights and gradients, minus the rank's
        parts of the reduced gradients."""
        out = bytes_of_kinds((*self.held_in("backward"), *self.accumulated()))
        out.subtract(bytes_of_kinds(self.gradients()))
        return out


def _whole(p: Piece, copies: int) -> TensorGroup:
    return tensor_group("parameter", f"gathered {p.name}", p.whole, p.sent, _STAGE, p.where, copies)


def _gradient(p: Piece, ranks: Ranks, copies: int) -> TensorGroup:
    return tensor_group("gradient", f"{p.name}.grad, whole", p.made, ranks.reduces or p.sent, _STAGE, p.where, copies)


@lru_cache(maxsize=512)
def reduction(graph: Graph, ranks: Ranks) -> tuple[TensorGroup, ...]:
    """Return a chunk's weights and gradients at the peak while its gradients are reduced.

    For each unit its weights are freed, its gradients are copied into the input of a reduce-scatter and freed, and the
    rank's part is allocated. The input of a reduce-scatter stays until that of the next one exists.
    """
    units = dict(division(graph, ranks).units)
    by_unit = {name: list(group) for name, group in groupby(pieces(graph, ranks), key=lambda piece: piece.unit)}
    done = dict.fromkeys(by_unit, 0)
    alive = total_bytes(_whole(p, p.copies) for p in pieces(graph, ranks))
    alive += total_bytes(_gradient(p, ranks, p.copies) for p in pieces(graph, ranks) if p.trains)
    peak = 0
    at_peak: tuple[dict[str, int], str, int] = ({}, "", 0)
    for name in _order(by_unit):
        group, unit = by_unit[name], units[name]
        alive -= total_bytes(_whole(p, 1) for p in group)
        gradient = total_bytes(_gradient(p, ranks, 1) for p in group if p.trains)
        joined, received, parts = (tensor_bytes(tensors) for tensors in (unit.joined, unit.received, unit.parts))
        for moment, now in enumerate((alive + joined, alive - gradient + joined + received + parts)):
            if now > peak:
                peak, at_peak = now, (dict(done), name, moment)
        alive += parts - gradient + (received if ranks.replicated else 0)  # replicas sum `received` at the end
        done[name] += 1
    return tuple(_alive(by_unit, units, ranks, *at_peak))


def _alive(
    by_unit: dict[str, list[Piece]], units: dict[str, Unit], ranks: Ranks, done: dict[str, int], now: str, moment: int
) -> Iterator[TensorGroup]:
    """Yield what is alive while the unit `now` is reduced: before its gradients are freed (`moment` 0), or after (1).
    `done` counts the reduced copies of each unit."""
    for name, group in by_unit.items():
        is_current, unit = int(name == now), units[name]
        rest = group[0].copies - done[name]
        for p in group:
            if rest > is_current:
                yield _whole(p, rest - is_current)
            if p.trains and rest > is_current * moment:
                yield _gradient(p, ranks, rest - is_current * moment)
        parts = done[name] + is_current * moment
        if parts:
            yield from (_tensor(t, "gradient", parts) for t in unit.parts)
        if ranks.replicated and done[name]:
            yield from (_tensor(t, "temp", done[name]) for t in unit.received)
        if is_current:
            yield from (_tensor(t, "temp", 1) for t in (*unit.joined, *(unit.received if moment else ())))


def _tensor(t: Tensor, kind: str, copies: int) -> TensorGroup:
    return tensor_group(kind, t.name, t.shape, t.dtype, _STAGE, copies=copies)


def _order(by_unit: dict[str, list[Piece]]) -> Iterator[str]:
    """Yield the units in the order of the model's modules, once for each copy of a block."""

    def run_of(name: str) -> str:
        return name.partition(".")[0]

    for _, group in groupby(sorted(by_unit, key=lambda name: name == AFTER or name not in OUTSIDE), key=run_of):
        names = [*group]
        for _ in range(by_unit[names[0]][0].copies):
            yield from names
