"""Running a stack of operations through one forward and backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from functools import lru_cache, partial
from itertools import accumulate
from types import MappingProxyType
from typing import Literal

from memplan.core.identity import Identity
from memplan.core.ir import Block, Division, Op, SavedTensors, Stack
from memplan.core.records import NamedTuple
from memplan.engine.copies import Copies, ResolvedStack, is_called, resolve_stack, shares_with_gradient
from memplan.engine.dtypes import FLOATING
from memplan.engine.frames import Frame
from memplan.engine.gather import AFTER, BEFORE, REST, ROOT, TIED, Gatherer
from memplan.engine.lowered import Lowered, at_depth
from memplan.engine.moments import Moment, add_to_each
from memplan.engine.operation_facts import leaf_names, names_read, part_begins, saved_operations, storages_behind
from memplan.engine.repeats import RepeatingTape
from memplan.engine.stash import Stash
from memplan.engine.storages import GRADIENT_OF, Storage
from memplan.engine.tape import Tape


class ExecutionOptions(NamedTuple):
    """How a pass is run.

    autocast        compute dtype of autocast, or None
    checkpoint      blocks are checkpointed
    reentrant       by torch's reentrant kind, which recomputes a whole block before any of its backward
    input_grad      the embeddings' output requires a gradient though nothing before it trains, as under checkpointing
    to_host         checkpoints keep their inputs in host memory
    saves           how saved tensors are offloaded to host memory
    saves_products  what checkpoints keep in addition to their inputs, as in `operation_facts.saved_operations`
    """

    autocast: str | None = None
    checkpoint: bool = False
    reentrant: bool = False
    input_grad: bool = False
    to_host: bool = False
    saves: SavedTensors | None = None
    saves_products: str = ""


PLAIN = ExecutionOptions()


def lower(
    stack: Stack,
    depth: Mapping[str, int],
    options: ExecutionOptions = PLAIN,
    *,
    grads_exist: bool = False,
    labelled: bool = False,
    updates: Mapping[str, int] = MappingProxyType({}),
    holds_previous: Literal["", "outputs", "returned", "graph"] = "",
    division: Division | None = None,
) -> Lowered:
    """Return the moments of one forward and backward pass.

    depth           axis of each run -> its number of copies
    grads_exist     the gradients exist already, as in a later micro-batch
    labelled        tensors are counted by kind, block, operation, name and source too
    updates         weight path -> bytes of its update in backward, as soon as its gradient is there
    holds_previous  what variables of the loop keep of the previous pass until they are assigned again: its outputs and
                    loss, with the graph, or only the outputs, which are assigned together with the loss, or once the
                    model has `returned`
    division        how weights are sharded over ranks
    """
    flags = grads_exist, labelled, tuple(updates.items()), holds_previous, division
    key = Identity(stack)
    return at_depth(stack, depth, lambda few: _lowered(key, few, options, *flags))


@lru_cache(maxsize=64)  # each keeps its stack: 128 take 30 MB more over 3,000 models, and save no time
def _lowered(
    stack: Identity[Stack],
    depth: tuple[tuple[str, int], ...],
    options: ExecutionOptions,
    grads_exist: bool,
    labelled: bool,
    updates: tuple[tuple[str, int], ...],
    holds_previous: Literal["", "outputs", "returned", "graph"],
    division: Division | None,
) -> Lowered:
    tape = RepeatingTape(grads_exist, labelled, dict(updates))
    passed = run_pass(tape, Gatherer(tape, division, grads_exist), stack.value, dict(depth), options)
    (held,) = add_to_each((passed.held,), passed.nodes)
    moments = tape.moments
    in_loss = held if holds_previous == "outputs" else passed.nodes
    in_phases = (("forward", held), ("loss", in_loss))[: 1 if holds_previous == "returned" else 2]
    for phase, before in in_phases if holds_previous else ():
        of_phase = [i for i, each in enumerate(moments.phases) if each == phase]
        for i, moment in zip(of_phase, add_to_each([moments[i] for i in of_phase], before), strict=True):
            moments.shared[i], moments.per_copy[i] = moment.shared, moment.per_copy
    return Lowered(moments.packed(), passed.kept, tape.snapshot(), held, tape.host, tuple(tape.sizes), passed.runs)


def infer(
    stack: Stack,
    depth: Mapping[str, int],
    autocast: str | None = None,
    phase: str = "forward",
    labelled: bool = False,
    division: Division | None = None,
    casts: str = "",
) -> Lowered:
    """Return the moments of a forward pass without autograd, named by `phase`.

    What it leaves for a later pass, such as key/value caches, is alive at its end (`left`). `division` is as in
    `lower`, `casts` as in `Scope`.
    """
    key = Identity(stack)
    return at_depth(stack, depth, lambda few: _inferred(key, few, autocast, phase, labelled, division, casts))


@lru_cache(maxsize=64)
def _inferred(
    stack: Identity[Stack],
    depth: tuple[tuple[str, int], ...],
    autocast: str | None,
    phase: str,
    labelled: bool,
    division: Division | None,
    casts: str,
) -> Lowered:
    tape = RepeatingTape(False, labelled, {})
    tape.phase = phase
    gatherer = Gatherer(tape, division, False)
    options = ExecutionOptions(autocast)
    passed = run_pass(tape, gatherer, stack.value, dict(depth), options, records=False, casts=casts)
    return Lowered(
        tape.moments.packed(), passed.kept, tape.snapshot(), passed.held, tape.host, tuple(tape.sizes), passed.runs
    )


class PassResult(NamedTuple):
    """The result of a pass, as in `Lowered`; of `held` there, what the graph's `nodes` reference is separate."""

    kept: Moment
    held: Moment
    nodes: Moment
    runs: tuple[tuple[str, int], ...]


def run_pass(
    tape: Tape,
    gatherer: Gatherer,
    stack: Stack,
    depth: Mapping[str, int],
    options: ExecutionOptions,
    *,
    one_by_one: int = 0,
    records: bool = True,
    casts: str = "",
) -> PassResult:
    """Run the stack on the tape, forward and backward.

    depth       axis of each run -> its number of copies
    one_by_one  run this many copies of each block one by one and skip the others, instead of one copy per run
    records     whether autograd records; if not, there is only a forward pass
    casts       as in `memplan.engine.dtypes.Scope`
    """
    tape.saves = options.saves
    if options.saves is not None and options.saves.stash:
        tape.stash = Stash(options.saves.stash, tape.drop)

    def resolved(stack: Stack, is_sharded: bool, input_grad: bool = False, reentrant: bool = False) -> ResolvedStack:
        return resolve_stack(
            stack,
            depth,
            options.autocast,
            input_grad=input_grad,
            reentrant=reentrant,
            casts=casts,
            is_sharded=is_sharded,
            one_by_one=one_by_one,
        )

    reentrant = options.checkpoint and options.reentrant
    own = resolved(stack, gatherer.divides or tape.stash is not None, options.input_grad, reentrant)
    one = _Pass(tape, gatherer, own, depth, options, records)

    def run_model(model: Stack, phase: str) -> None:
        gatherer.end_forward()  # the model has returned
        own = phase in gatherer.models or not gatherer.divides
        aside = Gatherer(tape, gatherer.models.get(phase), False) if own else gatherer
        aside.attach()
        with aside.aside() if not own else nullcontext():
            one.run_inside(_Pass(tape, aside, resolved(model, aside.divides), depth, options, records=False))
        if own:
            aside.release_all()

    tape.run_model = run_model
    one.forward()
    result = one.loss_and_backward() if records else one.end_of_inference()
    # without cycles, all is freed at once
    tape.run_model = tape.reach = tape.passed = tape.module = tape.reaches_first = None
    return result


class _CopyRun(NamedTuple):
    """A copy that was run forward: its run if it stands for several, and a frame per block."""

    run: int | None
    frames: list[Frame]


class _Pass:
    """One pass of a stack. After each step of it:

    stream     the input of the next block
    stream_requires_grad  whether it needs a gradient
    outer      the other tensors from outside of blocks, by name
    flowing    names of those that need a gradient
    carried    outputs that the blocks return with the stream, alive until the next block returns others
    """

    def __init__(
        self,
        tape: Tape,
        gatherer: Gatherer,
        stack: ResolvedStack,
        depth: Mapping[str, int],
        options: ExecutionOptions,
        records: bool,
    ) -> None:
        self.tape, self.gatherer, self.stack, self.depth, self.options = tape, gatherer, stack, depth, options
        self.records = records
        self.first_copy, self.next_copy = 0, len(stack.copies)  # numbers of its first copy, and of another pass's
        # For each of the copies: the units that it gathers, and the next unit that it or a later copy gathers.
        self.units = [tuple(map(gatherer.named, c.units, map(is_called, c.blocks))) for c in stack.copies]
        self.next_unit = [*accumulate(reversed(self.units), lambda later, own: _first(own, later), initial="")][::-1]
        self.runs: list[tuple[str, int]] = []
        self.first_layers: list[dict[str, str]] = []  # of each run: names of its last copy's layers -> the first copy's
        self.ran: list[_CopyRun] = []
        self.joined: dict[int, Frame] = {}  # copy -> the operations outside of blocks before it
        self.layers: Counter[str] = Counter()  # number of earlier blocks by name
        self.stream_requires_grad = False
        self.flowing: frozenset[str] = frozenset()
        self.carried: dict[str, Storage] = {}

    def run_inside(self, other: _Pass) -> None:
        """Run another pass forward, in the middle of this one."""
        other.runs, other.first_layers = self.runs, self.first_layers
        other.first_copy, self.next_copy = self.next_copy, self.next_copy + len(other.stack.copies)
        other.forward()
        other.end_of_inference()

    # forward

    def forward(self) -> None:
        """Run everything but the loss."""
        self.tape.uses = self.stack.weight_uses
        self._recall()
        self._run_before()
        for at, copies in enumerate(self.stack.copies):
            if copies.joins is not None:
                self._run_between(at, copies)
            self._run_copy(at, copies)
        self.outer |= {"x": self.stream, **self.carried}
        self.tail = Frame(self.stack.after, self.stack.scope, self.outer, self.flowing | self._of_stream())
        self.tail.past = self._past_after
        self.gatherer.enter_outside()
        self.outer = self._forward(self.tail, {r for op in self.stack.loss for r in op.reads}, self.outer)
        self.tape.note()

    def _forward(
        self, frame: Frame, exported: Collection[str], owned: Mapping[str, Storage] = MappingProxyType({})
    ) -> dict[str, Storage]:
        return self.tape.forward(frame, exported, owned, grad=self.records, checkpoint=not self.records)

    def _of_stream(self) -> frozenset[str]:
        return frozenset(("x",)) if self.stream_requires_grad else frozenset()

    def _recall(self) -> None:
        """Allocate what the previous pass left."""
        stack, tape = self.stack, self.tape
        (self._past_before,) = tape.recall([("", stack.before)])
        self._pasts: list[list[dict[str, Storage]]] = []
        run = 0
        for c in stack.copies:
            tape.enter_copy(self.first_copy + len(self._pasts), "past", c.skipped, c.times)
            self._pasts.append(tape.recall(((b.name, b.ops) for b in c.blocks), None if c.alone else run))
            tape.leave_copy()
            run += not c.alone
        self._past_after, *self._pasts_between = tape.recall(
            [("", stack.after), *(("", joint.ops) for joint in stack.joins)]
        )

    def _run_before(self) -> None:
        stack, gatherer = self.stack, self.gatherer
        first = self.first = Frame(stack.before, stack.before_scope, {}, stack.leaf)
        first.past = self._past_before
        self.embeds = stack.before_scope["embeds"].name  # another name if `embeds` is the output of a dropped cast
        gatherer.recall(first)
        gatherer.gather(REST, first)
        gatherer.gather(ROOT, first, self.next_unit[0])
        gatherer.enter_outside()
        behind = storages_behind(first.ops)
        begins = behind.get(self.embeds, self.embeds)
        made = self._forward(first, {begins, *_roots(behind, stack.read)})
        opening = gatherer.leave(BEFORE)
        self.previous_unit = [*accumulate(self.units, lambda earlier, own: _first(own[::-1], earlier), initial=opening)]
        self.stream = made[begins]
        self.outer = _handed(made, behind, stack.read, self.stream)
        self.flowing = frozenset(first.flows)
        self.stream_requires_grad = self.embeds in first.flows

    def _run_between(self, at: int, copies: Copies) -> None:
        """Run the operations outside of blocks before these copies."""
        tape, joins = self.tape, copies.joins
        assert joins is not None
        if joins.stream in self.outer:  # of an earlier run
            tape.drop(self.outer.pop(joins.stream))
        self.outer |= {"x": self.stream, **self.carried}
        entering = self.flowing | self._of_stream() | set(joins.leaf)
        joint = self.joined[at] = Frame(joins.ops, joins.scope, self.outer, entering)
        joint.past = self._pasts_between.pop(0)
        self.gatherer.enter_outside()
        behind = storages_behind(joint.ops, {"x": "x"})
        begins, wanted = behind.get(joins.stream, joins.stream), self.stack.read_from[at] - {"x"}
        made = self._forward(joint, {begins, *_roots(behind, wanted)}, self.outer)
        self.stream = made[begins]
        self.outer = _handed(made, behind, wanted, self.stream)
        self.flowing = frozenset(joint.flows - {"x"})
        self.stream_requires_grad, self.carried = joins.stream in joint.flows, {}

    def _run_copy(self, at: int, copies: Copies) -> None:
        """Run one copy, which stands for all of a run unless it is alone."""
        tape = self.tape
        number = None
        names = [block.name for block in copies.blocks]
        first = [self.layers[name] + names[:i].count(name) for i, name in enumerate(names)]
        further = copies.count(self.depth) + copies.skipped - 1
        last = [layer + further * names.count(name) for layer, name in zip(first, names, strict=True)]
        for name in names:
            self.layers[name] += further + 1
        if not copies.alone:
            number = len(self.runs)
            self.runs.append((copies.times, copies.less + 1 + copies.after))
            of_first = zip(names, last, first, strict=True)
            self.first_layers.append({f"{name}.{to}.": f"{name}.{of}." for name, to, of in of_first})
            tape.enter_run(number, self.first_layers[number])
        tape.enter_copy(self.first_copy + at, "forward", copies.skipped, copies.times)
        entering = self.stream
        frames = [self._run_block(at, i, copies, layer) for i, layer in enumerate(last)]
        if number is not None:
            tape.leave_run(self.stream, *self.carried.values(), *self.gatherer.handed, *tape.handed)
            holding = (op for block in copies.blocks for op in block.ops if op.holds)
            if any(op.holds == "states" or any(t.name == "y" for t in op.writes) for op in holding):
                entering.run = number  # stands for the other copies' inputs, and is freed with them
        tape.leave_copy()
        self.ran.append(_CopyRun(number, frames))

    def _run_block(self, at: int, i: int, copies: Copies, layer: int) -> Frame:
        tape, block, units = self.tape, copies.blocks[i], self.units[at]
        frame = Frame(
            block.ops,
            copies.scopes[i],
            {**self.outer, "x": self.stream},
            self.flowing | self._of_stream(),
            block.name,
            layer,
        )
        is_checkpointed = self.options.checkpoint and not block.never_checkpointed
        if is_checkpointed:
            self._checkpoint(frame, block)
        if units[i]:
            again_first = units if copies.count(self.depth) > 1 else ()
            self.gatherer.gather(units[i], frame, _first((*units[i + 1 :], *again_first), self.next_unit[at + 1]))
        behind = storages_behind(block.ops, {"x": "x"} if block.shares else {})
        y, shares = behind["y"], {name: behind[name] for name in block.shares}
        frame.past = self._pasts[at][i]
        made = tape.forward(
            frame,
            (y, *self.stack.returned.values(), *shares.values()),
            grad=self.records,
            checkpoint=is_checkpointed or not self.records,
        )
        for name in block.replaces:
            tape.drop(self.outer.pop(name))
        for name, storage in shares.items():
            shared = self.outer[name] = made.get(storage, self.stream)
            shared.refs += storage in ("x", y)  # in addition to the stream's
            shared.shared = True
            if is_checkpointed and not self.options.reentrant and not block.returned:
                shared.refs += 1
                frame.shared.append(shared)
                frame.shares = tuple(shares.values())
        self.flowing |= shares_with_gradient(block, frame.flows, is_checkpointed and self.options.reentrant)
        self.gatherer.leave(copies.units[i])
        returns_input = y not in made
        carried = {name: made[of] for name, of in self.stack.returned.items() if of in made}
        replaced = (storage for name, storage in self.carried.items() if name in carried)
        for storage in (*(() if returns_input else (self.stream,)), *replaced):
            tape.drop(storage)  # the caller's variables now hold what the block returned
        self.stream = self.stream if returns_input else made[y]
        self.carried = {**self.carried, **carried}
        self.stream_requires_grad = "y" in frame.flows
        if block.unread and returns_input:
            tape.forget(frame)
        return frame

    def _checkpoint(self, frame: Frame, block: Block) -> None:
        """Let a checkpoint keep the block's inputs."""
        options, outer = self.options, self.outer
        frame.reentrant, frame.whole = options.reentrant, block.recomputes_all
        frame.lends = bool(block.shares) and not block.returned
        if options.saves_products and self.records:
            frame.saves = saved_operations(block.ops, options.saves_products)
            frame.begins = part_begins(block.ops) if options.saves_products == "modules" else frame.begins
        frame.to_host = options.to_host or options.saves is not None  # it saves its input like any saved tensor
        inputs = [outer[r] for r in names_read(Identity(block.ops)) if r in outer]
        inputs += [self.carried[name] for name in block.passed if name in self.carried]
        if options.reentrant and block.by_name:
            frame.named, inputs = inputs, []
        keeps_stream = not frame.to_host and (self.stream_requires_grad or options.saves_products != "modules")
        frame.checkpoint = [*([self.stream] if keeps_stream else []), *inputs]
        for storage in (*frame.checkpoint, *frame.named):
            storage.refs += 1

    def end_of_inference(self) -> PassResult:
        """End a pass without autograd."""
        self.tape.end_forward()
        self.gatherer.end_forward()
        kept = self.tape.snapshot()
        held, nodes = self.tape.end_step()
        return PassResult(kept, held, nodes, tuple(self.runs))

    # loss and backward

    def loss_and_backward(self) -> PassResult:
        """Run the loss, and then everything backward."""
        tape, gatherer, stack = self.tape, self.gatherer, self.stack
        tape.phase = "loss"
        gatherer.head_done()
        criterion = Frame(stack.loss, stack.scope, self.outer, self.tail.flows)
        left = tape.forward(criterion, ("loss",), self.outer)
        tape.end_forward()
        for copies, ran in zip(stack.copies, self.ran, strict=True):
            for block, frame in zip(copies.blocks, ran.frames, strict=True):
                if block.unread:
                    tape.forget(frame)
        gatherer.end_forward()
        tape.note()
        kept = tape.snapshot()

        tape.phase = "backward"
        self._turn()
        root = tape.alloc(stack.scope["loss"], "temp")
        root.refs += 1  # backward() holds the gradient that it starts from
        self.grads = {"loss": root}
        self._head_backward(criterion)
        for at in reversed(range(len(self.ran))):
            self._copy_backward(at)
        tape.end_blocks()
        self._before_backward()
        for storage in (root, *left.values()):
            tape.drop(storage)
        leaves = stack.leaf if tape.holds_for_model else ()
        behind = [self.first[name] for name in leaves]
        for storage in behind:
            storage.refs += 1
        behind += map(self.grads.pop, leaves)
        held, nodes = tape.end_step(*self.grads.values(), behind=behind)
        tape.note()
        return PassResult(kept, held, nodes, tuple(self.runs))

    def _turn(self) -> None:
        """Tell the gatherer the order of the units in backward, and begin it."""
        for unit in (REST, ROOT, TIED, BEFORE):
            self.gatherer.remember(unit, None)
        for ran, c in zip(self.ran, self.stack.copies, strict=True):
            for unit in c.units:
                self.gatherer.remember(unit, ran.run)
        self.gatherer.remember(AFTER, None)
        self.gatherer.turn()

    def _rename_gradient(self, old: str, new: str) -> None:
        """Pass on a gradient under the name by which the operations before it know the tensor."""
        if old in self.grads:
            self.grads[new] = self.grads.pop(old)

    def _head_backward(self, criterion: Frame) -> None:
        """Run the loss and what follows the blocks backward."""
        tape, gatherer, tail = self.tape, self.gatherer, self.tail
        gatherer.backward(REST, tail, "")
        gather = partial(gatherer.backward, gatherer.head, tail, self.previous_unit[-1])
        if gatherer.at_loss and any(op.returns for op in criterion.ops):
            gatherer.reaches_model = gather
        elif gatherer.at_loss:
            gather()
        tape.backward(criterion, self.grads)
        if not gatherer.at_loss:
            gather()
        gatherer.enter_outside()
        tape.backward(tail, self.grads)
        if not gatherer.alone:
            gatherer.reduce(AFTER, tail)
        self._rename_gradient("x", "y")

    def _copy_backward(self, at: int) -> None:
        """Run one copy backward, and the operations between runs before it."""
        tape, copies, ran = self.tape, self.stack.copies[at], self.ran[at]
        if ran.run is not None:
            tape.enter_run(ran.run, self.first_layers[ran.run])
        tape.enter_copy(at, "backward", copies.skipped, copies.times)
        for i in reversed(range(len(ran.frames))):
            self._block_backward(at, i)
        if ran.run is not None:
            tape.leave_run(*self.grads.values(), *self.gatherer.handed, *tape.handed)
        tape.leave_copy()
        if copies.joins is not None:
            tape.end_blocks()
            self._rename_gradient("y", copies.joins.stream)
            self.gatherer.enter_outside()
            tape.backward(self.joined[at], self.grads)
            self._rename_gradient("x", "y")

    def _block_backward(self, at: int, i: int) -> None:
        copies, (run, frames), units = self.stack.copies[at], self.ran[at], self.units[at]
        frame, block = frames[i], copies.blocks[i]
        reentrant = self.options.checkpoint and self.options.reentrant and not block.never_checkpointed
        if reentrant and "y" in self.grads:
            self._materialise(frame, block)
        is_gathered = units[i] and any(node.targets for node in frame.nodes)
        if is_gathered:
            several = (run is not None and copies.count(self.depth) > 1) or copies.skipped
            again_last = units[::-1] if several else ()
            previous = _first((*units[:i][::-1], *again_last), self.previous_unit[at])
            self.gatherer.backward(copies.units[i], frame, previous)
        self.tape.backward(frame, self.grads)
        if is_gathered:
            self.gatherer.reduce(copies.units[i], frame)
        self._rename_gradient("x", "y")

    def _materialise(self, frame: Frame, block: Block) -> None:
        """Allocate zero gradients for outputs of an autograd.Function that nothing read.

        A block returns what it `shares`, what it got of that, and what the model holds until the next block returns.
        """
        flowing = self.flowing & self.stack.shared
        shared = (*block.shares, *(r for op in frame.ops for r in op.reads)) if block.returned else ()
        returned = (frame.scope[n].name for n in self.stack.returned if n in frame.scope)
        names = [*(n for n in shared if n in flowing), *returned]
        for name in dict.fromkeys(n for n in names if n not in self.grads and frame.scope[n].dtype in FLOATING):
            self.grads[name] = self.tape.alloc(frame.scope[name], "temp", of=GRADIENT_OF)

    def _before_backward(self) -> None:
        """Run what precedes the blocks backward, and drop gradients that belong to no leaf."""
        tape, gatherer, stack, first = self.tape, self.gatherer, self.stack, self.first
        self._rename_gradient("y", self.embeds)
        for dealt in [t for op in first.ops if op.holds == "past" for t in op.writes]:
            tape.enter(first, Op("past"))
            self.grads[dealt.name] = tape.alloc(dealt, "temp", of=GRADIENT_OF)
        if gatherer.is_reached(BEFORE, first, stack.leaf):
            gatherer.backward(BEFORE, first, gatherer.last_before)
        gatherer.enter_outside()
        tape.backward(first, self.grads)
        for unit in (ROOT, BEFORE, TIED, REST):  # in the order of the modules
            gatherer.reduce(unit, first)
        gatherer.end(first)
        of_blocks = [leaf_names(Identity(block.ops)) for c in stack.copies for block in c.blocks]
        leaf = frozenset(stack.leaf).union(*[joint.leaf for joint in stack.joins], *of_blocks)
        for name in [n for n in self.grads if n not in leaf]:
            tape.drop(self.grads.pop(name))


def _first(names: Iterable[str], default: str) -> str:
    """Return the first name that is not empty."""
    return next(filter(None, names), default)


def _roots(behind: Mapping[str, str], names: Iterable[str]) -> set[str]:
    """Return the storages behind the names."""
    return {behind.get(name, name) for name in names}


def _handed(
    made: Mapping[str, Storage], behind: Mapping[str, str], names: Iterable[str], stream: Storage
) -> dict[str, Storage]:
    """Return the outputs in `made` under the names by which later operations read them, with a reference per name.

    The `stream`, which is the input of the blocks, has one more reference.
    """
    outputs = {name: made[behind.get(name, name)] for name in names if behind.get(name, name) in made}
    for storage in (*outputs.values(), stream):
        storage.refs += 1
    for storage in made.values():
        storage.refs -= 1
        storage.shared = True
    return outputs
