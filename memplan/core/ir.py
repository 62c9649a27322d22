"""What the engine reads: a training step as a list of kernels that say what they read, write and keep.

A family of models is a `Stack`: the operations before its blocks, runs of equal blocks, the operations after them.
An `Op` is one kernel call as data: nothing here computes a size or knows a model.

Axes by letter (Korthikanti et al. 2022, arXiv:2205.05198, where they name one):

    b microbatch   s sequence   h hidden      a query heads   k key/value heads   d head dim
    f FFN width    v vocabulary L layers      r LoRA rank     w attention window
    E experts      e experts a token chooses   t sequence of a decoder beside an encoder   c classes
    kv tokens that keys and values are of, where those of earlier passes are among them; past of them those before

A shape is a string of axes and integers, `"b s h"` or `"b s 3 a d"`; the empty string is a scalar. Families may add
axes of their own (a word such as `rot`), defined where the family turns a config into axes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

# Axes that are never smaller than another one: that one rounded up, or the tokens that its chunks are of.
AT_LEAST = {
    "s": "chunks",
    **dict.fromkeys(("s1", "s8", "s32", "s128", "s_conv", "s_chunks"), "s"),
    **dict.fromkeys(("t8", "t32", "t128"), "t"),
    **dict.fromkeys(("kv1", "kv8", "kv32", "kv128"), "kv"),
}


class Tensor(NamedTuple):
    """One storage.

    `dtype` is a literal (`"fp32"`, `"bf16"`, `"fp16"`, `"int64"`, `"int32"`, `"bool"`, `"uint8"`), or `""` for what
    torch's type promotion makes of the operation's inputs, or `"=x"` for the dtype of the tensor `x`; with `/n` there
    is one for every n elements, rounded up.
    """

    name: str
    shape: str = ""
    dtype: str = ""


class Weight(NamedTuple):
    """A parameter of the model.

    `name` is the path inside its block (`self_attn.q_proj.weight`); `group` is what it is counted under: `embedding
    attention mixer mlp router norm vision projector audio lm_head adapter`, or `buffer` for a constant the model holds.
    `dtype` is empty until a precision is chosen, but where the model class keeps one. A quantised weight is stored as
    the tensors in `stored` instead.

    matrix      the 2-D weight of a linear layer, which adapters and quantisation may take
    rows        how many leading axes of a 2-D weight's shape are its first dimension; 0 of a vector
    transposed  of a linear layer that stores it input by output, as transformers' Conv1D does
    viewed      of a linear layer of the model's own that reads a view of it: autocast does not keep its cast, and
                bitsandbytes does not take it
    several     of a linear layer whose module returns more than the product, as one that peft or bitsandbytes puts in
                its place does not
    direct      of a linear layer whose weight the model reads itself, and does not call its module unless it is
                quantised: adapters around it are idle
    chosen      the axis that says how many along the first one a token uses, where it does not use all
    stacked     matrices along the first axis, as one parameter of three dimensions; `rows` counts that axis too
    stands_for  the linear layers by whose names peft adapts it, though it is a parameter by itself
    idle        would train, but never has a gradient: the run's operations do not use it, or only without one
    gradient    the shape of its gradient, where that is not the weight's: of a part of a table, the whole table's
    kernel      of a stored one, what runs it where nothing trains over its format
                (`memplan.catalogue.quantization.inference_formats`)
    """

    name: str
    shape: str
    group: str
    dtype: str = ""
    trains: bool = True
    matrix: bool = False
    rows: int = 0
    stored: tuple[Tensor, ...] = ()
    transposed: bool = False
    viewed: bool = False
    several: bool = False
    direct: bool = False
    chosen: str = ""
    stacked: bool = False
    stands_for: tuple[str, ...] = ()
    idle: bool = False
    gradient: str = ""
    kernel: str = ""


class Keep(NamedTuple):
    """The operation keeps `what` from forward to backward when a gradient is asked of `of` (a read or a weight).

    `becomes`: that gradient is `what` itself, written over or made already. `seen`: the shape of the view that it is
    kept by, where that repeats it; a copy of it has all of those elements.
    """

    what: str
    of: str
    becomes: bool = False
    seen: str = ""


class Scratch(NamedTuple):
    """A tensor alive only inside the operation's backward, when a gradient is asked of `of` (any, if empty).

    An `early` one is gone before the gradients are made. A `summed` one is the gradient itself, before it is summed to
    the shape of what was broadcast, which happens when all gradients are made.
    """

    tensor: Tensor
    of: str = ""
    early: bool = False
    summed: bool = False


class Op(NamedTuple):
    """One kernel call.

    reads, writes   names of the tensors it reads; the tensors it writes. A `view` aliases its first read.
    weights         the parameters it uses.
    keeps           what it pins for backward, and for whose gradient.
    scratch         alive only inside the forward call; `scratch_back` only inside the backward call.
    gradient        how the gradient of a read comes: `new` storage; `view`, new storage that the gradient is a view
                    of, so that autograd cannot add into it in place; `same`, the incoming gradient itself
                    (cast, and so new, where dtypes or shapes differ);
                    `own`, new storage in the read's own dtype at once, whatever the output's; `none` where no
                    gradient flows through.
    cast            only changes the dtype: no call, the same tensor, where it has that dtype already.
    spared          of a cast: the dtype it need not be done from, because the next kernel reads that one itself.
    laid            copies what it reads as the product that reads both needs it to lie: no call where autocast casts
                    that for the product, whose cast lies so.
    autocast        under autocast, inputs are cast to the compute dtype (`lower`) or to fp32 (`fp32`), or only the
                    output is fp32 (`wide`).
    holds           its outputs are referenced to the end of the `forward` or of the `step`, whoever reads them; as an
                    encoder's `states`, until an operation outside of blocks that `releases` those; as a `cache`, beyond
                    the pass, for the next one.
    past            tensors that are there from the pass before, by the names they are read by here: of each its
                    reference goes with its last reader.
    caches          where it stands, what it reads is put beside what a cache has of earlier tokens, of which there are
                    then as many as this axis says, and the names mean all of them from there on; where it is a view,
                    another layer has done so; where it `holds` that, the first pass keeps it as it is, without a copy.
                    A rewrite makes operations of it (`memplan.catalogue.inference.decoding`).
    captures        reads that the operation's backward node refers to itself until the graph goes at the end of the
                    step, so that checkpointing does not let go of them.
    wraps           parameters that it makes for itself of what it is given, without a copy. They train: their gradients
                    are made though nothing reads them, and stay until the graph goes at the end of the step.
    asks            with checkpointing its output asks for a gradient though nothing before it trains, as that of
                    embeddings does. Where no gradient flows through, checkpointing or not.
    lends           a module whose weights it hands to the operations after it: their gradients reach the weights only
                    when its own backward would run.
    returns         the module that this is the last operation of, which one that lends its weights began.
    skipped         the run leaves it out: of it there are only its weights.
    recorded        takes place only where autograd records: not in the forward pass of a checkpoint.
    unit            what it is a part of that one kernel may do at once: the kernel's name, and one of the unit's own.
    product         `matrix` where it multiplies a read by its matrices or by another read; `grouped` where each row of
                    a read by one of several matrices; `fold` where two adapters' matrices by each other; `attention`
                    where it is both products of attention in one kernel, which leaves out what a causal mask hides,
                    `whole attention` where no mask hides anything, and `over` the axis of its keys where not s; empty
                    where it goes element by element.
    source          where the facts come from.
    """

    name: str
    reads: tuple[str, ...] = ()
    writes: tuple[Tensor, ...] = ()
    weights: tuple[Weight, ...] = ()
    keeps: tuple[Keep, ...] = ()
    scratch: tuple[Tensor, ...] = ()
    scratch_back: tuple[Scratch, ...] = ()
    gradient: str = "new"
    view: bool = False
    cast: bool = False
    spared: str = ""
    laid: bool = False
    autocast: str = ""
    holds: str = ""
    releases: bool = False
    past: tuple[Tensor, ...] = ()
    caches: str = ""
    captures: tuple[str, ...] = ()
    wraps: tuple[Tensor, ...] = ()
    asks: bool = False
    lends: str = ""
    returns: str = ""
    skipped: bool = False
    recorded: bool = False
    unit: str = ""
    product: str = ""
    source: str = ""


class Block(NamedTuple):
    """A repeated list of operations, one layer of the model: reads `x` (and names of `Stack.before`), makes `y`.

    A block is what checkpointing recomputes as a unit. What it `shares`, all that comes later may read; its run has it
    once. `returned`: the model hands that on by itself. Otherwise it is in a dictionary that the checkpoints of all
    blocks refer to, where what is computed again takes its place. `by_name`: so it is given what it reads besides `x`,
    which checkpointing of the reentrant kind then refers to until the graph goes.
    A `lasting` one is never checkpointed, as those of a tower whose layers the library does not checkpoint.
    What it shares takes the place of what it `replaces`, which earlier blocks shared: the model names that no more.
    Of a `whole` one a checkpoint computes everything again, and does not stop at what was kept last.
    """

    name: str
    ops: tuple[Op, ...]
    shares: tuple[str, ...] = ()
    returned: bool = False
    lasting: bool = False
    by_name: bool = False
    replaces: tuple[str, ...] = ()
    whole: bool = False


class Run(NamedTuple):
    """`blocks` in sequence, as often as the axis `times` says.

    `before`: operations between the run before and this one, outside of any block. They read the output of that one's
    last block as `x`, and write `stream`, which the first block here reads as `x`; what else they write, all that comes
    later may read.
    """

    blocks: tuple[Block, ...]
    times: str
    before: tuple[Op, ...] = ()


class Stack(NamedTuple):
    """A model: the operations before the blocks (they write `embeds`), the runs of blocks, the operations after.

    Where there are several streams, an encoder's and a decoder's, runs have operations between them.

    `after` reads the last block's output as `x` and ends with the logits, or with the hidden states that a fused
    loss reads; `loss` ends with the tensor `loss`.
    """

    before: tuple[Op, ...]
    runs: tuple[Run, ...]
    after: tuple[Op, ...]
    loss: tuple[Op, ...] = ()


def outside(stack: Stack) -> tuple[tuple[Op, ...], ...]:
    """The operations of the stack outside of blocks, in order, but for the loss."""
    return (stack.before, *(run.before for run in stack.runs if run.before), stack.after)


def operations(stack: Stack) -> Iterator[Op]:
    """Every operation of the stack in order, of repeated blocks once."""
    yield from stack.before
    for run in stack.runs:
        yield from run.before
        for block in run.blocks:
            yield from block.ops
    yield from stack.after
    yield from stack.loss


class Unwritten(NamedTuple):
    """A name that an operation of a stack uses, and that nothing before it writes: `where` is the operation's list."""

    where: str
    operation: str
    name: str


def unwritten(stack: Stack) -> Iterator[Unwritten]:
    """The names that operations read, keep or take a dtype from without a writer: none of a stack that can be run.

    An operation knows what its own list wrote before it, what was written outside of blocks, and what earlier blocks
    share; those after the blocks also know what the last block wrote.
    """
    known = set[str]()
    yield from _unwritten("before", stack.before, known, "embeds")
    last = set[str]()
    for run in stack.runs:
        if run.before:
            known = known | {"x"}
            yield from _unwritten(f"before {run.times}", run.before, known, "stream")
        for block in run.blocks:
            last = known | {"x"}
            yield from _unwritten(block.name, block.ops, last, "y", *block.shares)
            known = known.union(block.shares).difference(block.replaces)
    known = known | last | {"x"}
    yield from _unwritten("after", stack.after, known)
    yield from _unwritten("loss", stack.loss, known, *(("loss",) if stack.loss else ()))


def _unwritten(where: str, operations: tuple[Op, ...], known: set[str], *handed_on: str) -> Iterator[Unwritten]:
    """The unwritten names of one list, which must write what is `handed_on`. What it writes is added to `known`."""
    known.update(w.name for op in operations for w in op.weights)
    for op in operations:
        known.update(t.name for t in op.past)
        yield from (Unwritten(where, op.name, name) for name in op.reads if name not in known)
        known.update(t.name for t in (*op.writes, *op.wraps))
        yield from (Unwritten(where, op.name, name) for name in named(op) if name not in known)
    yield from (Unwritten(where, "", name) for name in handed_on if name not in known)


def named(op: Op) -> Iterator[str]:
    """The names that an operation keeps, captures, or takes a dtype from."""
    yield from op.captures
    for keep in op.keeps:
        yield keep.what
        yield keep.of
    for tensor in (*op.past, *op.writes, *op.wraps, *op.scratch, *(s.tensor for s in op.scratch_back)):
        if tensor.dtype.startswith("="):
            yield tensor.dtype[1:].partition("/")[0]


class SavedTensors(NamedTuple):
    """What operations keep for backward is kept in host memory: a copy for every operation that keeps it, made when
    the operation runs. It comes back as a copy when the operation's backward begins, and that goes when it is over.

    weights  what is kept of weights is copied as well, though they are there anyway
    source   where the facts come from
    """

    weights: bool
    source: str


class Unit(NamedTuple):
    """Weights of which every rank holds a part, and which are gathered together for as long as they are used.

    whole     the weights gathered
    message   what the all-gather writes, where the weights are copied out of that
    cast      the rank's part in the dtype that is sent, where it is kept in another
    joined    the gradients of those that train as the reduce-scatter reads them
    padded    a copy of them with padding, where it reads that
    received  the rank's part of those, where it is cast to the dtype of its weights afterwards
    parts     the rank's part of the gradients, which stays
    summed    the gradients of the passes before, whole, where they are reduced after several
    laid      `parts` are the gradients of those that train, laid together, and need no tensor between
    nested    weights within that are units of their own, gathered for the operation that uses them: name and unit
    modules   modules within that are units of their own, gathered from the operation that lends their weights to the
              one that returns: path and unit
    divided   what is made of the gradients as they were joined, to divide them, once the rank's part is there
    """

    whole: tuple[Tensor, ...]
    message: tuple[Tensor, ...] = ()
    cast: tuple[Tensor, ...] = ()
    joined: tuple[Tensor, ...] = ()
    padded: tuple[Tensor, ...] = ()
    received: tuple[Tensor, ...] = ()
    parts: tuple[Tensor, ...] = ()
    summed: tuple[Tensor, ...] = ()
    laid: bool = False
    nested: tuple[tuple[str, Unit], ...] = ()
    modules: tuple[tuple[str, Unit], ...] = ()
    divided: tuple[Tensor, ...] = ()


class Division(NamedTuple):
    """How the weights of a stack are divided among ranks: its units by name.

    A block's weights are a unit by the block's place in the stack (`memplan.engine.gather.unit_of`). Weights outside of
    blocks are in up to four units: `root` is gathered before everything else, `tied` before the first operation that
    uses it, and both stay whole to the end of the pass; `before` goes when the operations before the blocks have run,
    and is gathered again for their backward; `after` stays whole until its own backward is over. What is in the unit
    `rest` is whole as long as `root`, its gradients too; blocks in it are no units of their own.

    outside  the weights outside of blocks, by name, and the unit each is in
    lingers  what a collective wrote or read stays until the next of its kind is over
    asks     when a unit is asked for on the way back: at the `first` of the backward of the one after it, at its
             `last`, when that one's weights are `gone`, or `never` before its own
    at_loss  the last block's unit is asked for when the loss's backward begins, not when the head's does
    ahead    on the way there a unit is asked for when the one before it begins; autograd then comes to the making of a
             unit's gradients only after the backward of the one before it
    keeps    weights stay whole from forward to backward
    waits    what a rank received stays until the pass is over, as replicas sum it
    returns  the loss is computed when the model has returned, and let go of what its last gathering wrote
    leaves   its parts of the gradients go to the host as soon as they are reduced
    hooks    what a recomputed block was given, and the gradient of that, stay until the pass is over: a hook refers to
             them
    sums     there are gradients of passes before, whole, which are added to, and go as each unit's are reduced
    """

    units: tuple[tuple[str, Unit], ...]
    outside: tuple[tuple[str, str], ...]
    lingers: bool
    asks: str
    source: str
    at_loss: bool = False
    sums: bool = False
    ahead: bool = False
    keeps: bool = False
    waits: bool = False
    returns: bool = False
    leaves: bool = False
    hooks: bool = False
