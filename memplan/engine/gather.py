"""Gathering sharded weights (FSDP, ZeRO-3): what a rank holds in addition to its own shard.

A unit is gathered before its operations run and freed after them. In backward the next unit is prefetched before a
unit's own backward, so two are alive; a unit's gradients stay whole until its backward is over, then they are
reduce-scattered.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator
from contextlib import contextmanager
from functools import partial

from memplan.core.ir import MODEL, Division, Op, Unit
from memplan.core.records import NamedTuple
from memplan.engine.frames import Frame
from memplan.engine.storages import CASTING, COMPUTING, GATHERING, LENT, REDUCING, Storage
from memplan.engine.tape import Tape

BEFORE, AFTER, TIED, ROOT, REST = "before", "after", "tied", "root", "rest"
OUTSIDE = (ROOT, BEFORE, TIED, AFTER)  # units of weights outside of blocks


def unit_of(run: int, block: int) -> str:
    """Return the name of the unit of a block's weights, by the block's place in the stack."""
    return f"{run}.{block}"


def left_whole(division: Division) -> tuple[str, ...]:
    """Return the units that a pass without gradients leaves whole. FSDP1 divides them when generation is over."""
    names = (name for name, _ in division.units)
    return tuple(name for name in names if name in (ROOT, TIED, AFTER, REST) and division.keeps_buffers)


class _FinishedUnit(NamedTuple):
    """A unit whose backward is over, with its whole gradients and weights."""

    unit: Unit
    grads: list[Storage]
    whole: list[Storage]


class Gatherer:
    """Gathers the units of a division on a tape; does nothing without a division.

    `grads_exist` says that the rank's gradient shards exist already and are added to. If the division `sums`, whole
    gradients exist instead.
    """

    def __init__(self, tape: Tape, division: Division | None, grads_exist: bool) -> None:
        self._tape = tape
        self._units = dict(division.units) if division else {}
        self._outside = dict(division.outside) if division else {}
        self._nested_outside = {n: u for name in OUTSIDE if name in self._units for n, u in self._units[name].nested}
        self._keeps_buffers = division.keeps_buffers if division else False
        self._asks = division.gathers_at if division else "never"
        self.alone = division.alone if division else False
        self.at_loss = division.at_loss if division else False
        self._keeps = division.keeps if division else ""
        self._root_has_ends = division.root_has_ends if division else ""
        self._is_last = False  # the running unit is the last block's
        self._asks_ahead = division.prefetches_forward if division else False
        self._kept: dict[str, list[list[Storage]]] = {}  # unit -> weights of each copy that stay whole until backward
        self._following = ""
        self._source = division.source if division else ""
        self._sums = division.sums if division else False
        self._grads_exist = grads_exist and not self._sums
        self._summed: dict[str, list[list[Storage]]] = {}  # unit -> gradients of earlier passes, of each copy
        self._modules: dict[str, Unit] = {}  # modules of the running unit that are units of their own
        self._module_weights: list[Storage] = []  # while such a module is gathered
        self._outer_waiting: list[Storage] | None = None  # `tape.waiting` outside of such a module
        self._hooks = division.hooks if division else False
        self.models = dict(division.models) if division else {}
        self.reaches_model: Callable[[], None] | None = None  # called when backward reaches what the model returned
        self.is_aside = False  # the model runs without gradients, in the middle of its own pass
        self.attach()
        self._left = division.whole if division else ()
        # the last unit of the pass before, which FSDP2 gathers ahead at the end of backward
        self.last_before = AFTER if AFTER in self._left else ""
        self._whole: dict[str, list[Storage]] = {}
        self._grads: dict[str, list[Storage]] = {}
        self._ahead: list[Storage] = []  # prefetched
        self._waits = division.waits if division else False
        self._returns = division.returns if division else False
        self._leaves = division.offloads_gradients if division else False
        self._received: list[Storage] = []  # reduced in groups of ranks, to be summed over replicas
        self._delayed: _FinishedUnit | None = None  # the last unit, whose gradients are not reduced yet
        self._asked = ""  # the unit that `_ahead` belongs to
        self._message: list[Storage] = []  # output of the last all-gather in forward
        self._sent: list[Storage] = []  # input of the last reduce-scatter

    def attach(self) -> None:
        """Let the tape tell which operations and modules it runs."""
        self._tape.reach = self.reach if self._outside else None
        self._tape.passed = self._pass_by if self.alone else None
        self._tape.module = self._on_module if self._units else None
        self._tape.hooks = self._hooks

    @property
    def divides(self) -> bool:
        """Whether any weights are sharded."""
        return bool(self._units)

    @property
    def handed(self) -> tuple[Storage, ...]:
        """The storages that stay alive from one block to the next."""
        delayed = (*self._delayed.grads, *self._delayed.whole) if self._delayed else ()
        return (*self._ahead, *self._message, *self._sent, *delayed)

    @property
    def head(self) -> str:
        """The unit of the head's weights."""
        return next((name for name in (AFTER, TIED) if name in self._units), ROOT)

    def named(self, unit: str, called: bool) -> str:
        """Return the unit's name if it is gathered, else "". Units of blocks that are not `called` are not."""
        return unit if called and unit in self._units else ""

    def turn(self) -> None:
        """Begin backward. Gradients of weights outside of blocks wait until those of their unit are complete."""
        if not (self._sums and self._keeps_buffers):  # else every gradient is added at once
            self._tape.waiting_outside = {w: self._grads.setdefault(name, []) for w, name in self._outside.items()}

    def is_reached(self, name: str, frame: Frame, leaf: Container[str]) -> bool:
        """Whether backward reaches the unit's operations: they compute gradients, or their outputs require one."""
        nodes = [node for node in frame.nodes if any(self._outside.get(w.name) == name for w in node.op.weights)]
        return any(node.targets or any(t.name in leaf for t in node.op.writes) for node in nodes)

    def recall(self, frame: Frame) -> None:
        """Allocate the units that earlier passes left whole."""
        for name in self._left if not self.is_aside else ():
            self._enter(frame, "all_gather")
            self._whole[name] = self._tape.alloc_buffers(self._units[name].whole, "parameter")

    def enter_outside(self) -> None:
        """Begin operations outside of blocks, or their backward."""
        self._tape.nested = self._nested_outside

    def reach(self, frame: Frame, op: Op) -> None:
        """Gather the units of an operation outside of blocks, in forward."""
        for name in dict.fromkeys(self._outside[w.name] for w in op.weights if w.name in self._outside):
            self._gather(name, frame)
            if self.is_aside and self._keeps_buffers and not self.at_loss:  # else the head's module is not called
                self.last_before = name

    def gather(self, name: str, frame: Frame, following: str = "") -> None:
        """Gather a unit's weights in forward; the `following` unit may be prefetched."""
        unit = self._units.get(name)
        self._tape.nested = dict(unit.nested) if unit else {}
        self._modules = dict(unit.modules) if unit else {}
        self._is_last = not following
        self._gather(name, frame, following)

    def _gather(self, name: str, frame: Frame, following: str = "") -> None:
        unit = self._units.get(name)
        if unit is None or name in self._whole or (self.is_aside and self._kept.get(name)):
            return
        self._enter(frame, "all_gather")
        if self._keeps_buffers and not unit.message:  # gathered by the code that uses it
            self._whole[name] = self._tape.alloc_buffers(unit.whole, "parameter")
            return
        asked = self._ahead if self._asked == name and self._ahead else self._ask(unit)
        self._ahead, self._asked = [], ""
        if (
            self._keeps_buffers
        ):  # a variable references the previous message while the weights are copied out of this one
            before, self._message = self._message, asked
            asked = self._tape.alloc_buffers(unit.whole, "parameter")
            self._drop(before)
        self._whole[name] = asked
        if self._asks_ahead and following in self._units and (following == name or following not in self._whole):
            self._ahead, self._asked = self._ask(self._units[following]), following

    def leave(self, name: str) -> str:
        """Free or keep a unit's weights after its forward. Returns the unit's name, or "" if it is not gathered."""
        if name not in self._whole:
            return ""
        if self.is_aside and self._keeps_buffers and AFTER not in self._left:
            self.last_before = name
        if (self._keeps == "all" or (self._keeps == "last" and self._is_last)) and not self.is_aside:
            self._kept.setdefault(name, []).append(self._whole.pop(name))
        else:
            self.release(name)
        return name

    def release(self, name: str) -> None:
        """Free a unit's weights."""
        self._drop(self._whole.pop(name, []))

    @contextmanager
    def aside(self) -> Generator[None]:
        """Run the model in the middle of its own pass, with its own copies of units that its code gathers."""
        by_code = [name for name, unit in self._units.items() if self._keeps_buffers and not unit.message]
        own = {name: self._whole.pop(name) for name in by_code if name in self._whole}
        self.is_aside = True
        yield
        self.is_aside = False
        for name in by_code:
            self.release(name)
        self._whole |= own

    def release_all(self) -> None:
        """Free every unit's weights."""
        for name in [*self._whole]:
            self.release(name)

    def head_done(self) -> None:
        """End the model's forward, before the loss."""
        if self._returns:
            self._drop(self._message)

    def end_forward(self) -> None:
        """End the forward pass, after the loss."""
        self._drop(self._message)
        if self._root_has_ends == "freed":
            self.release(ROOT)

    def remember(self, name: str, run: int | None) -> None:
        """Allocate a unit's gradients of earlier passes, once per copy if the unit is in a `run`."""
        unit = self._units.get(name)
        if unit is None or not self._sums:
            return
        nested = (t for _, inner in unit.nested for t in inner.summed)
        summed = self._tape.alloc_buffers((*unit.summed, *nested), "gradient")
        self._summed.setdefault(name, []).append(summed)
        if run is not None:
            for storage in summed:
                self._tape.of_copies(storage, run)

    def backward(self, name: str, frame: Frame, following: str) -> None:
        """Gather a unit's weights for its backward, and prefetch the `following` unit."""
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
            if self._keeps_buffers:
                message, asked = asked, self._tape.alloc_buffers(unit.whole, "parameter")
                self._drop(message)
            self._whole[name] = asked
        self._following = "" if following in self._whole and following != name else following
        self._tape.reaches_first = None
        if unit.modules:
            pass  # the module's unit comes first, and prefetches the next one
        elif unit.nested and self._asks == "first":
            self._tape.reaches_first = partial(self._ask_next, frame)
        elif self._asks == "first":
            self._prefetch()
        if name not in OUTSIDE:
            adds = (
                self._sums and self._keeps_buffers
            )  # adds every gradient at once, instead of all of a unit's together
            self._tape.waiting = None if adds else self._grads.setdefault(name, [])

    def _pass_by(self, frame: Frame, op: Op) -> None:
        """Reduce the head's unit once the backward of its operation is over."""
        if any(self._outside.get(w.name) == AFTER for w in op.weights):
            self.reduce(AFTER, frame)

    def _on_model(self, event: str) -> None:
        """Free the last message when the model returns; gather its last unit when backward reaches what it returned."""
        if event == "returns":
            self._drop(self._message)
        elif self.reaches_model is not None:
            reaches, self.reaches_model = self.reaches_model, None
            reaches()

    def _on_module(self, event: str, module: str, frame: Frame) -> None:
        """Gather or free a module that is a unit of its own, at an event of its forward or backward."""
        if module == MODEL:
            self._on_model(event)
        unit = self._modules.get(module)
        if unit is None:
            return
        if event in ("begins", "differentiated") and not self._module_weights:
            self._enter(frame, "all_gather")
            self._drop(self._message)
            self._module_weights = self._tape.alloc_buffers(unit.whole, "parameter", GATHERING)
        if event == "returns":
            self._drop(self._module_weights)
        elif event == "differentiated":
            self._outer_waiting, self._tape.waiting = self._tape.waiting, []
            self._prefetch()
        elif event == "reduced":
            grads, self._tape.waiting = self._tape.waiting or [], self._outer_waiting
            self._reduce(frame, unit, grads, self._module_weights)

    def reduce(self, name: str, frame: Frame) -> None:
        """End a unit's backward: reduce its gradients, keep the rank's shard, and free the weights."""
        unit = self._units.get(name)
        if unit is None:
            return
        self._tape.waiting = None
        grads = self._grads.pop(name, [])
        summed = self._summed[name].pop() if self._summed.get(name) else []
        whole = self._whole.pop(name, [])
        finished = _FinishedUnit(unit, [*grads, *summed], whole)
        if self._asks_ahead and unit.parts:
            finished, self._delayed = self._delayed, finished
        if finished is not None:
            # a loop's variable holds the last gradient; those of blocks are norms', which take nothing
            ends = (BEFORE, AFTER, ROOT) if self._root_has_ends else (BEFORE, AFTER)
            self._reduce(frame, *finished, held=grads[:1] if name in ends and self._keeps_buffers else [])
        self._tape.waiting = self._grads.get(REST)

    def _reduce(
        self, frame: Frame, unit: Unit, grads: list[Storage], whole: list[Storage], held: list[Storage] | None = None
    ) -> None:
        if self._asks == "last" or (not unit.parts and self._asks in ("gone", "never")):
            self._ask_next(frame)
        self._enter(frame, "reduce_scatter")
        if self._keeps_buffers:
            self._drop(whole)
            self._drop(self._sent)
        if grads:
            joined = self._tape.alloc_buffers(unit.joined, "temp", COMPUTING if self._keeps_buffers else LENT)
            joined += self._tape.alloc_buffers(unit.padded, "temp", REDUCING)
            copied = self._tape.alloc_buffers(unit.parts, "gradient") if unit.laid else []
            for storage in held or ():
                storage.refs += 1
            self._drop(grads)
            self._drop(whole)
            self._ask_gone(frame)
            received = self._tape.alloc_buffers(unit.received, "temp", REDUCING)
            parts = copied or self._tape.alloc_buffers(unit.parts, "gradient", REDUCING)
            self._drop(self._tape.alloc_buffers(unit.divided, "temp"))
            self._drop(held or [])
            if self._waits:
                self._received += received
            else:
                self._drop(received)
            if self._leaves and self._waits and not unit.received:  # replicas sum the parts themselves
                self._received += parts
            elif self._grads_exist or self._leaves:
                self._drop(parts)
            if self._keeps_buffers:
                self._sent = joined
            else:
                self._drop(joined)
        self._drop(whole)
        self._ask_gone(frame)

    def end(self, frame: Frame) -> None:
        """End the pass; `frame` was the last in backward."""
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
        if self._following in self._units and not self._kept.get(self._following):
            self._drop(self._ahead)
            self._ahead, self._asked = self._ask(self._units[self._following]), self._following
        self._following = ""

    def _ask(self, unit: Unit) -> list[Storage]:
        """Allocate the output of an all-gather.

        FSDP2 copies the weights out of it on the compute stream, and casts the shard on the gathering stream.
        """
        cast = self._tape.alloc_buffers(unit.cast, "temp", GATHERING if self._keeps_buffers else CASTING)
        written, kind = (unit.message, "temp") if self._keeps_buffers else (unit.whole, "parameter")
        asked = self._tape.alloc_buffers(written, kind, GATHERING)
        self._drop(cast)
        return asked

    def _enter(self, frame: Frame, what: str) -> None:
        self._tape.enter(frame, Op(what, source=self._source))

    def _drop(self, storages: list[Storage]) -> None:
        while storages:
            self._tape.drop(storages.pop())
