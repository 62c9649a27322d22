"""FSDP2 inside a pipeline stage: the weights and gradients that a rank holds whole for a step.

A unit's weights are gathered for the first microbatch and stay gathered for the others. Gradients accumulate whole, and
are reduced when a chunk's last microbatch has finished backward, one unit after another in the order of the model.
Source: torch 2.13 distributed/pipelining/stage.py backward_maybe_with_nosync, perform_reduce_grad; torchtitan 0.3.0
distributed/fsdp.py get_fsdp_reshard_after_forward_policy. Bytes are those of the first rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from memplan.core.ir import Division, Tensor, Unit
from memplan.engine.gather import AFTER, OUTSIDE
from memplan.engine.walk import size
from memplan.program.graph import Graph, TensorGroup
from memplan.program.sharding.ranks import Piece, Ranks, division, pieces

_STAGE = "torch 2.13 distributed/pipelining/stage.py"


def weights(graph: Graph, ranks: Ranks) -> Iterator[TensorGroup]:
    """Yield the gathered weights, which exist in addition to the rank's parts."""
    for p in pieces(graph, ranks):
        yield _whole(p, p.copies)


def gradients(graph: Graph, ranks: Ranks) -> Iterator[TensorGroup]:
    """Yield the whole gradients that every microbatch but the last leaves."""
    for p in pieces(graph, ranks):
        if p.trains:
            yield _gradient(p, ranks, p.copies)


def _whole(p: Piece, copies: int) -> TensorGroup:
    return _held("parameter", f"gathered {p.name}", p.where, p.whole, p.sent, copies)


def _gradient(p: Piece, ranks: Ranks, copies: int) -> TensorGroup:
    return _held("gradient", f"{p.name}.grad, whole", p.where, p.made, ranks.reduces or p.sent, copies)


def _held(kind: str, what: str, where: str, numbers: int, dtype: str, copies: int) -> TensorGroup:
    return TensorGroup(kind, what, where, str(numbers), dtype, copies, size(str(numbers), dtype, {})[1], _STAGE)


def passing(graph: Graph, ranks: Ranks, later: bool) -> Division | None:
    """Return the units that matter to a pass, or None if gradients accumulate in the dtype they are computed in.

    Otherwise a unit's gradients stay until its backward is over, and are then cast, or added to the gradients of
    earlier passes (`later`).
    """
    if all(ranks.reduces in ("", p.sent) for p in pieces(graph, ranks) if p.trains):
        return None
    full = division(graph, ranks)
    assert full is not None
    units: list[tuple[str, Unit]] = []
    for name, group in groupby(pieces(graph, ranks), key=lambda piece: piece.unit):
        trained = [p for p in group if p.trains]
        summed = tuple(Tensor(f"{p.name}.grad, whole", str(p.made), ranks.reduces) for p in trained)
        units.append((name, Unit((), parts=() if later else summed)))
    return Division(tuple(units), full.outside, False, "never", _STAGE)


def opening(graph: Graph, ranks: Ranks) -> Division | None:
    """Return the units that the first forward pass of a step gathers, or None if weights are not sharded.

    The parts to send are left out: they are smaller than the weights copied out of the message after they are freed.
    """
    full = division(graph, ranks)
    units = tuple((name, Unit(unit.whole, unit.message)) for name, unit in full.units) if full else ()
    return full._replace(units=units) if full else None


def message(graph: Graph, ranks: Ranks) -> tuple[TensorGroup, ...]:
    """Return the output of the largest all-gather among the units."""
    full = division(graph, ranks)
    largest = max((unit.message for _, unit in full.units), key=_tensor_bytes) if full else ()
    return tuple(_tensor(t, "temp", 1) for t in largest)


class Reduction(NamedTuple):
    """The peak while a chunk's gradients are reduced: its weights and gradients, and their bytes."""

    held: tuple[TensorGroup, ...]
    bytes: int


@lru_cache(maxsize=512)
def reduction(graph: Graph, ranks: Ranks) -> Reduction:
    """Return the peak while a chunk's gradients are reduced.

    For each unit its weights are freed, its gradients are copied into the input of a reduce-scatter and freed, and the
    rank's part is allocated. The input of a reduce-scatter stays until that of the next one exists.
    """
    full = division(graph, ranks)
    units = dict(full.units) if full else {}
    by_unit = {name: list(group) for name, group in groupby(pieces(graph, ranks), key=lambda piece: piece.unit)}
    done = dict.fromkeys(by_unit, 0)
    alive = sum(_bytes([_whole(p, p.copies) for p in group]) for group in by_unit.values())
    alive += sum(_bytes([_gradient(p, ranks, p.copies) for p in group if p.trains]) for group in by_unit.values())
    peak = 0
    at_peak: tuple[dict[str, int], str, int] = ({}, "", 0)
    for name in _order(by_unit):
        group, unit = by_unit[name], units[name]
        whole, gradient = (
            _bytes([_whole(p, 1) for p in group]),
            _bytes([_gradient(p, ranks, 1) for p in group if p.trains]),
        )
        alive -= whole
        joined, received, parts = (_tensor_bytes(tensors) for tensors in (unit.joined, unit.received, unit.parts))
        for moment, now in enumerate((alive + joined, alive - gradient + joined + received + parts)):
            if now > peak:
                peak, at_peak = now, (dict(done), name, moment)
        alive += parts - gradient + (received if ranks.replicated else 0)  # replicas sum `received` at the end
        done[name] += 1
    return Reduction(tuple(_alive(by_unit, units, ranks, *at_peak)), peak)


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
    return TensorGroup(kind, t.name, "", t.shape, t.dtype, copies, size(t.shape, t.dtype, {})[1], _STAGE)


def _order(by_unit: dict[str, list[Piece]]) -> Iterator[str]:
    """Yield the units in the order of the model's modules, once for each copy of a block."""

    def run_of(name: str) -> str:
        return name.partition(".")[0]

    for _, group in groupby(sorted(by_unit, key=lambda name: name == AFTER or name not in OUTSIDE), key=run_of):
        names = [*group]
        for _ in range(by_unit[names[0]][0].copies):
            yield from names


def _bytes(held: Iterable[TensorGroup]) -> int:
    return sum(h.bytes * h.copies for h in held)


def _tensor_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(size(t.shape, t.dtype, {})[1] for t in tensors)
