"""Gathering: what a rank has beside its own part of the weights while units of them are whole.

A unit is gathered before its operations run and let go after them. On the way back the next unit is asked for before a
unit's own backward, so that two are there; a unit's gradients are kept whole until its backward is over, then every
rank receives its part of their sum.
"""

from __future__ import annotations

from collections.abc import Container
from functools import partial
from typing import NamedTuple

from memplan.core.ir import Division, Op, Unit
from memplan.engine.lower import CASTING, COMPUTING, GATHERING, LENT, REDUCING, Frame, Storage, Tape

BEFORE, AFTER, TIED, ROOT, REST = "before", "after", "tied", "root", "rest"
OUTSIDE = (ROOT, BEFORE, TIED, AFTER)  # units of weights outside of blocks


def unit_of(run: int, block: int) -> str:
    """The name of the unit that a block's weights are gathered in, by its place in the stack."""
    return f"{run}.{block}"


class _Backward(NamedTuple):
    """A unit whose backward is over: its gradients and its weights, whole."""

    unit: Unit
    grads: list[Storage]
    whole: list[Storage]


class Gatherer:
    """Gathers the units of a division on a tape. Without a division it does nothing.

    `grads_exist`: the rank's parts of gradients are there already, and are added to; where the division `sums`, whole
    ones are, and no parts yet.
    """

    def __init__(self, tape: Tape, division: Division | None, grads_exist: bool) -> None:
        self._tape = tape
        self._units = dict(division.units) if division else {}
        self._outside = dict(division.outside) if division else {}
        self._nested_outside = {n: u for name in OUTSIDE if name in self._units for n, u in self._units[name].nested}
        self._lingers = division.lingers if division else False
        self._asks = division.asks if division else "never"
        self.at_loss = division.at_loss if division else False
        self._keeps = division.keeps if division else False
        self._asks_ahead = division.ahead if division else False
        self._kept: dict[str, list[list[Storage]]] = {}  # whole until backward, by unit, of the last copy last
        self._following = ""
        self._source = division.source if division else ""
        self._sums = division.sums if division else False
        self._grads_exist = grads_exist and not self._sums
        self._summed: dict[str, list[list[Storage]]] = {}  # of passes before, by unit, of the last copy last
        self._modules: dict[str, Unit] = {}  # of the unit whose operations run
        self._inner: list[Storage] = []  # a module's weights, while they are whole
        self._outer: list[Storage] | None = None  # where gradients wait outside of the module
        tape.reach = self.reach if self._outside else None
        tape.module = self._told if any(unit.modules for unit in self._units.values()) else None
        tape.hooks = division.hooks if division else False
        self._whole: dict[str, list[Storage]] = {}
        self._grads: dict[str, list[Storage]] = {}
        self._ahead: list[Storage] = []  # asked for on the way back
        self._waits = division.waits if division else False
        self._returns = division.returns if division else False
        self._leaves = division.leaves if division else False
        self._received: list[Storage] = []  # what groups of ranks reduced, and replicas sum
        self._delayed: _Backward | None = None  # the unit before, whose backward is over
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
        delayed = (*self._delayed.grads, *self._delayed.whole) if self._delayed else ()
        return (*self._ahead, *self._message, *self._sent, *delayed)

    @property
    def head(self) -> str:
        """The unit that the head's weights are in."""
        return next((name for name in (AFTER, TIED) if name in self._units), ROOT)

    def named(self, unit: str, called: bool) -> str:
        """The unit's name if it is gathered, which only the units of blocks that are `called` are; else nothing."""
        return unit if called and unit in self._units else ""

    def turn(self) -> None:
        """Backward begins. Gradients of weights outside of blocks wait until those of their unit are all there."""
        if not (self._sums and self._lingers):  # else each is added as it comes
            self._tape.waiting_outside = {w: self._grads.setdefault(name, []) for w, name in self._outside.items()}

    def is_reached(self, name: str, frame: Frame, leaf: Container[str]) -> bool:
        """Whether backward comes to what the unit's operations made: they have gradients to make, or asked for one."""
        own = [node for node in frame.nodes if any(self._outside.get(w.name) == name for w in node.op.weights)]
        return any(node.targets or any(t.name in leaf for t in node.op.writes) for node in own)

    def enter_outside(self) -> None:
        """Operations outside of blocks follow, or their backward."""
        self._tape.nested = self._nested_outside

    def reach(self, frame: Frame, op: Op) -> None:
        """Gather the units of an operation outside of blocks, on the way there."""
        for name in dict.fromkeys(self._outside[w.name] for w in op.weights if w.name in self._outside):
            self._gather(name, frame)

    def gather(self, name: str, frame: Frame, following: str = "") -> None:
        """A unit's weights are gathered, on the way there, and those of the `following` one may be asked for."""
        unit = self._units.get(name)
        self._tape.nested = dict(unit.nested) if unit else {}
        self._modules = dict(unit.modules) if unit else {}
        self._gather(name, frame, following)

    def _gather(self, name: str, frame: Frame, following: str = "") -> None:
        unit = self._units.get(name)
        if unit is None or name in self._whole:
            return
        self._enter(frame, "all_gather")
        asked = self._ahead if self._asked == name and self._ahead else self._ask(unit)
        self._ahead, self._asked = [], ""
        if self._lingers:  # a name still means the message before while the weights are copied out of this one
            before, self._message = self._message, asked
            asked = self._tape.made(unit.whole, "parameter")
            self._drop(before)
        self._whole[name] = asked
        if self._asks_ahead and following in self._units and (following == name or following not in self._whole):
            self._ahead, self._asked = self._ask(self._units[following]), following

    def leave(self, name: str) -> str:
        """A unit's operations have run, on the way there. Returns the unit's name, or nothing if none have."""
        if name not in self._whole:
            return ""
        if self._keeps:
            self._kept.setdefault(name, []).append(self._whole.pop(name))
        else:
            self.release(name)
        return name

    def release(self, name: str) -> None:
        """A unit's weights go."""
        self._drop(self._whole.pop(name, []))

    def head_done(self) -> None:
        """The head has run, and the loss comes."""
        if self._returns:
            self._drop(self._message)

    def end_forward(self) -> None:
        """The forward pass is over, its loss too."""
        self._drop(self._message)

    def remember(self, name: str, run: int | None) -> None:
        """The gradients of passes before are there for a unit, or for that of every copy of a `run`."""
        unit = self._units.get(name)
        if unit is None or not self._sums:
            return
        nested = (t for _, inner in unit.nested for t in inner.summed)
        made = self._tape.made((*unit.summed, *nested), "gradient")
        self._summed.setdefault(name, []).append(made)
        if run is not None:
            for storage in made:
                self._tape.of_copies(storage, run)

    def backward(self, name: str, frame: Frame, following: str) -> None:
        """A unit's weights are whole for its backward, and those of the `following` unit are asked for."""
        unit = self._units.get(name)
        if unit is None:
            return
        self._tape.nested, self._modules = dict(unit.nested), dict(unit.modules)
        self._enter(frame, "all_gather")
        if self._kept.get(name):
            self._whole[name] = self._kept[name].pop()
        if name not in self._whole:
            if self._asked != name:
                self._drop(self._ahead)
            asked = self._ahead or self._ask(unit)
            self._ahead, self._asked = [], ""
            if self._lingers:
                message, asked = asked, self._tape.made(unit.whole, "parameter")
                self._drop(message)
            self._whole[name] = asked
        self._following = "" if following in self._whole and following != name else following
        self._tape.reaches_first = None
        if unit.modules:
            pass  # the module's unit is what comes before this one, and asks for the next
        elif unit.nested and self._asks == "first":
            self._tape.reaches_first = partial(self._ask_next, frame)
        elif self._asks == "first":
            self._prefetch()
        if name not in OUTSIDE:
            adds = self._sums and self._lingers  # each as it comes; else all of a unit's, laid together
            self._tape.waiting = None if adds else self._grads.setdefault(name, [])

    def _told(self, event: str, module: str, frame: Frame) -> None:
        """A module that is a unit of its own begins or returns, or its backward begins or is over."""
        unit = self._modules.get(module)
        if unit is None:
            return
        if event in ("begins", "differentiated") and not self._inner:
            self._enter(frame, "all_gather")
            self._drop(self._message)
            self._inner = self._tape.made(unit.whole, "parameter", GATHERING)
        if event == "returns":
            self._drop(self._inner)
        elif event == "differentiated":
            self._outer, self._tape.waiting = self._tape.waiting, []
            self._prefetch()
        elif event == "reduced":
            grads, self._tape.waiting = self._tape.waiting or [], self._outer
            self._reduce(frame, unit, grads, self._inner)

    def reduce(self, name: str, frame: Frame) -> None:
        """A unit's backward is over: its gradients are reduced, every rank keeps its part, and the weights go."""
        unit = self._units.get(name)
        if unit is None:
            return
        self._tape.waiting = None
        grads = self._grads.pop(name, [])
        summed = self._summed[name].pop() if self._summed.get(name) else []
        whole = self._whole.pop(name, [])
        backward = _Backward(unit, [*grads, *summed], whole)
        if self._asks_ahead and unit.parts:
            backward, self._delayed = self._delayed, backward
        if backward is not None:
            self._reduce(frame, *backward)
        self._tape.waiting = self._grads.get(REST)

    def _reduce(self, frame: Frame, unit: Unit, grads: list[Storage], whole: list[Storage]) -> None:
        if self._asks == "last" or (not unit.parts and self._asks in ("gone", "never")):
            self._ask_next(frame)
        self._enter(frame, "reduce_scatter")
        if self._lingers:
            self._drop(whole)
            self._drop(self._sent)
        if grads:
            joined = self._tape.made(unit.joined, "temp", COMPUTING if self._lingers else LENT)
            joined += self._tape.made(unit.padded, "temp", REDUCING)
            laid = self._tape.made(unit.parts, "gradient") if unit.laid else []
            self._drop(grads)
            self._drop(whole)
            self._ask_gone(frame)
            received = self._tape.made(unit.received, "temp", REDUCING)
            parts = laid or self._tape.made(unit.parts, "gradient", REDUCING)
            self._drop(self._tape.made(unit.divided, "temp"))
            if self._waits:
                self._received += received
            else:
                self._drop(received)
            if self._leaves and self._waits and not unit.received:  # what replicas sum are the parts themselves
                self._received += parts
            elif self._grads_exist or self._leaves:
                self._drop(parts)
            if self._lingers:
                self._sent = joined
            else:
                self._drop(joined)
        self._drop(whole)
        self._ask_gone(frame)

    def end(self, frame: Frame) -> None:
        """The pass is over, of which the frame's was the last backward."""
        if self._delayed is not None:
            self._reduce(frame, *self._delayed)
        for storages in (self._ahead, self._sent, self._received):
            self._drop(storages)
        self._tape.end_hooks()

    def _ask_gone(self, frame: Frame) -> None:
        if self._asks == "gone":
            self._ask_next(frame)
            self._enter(frame, "reduce_scatter")

    def _ask_next(self, frame: Frame) -> None:
        self._enter(frame, "all_gather")
        self._prefetch()

    def _prefetch(self) -> None:
        if self._following in self._units and not self._keeps:
            self._drop(self._ahead)
            self._ahead, self._asked = self._ask(self._units[self._following]), self._following
        self._following = ""

    def _ask(self, unit: Unit) -> list[Storage]:
        """What an all-gather writes. FSDP2 copies the weights out of that on the stream it computes on, and casts on
        the one it gathers on."""
        cast = self._tape.made(unit.cast, "temp", GATHERING if self._lingers else CASTING)
        written, kind = (unit.message, "temp") if self._lingers else (unit.whole, "parameter")
        asked = self._tape.made(written, kind, GATHERING)
        self._drop(cast)
        return asked

    def _enter(self, frame: Frame, what: str) -> None:
        self._tape.enter(frame, Op(what, source=self._source))

    def _drop(self, storages: list[Storage]) -> None:
        while storages:
            self._tape.drop(storages.pop())
