"""`Tape`: running operations forward and backward as torch does: reference counts, saved tensors, gradient buffers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice
from types import MappingProxyType

from memplan.core.identity import Identity
from memplan.core.ir import Op, SavedTensors, Stack, Tensor, Unit
from memplan.engine.frames import NOTHING, Frame, Node
from memplan.engine.moments import Moment
from memplan.engine.operation_facts import (
    are_holding,
    gradient_flow,
    last_uses,
    leaves,
    parts_behind,
    without_recorded,
)
from memplan.engine.stash import Stash
from memplan.engine.storages import CASTING, COMPUTING, GATHERING, GRADIENT_OF, LENT, REDUCING, LiveStorages, Storage


class Tape(LiveStorages):
    """Runs frames forward and backward and collects moments.

    grads_exist  whether the gradients exist already, as in a later micro-batch
    labelled     as in `LiveStorages`
    updates      weight path -> scratch bytes of its update in backward, as soon as its gradient is there
    """

    def __init__(
        self, grads_exist: bool = False, labelled: bool = False, updates: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        super().__init__(labelled)
        self._updates = updates
        self._grads_exist = grads_exist
        self._held: dict[str, list[Storage]] = {"forward": [], "step": [], "nodes": []}
        self.host = Moment("forward", "", {}, (), 0, {})  # tensors in host memory at the end of forward
        self.saves: SavedTensors | None = None  # how saved tensors are offloaded, if they are
        self.stash: Stash | None = None  # those that are still on the GPU, if another stream copies them
        self._pending: dict[str, Storage] = {}  # gradients of weights that other operations will still add to
        self.uses: dict[str, int] = {}  # weight outside of blocks -> operations that use it, if more than one
        self._shared: list[Storage] = []  # recomputed outputs for other blocks, and what their graph keeps
        self.nested: Mapping[str, Unit] = {}  # weights that are gathered for the operation that uses them
        self.reaches_first: Callable[[], None] | None = None  # called before the first such operation's backward
        self.waiting: list[Storage] | None = None  # gradients that stay until their unit's gradients are complete
        self.waiting_outside: Mapping[str, list[Storage]] = {}  # likewise, by the name of a weight outside of blocks
        self.reach: Callable[[Frame, Op], None] | None = None  # called before an operation outside of blocks runs
        self.passed: Callable[[Frame, Op], None] | None = None  # called after the backward of such an operation
        self.module: Callable[[str, str, Frame], None] | None = None  # called when a module begins and returns
        self.hooks = False  # a hook keeps the input of a recomputed block, and its gradient
        self._hooked: list[tuple[Storage, int | None]] = []  # storages kept by hooks, and their run
        self._lent: dict[str, list[tuple[str, Storage]]] = {}  # module -> gradients of the weights it lends
        self.run_model: Callable[[Stack, str], None] | None = None  # runs an operation's model, in a phase

    def enter(self, frame: Frame, op: Op) -> None:
        """Attribute the following allocations to this operation."""
        self._layer, self._block, self._op = frame.where, frame.block, op

    @property
    def handed(self) -> list[Storage]:
        """The storages that one copy of a block hands to the next in the stash."""
        return self.stash.alone if self.stash is not None else []

    # hooks for subclasses

    def computed(self, frame: Frame, op: Op) -> None:
        """Called before an operation computes its outputs, in forward or recomputed in backward."""

    def differentiated(self, frame: Frame, node: Node, incoming: list[tuple[Tensor, Storage]]) -> None:
        """Called before a node computes the gradients of its targets from the `incoming` ones of its outputs."""

    # forward

    def forward(
        self,
        frame: Frame,
        exported: Collection[str],
        owned: Mapping[str, Storage] = MappingProxyType({}),
        grad: bool = True,
        checkpoint: bool = False,
    ) -> dict[str, Storage]:
        """Run the frame's operations and return the remaining references, to the `exported` names.

        `owned` are references handed in, which are dropped after their last reader. Under a checkpoint nothing is kept.
        """
        frame.checkpointed, frame.exported = checkpoint, exported
        frame.left = len(frame.ops) if checkpoint else 0
        if grad:
            frame.flow = gradient_flow(frame.ops, frame.flows)
            frame.flows |= frame.flow.flows
        left = self._run(frame, range(len(frame.ops)), exported, owned, keep=not checkpoint, holds=self._held)
        if frame.flow is None or not frame.flow.keeps:  # nothing needs recomputation
            frame.checkpoint += frame.named
            self._release_checkpoint(frame)
            return left
        self._held["nodes"] += frame.named
        if frame.to_host:
            self._offload(frame.scope["x"])
        return left

    def _offload(self, tensor: Tensor) -> None:
        """Count a copy of `tensor` in host memory; in a run, one per copy of the run."""
        key = self.sizes.setdefault((tensor.shape, tensor.dtype), len(self.sizes))
        counts, per_copy = self.host.shared, self.host.per_copy
        counts[key] = counts.get(key, 0) + 1
        if self._in_run is not None:
            counts = per_copy.get(self._in_run, {})
            counts = {**counts, key: counts.get(key, 0) + 1}
            self.host = self.host._replace(per_copy={**per_copy, self._in_run: counts})

    def _offload_saved(self, frame: Frame, node: Node, outputs: bool) -> None:
        """Offload the node's saved inputs, which autograd saves before it computes, or its outputs.

        Quantised weights are not offloaded, for autograd does not save them.
        """
        written = {t.name for t in node.op.writes}
        seen = {k.what: k.seen for k in node.op.keeps if k.seen}
        stored = {w.name for w in node.op.weights if w.stored}
        away = {**node.away}
        for what in [what for what in node.pins if (what in written) == outputs]:
            if what not in stored and self._leaves(frame, node.op, what):
                tensor = frame.scope[what]
                away[what] = tensor._replace(shape=seen.get(what, tensor.shape))
                self._offload(away[what])
        node.away = away

    def _leaves(self, frame: Frame, op: Op, what: str) -> bool:
        """Return whether a saved tensor is copied to host memory. Weights and tensors of a few numbers are not, nor, if
        there is a stash, what it holds and what its `stays` names."""
        storage = frame.storage(what)
        if self.stash is None or self.saves is None:
            return storage is not None or (self.saves is not None and self.saves.weights)
        if self.saves.stays and op.name.startswith(self.saves.stays):
            return False
        if storage is None or not any(map(str.isalpha, frame.scope[what].shape)):
            return self.stash.takes(None)
        return self.stash.takes((storage, parts_behind(Identity(frame.ops)).get(what, "")))

    def _unpack(self, frame: Frame, node: Node) -> None:
        """Copy the node's saved tensors back from host memory, except those that the stash still holds."""
        stashed, stream = ((), COMPUTING) if self.stash is None else (self.stash.held, GATHERING)
        fetched: dict[str, Storage] = {}
        for what, tensor in node.away.items():
            storage = frame.storage(what)
            if storage is not None and storage in stashed:
                storage.refs += 1
                fetched[what] = storage
            else:
                (fetched[what],) = self.alloc_buffers((tensor,), "activation", stream)
        node.fetched = fetched
        node.kept += fetched.values()

    def _fetch(self, frame: Frame) -> list[Storage]:
        """Copy the checkpoint's input back from host memory, if it is there; the caller drops the copy."""
        if not frame.to_host:
            return []
        self.enter(frame, Op("checkpoint"))
        copy = self.alloc(frame.scope["x"], "activation")
        frame.outer = {**frame.outer, "x": copy}
        return [copy]

    def _run(
        self,
        frame: Frame,
        part: range,
        exported: Collection[str],
        owned: Mapping[str, Storage],
        keep: bool,
        holds: dict[str, list[Storage]],
    ) -> dict[str, Storage]:
        """Run a part of the operations; if it ends before them, its last one only if that keeps one of its outputs.

        Storages held to the end of the forward pass or of the step are added to `holds`.
        """
        ops, names, outer = frame.ops, frame.names, frame.outer
        mine = dict(owned)  # references held by Python variables
        offloads = keep and self.saves is not None and self.phase != "backward"  # recomputed tensors stay
        last_node = frame.nodes[part.stop - 1] if part.stop < len(ops) else None
        facts = zip(ops, frame.nodes, last_uses(ops, keep), are_holding(ops), strict=False)
        for op, node, ends, holding in islice(facts, part.start, part.stop):
            if op.lends:
                self._call_module_hook("begins", op.lends, frame)
            self.enter(frame, op)
            for t in op.past:
                names[t.name] = mine[t.name] = frame.past[t.name]
            if offloads and node.pins:
                self._offload_saved(frame, node, outputs=False)
            unrecorded = op.needs_recording and not (keep and (node.pins or not op.keeps))
            if not unrecorded and (node is not last_node or _keeps_an_output(node)):
                self._compute(frame, op if node.pins or not op.recorded else without_recorded(op), mine)
            if frame.checkpointed and op.name in frame.saves:
                self._save_outputs(frame, op)
            if keep and node.pins:
                if offloads:
                    self._offload_saved(frame, node, outputs=True)
                for what in node.pins:
                    storage = names.get(what) or outer.get(what)
                    if storage is not None and what not in node.away:  # a weight is alive anyway
                        storage.refs += 1
                        node.kept.append(storage)
            if holding:
                self._hold(frame, op, bool(node.targets), keep, holds)
            for name in ends:
                if name in mine and name not in exported:
                    self.drop(mine.pop(name))
            if op.returns:
                self._call_module_hook("returns", op.returns, frame)
        for name in [n for n in mine if n not in exported]:
            self.drop(mine.pop(name))
        return mine

    def _save_outputs(self, frame: Frame, op: Op) -> None:
        """Let a checkpoint keep an operation's outputs."""
        for t in op.writes:
            storage = frame.saved[t.name] = frame.names[t.name]
            storage.refs += 1

    def _compute(self, frame: Frame, op: Op, mine: dict[str, Storage]) -> None:
        """Allocate an operation's outputs, which Python variables then reference (`mine`), and its scratch."""
        if frame.saved and not frame.checkpointed and op.name in frame.saves:
            mine |= {t.name: frame.saved.pop(t.name) for t in op.writes}
            frame.names.update((t.name, mine[t.name]) for t in op.writes)
            return
        if self.reach is not None and op.writes and not frame.block:
            self.reach(frame, op)
            self.enter(frame, op)
        self.computed(frame, op)
        if op.model is not None:
            self._run_aside(op.model, op.name)
            self.enter(frame, op)
        gathered = self._gather(op) if self.nested else ()
        if op.view or (op.is_view_again and frame.recomputed):
            frame.names.update((t.name, frame[op.reads[0]]) for t in op.writes)
        else:
            for t in op.writes:
                frame.names[t.name] = mine[t.name] = self.alloc(t, "activation")
        if op.scratch or gathered:
            for scratch in [*[self.alloc(t, "temp") for t in op.scratch], *gathered]:
                self.drop(scratch)

    def _run_aside(self, model: Stack, phase: str) -> None:
        """Run a model without gradients, in a phase of its own. Only what its caller holds (`cache`) is left."""
        assert self.run_model is not None
        self.note()
        before = self.phase, self._held, self.uses, self.nested, self.reach, self.module, self.hooks
        self.phase, self._held = phase, {"forward": [], "step": [], "nodes": []}
        self.nested, self.reach, self.module = {}, None, None
        self.run_model(model, phase)
        self.note()
        cached = self._held.pop("cache", ())
        self.phase, self._held, self.uses, self.nested, self.reach, self.module, self.hooks = before
        self._held.setdefault("forward", []).extend(cached)

    def _hold(self, frame: Frame, op: Op, differentiates: bool, keep: bool, holds: dict[str, list[Storage]]) -> None:
        """Reference what the operation's module, the graph's nodes, or a variable hold from now on, or let it go.

        `differentiates`: the operation has a node in the graph.
        """
        if op.holds:
            for t in op.writes:
                frame.names[t.name].refs += 1
                holds.setdefault(op.holds, []).append(frame.names[t.name])
        if op.releases.startswith("last "):
            self.drop(holds[op.releases.removeprefix("last ")].pop())
        elif op.holds and op.view:  # a cast that was dropped: what is held are the tensors themselves
            holds.setdefault(op.holds, []).extend(holds.pop(op.releases, ()))
        elif op.releases:
            for storage in holds.pop(op.releases, ()):
                self.drop(storage)
        if frame.reentrant and not keep:
            return
        for name in op.captures if differentiates else ():
            frame[name].refs += 1
            holds["nodes"].append(frame[name])
        for name in leaves(op):  # referenced by the node that accumulates its gradient
            frame.names[name].refs += 1
            holds["nodes"].append(frame.names[name])

    def _call_module_hook(self, event: str, module: str, frame: Frame) -> None:
        if self.module is not None:
            self.module(event, module, frame)

    def _gather(self, op: Op) -> list[Storage]:
        """Gather the weights that are gathered only for this operation, and return them."""
        gathered: list[Storage] = []
        for unit in (self.nested[w.name] for w in op.weights if w.name in self.nested):
            cast = self.alloc_buffers(unit.cast, "temp", CASTING)
            gathered += self.alloc_buffers(unit.whole, "parameter", GATHERING)
            for storage in cast:
                self.drop(storage)
        return gathered

    def end_forward(self) -> None:
        """Close the autocast context and free the model's variables and outputs."""
        for storage in (held for scope in ("autocast", "call", "forward") for held in self._held.pop(scope, ())):
            self.drop(storage)

    def forget(self, frame: Frame) -> None:
        """Free what a frame keeps for a backward that will not run, and recompute nothing there."""
        for node in frame.nodes:
            self._release(node)
        self._release_checkpoint(frame)
        frame.flow, frame.checkpointed = None, False
        vars(frame).update(nodes=[])

    @property
    def holds_for_model(self) -> bool:
        """Whether a model holds an output until its next pass."""
        return "model" in self._held

    def end_step(self, *gradients: Storage, behind: Iterable[Storage] = ()) -> tuple[Moment, Moment]:
        """Free what is held to the end of the step, with its `gradients`, then what the graph's nodes reference.

        Returns the storages freed by either. If a model holds an output until its next pass, these are that output and
        what is `behind` it in the graph, which are freed last.
        """
        if self.stash is not None:
            self.stash.pass_by(())
        freed: list[Moment] = []
        holds = self.holds_for_model
        for name, more in (("step", gradients), ("nodes", ()), ("model", behind)):
            before = self.snapshot()
            for storage in (*self._held.pop(name, ()), *more):
                self.drop(storage)
            freed.append(before.less(self.snapshot()))
        return (freed[2], before.less(before)) if holds else (freed[0], freed[1])

    # backward

    def backward(self, frame: Frame, grads: dict[str, Storage]) -> None:
        """Run the frame's graph backward. `grads` maps tensor names to gradients, in the end those of the inputs."""
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
                self._call_module_hook("differentiated", node.op.returns, frame)
            if node.op.lends:
                for name, storage in self._lent.pop(node.op.lends, ()):
                    self._weight_gradient(frame, name, storage)
                self._call_module_hook("reduced", node.op.lends, frame)
            if not node.targets:
                continue
            if node.pins and i < frame.left:
                self._recompute(frame, i)
            if i == first and self.reaches_first is not None:
                self.reaches_first()
            self.enter(frame, node.op)
            self._backward(frame, node, grads)
            if self.passed is not None and not frame.block:
                self.passed(frame, node.op)
            if savers and i == savers[0]:
                self._release_checkpoint(frame)
        self._release_checkpoint(frame)

    def _release_checkpoint(self, frame: Frame) -> None:
        frame.checkpoint += frame.saved.values()  # of operations that are not run again
        frame.saved = {}
        while frame.checkpoint:
            self.drop(frame.checkpoint.pop())

    def _recompute(self, frame: Frame, last: int) -> None:
        """Recompute the part of a checkpointed frame whose last operation that keeps something is this one."""
        begin, end = max(i for i in frame.begins if i <= last), len(frame.ops) if frame.whole else last + 1
        if len(frame.begins) > 1:  # what is saved are inputs, each kept until its part's backward is over
            frame.saves, read = (), {r for op in frame.ops[:end] for r in op.reads}
            for name in [name for name in frame.saved if name not in read]:
                self.drop(frame.saved.pop(name))
        frame.checkpointed, frame.left = False, begin
        frame.recomputed = True
        frame.names = {**frame.saved}
        fetched = self._fetch(frame)
        holds: dict[str, list[Storage]] = {"forward": [], "step": [], "nodes": []}
        outputs = self._run(frame, range(begin, end), frame.shares, {}, keep=True, holds=holds)
        for storage in (*(held for those in holds.values() for held in those), *fetched):
            self.drop(storage)
        self._replace_shared(frame, outputs)

    def _replace_shared(self, frame: Frame, outputs: Mapping[str, Storage]) -> None:
        """Replace a block's outputs for later blocks by the recomputed ones.

        Their graph, with everything it keeps, stays alive as long as any checkpoint.
        """
        for storage in frame.shared:
            self.drop(storage)
        frame.shared = []
        wanted = set(outputs)
        kept: list[Storage] = []
        for node in reversed(frame.nodes) if outputs else ():
            if node.targets and not wanted.isdisjoint(t.name for t in node.op.writes):
                wanted.update(node.op.reads)
                kept += node.kept
        for storage in kept:
            storage.refs += 1
        self._shared += (*outputs.values(), *kept)

    def end_hooks(self) -> None:
        """Free what the hooks on recomputed blocks reference, at the end of the pass."""
        while self._hooked:
            storage, run = self._hooked.pop()
            storage.run = run
            self.drop(storage)

    def end_blocks(self) -> None:
        """Free what blocks recomputed for other blocks, and gradients of what is past, once no block is left."""
        while self._shared:
            self.drop(self._shared.pop())

    def _reenter(self, frame: Frame, grads: dict[str, Storage]) -> None:
        """Run reentrant checkpointing's inner backward pass: recompute all of the frame, then run its graph backward.

        The frame's inputs and outputs and the outputs' gradients stay alive until it is over.
        """
        if not any(t.name in grads for op in frame.ops for t in op.writes):
            self._release_checkpoint(frame)
            return
        frame.checkpointed, frame.left = False, 0
        frame.names = {}
        gradients, inputs = list(grads.values()), [*self._fetch(frame), *frame.checkpoint]
        frame.checkpoint = []
        frame.detach(inputs)
        for storage in gradients:
            storage.refs += 1
        holds: dict[str, list[Storage]] = {"forward": [], "step": [], "nodes": []}
        returned = self._run(frame, range(len(frame.ops)), frame.exported, {}, keep=True, holds=holds)
        for storage in (held for name in ("autocast", "forward", "states") for held in holds.get(name, ())):
            self.drop(storage)
        before = len(self._held["nodes"])
        self.backward(frame, grads)
        holds["nodes"] += self._held["nodes"][before:]
        del self._held["nodes"][before:]
        for name in [t.name for op in frame.ops for t in op.writes if t.name in grads]:  # unused
            self.drop(grads.pop(name))
        if frame.lends and "x" in grads:  # the shared outputs' graph references the block's input, with its gradient
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
        backward = node.backward
        gathered = self._gather(op) if self.nested else []
        self.differentiated(frame, node, incoming)
        if node.away:
            self._unpack(frame, node)
        early = [self.alloc(t, "temp") for t in backward.early] if backward.early else ()
        late = [self.alloc(t, "temp") for t in backward.late] if backward.late else ()
        for storage in early:
            self.drop(storage)
        raw = [self._gradient(frame, node, target, incoming) for target in node.targets]
        for storage in late:
            self.drop(storage)
        if node.away and self.stash is not None:
            self.stash.pass_by(node.fetched.values())
        if frame.recomputed or self.saves is not None:  # what was unpacked is freed before the casts
            self._release(node)
        gradients = [
            self._own_dtype(frame, node, target, storage) if wide else storage
            for target, (storage, wide) in zip(node.targets, raw, strict=True)
        ]
        for _, storage in incoming:
            self.drop(storage)
        self._release(node)
        for target, storage in zip(node.targets, gradients, strict=True):
            if target in backward.wraps or target in backward.past:
                (self._held["nodes"] if target in backward.wraps else self._shared).append(storage)
            elif target in self.nested:
                self._reduce(self.nested[target], storage, gathered)
            elif target in backward.weights:
                self._weight_gradient(frame, target, storage)
            else:
                grads[target] = self._sum(frame.scope[target], grads.get(target), storage)
        for storage in gathered:
            self.drop(storage)

    def _reduce(self, unit: Unit, gradient: Storage, gathered: list[Storage]) -> None:
        """Reduce the gradient of a weight that was gathered for its operation, and free the `gathered` weight."""
        joined = self.alloc_buffers(unit.joined, "temp", LENT) + self.alloc_buffers(unit.padded, "temp", REDUCING)
        copied = self.alloc_buffers(unit.parts, "gradient") if unit.laid else []
        for storage in (gradient, *gathered):
            self.drop(storage)
        gathered.clear()
        received = self.alloc_buffers(unit.received, "temp", REDUCING)
        parts = copied or self.alloc_buffers(unit.parts, "gradient", REDUCING)
        for storage in (*received, *joined, *(parts if self._grads_exist else ())):
            self.drop(storage)

    def _release(self, node: Node) -> None:
        if node.kept:
            for storage in node.kept:
                self.drop(storage)
            node.kept, node.fetched = [], NOTHING

    def _own_dtype(self, frame: Frame, node: Node, target: str, wide: Storage) -> Storage:
        """Cast a gradient from the promoted dtype, or sum it, once all gradients of the node are computed."""
        gradient = self.alloc(frame.scope[target], _kind(node, target), of=GRADIENT_OF)
        self.drop(wide)
        return gradient

    def _gradient(
        self, frame: Frame, node: Node, target: str, incoming: list[tuple[Tensor, Storage]]
    ) -> tuple[Storage, bool]:
        """Return the gradient of `target`, and whether it is still to be cast from the promoted dtype or summed."""
        op, backward, like = node.op, node.backward, frame.scope[target]
        if target in backward.shapes:
            like = like._replace(shape=backward.shapes[target])
        if target in backward.becomes:
            becomes = backward.becomes[target]
            kept = node.fetched[becomes] if becomes in node.fetched else frame[becomes]
            kept.refs += 1
            return kept, False
        if target in backward.sums:
            return self.alloc(backward.sums[target], "temp", of=GRADIENT_OF), True
        if op.gradient in ("same", "part"):
            out, storage = incoming[0]
            aliased = op.gradient == "part" or (op.view and target == op.reads[0])
            if aliased or (out.shape, out.dtype) == (like.shape, like.dtype):
                storage.refs += 1
                return storage, False
        out = op.writes[0]
        if op.cast or op.gradient in ("same", "own") or out.dtype == like.dtype:
            return self.alloc(like, _kind(node, target), fresh=op.gradient != "view", of=GRADIENT_OF), False
        return self.alloc(like._replace(dtype=out.dtype), "temp", of=GRADIENT_OF), True

    def _sum(self, like: Tensor, old: Storage | None, new: Storage, kind: str = "temp") -> Storage:
        """Add two gradients as autograd does: in place into the older one if nothing else references it."""
        if old is None:
            return new
        if old.refs == 1 and old.fresh:
            self.drop(new)
            return old
        total = self.alloc(like, kind, of=GRADIENT_OF)
        self.drop(old)
        self.drop(new)
        return total

    def _weight_gradient(self, frame: Frame, name: str, storage: Storage) -> None:
        lent = self._lent.get(name.rpartition(".")[0])
        if lent is not None:
            lent.append((name, storage))
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


def _keeps_an_output(node: Node) -> bool:
    return any(t.name in node.pins for t in node.op.writes)


def _kind(node: Node, target: str) -> str:
    return "gradient" if target in node.backward.weights or target in node.backward.wraps else "temp"
