"""Gathering: what a rank has beside its own part of the weights while units of them are whole.

A unit is gathered before its operations run and let go after them. On the way back the next unit is asked for before a
unit's own backward, so that two are there; a unit's gradients are kept whole until its backward is over, then every
rank receives its part of their sum.
"""

from __future__ import annotations

from collections.abc import Iterable

from memplan.engine.lower import Frame, Storage, Tape
from memplan.ir import Division, Op, Tensor, Unit

BEFORE, AFTER, ROOT = "before", "after", "root"


def unit_of(run: int, block: int) -> str:
    """The name of the unit that a block's weights are gathered in, by its place in the stack."""
    return f"{run}.{block}"


class Gatherer:
    """Gathers the units of a division on a tape. Without a division it does nothing.

    `grads_exist`: the rank's parts of gradients are there already, and are added to.
    """

    def __init__(self, tape: Tape, division: Division | None, grads_exist: bool) -> None:
        self._tape = tape
        self._units = dict(division.units) if division else {}
        self._lingers = division.lingers if division else False
        self._late = division.late if division else False
        self._following = ""
        self._source = division.source if division else ""
        self._grads_exist = grads_exist
        self._whole: dict[str, list[Storage]] = {}
        self._grads: dict[str, list[Storage]] = {}
        self._ahead: list[Storage] = []  # asked for on the way back
        self._asked = ""  # and of which unit that is
        self._message: list[Storage] = []  # of the unit gathered last on the way there
        self._sent: list[Storage] = []  # what the last reduce-scatter reads

    @property
    def divides(self) -> bool:
        """Whether there is anything to gather."""
        return bool(self._units)

    @property
    def handed(self) -> tuple[Storage, ...]:
        """What one block hands on to the next."""
        return (*self._ahead, *self._message, *self._sent)

    def outside(self, name: str) -> str:
        """The unit that the weights before or after the blocks are in."""
        return ROOT if ROOT in self._units else name

    def gather(self, name: str, frame: Frame) -> None:
        """A unit's weights are gathered, on the way there."""
        unit = self._units.get(name)
        if unit is None or name in self._whole:
            return
        self._enter(frame, "all_gather")
        asked = self._ask(unit)
        if self._lingers:  # a name still means the message before while the weights are copied out of this one
            before, self._message = self._message, asked
            asked = self._made(unit.whole, "parameter")
            self._drop(before)
        self._whole[name] = asked

    def release(self, name: str) -> None:
        """A unit's weights go."""
        self._drop(self._whole.pop(name, []))

    def end_forward(self) -> None:
        """The model has returned."""
        self._drop(self._message)

    def backward(self, name: str, frame: Frame, following: str) -> None:
        """A unit's weights are whole for its backward, and those of the `following` unit are asked for."""
        unit = self._units.get(name)
        if unit is None:
            return
        self._enter(frame, "all_gather")
        if name not in self._whole:
            if self._asked != name:
                self._drop(self._ahead)
            asked = self._ahead or self._ask(unit)
            self._ahead, self._asked = [], ""
            if self._lingers:
                message, asked = asked, self._made(unit.whole, "parameter")
                self._drop(message)
            self._whole[name] = asked
        self._following = "" if following in self._whole and following != name else following
        if not self._late:
            self._prefetch()
        self._tape.waiting = self._grads.setdefault(name, [])

    def reduce(self, name: str, frame: Frame) -> None:
        """A unit's backward is over: its gradients are reduced, every rank keeps its part, and the weights go."""
        unit = self._units.get(name)
        if unit is None:
            return
        self._tape.waiting = None
        grads = self._grads.pop(name, [])
        if self._late:
            self._enter(frame, "all_gather")
            self._prefetch()
        self._enter(frame, "reduce_scatter")
        if self._lingers:
            self.release(name)
        if grads:
            if self._lingers:
                self._drop(self._sent)
            joined = self._made(unit.joined, "temp")
            self._drop(grads)
            self.release(name)
            received = self._made(unit.received, "temp")
            parts = self._made(unit.parts, "gradient")
            self._drop(received)
            if self._grads_exist:
                self._drop(parts)
            if self._lingers:
                self._sent = joined
            else:
                self._drop(joined)
        self.release(name)

    def end(self) -> None:
        """The pass is over."""
        for storages in (self._ahead, self._sent):
            self._drop(storages)

    def _prefetch(self) -> None:
        if self._following in self._units:
            self._drop(self._ahead)
            self._ahead, self._asked = self._ask(self._units[self._following]), self._following
        self._following = ""

    def _ask(self, unit: Unit) -> list[Storage]:
        """What an all-gather writes."""
        cast = self._made(unit.cast, "temp")
        asked = self._made(unit.message, "temp") if self._lingers else self._made(unit.whole, "parameter")
        self._drop(cast)
        return asked

    def _enter(self, frame: Frame, what: str) -> None:
        self._tape.enter(frame, Op(what, source=self._source))

    def _made(self, tensors: Iterable[Tensor], kind: str) -> list[Storage]:
        return [self._tape.alloc(t, kind) for t in tensors]

    def _drop(self, storages: list[Storage]) -> None:
        while storages:
            self._tape.drop(storages.pop())
