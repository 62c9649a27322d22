"""Lowering: operations become moments, each a count of the storages alive. Structure only: no sizes, no depth.

`Tape` runs the operations as torch does (reference counts, saved tensors, gradient buffers) and notes what is alive
whenever memory is about to fall. A repeated block is run once: what its further copies add is counted per copy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

from memplan.core.errors import InternalError
from memplan.core.ir import Op, SavedTensors, Tensor, Unit
from memplan.engine.dtypes import FLOATING, Scope

Way = Literal["past", "forward", "backward"]  # past: what a copy finds of the pass before
Counts = dict[int, int]  # size -> how many storages of it are alive
_MOST_CHANGES = 32  # that a moment has by itself, before the counts are shared again

# The streams that a process allocates on, each with pools of its own: the one it computes on, and those that FSDP and
# DeepSpeed gather weights on, cast a rank's part on before that, and reduce gradients on. What is LENT was allocated on
# the first, and is read on the last.
COMPUTING, GATHERING, CASTING, REDUCING, LENT = range(5)


class Moment(NamedTuple):
    """How many storages of each size are alive at one point of a pass.

    shared    in the copies that are run: counts that many moments have in common
    changes   to be added to those
    per_copy  added by each copy of a run beyond the first; many moments have these in common, too
    """

    phase: str
    where: str
    shared: Counts
    changes: Counts
    per_copy: Mapping[int, Counts]

    @property
    def counts(self) -> Counts:
        """How many storages of each size are alive in the copies that are run."""
        return _total(self.shared, self.changes)

    def less(self, other: Moment) -> Moment:
        """What is alive here and not at the other moment."""
        per_copy = {run: _negative(counts) for run, counts in other.per_copy.items()}
        return next(add_to_each((self,), other._replace(shared=_negative(other.counts), changes={}, per_copy=per_copy)))


def add_to_each(moments: Iterable[Moment], other: Moment) -> Iterator[Moment]:
    """Add what is alive at another moment to each of the moments."""
    before: Moment | None = None
    shared: Counts = {}
    per_copy: Mapping[int, Counts] = {}
    for moment in moments:
        if before is None or moment.shared is not before.shared:
            shared = _total(moment.shared, other.counts)
        if before is None or moment.per_copy is not before.per_copy:
            runs = {*moment.per_copy, *other.per_copy}
            per_copy = {run: _total(moment.per_copy.get(run, {}), other.per_copy.get(run, {})) for run in runs}
        before = moment
        yield moment._replace(shared=shared, per_copy=per_copy)


def _total(a: Counts, b: Counts) -> Counts:
    out = dict(a)
    for size, n in b.items():
        out[size] = out.get(size, 0) + n
    return out


def _negative(counts: Counts) -> Counts:
    return {size: -n for size, n in counts.items()}


def leaves(op: Op) -> tuple[str, ...]:
    """What the operation makes that asks for a gradient of its own."""
    return tuple(t.name for t in op.writes) if op.asks and op.gradient == "none" else ()


class Storage:
    """One storage alive: its size, who refers to it, and whether autograd may add into it in place."""

    __slots__ = ("fresh", "number", "refs", "run", "shared", "size")

    def __init__(self, size: int, fresh: bool) -> None:
        self.size = size
        self.refs = 1
        self.fresh = fresh
        self.number = -1  # where events are recorded, its place among all
        self.shared = False  # by the copies of a run: made outside of it
        self.run: int | None = None  # the run whose every copy holds one like it


class Node:
    """One operation of the backward graph, the storages it keeps, and what it keeps in host memory."""

    __slots__ = ("away", "fetched", "kept", "op", "pins", "targets")

    def __init__(self, op: Op, targets: tuple[str, ...], pins: tuple[str, ...]) -> None:
        self.op, self.targets, self.pins = op, targets, pins
        self.kept: list[Storage] = []
        self.away: dict[str, Tensor] = {}
        self.fetched: dict[str, Storage] = {}  # what came back of it, for the operation's backward


class Frame:
    """One execution of a list of operations, and the backward graph it leaves."""

    def __init__(
        self,
        ops: Sequence[Op],
        scope: Scope,
        outer: dict[str, Storage],
        flows: Iterable[str],
        block: str = "",
        layer: int | None = None,
    ) -> None:
        self.block = block
        uses = Counter(w.name for op in ops if block and op.gradient != "none" for w in op.weights if w.trains)
        self.uses = {name: n for name, n in uses.items() if n > 1}  # how many operations of a block use a weight
        self.where = "" if layer is None else f"{block}.{layer}."
        self.ops = ops
        self.scope = scope
        self.outer = outer
        self.flows = set(flows)
        self.nodes: list[Node] = []
        self.names: dict[str, Storage] = {}
        self.checkpointed = False
        self.reentrant = False
        self.recomputed = False
        self.whole = False  # a checkpoint runs all of it again
        self.exported: Container[str] = ()
        self.checkpoint: list[Storage] = []  # what a checkpoint keeps: the block's inputs
        self.named: list[Storage] = []  # what it keeps until the graph goes
        self.to_host = False  # but for `x`, which it keeps in host memory
        self.shares: Container[str] = ()  # what it makes for later blocks, which the checkpoints of all refer to
        self.shared: list[Storage] = []
        self.lends = False  # what it makes for later blocks is in a dictionary: of the reentrant kind, with its graph
        self.past: Mapping[str, Storage] = {}  # what the pass before left for it

    def __getitem__(self, name: str) -> Storage:
        return self.names[name] if name in self.names else self.outer[name]

    def storage(self, name: str) -> Storage | None:
        """The storage of a tensor; None for a weight, which is there throughout."""
        return self.names.get(name) or self.outer.get(name)


class Tape:
    """Runs frames forward and backward and collects moments.

    A tensor is counted under its shape and dtype; `labelled`, under its kind, place, name and source too. `updates`
    are the bytes of scratch that a weight's update needs as soon as its gradient is there, by the weight's path.
    """

    def __init__(
        self, grads_exist: bool = False, labelled: bool = False, updates: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        self.sizes: dict[tuple[str, ...], int] = {}
        self.moments: list[Moment] = []
        self.phase = "forward"
        self.stream = COMPUTING  # that allocations are made on
        self._labelled = labelled
        self._updates = updates
        self._grads_exist = grads_exist
        self._counts: Counts = {}
        self._base: Counts = {}  # the counts some time ago, which the moments since share
        self._changes: Counts = {}  # how the counts differ from those
        self._per_copy: Mapping[int, Counts] = {}  # never changed in place, since moments share it
        self._rising = False
        self._where = ""
        self._block = ""
        self._op = Op("")
        self._in_run: int | None = None
        self._born: set[Storage] = set()  # storages alive that were born in the current run
        self._held: dict[str, list[Storage]] = {"forward": [], "step": [], "nodes": []}
        self.host = Moment("forward", "", {}, {}, {})  # what is in host memory when forward is done
        self.saves: SavedTensors | None = None  # how what is kept in forward goes there, if it does
        self._pending: dict[str, Storage] = {}  # gradients of weights that wait for a further use's
        self.uses: dict[str, int] = {}  # how many operations use a weight, where more than one does
        self._shared: list[Storage] = []  # what blocks made again for others, and what its graph keeps
        self.nested: Mapping[str, Unit] = {}  # weights that are gathered for the operation that uses them
        self.reaches_first: Callable[[], None] | None = None  # is called before the first such operation's backward
        self.waiting: list[Storage] | None = None  # gradients that stay until those of their unit are all there
        self.waiting_outside: Mapping[str, list[Storage]] = {}  # the same, by the name of a weight outside of blocks
        self.reach: Callable[[Frame, Op], None] | None = None  # is told before an operation outside of blocks runs
        self.module: Callable[[str, str, Frame], None] | None = None  # is told when a module begins and returns
        self.hooks = False  # a hook keeps what a recomputed block was given, and its gradient
        self._hooked: list[tuple[Storage, int | None]] = []  # those, and the run of whose copies each has one
        self._lives: dict[tuple[int, bool], tuple[Sequence[Op], list[tuple[str, ...]]]] = {}  # see _last_uses
        self._lent: dict[str, list[tuple[str, Storage]]] = {}  # gradients of weights that an operation lends, by module

    # storages

    def alloc(self, tensor: Tensor, kind: str, fresh: bool = True, of: str = "") -> Storage:
        key = (tensor.shape, tensor.dtype)
        if self._labelled:
            key = (*key, kind, self._block, self._op.name, of + tensor.name, self._op.source)
        storage = Storage(self.sizes.setdefault(key, len(self.sizes)), fresh)
        self._count(storage.size, 1)
        self._rising = True
        self._peak_where = self._where
        if self._in_run is not None:
            self._born.add(storage)
        return storage

    def made(self, tensors: Iterable[Tensor], kind: str, stream: int = COMPUTING) -> list[Storage]:
        """Storages that a collective reads or writes, allocated on its stream."""
        self.stream = stream
        storages = [self.alloc(t, kind) for t in tensors]
        self.stream = COMPUTING
        return storages

    def drop(self, storage: Storage) -> None:
        storage.refs -= 1
        if storage.refs > 0:
            return
        if storage.refs < 0:
            raise self._freed_twice(storage.size)
        if storage.shared and self._in_run is not None:
            self._deferred.append(storage)  # the run's last copy drops it
            return
        self.note()
        self._count(storage.size, -1)
        self._born.discard(storage)
        if storage.run is not None and storage.run != self._in_run:
            self._count_in_copies(storage.run, storage.size, -1)
            if self._per_copy[storage.run][storage.size] < 0:
                raise self._freed_twice(storage.size)

    def _freed_twice(self, size: int) -> InternalError:
        shape, dtype, *labels = [*self.sizes][size]
        name = " ".join(filter(None, (shape, dtype, *labels[3:4])))
        return InternalError(f"a tensor ({name}) is freed once more than it is made, in {self.phase} at {self._where}")

    def _count(self, size: int, n: int) -> None:
        left = self._counts.get(size, 0) + n
        if left:
            self._counts[size] = left
        else:
            self._counts.pop(size, None)
        self._changes[size] = self._changes.get(size, 0) + n

    def _count_in_copies(self, run: int, size: int, n: int) -> None:
        copies = self._per_copy.get(run, {})
        self._per_copy = {**self._per_copy, run: {**copies, size: copies.get(size, 0) + n}}

    def of_copies(self, storage: Storage, run: int) -> None:
        """Every copy of the run has one like this storage, which was made outside of it."""
        storage.run = run
        self._count_in_copies(run, storage.size, 1)

    def recall(self, blocks: Iterable[tuple[str, Iterable[Op]]], run: int | None = None) -> list[dict[str, Storage]]:
        """What the pass before left for each of the blocks, named and with their operations; in a run, for each of its
        copies."""
        found: list[dict[str, Storage]] = []
        for name, ops in blocks:
            found.append({})
            for op in ops:
                self._block, self._op = name, op
                for t in op.past:
                    found[-1][t.name] = storage = self.alloc(t, "activation")
                    if run is not None:
                        self.of_copies(storage, run)
        return found

    def note(self) -> None:
        """Write the moment down, if memory rose since the last one."""
        if self._rising:
            self._rising = False
            if len(self._changes) > _MOST_CHANGES:
                self._base, self._changes = dict(self._counts), {}
            changes = dict(self._changes)
            self.moments.append(Moment(self.phase, self._peak_where, self._base, changes, self._per_copy))

    def snapshot(self) -> Moment:
        """What is alive now."""
        return Moment(self.phase, self._where, dict(self._counts), {}, self._per_copy)

    def enter(self, frame: Frame, op: Op) -> None:
        """What follows is the operation's."""
        self._where, self._block, self._op = f"{frame.where}{op.name}", frame.block, op

    # what is computed

    def computed(self, frame: Frame, op: Op) -> None:
        """The operation is about to compute what it writes, in forward or, recomputed, in backward."""

    def differentiated(self, frame: Frame, node: Node, of: tuple[Tensor, ...]) -> None:
        """The node is about to make its targets' gradients from those `of` its outputs."""

    # forward

    def forward(
        self,
        frame: Frame,
        exported: Container[str],
        owned: Mapping[str, Storage] = MappingProxyType({}),
        grad: bool = True,
        checkpoint: bool = False,
    ) -> dict[str, Storage]:
        """Run the frame's operations and return the references left: to the `exported` names.

        `owned` are references handed in, dropped after their last reader. Under a checkpoint nothing is kept.
        """
        frame.nodes = self._graph(frame, grad)
        frame.checkpointed = checkpoint
        frame.exported = exported
        left = self._run(frame, len(frame.ops), exported, owned, keep=not checkpoint, holds=self._held)
        if not any(node.pins for node in frame.nodes):  # nothing will ask for a recomputation
            frame.checkpoint += frame.named
            self._release_checkpoint(frame)
            return left
        self._held["nodes"] += frame.named
        if frame.to_host:
            self._put_away(frame.scope["x"])
        return left

    def _put_away(self, tensor: Tensor) -> None:
        """A copy of `tensor` is in host memory from here on; in a run, one for each of its copies."""
        key = self.sizes.setdefault((tensor.shape, tensor.dtype), len(self.sizes))
        counts, per_copy = self.host.shared, self.host.per_copy
        counts[key] = counts.get(key, 0) + 1
        if self._in_run is not None:
            copies = per_copy.get(self._in_run, {})
            own = {**copies, key: copies.get(key, 0) + 1}
            self.host = self.host._replace(per_copy={**per_copy, self._in_run: own})

    def _save_away(self, frame: Frame, node: Node) -> Container[str]:
        """What the node keeps in host memory from here on: nothing of what is computed again in backward, and of
        quantised weights nothing, which autograd does not save."""
        if self.saves is None or self.phase == "backward":
            return ()
        seen = {k.what: k.seen for k in node.op.keeps if k.seen}
        stored = {w.name for w in node.op.weights if w.stored}
        for what in node.pins:
            if what not in stored and (self.saves.weights or frame.storage(what) is not None):
                tensor = frame.scope[what]
                node.away[what] = tensor._replace(shape=seen.get(what, tensor.shape))
                self._put_away(node.away[what])
        return node.away

    def _fetch(self, frame: Frame) -> list[Storage]:
        """What a checkpoint kept in host memory comes back, as a copy that goes once it has been used."""
        if not frame.to_host:
            return []
        self._where, self._block, self._op = f"{frame.where}checkpoint", frame.block, Op("checkpoint")
        copy = self.alloc(frame.scope["x"], "activation")
        frame.outer = {**frame.outer, "x": copy}
        return [copy]

    def _graph(self, frame: Frame, grad: bool) -> list[Node]:
        nodes: list[Node] = []
        for op in frame.ops:
            targets: tuple[str, ...] = ()
            pins: tuple[str, ...] = ()
            if grad and op.gradient != "none":
                targets = tuple(r for r in dict.fromkeys(op.reads) if r in frame.flows)
                targets += tuple(w.name for w in op.weights if w.trains)
                targets += tuple(t.name for t in op.wraps)
                if targets:
                    frame.flows.update(t.name for t in op.writes if t.dtype in FLOATING)
                    pins = tuple(dict.fromkeys(k.what for k in op.keeps if k.of in targets))
            elif grad:
                frame.flows.update(leaves(op))
            nodes.append(Node(op, targets, pins))
        return nodes

    def _run(
        self,
        frame: Frame,
        end: int,
        exported: Container[str],
        owned: Mapping[str, Storage],
        keep: bool,
        holds: dict[str, list[Storage]],
    ) -> dict[str, Storage]:
        """Run the first `end` operations; the last of them, if `end` cuts the list, only as far as what it keeps.

        What is held to the end of the forward pass or of the step is added to `holds`.
        """
        ops, names = frame.ops, frame.names
        ends = self._last_uses(ops, keep)
        cut = end < len(ops)
        mine = dict(owned)  # Python's references
        for i, op in enumerate(ops[:end]):
            if op.lends:
                self._tell("begins", op.lends, frame)
            self.enter(frame, op)
            node = frame.nodes[i]
            for t in op.past:
                names[t.name] = mine[t.name] = frame.past[t.name]
            skipped = op.recorded and not keep
            if not skipped and not (cut and i == end - 1 and all(t.name not in node.pins for t in op.writes)):
                if self.reach is not None and op.writes and not frame.block:
                    self.reach(frame, op)
                    self.enter(frame, op)
                self.computed(frame, op)
                whole = self._gathered(op)
                for t in op.writes:
                    if op.view:
                        names[t.name] = frame[op.reads[0]]
                    else:
                        names[t.name] = mine[t.name] = self.alloc(t, "activation")
                for scratch in [*(self.alloc(t, "temp") for t in op.scratch), *whole]:
                    self.drop(scratch)
            if keep and node.pins:
                away = self._save_away(frame, node)
                for what in node.pins:
                    storage = frame.storage(what)
                    if storage is not None and what not in away:  # a weight is there anyway
                        storage.refs += 1
                        node.kept.append(storage)
            if op.holds:
                for t in op.writes:
                    names[t.name].refs += 1
                    holds.setdefault(op.holds, []).append(names[t.name])
            if op.releases:
                for storage in holds.pop("states", ()):
                    self.drop(storage)
            if op.captures and node.targets and (keep or not frame.reentrant):
                for name in op.captures:
                    frame[name].refs += 1
                    holds["nodes"].append(frame[name])
            if op.asks and (keep or not frame.reentrant):
                for name in leaves(op):  # the node that accumulates its gradient refers to it
                    names[name].refs += 1
                    holds["nodes"].append(names[name])
            for name in ends[i]:
                if name not in exported and name in mine:
                    self.drop(mine.pop(name))
            if op.returns:
                self._tell("returns", op.returns, frame)
        for name in [n for n in mine if n not in exported]:
            self.drop(mine.pop(name))
        return mine

    def _last_uses(self, ops: Sequence[Op], keep: bool) -> list[tuple[str, ...]]:
        """For each operation the names of tensors that none after it reads: those it writes, reads, or finds of the
        pass before. A view stands for what it is a view of. Copies of a layer have the same operations."""
        known = self._lives.get((id(ops), keep))
        if known is not None:
            return known[1]
        root: dict[str, str] = {}
        last: dict[str, int] = {}
        for i, op in enumerate(ops):
            for r in () if op.recorded and not keep else op.reads:
                last[root.get(r, r)] = i
            if op.view:
                root[op.writes[0].name] = root.get(op.reads[0], op.reads[0])
                for t in op.writes[1:]:
                    root[t.name] = root[op.writes[0].name]
        found: list[tuple[str, ...]] = []
        for i, op in enumerate(ops):
            used = (*(t.name for t in op.writes), *op.reads, *(t.name for t in op.past))
            found.append(tuple(n for n in dict.fromkeys(root.get(n, n) for n in used) if last.get(n, i) == i))
        self._lives[id(ops), keep] = ops, found
        return found

    def _tell(self, event: str, module: str, frame: Frame) -> None:
        if self.module is not None:
            self.module(event, module, frame)

    def _gathered(self, op: Op) -> list[Storage]:
        """The weights of an operation that are gathered for it."""
        found: list[Storage] = []
        if not self.nested:
            return found
        for unit in (self.nested[w.name] for w in op.weights if w.name in self.nested):
            cast = self.made(unit.cast, "temp", CASTING)
            found += self.made(unit.whole, "parameter", GATHERING)
            for storage in cast:
                self.drop(storage)
        return found

    def end_forward(self) -> None:
        """The autocast context closes and the model's outputs go."""
        for storage in self._held.pop("forward"):
            self.drop(storage)

    def end_step(self, *gradients: Storage) -> tuple[Moment, Moment]:
        """What is held to the end of the step goes, with the `gradients` of it, then what the graph's nodes refer to.

        Returns how much each was.
        """
        found: list[Moment] = []
        for name, more in (("step", gradients), ("nodes", ())):
            before = self.snapshot()
            for storage in (*self._held.pop(name), *more):
                self.drop(storage)
            found.append(before.less(self.snapshot()))
        return found[0], found[1]

    # backward

    def backward(self, frame: Frame, grads: dict[str, Storage]) -> None:
        """Run the frame's graph backward; `grads` holds gradients by tensor name, and is left with the inputs'."""
        if frame.checkpointed and frame.reentrant:
            self._reenter(frame, grads)
            return
        savers = [i for i, node in enumerate(frame.nodes) if node.pins]
        gathers = (i for i, op in enumerate(frame.ops) if any(w.name in self.nested for w in op.weights))
        first = next(gathers, None) if self.nested else None
        self._lent = {op.lends: [] for op in frame.ops if op.lends}
        for i in reversed(range(len(frame.nodes))):
            node = frame.nodes[i]
            if node.op.returns:
                self._tell("differentiated", node.op.returns, frame)
            if node.op.lends:
                for name, storage in self._lent.pop(node.op.lends, ()):
                    self._weight_gradient(frame, name, storage)
                self._tell("reduced", node.op.lends, frame)
            if not node.targets:
                continue
            if frame.checkpointed and node.pins:
                self._recompute(frame, len(frame.ops) if frame.whole else savers[-1] + 1)
            if i == first and self.reaches_first is not None:
                self.reaches_first()
            self.enter(frame, node.op)
            self._backward(frame, node, grads)
            if savers and i == savers[0]:
                self._release_checkpoint(frame)
        self._release_checkpoint(frame)

    def _release_checkpoint(self, frame: Frame) -> None:
        while frame.checkpoint:
            self.drop(frame.checkpoint.pop())

    def _recompute(self, frame: Frame, end: int) -> None:
        frame.checkpointed = False
        frame.recomputed = True
        frame.names = {}
        fetched = self._fetch(frame)
        holds: dict[str, list[Storage]] = {"forward": [], "step": [], "nodes": []}
        made = self._run(frame, end, frame.shares, {}, keep=True, holds=holds)
        for storage in (*holds["forward"], *holds["step"], *holds["nodes"], *fetched):
            self.drop(storage)
        self._share_again(frame, made)

    def _share_again(self, frame: Frame, made: Mapping[str, Storage]) -> None:
        """What a block made for later ones is made again, and takes the old one's place: the graph of what is computed
        again stays behind it, with all that it keeps, as long as any checkpoint does."""
        for storage in frame.shared:
            self.drop(storage)
        frame.shared = []
        wanted = set(made)
        kept: list[Storage] = []
        for node in reversed(frame.nodes):
            if node.targets and not wanted.isdisjoint(t.name for t in node.op.writes):
                wanted.update(node.op.reads)
                kept += node.kept
        for storage in kept:
            storage.refs += 1
        self._shared += (*made.values(), *kept)

    def end_hooks(self) -> None:
        """The pass is over, and the hooks on what blocks were given go."""
        while self._hooked:
            storage, run = self._hooked.pop()
            storage.run = run
            self.drop(storage)

    def end_blocks(self) -> None:
        """No checkpoint is left: what blocks made for others goes."""
        while self._shared:
            self.drop(self._shared.pop())

    def _reenter(self, frame: Frame, grads: dict[str, Storage]) -> None:
        """A backward pass within the backward pass: all of the frame is run again first, and what it was given, what
        it returned and that one's gradient stay until it is over."""
        if not any(t.name in grads for op in frame.ops for t in op.writes):
            self._release_checkpoint(frame)
            return
        frame.checkpointed = False
        frame.names = {}
        gradients, inputs = list(grads.values()), [*self._fetch(frame), *frame.checkpoint]
        frame.checkpoint = []
        for storage in gradients:
            storage.refs += 1
        holds: dict[str, list[Storage]] = {"forward": [], "step": [], "nodes": []}
        returned = self._run(frame, len(frame.ops), frame.exported, {}, keep=True, holds=holds)
        for storage in holds["forward"]:
            self.drop(storage)
        before = len(self._held["nodes"])
        self.backward(frame, grads)
        holds["nodes"] += self._held["nodes"][before:]
        del self._held["nodes"][before:]
        for name in [t.name for op in frame.ops for t in op.writes if t.name in grads]:  # nothing here makes use of it
            self.drop(grads.pop(name))
        if frame.lends and "x" in grads:  # the graph of what was lent ends in the block's input, which has its gradient
            for storage in (inputs[0], grads["x"]):
                storage.refs += 1
                self._shared.append(storage)
        if self.hooks and "x" in grads:
            for storage in (inputs[0], grads["x"]):
                storage.refs += 1
                self._hooked.append((storage, self._in_run))
        for storage in (*gradients, *returned.values(), *inputs, *holds["step"], *holds["nodes"]):
            self.drop(storage)

    def _backward(self, frame: Frame, node: Node, grads: dict[str, Storage]) -> None:
        op = node.op
        incoming = [(t, grads.pop(t.name)) for t in op.writes if t.name in grads]
        if not incoming:
            self._release(node)
            return
        whole = self._gathered(op)
        self.differentiated(frame, node, tuple(t for t, _ in incoming))
        node.fetched = {what: self.alloc(tensor, "activation") for what, tensor in node.away.items()}
        node.kept += node.fetched.values()
        scratch = [s for s in op.scratch_back if not s.summed and (not s.of or s.of in node.targets)]
        early = [self.alloc(s.tensor, "temp") for s in scratch if s.early]
        beside = [self.alloc(s.tensor, "temp") for s in scratch if not s.early]
        for storage in early:
            self.drop(storage)
        raw = [self._gradient(frame, node, target, incoming) for target in node.targets]
        for storage in beside:
            self.drop(storage)
        if frame.recomputed or node.fetched:  # what was unpacked goes when the function returns, before the casts
            self._release(node)
        made = [
            (target, self._own_dtype(frame, node, target, storage) if wide else storage)
            for target, (storage, wide) in zip(node.targets, raw, strict=True)
        ]
        for _, storage in incoming:
            self.drop(storage)
        self._release(node)
        weights, wrapped = {w.name for w in op.weights}, {t.name for t in op.wraps}
        for target, storage in made:
            if target in wrapped:
                self._held["nodes"].append(storage)
            elif target in self.nested:
                self._reduced(self.nested[target], storage, whole)
            elif target in weights:
                self._weight_gradient(frame, target, storage)
            else:
                grads[target] = self._sum(frame.scope[target], grads.get(target), storage)
        for storage in whole:
            self.drop(storage)

    def _reduced(self, unit: Unit, gradient: Storage, whole: list[Storage]) -> None:
        """The gradient of a weight gathered for its operation is reduced at once, and the `whole` weight goes."""
        joined = self.made(unit.joined, "temp", LENT) + self.made(unit.padded, "temp", REDUCING)
        laid = self.made(unit.parts, "gradient") if unit.laid else []
        for storage in (gradient, *whole):
            self.drop(storage)
        whole.clear()
        received = self.made(unit.received, "temp", REDUCING)
        parts = laid or self.made(unit.parts, "gradient", REDUCING)
        for storage in (*received, *joined, *(parts if self._grads_exist else ())):
            self.drop(storage)

    def _release(self, node: Node) -> None:
        for storage in node.kept:
            self.drop(storage)
        node.kept, node.fetched = [], {}

    def _own_dtype(self, frame: Frame, node: Node, target: str, wide: Storage) -> Storage:
        """A gradient that came in the promoted dtype is cast to its own, or summed, when all of the node's are made."""
        made = self.alloc(frame.scope[target], _kind(node.op, target), of="gradient of ")
        self.drop(wide)
        return made

    def _gradient(
        self, frame: Frame, node: Node, target: str, incoming: list[tuple[Tensor, Storage]]
    ) -> tuple[Storage, bool]:
        """The gradient of `target`, and whether it is still to be cast from the promoted dtype, or to be summed."""
        op, like = node.op, frame.scope[target]
        whole = next((w.gradient for w in op.weights if w.gradient and w.name == target), "")
        like = like._replace(shape=whole) if whole else like
        becomes = next((k.what for k in op.keeps if k.becomes and k.of == target), None)
        if becomes is not None:
            kept = node.fetched[becomes] if becomes in node.fetched else frame[becomes]
            kept.refs += 1
            return kept, False
        unsummed = next((s.tensor for s in op.scratch_back if s.summed and s.of == target), None)
        if unsummed is not None:
            return self.alloc(unsummed, "temp", of="gradient of "), True
        if op.gradient == "same":
            out, storage = incoming[0]
            aliased = op.view and target == op.reads[0]
            if aliased or (out.shape, out.dtype) == (like.shape, like.dtype):
                storage.refs += 1
                return storage, False
        out = op.writes[0]
        if op.cast or op.gradient in ("same", "own") or out.dtype == like.dtype:
            return self.alloc(like, _kind(op, target), fresh=op.gradient != "view", of="gradient of "), False
        return self.alloc(like._replace(dtype=out.dtype), "temp", of="gradient of "), True

    def _sum(self, like: Tensor, old: Storage | None, new: Storage, kind: str = "temp") -> Storage:
        """Autograd adds into the older gradient in place if nothing else refers to it, else into a new storage."""
        if old is None:
            return new
        if old.refs == 1 and old.fresh:
            self.drop(new)
            return old
        total = self.alloc(like, kind, of="gradient of ")
        self.drop(old)
        self.drop(new)
        return total

    def _weight_gradient(self, frame: Frame, name: str, storage: Storage) -> None:
        late = self._lent.get(name.rpartition(".")[0])
        if late is not None:
            late.append((name, storage))
            return
        uses = frame.uses if frame.block else self.uses
        left = uses.get(name, 1) - 1
        total = self._sum(frame.scope[name], self._pending.pop(name, None), storage, "gradient")
        if left:
            uses[name] = left
            self._pending[name] = total
            return
        update = self._updates.get(f"{frame.block}.{name}" if frame.block else name)
        if update:
            self.drop(self.alloc(Tensor(f"update of {name}", str(update), "uint8"), "temp"))
        waiting = self.waiting if frame.block else self.waiting_outside.get(name, self.waiting)
        if waiting is not None:
            waiting.append(total)
        elif self._grads_exist:
            self.drop(total)

    # copies of equal blocks, and runs of them

    def enter_copy(self, number: int, way: Way, skipped: int) -> None:
        """One copy's part begins; `number` is its place among those that are run. `skipped` after it are left out."""

    def leave_copy(self) -> None:
        """The copy is done."""

    def enter_run(self, run: int, first: Mapping[str, str]) -> None:
        """What follows stands for every copy of a run of blocks. `first` says what the last copy's layers are called
        in the first one."""
        self.note()
        self._in_run = run
        self._first = first
        self._born = set()
        self._deferred: list[Storage] = []
        self._before = dict(self._counts)
        self._first_moment = len(self.moments)

    def _first_copy(self, where: str) -> str:
        last = next(layer for layer in self._first if where.startswith(layer))
        return self._first[last] + where.removeprefix(last)

    def leave_run(self, *passed_on: Storage) -> None:
        """The run's one copy is done: every further copy adds what this one left. `passed_on` is handed to the next."""
        self.note()
        run = self._in_run
        assert run is not None
        old, before, now = self._per_copy.get(run, {}), self._before, self._counts
        new = {k: old.get(k, 0) + now.get(k, 0) - before.get(k, 0) for k in sorted({*old, *before, *now})}
        new = {k: n for k, n in new.items() if n}
        keys, less = list(self.sizes), Counter[tuple[str, ...]]()  # by shape and dtype, whatever it is called
        for counts, sign in ((old, 1), (new, -1)) if old else ():
            for k, n in counts.items():
                less[keys[k][:2]] += sign * n
        spends = any(less[keys[k][:2]] > 0 for k in old)  # what the pass before left: the first copy may peak
        renamed = self._renamed(new, passed_on)
        shared: Mapping[int, Counts] | None = None
        with_new = with_old = self._per_copy
        for i in range(self._first_moment, len(self.moments)):
            m = self.moments[i]
            if m.per_copy is not shared:
                shared = m.per_copy
                with_new, with_old = {**shared, run: new}, {**shared, run: old}
            last = m._replace(changes=self._as_last(m, renamed), per_copy=with_new)
            if self.phase == "backward":
                self.moments.append(last._replace(where=self._first_copy(m.where)))
            else:  # each copy leaves more alive, so the last one peaks
                self.moments[i] = last
                if spends:
                    self.moments.append(m._replace(where=self._first_copy(m.where), per_copy=with_old))
        negative = next((key for key, n in new.items() if n < 0), None)
        if negative is not None:
            raise self._freed_twice(negative)
        self._per_copy = {**self._per_copy, run: new}
        for storage in self._born:
            storage.run = run
        for storage in passed_on:  # there is one, whatever the run had of its kind
            storage.run = None
        self._in_run = None
        for storage in self._deferred:
            storage.refs += 1
            self.drop(storage)

    def _renamed(self, left: Counts, passed_on: Iterable[Storage]) -> dict[int, int]:
        """Labels of what the run was handed, by those of what it hands on, where they differ: from the second copy on
        the one stands for the other. Taken out of what each copy `left`."""
        out: dict[int, int] = {}
        if min(left.values(), default=0) >= 0:
            return out
        keys = list(self.sizes)
        for storage in passed_on:
            handed = next((k for k, n in left.items() if n < 0 and keys[k][:2] == keys[storage.size][:2]), None)
            if handed is not None and storage in self._born:
                out[handed] = storage.size
                left[handed] += 1
                left[storage.size] = left.get(storage.size, 0) - 1
        return out

    def _as_last(self, moment: Moment, renamed: Mapping[int, int]) -> Counts:
        """The changes of a moment of the last of several copies, given that of the run's one copy."""
        if not renamed:
            return moment.changes
        out = dict(moment.changes)
        for handed, name in renamed.items():
            alive = moment.shared.get(handed, 0) + out.get(handed, 0) - self._counts.get(handed, 0)
            out[handed] = out.get(handed, 0) - alive
            out[name] = out.get(name, 0) + alive
        return out


def _kind(op: Op, target: str) -> str:
    return "gradient" if any(t.name == target for t in (*op.weights, *op.wraps)) else "temp"
