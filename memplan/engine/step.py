"""Running a stack of operations through one forward and backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

from memplan.core.ir import Block, Division, Op, SavedTensors, Stack, Tensor
from memplan.engine.dtypes import FLOATING, BlockDtypes, Scope
from memplan.engine.gather import AFTER, BEFORE, REST, ROOT, TIED, Gatherer, unit_of
from memplan.engine.lower import Frame, Moment, Storage, Tape, add_to_each, leaves


class OpsBetweenRuns(NamedTuple):
    """Operations outside of blocks between two runs, with literal dtypes.

    ops     the operations
    scope   the tensors known after them
    leaf    outputs that require a gradient
    stream  name of the input of the first block after them
    """

    ops: tuple[Op, ...]
    scope: Scope
    leaf: tuple[str, ...]
    stream: str


class Copies(NamedTuple):
    """Equal copies of a run's blocks, with literal dtypes.

    times    axis of the run's number of copies
    less     number of copies split off before these
    alone    a single copy, which differs from those after it
    units    units of the blocks' weights, see `memplan.core.ir.Division`
    after    number of copies split off after these
    skipped  in recording, where every copy is alone: number of equal copies after it that are not run
    joins    operations before them
    """

    blocks: tuple[Block, ...]
    scopes: tuple[Scope, ...]
    times: str
    less: int
    alone: bool
    units: tuple[str, ...]
    after: int = 0
    skipped: int = 0
    joins: OpsBetweenRuns | None = None

    def count(self, depth: Mapping[str, int]) -> int:
        """Return the number of copies."""
        return 1 if self.alone else depth[self.times] - self.less - self.after


class Lowered(NamedTuple):
    """A forward and backward pass as moments.

    moments  their counts index `sizes`
    kept     storages alive at the end of forward
    left     storages alive at the end of backward
    held     storages that variables of the script and the graph's nodes reference after backward
    host     tensors that checkpoints and operations keep in host memory
    sizes    shape and dtype of a storage; if labelled, also its kind, block, operation, name and source
    runs     for each run, the axis of its number of copies, and how many of them the counts already include
    """

    moments: tuple[Moment, ...]
    kept: Moment
    left: Moment
    held: Moment
    host: Moment
    sizes: tuple[tuple[str, ...], ...]
    runs: tuple[tuple[str, int], ...]


class PassResult(NamedTuple):
    """The result of a pass, as in `Lowered`; of `held` there, what the graph's `nodes` reference is separate."""

    kept: Moment
    held: Moment
    nodes: Moment
    runs: tuple[tuple[str, int], ...]


def _copies(
    stack: Stack,
    scope: Scope,
    flowing: Iterable[str],
    autocast: str | None,
    depth: Mapping[str, int],
    leaf: bool,
    reentrant: bool,
) -> list[Copies]:
    """Resolve the stack's blocks, and split off copies that differ from the others of their run.

    The very first block, and the first after operations between runs, reads a tensor that the model may still
    reference. A block's output may differ from its input in shape or dtype, or need a gradient though its input does
    not. In backward the last copy comes first: it creates the gradients of tensors that all copies read, to which the
    others add.

    flowing  names of tensors that need a gradient
    leaf     whether embeddings between runs require a gradient
    """
    out: list[Copies] = []
    flowing = set(flowing)
    x, flows = scope["embeds"]._replace(name="x"), scope["embeds"].name in flowing
    resolved = BlockDtypes(autocast)
    at_input = True  # all blocks so far have returned their input unchanged
    for number, run in enumerate(stack.runs):
        units = tuple(unit_of(number, i) for i in range(len(run.blocks)))
        less = 0
        joins: OpsBetweenRuns | None = None
        if run.before:
            scope = Scope(scope, {"x": x})
            between, leaf_names = scope.resolve(run.before, autocast), ()
            if leaf:
                between, leaf_names = _input_leaf(between)
            joins = OpsBetweenRuns(between, scope, leaf_names, scope["stream"].name)
            flowing = _flowing(between, flowing.union(_x(flows), leaf_names))
            x, flows = scope["stream"]._replace(name="x"), joins.stream in flowing
            flowing -= {"x"}
        while less < depth[run.times]:
            entered = (x.shape, x.dtype, flows)
            blocks: list[Block] = []
            scopes: list[Scope] = []
            for block in run.blocks:
                ops, inner = resolved.resolve(block.ops, scope, x)
                after_block = _flowing(ops, flowing | _x(flows))
                flows = "y" in after_block
                x = inner["y"]._replace(name="x")
                if block.shares:
                    scope = Scope(scope, {name: inner[name] for name in block.shares})
                    flowing |= _shares_with_gradient(block, after_block, reentrant)
                blocks.append(block._replace(ops=ops))
                scopes.append(inner)
            at_input = at_input or joins is not None
            works = not all(_returns_input(block) for block in blocks)
            shares = any(block.shares for block in run.blocks)
            alone = (at_input and works) or joins is not None or shares or (x.shape, x.dtype, flows) != entered
            at_input = at_input and not works
            out.append(Copies(tuple(blocks), tuple(scopes), run.times, less, alone, units, joins=joins))
            joins = None
            less += 1
            if not alone:
                break
        if out and flowing.intersection(r for block in out[-1].blocks for op in block.ops for r in op.reads):
            out = _split_last(out, depth)
    return out


def _shares_with_gradient(block: Block, flowing: Container[str], reentrant: bool) -> set[str]:
    """Return the block's shares that need a gradient.

    Reentrant checkpointing is an autograd.Function: all its outputs need gradients if any does, but tensors that it
    puts into a dictionary never do.
    """
    if reentrant:
        return set(block.shares) if block.returned and "y" in flowing else set()
    return {name for name in block.shares if name in flowing}


def _materialise(
    tape: Tape, frame: Frame, block: Block, flowing: Container[str], also: Iterable[str], grads: dict[str, Storage]
) -> None:
    """Allocate zero gradients for outputs of an autograd.Function that nothing read.

    A block returns what it `shares`, what it got of that, and `also` what the model holds until the next block returns.
    """
    shared = (*block.shares, *(r for op in frame.ops for r in op.reads)) if block.returned else ()
    names = [*(n for n in shared if n in flowing), *(frame.scope[n].name for n in also if n in frame.scope)]
    for name in dict.fromkeys(n for n in names if n not in grads and frame.scope[n].dtype in FLOATING):
        grads[name] = tape.alloc(frame.scope[name], "temp", of="gradient of ")


def _is_called(block: Block) -> bool:
    """Whether the run calls the block; of a tower that is not run, only the weights exist."""
    return any(op.writes and not op.view for op in block.ops)


def _first(names: Iterable[str], default: str) -> str:
    """Return the first name that is not empty."""
    return next(filter(None, names), default)


def _returns_input(block: Block) -> bool:
    """Whether the block returns its input unchanged, as a block that is not run does."""
    return any(op.view and op.reads[0] == "x" and op.writes[0].name == "y" for op in block.ops)


def _flowing(ops: Iterable[Op], entering: Iterable[str]) -> set[str]:
    """Return the names of tensors that need a gradient after the operations, given those before them."""
    flows = set(entering)
    for op in ops:
        flows.update(leaves(op))
        trains = op.wraps or any(w.trains for w in op.weights)
        if op.gradient != "none" and (trains or not flows.isdisjoint(op.reads)):
            flows.update(t.name for t in op.writes if t.dtype in FLOATING)
    return flows


def read_dtype(
    stack: Stack, writes: str | tuple[str, ...], autocast: str | None, depth: Mapping[str, int]
) -> str | None:
    """Return the dtype of the first read of the operation that writes a tensor named `...writes` (or one of several).

    If several blocks have one, it is the last block's; None if no block has.
    """
    scope = Scope()
    scope.resolve(stack.before, autocast)
    dtype: str | None = None
    for c in _copies(stack, scope, (), autocast, depth, leaf=False, reentrant=False):
        for block, inner in zip(c.blocks, c.scopes, strict=True):
            reads = [op.reads[0] for op in block.ops if any(t.name.endswith(writes) for t in op.writes)]
            dtype = inner[reads[0]].dtype if reads else dtype
    return dtype


def made_by(op: Op, stack: Stack, autocast: str | None) -> tuple[Tensor, ...]:
    """Return the outputs of an operation before the blocks, with literal dtypes."""
    return next(resolved.writes for resolved in Scope().resolve(stack.before, autocast) if resolved.name == op.name)


def stream_of(stack: Stack, autocast: str | None, depth: Mapping[str, int]) -> Tensor:
    """Return the output of the stack's last block or, without blocks, the first block's input."""
    scope = Scope()
    scope.resolve(stack.before, autocast)
    copies = _copies(stack, scope, (), autocast, depth, leaf=False, reentrant=False)
    return copies[-1].scopes[-1]["y"] if copies else scope["embeds"]


def _returned(stack: Stack, last: Scope, ops: tuple[Op, ...]) -> dict[str, str]:
    """Return the block outputs other than `y` that `after` reads, each with its storage.

    Every block returns them with `y`, so they stay alive until the next block has returned.
    """
    written = {t.name for op in stack.after for t in op.writes}
    shared = {name for run in stack.runs for block in run.blocks for name in block.shares}
    names = {r for op in stack.after for r in op.reads} - written - {"x", "y"} - shared
    behind = _behind(ops)
    return {name: behind[last[name].name] for name in names if name in last and last[name].name in behind}


def _behind(ops: Iterable[Op], inputs: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Map names to storages: those of `inputs` and those that the operations write or find left by the previous pass.

    A view has the storage of its base.
    """
    behind = dict(inputs)
    for op in ops:
        behind.update((t.name, t.name) for t in op.past)
        for t in op.writes:
            behind[t.name] = behind[op.reads[0]] if op.view and op.reads[0] in behind else t.name
    return behind


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


def _x(flows: bool) -> frozenset[str]:
    return frozenset(("x",)) if flows else frozenset()


def _input_leaf(before: tuple[Op, ...]) -> tuple[tuple[Op, ...], tuple[str, ...]]:
    """Make the output of the input embeddings require a gradient; return the operations and that output's name.

    The node that accumulates the gradient holds the output. If the embeddings or an adapter around them train, the
    output has a gradient anyway, and nothing changes.
    """
    embedding = (op for op in before if any(w.group == "embedding" for w in op.weights))
    candidates = [
        op for op in (next(embedding, None), *(op for op in before if op.requires_gradient)) if op is not None
    ]
    names: list[str] = []
    for candidate in candidates:
        module = candidate.name.removesuffix(".base_layer")
        weights = [w for op in before for w in op.weights if op.name.startswith(module) or w.name.startswith(module)]
        if not any(w.trains for w in weights):
            names.append(candidate.name)
    ops = tuple(op._replace(holds="step") if op.name in names else op for op in before)
    return ops, tuple(op.writes[0].name for op in candidates if op.name in names)


def _split_last(copies: list[Copies], depth: Mapping[str, int]) -> list[Copies]:
    """Split off the last two copies.

    In backward the last copy creates the gradients of tensors that all copies read, the one before it may add to them
    in new storages, and all others add in place.
    """
    *rest, last = copies
    split = min(2, last.count(depth) - 1)
    alone = (last._replace(less=depth[last.times] - i, alone=True) for i in range(split, 0, -1))
    return [*rest, last._replace(after=split), *alone] if split > 0 else copies


def _split_ends(copies: Copies, depth: Mapping[str, int]) -> Iterator[Copies]:
    """Split off the first and the last copy of blocks whose weights are gathered.

    In forward the first one finds the output of another unit's all-gather, in backward the last one the input of
    another unit's reduce-scatter.
    """
    count = copies.count(depth)
    yield copies._replace(alone=True, after=0)
    if count > 2:
        yield copies._replace(less=copies.less + 1, after=copies.after + 1, joins=None)
    if count > 1:
        yield copies._replace(less=copies.less + count - 1, after=0, alone=True, joins=None)


def _split_all(copies: list[Copies], depth: Mapping[str, int], most: int) -> list[Copies]:
    """Split off every copy, at most `most` of each run: those in the middle are not run."""
    out: list[Copies] = []
    for c in copies:
        count = c.count(depth)
        for i in range(min(count, most)):
            skipped = max(0, count - most) if i == most // 2 else 0
            out.append(c._replace(alone=True, less=c.less + i, skipped=skipped))
    return out


def lower(  # noqa: PLR0913, PLR0917 (one pass, phase after phase)
    stack: Stack,
    depth: Mapping[str, int],
    autocast: str | None = None,
    checkpoint: bool = False,
    reentrant: bool = False,
    grads_exist: bool = False,
    input_grad: bool = False,
    labelled: bool = False,
    updates: Mapping[str, int] = MappingProxyType({}),
    keeps_last_outputs: bool = False,
    to_host: bool = False,
    division: Division | None = None,
    saves: SavedTensors | None = None,
) -> Lowered:
    """Return the moments of one forward and backward pass.

    depth               axis of each run -> its number of copies
    autocast            compute dtype of autocast, or None
    checkpoint          blocks are checkpointed
    reentrant           by torch's reentrant kind, which recomputes a whole block before any of its backward
    grads_exist         the gradients exist already, as in a later micro-batch
    input_grad          the embeddings' output requires a gradient though nothing before it trains, as under
                        checkpointing
    labelled            tensors are counted by kind, block, operation, name and source too
    updates             weight path -> bytes of its update in backward, as soon as its gradient is there
    keeps_last_outputs  variables of the loop keep the previous pass's outputs and loss, with the graph, until they are
                        assigned again
    to_host             checkpoints keep their inputs in host memory
    division            how weights are sharded over ranks
    saves               how saved tensors are offloaded to host memory
    """
    tape = Tape(grads_exist, labelled, updates)
    tape.saves = saves
    gatherer = Gatherer(tape, division, grads_exist)
    passed = run_pass(tape, gatherer, stack, depth, autocast, checkpoint, reentrant, input_grad, to_host)
    (held,) = add_to_each((passed.held,), passed.nodes)
    moments = tape.moments
    for phase, before in (("forward", held), ("loss", passed.nodes)) if keeps_last_outputs else ():
        of_phase = [i for i, m in enumerate(moments) if m.phase == phase]
        for i, moment in zip(of_phase, add_to_each([moments[i] for i in of_phase], before), strict=True):
            moments[i] = moment
    return Lowered(tuple(moments), passed.kept, tape.snapshot(), held, tape.host, tuple(tape.sizes), passed.runs)


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
    tape = Tape(labelled=labelled)
    tape.phase = phase
    gatherer = Gatherer(tape, division, False)
    passed = run_pass(tape, gatherer, stack, depth, autocast, False, False, False, records=False, casts=casts)
    return Lowered(
        tuple(tape.moments), passed.kept, tape.snapshot(), passed.held, tape.host, tuple(tape.sizes), passed.runs
    )


def run_pass(  # noqa: PLR0912, PLR0913, PLR0915, PLR0917 (one pass, phase after phase)
    tape: Tape,
    gatherer: Gatherer,
    stack: Stack,
    depth: Mapping[str, int],
    autocast: str | None,
    checkpoint: bool,
    reentrant: bool,
    input_grad: bool,
    to_host: bool = False,
    one_by_one: int = 0,
    records: bool = True,
    casts: str = "",
) -> PassResult:
    """Run the stack on the tape, forward and backward. Other arguments are those of `lower`.

    one_by_one  run this many copies of each block one by one and skip the others, instead of one copy per run
    records     whether autograd records; if not, there is only a forward pass
    """
    offloads = to_host or tape.saves is not None  # a checkpoint saves its input like any saved tensor
    first_scope = Scope(casts=casts)
    before = first_scope.resolve(stack.before, autocast)
    leaf: tuple[str, ...] = ()
    if input_grad:
        before, leaf = _input_leaf(before)
    copies = _copies(stack, first_scope, _flowing(before, leaf), autocast, depth, input_grad, checkpoint and reentrant)
    if gatherer.divides:
        copies = [split for c in copies for split in _split_ends(c, depth)]
    if one_by_one:
        copies = _split_all(copies, depth, one_by_one)
    last = copies[-1].scopes[-1]
    joints = [c.joins for c in copies if c.joins is not None]
    scope = joints[-1].scope if joints else first_scope
    returned = _returned(stack, last, copies[-1].blocks[-1].ops)
    handed = {name: last[name]._replace(name=name) for name in returned}
    shared = {
        name: inner[name]
        for c in copies
        for block, inner in zip(c.blocks, c.scopes, strict=True)
        for name in block.shares
    }
    tail_scope = Scope(scope, {"x": last["y"]._replace(name="x"), **shared, **handed})
    after, loss = tail_scope.resolve(stack.after, autocast), tail_scope.resolve(stack.loss, autocast)
    between = [op for joint in joints for op in joint.ops]
    outside = [op for op in (*before, *between, *after, *loss) if op.gradient != "none"]
    uses = Counter(w.name for op in outside for w in op.weights if w.trains)
    tape.uses = {name: n for name, n in uses.items() if n > 1}
    read = {r for op in (*after, *loss) for r in op.reads}
    later: list[frozenset[str]] = []  # for each of the copies, the names read by it and everything after it
    for c in reversed(copies):
        read |= {r for b in c.blocks for op in b.ops for r in op.reads}
        later.insert(0, frozenset(read))
        read |= {r for op in (c.joins.ops if c.joins is not None else ()) for r in op.reads}

    # forward
    (past,) = tape.recall([("", before)])
    pasts: list[list[dict[str, Storage]]] = []
    several = 0
    for c in copies:
        tape.enter_copy(len(pasts), "past", c.skipped)
        pasts.append(tape.recall(((b.name, b.ops) for b in c.blocks), None if c.alone else several))
        tape.leave_copy()
        several += not c.alone
    last_past, *joint_pasts = tape.recall([("", after), *(("", j.ops) for j in joints)])
    first = Frame(before, first_scope, {}, leaf)
    first.past = past
    embeds = first_scope["embeds"].name  # another name if `embeds` is the output of a dropped cast
    called = [tuple(map(gatherer.named, c.units, map(_is_called, c.blocks))) for c in copies]
    from_here = [*accumulate(reversed(called), lambda later, units: _first(units, later), initial="")][::-1]
    gatherer.gather(REST, first)
    gatherer.gather(ROOT, first, from_here[0])
    gatherer.enter_outside()
    behind = _behind(before)
    begins = behind.get(embeds, embeds)
    made = tape.forward(first, {begins, *_roots(behind, read)}, grad=records, checkpoint=not records)
    opening = gatherer.leave(BEFORE)
    before_here = [*accumulate(called, lambda earlier, units: _first(units[::-1], earlier), initial=opening)]
    flows = frozenset(first.flows)
    stream = made[begins]
    own = _handed(made, behind, read, stream)
    x_flows = embeds in flows
    ran: list[tuple[int | None, list[Frame]]] = []
    joined: dict[int, Frame] = {}  # copy -> the operations outside of blocks before it
    runs: list[tuple[str, int]] = []
    firsts: list[dict[str, str]] = []
    counted: Counter[str] = Counter()  # number of earlier blocks by name
    carried: dict[str, Storage] = {}
    for at, c in enumerate(copies):
        if c.joins is not None:
            own |= {"x": stream, **carried}
            joint = joined[at] = Frame(c.joins.ops, c.joins.scope, own, flows.union(_x(x_flows), c.joins.leaf))
            joint.past = joint_pasts.pop(0)
            gatherer.enter_outside()
            behind = _behind(joint.ops, {"x": "x"})
            begins, wanted = behind.get(c.joins.stream, c.joins.stream), later[at] - {"x"}
            made = tape.forward(joint, {begins, *_roots(behind, wanted)}, own, grad=records, checkpoint=not records)
            stream = made[begins]
            own = _handed(made, behind, wanted, stream)
            flows = frozenset(joint.flows - {"x"})
            x_flows, carried = c.joins.stream in joint.flows, {}
        number = None
        name, period = c.blocks[0].name, len(c.blocks)
        first_layer = counted[name]
        counted[name] += period * (c.count(depth) + c.skipped)
        last_layer = counted[name] - period
        if not c.alone:
            number = len(runs)
            runs.append((c.times, c.less + 1 + c.after))
            firsts.append(
                {f"{b.name}.{last_layer + i}.": f"{b.name}.{first_layer + i}." for i, b in enumerate(c.blocks)}
            )
            tape.enter_run(number, firsts[number])
        tape.enter_copy(at, "forward", c.skipped)
        again_first = called[at] if c.count(depth) > 1 else ()
        entering = stream
        frames: list[Frame] = []
        for i, (block, inner, unit) in enumerate(zip(c.blocks, c.scopes, c.units, strict=True)):
            enters = flows | _x(x_flows)
            frame = Frame(block.ops, inner, {**own, "x": stream}, enters, block.name, last_layer + i)
            is_checkpointed = checkpoint and not block.never_checkpointed
            if is_checkpointed:
                frame.reentrant, frame.whole = reentrant, block.recomputes_all
                frame.lends = bool(block.shares) and not block.returned
                reads = dict.fromkeys(r for op in block.ops for r in op.reads)
                frame.to_host = offloads
                inputs = [own[r] for r in reads if r in own]
                if reentrant and block.by_name:
                    frame.named, inputs = inputs, []
                frame.checkpoint = [*([] if offloads else [stream]), *inputs]
                for storage in (*frame.checkpoint, *frame.named):
                    storage.refs += 1
            if called[at][i]:
                gatherer.gather(unit, frame, _first((*called[at][i + 1 :], *again_first), from_here[at + 1]))
            behind = _behind(block.ops)
            y, shares = behind["y"], {name: behind[name] for name in block.shares}
            frame.past = pasts[at][i]
            made = tape.forward(
                frame,
                (y, *returned.values(), *shares.values()),
                grad=records,
                checkpoint=is_checkpointed or not records,
            )
            for name, storage in shares.items():
                own[name] = made[storage]
                own[name].shared = True
                if is_checkpointed and not reentrant and not block.returned:
                    own[name].refs += 1
                    frame.shared.append(own[name])
                    frame.shares = tuple(shares.values())
            for name in block.replaces:
                tape.drop(own.pop(name))
            flows |= _shares_with_gradient(block, frame.flows, is_checkpointed and reentrant)
            gatherer.leave(unit)
            returns_input = y not in made
            for storage in (*(() if returns_input else (stream,)), *carried.values()):
                tape.drop(storage)  # the caller's variables now hold what the block returned
            stream = stream if returns_input else made[y]
            carried = {name: made[behind] for name, behind in returned.items()}
            x_flows = "y" in frame.flows
            frames.append(frame)
        if number is not None:
            tape.leave_run(stream, *carried.values(), *gatherer.handed)
            if any(op.holds == "states" for block in c.blocks for op in block.ops):
                entering.run = number  # stands for the other copies' inputs, and is freed with them
        tape.leave_copy()
        ran.append((number, frames))
    own |= {"x": stream, **carried}
    tail = Frame(after, tail_scope, own, flows | _x(x_flows))
    tail.past = last_past
    gatherer.enter_outside()
    own = tape.forward(tail, {r for op in loss for r in op.reads}, own, grad=records, checkpoint=not records)
    tape.note()
    if not records:
        tape.end_forward()
        gatherer.end_forward()
        kept = tape.snapshot()
        held, nodes = tape.end_step()
        return PassResult(kept, held, nodes, tuple(runs))
    tape.phase = "loss"
    gatherer.head_done()
    criterion = Frame(loss, tail_scope, own, tail.flows)
    left = tape.forward(criterion, ("loss",), own)
    tape.end_forward()
    gatherer.end_forward()
    tape.note()
    kept = tape.snapshot()

    # backward
    tape.phase = "backward"
    for unit in (REST, ROOT, TIED, BEFORE):
        gatherer.remember(unit, None)
    for number, c in zip((number for number, _ in ran), copies, strict=True):
        for unit in c.units:
            gatherer.remember(unit, number)
    gatherer.remember(AFTER, None)
    gatherer.turn()
    root = tape.alloc(tail_scope["loss"], "temp")
    root.refs += 1  # backward() holds the gradient that it starts from
    grads = {"loss": root}
    gatherer.backward(REST, tail, "")
    if gatherer.at_loss:
        gatherer.backward(gatherer.head, tail, before_here[-1])
    tape.backward(criterion, grads)
    if not gatherer.at_loss:
        gatherer.backward(gatherer.head, tail, before_here[-1])
    gatherer.enter_outside()
    tape.backward(tail, grads)
    gatherer.reduce(AFTER, tail)
    if "x" in grads:
        grads["y"] = grads.pop("x")
    for i in reversed(range(len(ran))):
        number, frames = ran[i]
        if number is not None:
            tape.enter_run(number, firsts[number])
        tape.enter_copy(i, "backward", copies[i].skipped)
        several = (number is not None and copies[i].count(depth) > 1) or copies[i].skipped
        again_last = called[i][::-1] if several else ()
        for j in reversed(range(len(frames))):
            frame, unit, block = frames[j], copies[i].units[j], copies[i].blocks[j]
            if checkpoint and reentrant and not block.never_checkpointed and "y" in grads:
                _materialise(tape, frame, block, flows.intersection(shared), returned, grads)
            is_gathered = called[i][j] and any(node.targets for node in frame.nodes)
            if is_gathered:
                gatherer.backward(unit, frame, _first((*called[i][:j][::-1], *again_last), before_here[i]))
            tape.backward(frame, grads)
            if is_gathered:
                gatherer.reduce(unit, frame)
            if "x" in grads:
                grads["y"] = grads.pop("x")
        if number is not None:
            tape.leave_run(*grads.values(), *gatherer.handed)
        tape.leave_copy()
        joins = copies[i].joins
        if joins is not None:
            if "y" in grads:
                grads[joins.stream] = grads.pop("y")
            gatherer.enter_outside()
            tape.backward(joined[i], grads)
            if "x" in grads:
                grads["y"] = grads.pop("x")
    tape.end_blocks()
    if "y" in grads:
        grads[embeds] = grads.pop("y")
    if gatherer.is_reached(BEFORE, first, leaf):
        gatherer.backward(BEFORE, first, "")
    gatherer.enter_outside()
    tape.backward(first, grads)
    for unit in (ROOT, BEFORE, TIED, REST):  # in the order of the modules
        gatherer.reduce(unit, first)
    gatherer.end(first)
    leaf_names = {*leaf, *(name for joint in joints for name in joint.leaf)}
    leaf_names.update(name for c in copies for block in c.blocks for op in block.ops for name in leaves(op))
    for name in [n for n in grads if n not in leaf_names]:
        tape.drop(grads.pop(name))
    for storage in (root, *left.values()):
        tape.drop(storage)
    held, nodes = tape.end_step(*grads.values())
    tape.note()
    return PassResult(kept, held, nodes, tuple(runs))
