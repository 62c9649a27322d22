"""FSDP2 in the stages of a pipeline: what a rank holds whole for a step.

A unit's weights are gathered for the first microbatch and stay whole for all. Gradients are summed whole, and reduced
when a chunk's last microbatch has come back: one unit after the other, in the order of the model.
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
from memplan.program.graph import Graph, Held
from memplan.program.sharding.ranks import Piece, Ranks, division, pieces

_STAGE = "torch 2.13 distributed/pipelining/stage.py"


def weights(graph: Graph, ranks: Ranks) -> Iterator[Held]:
    """The weights as they are gathered, each of them beside the rank's part."""
    for p in pieces(graph, ranks):
        yield _whole(p, p.copies)


def gradients(graph: Graph, ranks: Ranks) -> Iterator[Held]:
    """The gradients as every microbatch but the last leaves them."""
    for p in pieces(graph, ranks):
        if p.trains:
            yield _gradient(p, ranks, p.copies)


def _whole(p: Piece, copies: int) -> Held:
    return _held("parameter", f"gathered {p.name}", p.where, p.whole, p.sent, copies)


def _gradient(p: Piece, ranks: Ranks, copies: int) -> Held:
    return _held("gradient", f"{p.name}.grad, whole", p.where, p.made, ranks.reduces or p.sent, copies)


def _held(kind: str, what: str, where: str, numbers: int, dtype: str, copies: int) -> Held:
    return Held(kind, what, where, str(numbers), dtype, copies, size(str(numbers), dtype, {})[1], _STAGE)


def passing(graph: Graph, ranks: Ranks, later: bool) -> Division | None:
    """What a pass does with units that are whole throughout: nothing, unless their gradients are summed in another
    dtype than they are made in. Then those of a unit stay until its backward is over, and are cast, or added to the
    ones of passes before (`later`)."""
    if all(ranks.reduces in ("", p.sent) for p in pieces(graph, ranks) if p.trains):
        return None
    found = division(graph, ranks)
    assert found is not None
    units: list[tuple[str, Unit]] = []
    for name, group in groupby(pieces(graph, ranks), key=lambda piece: piece.unit):
        own = [p for p in group if p.trains]
        summed = tuple(Tensor(f"{p.name}.grad, whole", str(p.made), ranks.reduces) for p in own)
        units.append((name, Unit((), parts=() if later else summed)))
    return Division(tuple(units), found.outside, False, "never", _STAGE)


def opening(graph: Graph, ranks: Ranks) -> Division | None:
    """What the pass gathers that opens a step, on its way there. The parts as they are sent are less than the weights
    that are copied out of the message when they have gone."""
    found = division(graph, ranks)
    units = tuple((name, Unit(unit.whole, unit.message)) for name, unit in found.units) if found else ()
    return found._replace(units=units) if found else None


def message(graph: Graph, ranks: Ranks) -> tuple[Held, ...]:
    """What the largest of the units' all-gathers wrote."""
    found = division(graph, ranks)
    sent = max((unit.message for _, unit in found.units), key=_sizes) if found else ()
    return tuple(_of(t, "temp", 1) for t in sent)


class Reduction(NamedTuple):
    """The moment at which most is there while a chunk's gradients are reduced: what there is of them and of weights."""

    held: tuple[Held, ...]
    bytes: int


@lru_cache(maxsize=512)
def reduction(graph: Graph, ranks: Ranks) -> Reduction:
    """A unit's weights go, its gradients are copied into what a reduce-scatter reads, and go; the rank's part comes.
    What a reduce-scatter read stays until the next one's is made."""
    found = division(graph, ranks)
    reads = dict(found.units) if found else {}
    by_unit = {name: list(group) for name, group in groupby(pieces(graph, ranks), key=lambda piece: piece.unit)}
    done = dict.fromkeys(by_unit, 0)
    left = sum(_bytes([_whole(p, p.copies) for p in group]) for group in by_unit.values())
    left += sum(_bytes([_gradient(p, ranks, p.copies) for p in group if p.trains]) for group in by_unit.values())
    most = 0
    best: tuple[dict[str, int], str, int] = ({}, "", 0)
    for name in _order(by_unit):
        own, unit = by_unit[name], reads[name]
        whole, graded = (
            _bytes([_whole(p, 1) for p in own]),
            _bytes([_gradient(p, ranks, 1) for p in own if p.trains]),
        )
        left -= whole
        joined, came, parts = (_sizes(some) for some in (unit.joined, unit.received, unit.parts))
        for moment, there in enumerate((left + joined, left - graded + joined + came + parts)):
            if there > most:
                most, best = there, (dict(done), name, moment)
        left += parts - graded + (came if ranks.replicated else 0)  # which replicas sum until all are reduced
        done[name] += 1
    return Reduction(tuple(_there(by_unit, reads, ranks, *best)), most)


def _there(
    by_unit: dict[str, list[Piece]], reads: dict[str, Unit], ranks: Ranks, done: dict[str, int], now: str, moment: int
) -> Iterator[Held]:
    for name, own in by_unit.items():
        here, unit = int(name == now), reads[name]
        rest = own[0].copies - done[name]
        for p in own:
            if rest > here:
                yield _whole(p, rest - here)
            if p.trains and rest > here * moment:
                yield _gradient(p, ranks, rest - here * moment)
        parts = done[name] + here * moment
        if parts:
            yield from (_of(t, "gradient", parts) for t in unit.parts)
        if ranks.replicated and done[name]:
            yield from (_of(t, "temp", done[name]) for t in unit.received)
        if here:
            yield from (_of(t, "temp", 1) for t in (*unit.joined, *(unit.received if moment else ())))


def _of(t: Tensor, kind: str, copies: int) -> Held:
    return Held(kind, t.name, "", t.shape, t.dtype, copies, size(t.shape, t.dtype, {})[1], _STAGE)


def _order(by_unit: dict[str, list[Piece]]) -> Iterator[str]:
    """The units in the order of the model's modules; of a run of several blocks, one copy after the other."""

    def run_of(name: str) -> str:
        return name.partition(".")[0]

    for _, group in groupby(sorted(by_unit, key=lambda name: name == AFTER or name not in OUTSIDE), key=run_of):
        names = [*group]
        for _ in range(by_unit[names[0]][0].copies):
            yield from names


def _bytes(held: Iterable[Held]) -> int:
    return sum(h.bytes * h.copies for h in held)


def _sizes(tensors: Iterable[Tensor]) -> int:
    return sum(size(t.shape, t.dtype, {})[1] for t in tensors)
