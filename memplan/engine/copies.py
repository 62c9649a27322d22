"""`Copies`: a stack's blocks with literal dtypes, and the copies of a run that differ from its others split off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from itertools import islice

from memplan.core.identity import Identity
from memplan.core.ir import Block, Op, Stack, Tensor
from memplan.core.records import NamedTuple
from memplan.engine.dtypes import Scope, with_cached_casts
from memplan.engine.gather import unit_of
from memplan.engine.operation_facts import gradient_flow, names_read, storages_behind


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


class ResolvedStack(NamedTuple):
    """A stack with literal dtypes, in the order in which it runs.

    before        operations before the blocks
    before_scope  the tensors known after them
    leaf          outputs of `before` that require a gradient though nothing there trains
    copies        the blocks
    after         operations after the blocks
    loss          operations of the loss
    scope         the tensors known at the end
    returned      outputs of every block other than `y` that `after` reads, each with its storage
    shared        names of tensors that a block makes for later blocks
    read          names that anything after `before` reads
    read_from     for each of the copies, the names that it and everything after it reads
    """

    before: tuple[Op, ...]
    before_scope: Scope
    leaf: tuple[str, ...]
    copies: tuple[Copies, ...]
    after: tuple[Op, ...]
    loss: tuple[Op, ...]
    scope: Scope
    returned: Mapping[str, str]
    shared: frozenset[str]
    read: frozenset[str]
    read_from: tuple[frozenset[str], ...]

    @property
    def joins(self) -> list[OpsBetweenRuns]:
        """The operations between runs, in order."""
        return [c.joins for c in self.copies if c.joins is not None]

    @property
    def weight_uses(self) -> dict[str, int]:
        """Weight outside of blocks -> operations that use it, if more than one."""
        between = (op for joint in self.joins for op in joint.ops)
        outside = [op for op in (*self.before, *between, *self.after, *self.loss) if op.gradient != "none"]
        uses = Counter(w.name for op in outside for w in op.weights if w.trains)
        return {name: n for name, n in uses.items() if n > 1}


def resolve_stack(
    stack: Stack,
    depth: Mapping[str, int],
    autocast: str | None,
    *,
    input_grad: bool,
    reentrant: bool,
    casts: str,
    is_sharded: bool,
    one_by_one: int,
) -> ResolvedStack:
    """Resolve a stack's dtypes, and split off the copies of blocks that differ from the others of their run.

    reentrant   blocks are checkpointed by torch's reentrant kind
    is_sharded  the first and the last copy of each run differ from the others, because weights are gathered, or
                saved tensors leave the GPU later
    one_by_one  split off this many copies of each run, and skip the others; 0 for those that differ

    The other arguments are those of `memplan.engine.step.ExecutionOptions` and `memplan.engine.dtypes.Scope`.
    """
    before_scope = Scope(casts=casts)
    before = before_scope.resolve(stack.before, autocast)
    leaf: tuple[str, ...] = ()
    if input_grad:
        before, leaf = require_input_gradient(before)
    flowing = {*leaf, *gradient_flow(before, frozenset(leaf)).flows}
    copies = resolve_copies(stack, before_scope, flowing, autocast, depth, input_grad, reentrant, leaf)
    if is_sharded:
        copies = [split for c in copies for split in split_ends(c, depth)]
    if one_by_one:
        copies = split_all(copies, depth, one_by_one)
    last = copies[-1].scopes[-1]
    scope = next((c.joins.scope for c in reversed(copies) if c.joins is not None), before_scope)
    handed, returned = _returned(stack, copies)
    shared = {
        name: inner[name]
        for c in copies
        for block, inner in zip(c.blocks, c.scopes, strict=True)
        for name in block.shares
    }
    tail = Scope(scope, {"x": last["y"]._replace(name="x"), **shared, **handed})
    after, loss = tail.resolve(stack.after, autocast), tail.resolve(stack.loss, autocast)
    read = frozenset(r for op in (*after, *loss) for r in op.reads)
    read_from: list[frozenset[str]] = []
    for c in reversed(copies):
        read = read.union(*[names_read(Identity(block.ops)) for block in c.blocks])
        read_from.insert(0, read)
        read |= names_read(Identity(c.joins.ops)) if c.joins is not None else frozenset[str]()
    return ResolvedStack(
        before,
        before_scope,
        leaf,
        tuple(copies),
        after,
        loss,
        tail,
        returned,
        frozenset(shared),
        read,
        tuple(read_from),
    )


def resolve_copies(
    stack: Stack,
    scope: Scope,
    flowing: Iterable[str],
    autocast: str | None,
    depth: Mapping[str, int],
    input_grad: bool,
    reentrant: bool,
    leaves: Container[str] = (),
) -> list[Copies]:
    """Resolve the stack's blocks, and split off copies that differ from the others of their run.

    The very first block, and the first after operations between runs, reads a tensor that the model may still
    reference; the first of a run may be passed what an earlier run keeps. A block's output may differ from its input in
    shape or dtype, or need a gradient though its input does not. In backward the last copy comes first: it creates the
    gradients of tensors that all copies read, to which the others add.

    flowing     names of tensors that need a gradient
    input_grad  whether embeddings between runs require a gradient
    leaves      embeddings before the blocks that are made to require a gradient
    """
    out: list[Copies] = []
    flowing = set(flowing)
    x, flows = scope["embeds"]._replace(name="x"), scope["embeds"].name in flowing
    leaf = x if scope["embeds"].name in leaves and x.dtype == "fp32" else None
    at_input = True  # all blocks so far have returned their input unchanged
    for number, run in enumerate(stack.runs):
        units = tuple(unit_of(number, i) for i in range(len(run.blocks)))
        less = 0
        joins: OpsBetweenRuns | None = None
        if run.before:
            scope = Scope(scope, {"x": x})
            between, leaf_names = scope.resolve(run.before, autocast), ()
            if input_grad:
                between, leaf_names = require_input_gradient(between)
            joins = OpsBetweenRuns(between, scope, leaf_names, scope["stream"].name)
            flowing = flowing.union(_x(flows), leaf_names)
            flowing |= gradient_flow(between, flowing).flows
            x, flows = scope["stream"]._replace(name="x"), joins.stream in flowing
            flowing -= {"x"}
        while less < depth[run.times]:
            entered = (x.shape, x.dtype, flows)
            blocks: list[Block] = []
            scopes: list[Scope] = []
            for block in run.blocks:
                inner = Scope(scope, {"x": x})
                ops = inner.resolve(block.ops, autocast)
                if x is leaf:
                    ops = with_cached_casts(Identity(ops), frozenset(("x",)))
                after_block = flowing | _x(flows)
                after_block |= gradient_flow(ops, after_block).flows
                flows = "y" in after_block
                x = inner["y"]._replace(name="x")
                if block.shares:
                    scope = Scope(scope, {name: inner[name] for name in block.shares})
                    flowing |= shares_with_gradient(block, after_block, reentrant)
                blocks.append(block._replace(ops=ops))
                scopes.append(inner)
            at_input = at_input or joins is not None
            works = not all(_returns_input(block) for block in blocks)
            shares = any(block.shares or (block.passed and not less) for block in run.blocks)
            alone = (at_input and works) or joins is not None or shares or (x.shape, x.dtype, flows) != entered
            at_input = at_input and not works
            out.append(Copies(tuple(blocks), tuple(scopes), run.times, less, alone, units, joins=joins))
            joins = None
            less += 1
            if not alone:
                break
        if out and any(names_read(Identity(block.ops)) & flowing for block in out[-1].blocks):
            out = _split_last(out, depth)
    return out


def shares_with_gradient(block: Block, flowing: Container[str], reentrant: bool) -> set[str]:
    """Return the block's shares that need a gradient.

    Reentrant checkpointing is an autograd.Function: all its outputs need gradients if any does, but tensors that it
    puts into a dictionary never do.
    """
    if reentrant:
        return set(block.shares) if block.returned and "y" in flowing else set()
    return {name for name in block.shares if name in flowing}


def is_called(block: Block) -> bool:
    """Whether the run calls the block; of a tower that is not run, only the weights exist."""
    return any(op.writes and not op.view for op in block.ops)


def _returns_input(block: Block) -> bool:
    """Whether the block returns its input unchanged, as a block that is not run does."""
    return any(op.view and op.reads[0] == "x" and op.writes[0].name == "y" for op in block.ops)


def _x(flows: bool) -> frozenset[str]:
    return frozenset(("x",)) if flows else frozenset()


def require_input_gradient(before: tuple[Op, ...]) -> tuple[tuple[Op, ...], tuple[str, ...]]:
    """Make the output of the input embeddings require a gradient; return the operations and that output's name.

    The node that accumulates the gradient holds the output. If the embeddings or an adapter around them train, the
    output has a gradient anyway, and nothing changes.
    """
    embedding = (op for op in before if not op.cast and op.reads and any(w.group == "embedding" for w in op.weights))
    candidates = [*islice(embedding, 1), *(op for op in before if op.requires_gradient)]
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


def split_ends(copies: Copies, depth: Mapping[str, int]) -> Iterator[Copies]:
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


def split_all(copies: list[Copies], depth: Mapping[str, int], most: int) -> list[Copies]:
    """Split off every copy, at most `most` of each run: those in the middle are not run."""
    out: list[Copies] = []
    for c in copies:
        count = c.count(depth)
        for i in range(min(count, most)):
            skipped = max(0, count - most) if i == most // 2 else 0
            out.append(c._replace(alone=True, less=c.less + i, skipped=skipped))
    return out


def read_dtype(
    stack: Stack, writes: str | tuple[str, ...], autocast: str | None, depth: Mapping[str, int]
) -> str | None:
    """Return the dtype of the first read of the operation that writes a tensor named `...writes` (or one of several).

    If several blocks have one, it is the last block's; None if no block has.
    """
    scope = Scope()
    scope.resolve(stack.before, autocast)
    dtype: str | None = None
    for c in resolve_copies(stack, scope, (), autocast, depth, input_grad=False, reentrant=False):
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
    copies = resolve_copies(stack, scope, (), autocast, depth, input_grad=False, reentrant=False)
    return copies[-1].scopes[-1]["y"] if copies else scope["embeds"]


def _returned(stack: Stack, copies: Sequence[Copies]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the block outputs other than `y` that `after` reads, and their storages, of the last block that has them.

    Blocks return them with `y`, so they stay alive until a later block returns others.
    """
    known = {"x", "y", *[t.name for op in stack.after for t in op.writes]}
    known |= {name for run in stack.runs for block in run.blocks for name in block.shares}
    names = [r for r in dict.fromkeys(r for op in stack.after for r in op.reads) if r not in known]
    handed, returned = dict[str, Tensor](), dict[str, str]()
    for block, inner in (pair for c in copies for pair in zip(c.blocks, c.scopes, strict=True)):
        behind = storages_behind(block.ops)
        for name in (name for name in names if name in inner and inner[name].name in behind):
            handed[name], returned[name] = inner[name]._replace(name=name), behind[inner[name].name]
    return handed, returned
