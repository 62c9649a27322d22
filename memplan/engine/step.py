"""A whole training step, forward to backward, from a stack of operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

from memplan.core.ir import Block, Division, Op, SavedTensors, Stack, Tensor
from memplan.engine.dtypes import FLOATING, Blocks, Scope
from memplan.engine.gather import AFTER, BEFORE, REST, ROOT, TIED, Gatherer, unit_of
from memplan.engine.lower import Frame, Moment, Storage, Tape, add_to_each, leaves


class Joint(NamedTuple):
    """Operations outside of blocks between two runs, with literal dtypes.

    `leaf` are those of their outputs that ask for a gradient; `stream` is what the first block after them is given.
    """

    ops: tuple[Op, ...]
    scope: Scope
    leaf: tuple[str, ...]
    stream: str


class Copies(NamedTuple):
    """Equal blocks with literal dtypes: as many as the axis `times` says, `less` those split off before and `after`.

    `units` are the names of what their weights are gathered in, see `memplan.core.ir.Division`. `skipped` is for
    recording, where every copy stands for itself: how many like it are left out after it. `joins` is what runs before
    them.
    """

    blocks: tuple[Block, ...]
    scopes: tuple[Scope, ...]
    times: str
    less: int
    alone: bool  # one copy only, unlike those after it
    units: tuple[str, ...]
    after: int = 0
    skipped: int = 0
    joins: Joint | None = None

    def count(self, depth: Mapping[str, int]) -> int:
        """How many copies it stands for."""
        return 1 if self.alone else depth[self.times] - self.less - self.after


class Lowered(NamedTuple):
    """A forward and backward pass as moments.

    moments   their counts index `sizes`
    kept      what is alive when forward is done; `left`, when backward is
    held      what names of the script and the graph's nodes would keep after backward
    host      what checkpoints and operations keep in host memory
    sizes     shape and dtype of a storage; if labelled, also its kind, block, operation, name and source
    runs      the axis that counts a run's copies, and how many of them were split off or run already
    """

    moments: tuple[Moment, ...]
    kept: Moment
    left: Moment
    held: Moment
    host: Moment
    sizes: tuple[tuple[str, ...], ...]
    runs: tuple[tuple[str, int], ...]


class Passed(NamedTuple):
    """What a pass left: see `Lowered`, and of `held` there the part that the graph's `nodes` refer to by itself."""

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
    """Split off the copies that differ from those after them, from `embeds`; `flowing` has what gradients are asked of.

    The very first block, and the first after operations between runs, reads what the model may hold on to; a block may
    hand on another shape or dtype than it was given, or a gradient where none came in. The last copy is the first on
    the way back: it makes the gradients of what all of its run read, to which the others add. With `leaf` embeddings
    between runs ask for a gradient.
    """
    out: list[Copies] = []
    flowing = set(flowing)
    x, flows = scope["embeds"]._replace(name="x"), scope["embeds"].name in flowing
    resolved = Blocks(autocast)
    given = True  # no block has made anything of what the first one was given
    for number, run in enumerate(stack.runs):
        units = tuple(unit_of(number, i) for i in range(len(run.blocks)))
        less = 0
        joins: Joint | None = None
        if run.before:
            scope = Scope(scope, {"x": x})
            between, asked = scope.resolve(run.before, autocast), ()
            if leaf:
                between, asked = _input_leaf(between)
            joins = Joint(between, scope, asked, scope["stream"].name)
            flowing = _flowing(between, flowing.union(_x(flows), asked))
            x, flows = scope["stream"]._replace(name="x"), joins.stream in flowing
            flowing -= {"x"}
        while less < depth[run.times]:
            entered = (x.shape, x.dtype, flows)
            blocks: list[Block] = []
            scopes: list[Scope] = []
            for block in run.blocks:
                ops, inner = resolved.resolve(block.ops, scope, x)
                made = _flowing(ops, flowing | _x(flows))
                flows = "y" in made
                x = inner["y"]._replace(name="x")
                if block.shares:
                    scope = Scope(scope, {name: inner[name] for name in block.shares})
                    flowing |= _asked(block, made, reentrant)
                blocks.append(block._replace(ops=ops))
                scopes.append(inner)
            given = given or joins is not None
            works = not all(_hands_on(block) for block in blocks)
            shares = any(block.shares for block in run.blocks)
            alone = (given and works) or joins is not None or shares or (x.shape, x.dtype, flows) != entered
            given = given and not works
            out.append(Copies(tuple(blocks), tuple(scopes), run.times, less, alone, units, joins=joins))
            joins = None
            less += 1
            if not alone:
                break
        if out and flowing.intersection(r for block in out[-1].blocks for op in block.ops for r in op.reads):
            out = _last_apart(out, depth)
    return out


def _asked(block: Block, made: Container[str], reentrant: bool) -> set[str]:
    """What of a block's shares a gradient is asked of: of all that a function of autograd's own returns, as the
    reentrant kind of checkpointing is one, if of any; of what such a one puts into a dictionary, of nothing."""
    if reentrant:
        return set(block.shares) if block.returned and "y" in made else set()
    return {name for name in block.shares if name in made}


def _materialise(
    tape: Tape, frame: Frame, block: Block, asked: Container[str], also: Iterable[str], grads: dict[str, Storage]
) -> None:
    """Zeros stand for the gradients of what a function of autograd's own returned and nothing later read. A block
    returns what it `shares`, what it was given of that, and `also` what the model holds until the next one returns."""
    shared = (*block.shares, *(r for op in frame.ops for r in op.reads)) if block.returned else ()
    names = [*(n for n in shared if n in asked), *(frame.scope[n].name for n in also if n in frame.scope)]
    for name in dict.fromkeys(n for n in names if n not in grads and frame.scope[n].dtype in FLOATING):
        grads[name] = tape.alloc(frame.scope[name], "temp", of="gradient of ")


def _is_called(block: Block) -> bool:
    """Whether the run calls the block: of a tower that it leaves out, only the weights are there."""
    return any(op.writes and not op.view for op in block.ops)


def _first(names: Iterable[str], default: str) -> str:
    """The first of the names that is not empty."""
    return next(filter(None, names), default)


def _hands_on(block: Block) -> bool:
    """Whether the block returns what it was given, as one does that a run leaves out."""
    return any(op.view and op.reads[0] == "x" and op.writes[0].name == "y" for op in block.ops)


def _flowing(ops: Iterable[Op], entering: Iterable[str]) -> set[str]:
    """The names that gradients are asked of once the operations have run, of those they were given and have made."""
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
    """The dtype of the first read of the operation that writes a tensor named `...writes`, in the last such block; of
    several such names, any."""
    scope = Scope()
    scope.resolve(stack.before, autocast)
    found: str | None = None
    for c in _copies(stack, scope, (), autocast, depth, leaf=False, reentrant=False):
        for block, inner in zip(c.blocks, c.scopes, strict=True):
            reads = [op.reads[0] for op in block.ops if any(t.name.endswith(writes) for t in op.writes)]
            found = inner[reads[0]].dtype if reads else found
    return found


def made_by(op: Op, stack: Stack, autocast: str | None) -> tuple[Tensor, ...]:
    """What an operation before the blocks makes, with literal dtypes."""
    return next(found.writes for found in Scope().resolve(stack.before, autocast) if found.name == op.name)


def stream_of(stack: Stack, autocast: str | None, depth: Mapping[str, int]) -> Tensor:
    """What the stack's last block hands on; without blocks, what the first would be given."""
    scope = Scope()
    scope.resolve(stack.before, autocast)
    copies = _copies(stack, scope, (), autocast, depth, leaf=False, reentrant=False)
    return copies[-1].scopes[-1]["y"] if copies else scope["embeds"]


def _returned(stack: Stack, last: Scope, ops: tuple[Op, ...]) -> dict[str, str]:
    """What `after` reads of a block's own, besides `y`: returned with it, and held until the next block has returned.

    By name, and the storage behind that name.
    """
    made = {t.name for op in stack.after for t in op.writes}
    shared = {name for run in stack.runs for block in run.blocks for name in block.shares}
    names = {r for op in stack.after for r in op.reads} - made - {"x", "y"} - shared
    behind = _behind(ops)
    return {name: behind[last[name].name] for name in names if name in last and last[name].name in behind}


def _behind(ops: Iterable[Op], given: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """The storages behind the names that the operations make, find of the pass before or are `given`; of views what
    they are views of."""
    behind = dict(given)
    for op in ops:
        behind.update((t.name, t.name) for t in op.past)
        for t in op.writes:
            behind[t.name] = behind[op.reads[0]] if op.view and op.reads[0] in behind else t.name
    return behind


def _roots(behind: Mapping[str, str], names: Iterable[str]) -> set[str]:
    """The storages behind the names."""
    return {behind.get(name, name) for name in names}


def _handed(
    made: Mapping[str, Storage], behind: Mapping[str, str], names: Iterable[str], stream: Storage
) -> dict[str, Storage]:
    """What was made, by the names that later operations read it by, each a reference of its own; what blocks are given
    as their input, the `stream`, has one more. No name is left for what none of those means."""
    found = {name: made[behind.get(name, name)] for name in names if behind.get(name, name) in made}
    for storage in (*found.values(), stream):
        storage.refs += 1
    for storage in made.values():
        storage.refs -= 1
        storage.shared = True
    return found


def _x(flows: bool) -> frozenset[str]:
    return frozenset(("x",)) if flows else frozenset()


def _input_leaf(before: tuple[Op, ...]) -> tuple[tuple[Op, ...], tuple[str, ...]]:
    """The output of the input embeddings asks for a gradient: the node that would accumulate it holds it.

    Where they train, or an adapter around them does, that output has a gradient anyway.
    """
    found = (op for op in before if any(w.group == "embedding" for w in op.weights))
    leaves = [op for op in (next(found, None), *(op for op in before if op.asks)) if op is not None]
    names: list[str] = []
    for leaf in leaves:
        module = leaf.name.removesuffix(".base_layer")
        of = [w for op in before for w in op.weights if op.name.startswith(module) or w.name.startswith(module)]
        if not any(w.trains for w in of):
            names.append(leaf.name)
    made = tuple(op._replace(holds="step") if op.name in names else op for op in before)
    return made, tuple(op.writes[0].name for op in leaves if op.name in names)


def _last_apart(copies: list[Copies], depth: Mapping[str, int]) -> list[Copies]:
    """The last two copies by themselves: on the way back the first of them makes the gradients of what all copies read,
    the second may add to those in new storages, and all others add in place."""
    *rest, last = copies
    apart = min(2, last.count(depth) - 1)
    alone = (last._replace(less=depth[last.times] - i, alone=True) for i in range(apart, 0, -1))
    return [*rest, last._replace(after=apart), *alone] if apart > 0 else copies


def _ends_apart(copies: Copies, depth: Mapping[str, int]) -> Iterator[Copies]:
    """The first and the last copy by themselves, if their weights are gathered: on the way there the first one finds
    what another unit's all-gather wrote, on the way back the last one what another unit's reduce-scatter read."""
    count = copies.count(depth)
    yield copies._replace(alone=True, after=0)
    if count > 2:
        yield copies._replace(less=copies.less + 1, after=copies.after + 1, joins=None)
    if count > 1:
        yield copies._replace(less=copies.less + count - 1, after=0, alone=True, joins=None)


def _apart(copies: list[Copies], depth: Mapping[str, int], most: int) -> list[Copies]:
    """Every copy by itself, but of each run `most`: those in the middle are left out."""
    out: list[Copies] = []
    for c in copies:
        count = c.count(depth)
        for i in range(min(count, most)):
            left_out = max(0, count - most) if i == most // 2 else 0
            out.append(c._replace(alone=True, less=c.less + i, skipped=left_out))
    return out


def lower(
    stack: Stack,
    depth: Mapping[str, int],
    autocast: str | None = None,
    checkpoint: bool = False,
    reentrant: bool = False,
    grads_exist: bool = False,
    input_grad: bool = False,
    labelled: bool = False,
    updates: Mapping[str, int] = MappingProxyType({}),
    lingers: bool = False,
    to_host: bool = False,
    division: Division | None = None,
    saves: SavedTensors | None = None,
) -> Lowered:
    """The moments of one forward and backward pass.

    `reentrant`: of a checkpointed block all is computed again before any of its backward.
    `grads_exist`: the gradients are there already (a later micro-batch). `input_grad`: the embeddings' output asks
    for a gradient though nothing before it trains, as checkpointing makes it. `updates`: bytes that updating a weight
    takes in backward, once its gradient is there, by the weight's path. `lingers`: the loop's names for outputs and
    loss keep those of the pass before until they are taken again: what was held, and what the graph's nodes refer to.
    `to_host`: what a checkpoint keeps of the block before lies in host memory, and a copy of it comes back when the
    block is computed again. `division`: the weights are divided among ranks, and gathered. `saves`: what operations
    keep lies in host memory.
    """
    tape = Tape(grads_exist, labelled, updates)
    tape.saves = saves
    gatherer = Gatherer(tape, division, grads_exist)
    passed = run_pass(tape, gatherer, stack, depth, autocast, checkpoint, reentrant, input_grad, to_host)
    (held,) = add_to_each((passed.held,), passed.nodes)
    moments = tape.moments
    for phase, before in (("forward", held), ("loss", passed.nodes)) if lingers else ():
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
    """The moments of a forward pass of which autograd records nothing, by the name of its `phase`. What it leaves for a
    later pass, as the caches of keys and values, is alive when it is over (`left`). `division`: the weights are divided
    among ranks, and gathered. `casts` is as `Scope` has it."""
    tape = Tape(labelled=labelled)
    tape.phase = phase
    gatherer = Gatherer(tape, division, False)
    passed = run_pass(tape, gatherer, stack, depth, autocast, False, False, False, records=False, casts=casts)
    return Lowered(
        tuple(tape.moments), passed.kept, tape.snapshot(), passed.held, tape.host, tuple(tape.sizes), passed.runs
    )


def run_pass(
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
) -> Passed:
    """Run the stack on the tape, forward and backward; see `lower`. With `one_by_one` there are no runs of equal
    blocks: that many copies of each are run, and the others left out. Unless it `records`, autograd keeps nothing, and
    forward is all there is."""
    goes = to_host or tape.saves is not None  # a checkpoint saves a block's input as an operation what it keeps
    first_scope = Scope(casts=casts)
    before = first_scope.resolve(stack.before, autocast)
    leaf: tuple[str, ...] = ()
    if input_grad:
        before, leaf = _input_leaf(before)
    copies = _copies(stack, first_scope, _flowing(before, leaf), autocast, depth, input_grad, checkpoint and reentrant)
    if gatherer.divides:
        copies = [part for c in copies for part in _ends_apart(c, depth)]
    if one_by_one:
        copies = _apart(copies, depth, one_by_one)
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
    later: list[frozenset[str]] = []  # what is read from each of the copies on, but for what comes before it
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
    embeds = first_scope["embeds"].name  # what a cast to the dtype it has already, and so dropped, was to rename
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
    joined: dict[int, Frame] = {}  # what ran before a copy, outside of blocks
    runs: list[tuple[str, int]] = []
    firsts: list[dict[str, str]] = []
    counted: Counter[str] = Counter()  # the blocks of each name that came before
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
            again = checkpoint and not block.lasting
            if again:
                frame.reentrant, frame.whole = reentrant, block.whole
                frame.lends = bool(block.shares) and not block.returned
                reads = dict.fromkeys(r for op in block.ops for r in op.reads)
                frame.to_host = goes
                given = [own[r] for r in reads if r in own]
                if reentrant and block.by_name:
                    frame.named, given = given, []
                frame.checkpoint = [*([] if goes else [stream]), *given]
                for storage in (*frame.checkpoint, *frame.named):
                    storage.refs += 1
            if called[at][i]:
                gatherer.gather(unit, frame, _first((*called[at][i + 1 :], *again_first), from_here[at + 1]))
            behind = _behind(block.ops)
            y, shares = behind["y"], {name: behind[name] for name in block.shares}
            frame.past = pasts[at][i]
            made = tape.forward(
                frame, (y, *returned.values(), *shares.values()), grad=records, checkpoint=again or not records
            )
            for name, storage in shares.items():
                own[name] = made[storage]
                own[name].shared = True
                if again and not reentrant and not block.returned:
                    own[name].refs += 1
                    frame.shared.append(own[name])
                    frame.shares = tuple(shares.values())
            for name in block.replaces:
                tape.drop(own.pop(name))
            flows |= _asked(block, frame.flows, again and reentrant)
            gatherer.leave(unit)
            same = y not in made  # the block hands on what it was given
            for storage in (*(() if same else (stream,)), *carried.values()):
                tape.drop(storage)  # the caller's names now mean what the block returned
            stream = stream if same else made[y]
            carried = {name: made[behind] for name, behind in returned.items()}
            x_flows = "y" in frame.flows
            frames.append(frame)
        if number is not None:
            tape.leave_run(stream, *carried.values(), *gatherer.handed)
            if any(op.holds == "states" for block in c.blocks for op in block.ops):
                entering.run = number  # it stands for what the other copies were given, and is released with them
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
        return Passed(kept, held, nodes, tuple(runs))
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
    root.refs += 1  # backward() holds the gradient it started from
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
            if checkpoint and reentrant and not block.lasting and "y" in grads:
                _materialise(tape, frame, block, flows.intersection(shared), returned, grads)
            used = called[i][j] and any(node.targets for node in frame.nodes)
            if used:
                gatherer.backward(unit, frame, _first((*called[i][:j][::-1], *again_last), before_here[i]))
            tape.backward(frame, grads)
            if used:
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
    for unit in (ROOT, BEFORE, TIED, REST):  # in the order of the model's modules
        gatherer.reduce(unit, first)
    gatherer.end(first)
    asked = {*leaf, *(name for joint in joints for name in joint.leaf)}
    asked.update(name for c in copies for block in c.blocks for op in block.ops for name in leaves(op))
    for name in [n for n in grads if n not in asked]:
        tape.drop(grads.pop(name))
    for storage in (root, *left.values()):
        tape.drop(storage)
    held, nodes = tape.end_step(*grads.values())
    tape.note()
    return Passed(kept, held, nodes, tuple(runs))
