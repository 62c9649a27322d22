"""The engine's input: a model as lists of kernels that state what they read, write and keep for backward.

A model is a `Stack`: the operations before its blocks, runs of equal blocks, the operations after them. An `Op` is one
kernel call as data: nothing here computes a size or knows a model.

Axes by letter (from Korthikanti et al. 2022, arXiv:2205.05198, if they name one):

    b microbatch   s sequence   h hidden      a query heads   k key/value heads   d head dim
    f FFN width    v vocabulary L layers      r LoRA rank     w attention window
    E experts      e experts per token        c classes       t decoder sequence of an encoder-decoder
    kv   tokens of keys and values, including those cached by earlier passes
    past tokens cached by earlier passes

A shape is a string of axes and integers, `"b s h"` or `"b s 3 a d"`; the empty string is a scalar. Families may add
axes (a word such as `rot`), defined in `memplan.models.configs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from memplan.core.identity import Identity
from memplan.core.records import NamedTuple

# Axis -> an axis that it is never smaller than: `s128` is `s` rounded up, and `s` is at least its number of chunks.
AT_LEAST = {
    "s": "chunks",
    **dict.fromkeys(("s1", "s8", "s32", "s128", "s_conv", "s_chunks"), "s"),
    **dict.fromkeys(("t8", "t32", "t128"), "t"),
    **dict.fromkeys(("kv1", "kv8", "kv32", "kv128"), "kv"),
}


class Tensor(NamedTuple):
    """One storage.

    `dtype` is a literal (`"fp32"`, `"bf16"`, `"fp16"`, `"int64"`, `"int32"`, `"bool"`, `"uint8"`), `""` for torch's
    type promotion of the operation's inputs, `"=x"` for the dtype of the tensor `x`, or `"product"` for autocast's, if
    the run has one, else fp32. With a suffix `/n` there is one element per n elements of the shape, rounded up. A
    temporary with `!x` after its dtype is a cast of `x`, which does not exist if `x` has that dtype already.
    """

    name: str
    shape: str = ""
    dtype: str = ""


class Weight(NamedTuple):
    """A parameter of the model.

    name             path inside its block (`self_attn.q_proj.weight`)
    group            the kind it is counted as: `embedding attention mixer mlp router norm vision projector audio
                     lm_head adapter`, or `buffer` for a constant that the model holds
    dtype            empty until a precision is chosen, unless the model class fixes it
    matrix           the 2-D weight of a linear layer, which adapters and quantisation can target
    rows             number of leading axes in `shape` that form the first dimension of a 2-D weight; 0 for a vector
    stored           the tensors that a quantised weight is stored as
    transposed       the linear layer stores it input by output, like transformers' Conv1D
    is_read_as_view  the model's own linear layer reads a view of it: autocast does not cache its cast, and bitsandbytes
                     does not replace the layer
    returns_more     the linear layer returns more than the product, which replacements by peft or bitsandbytes do not
    bypasses_module  the model reads the weight without calling the linear layer, unless it is quantised: adapters on
                     the layer are idle
    chosen           axis of the entries along the first dimension that a token uses, if it does not use all (experts)
    stacked          matrices along the first axis, as one 3-D parameter; `rows` counts that axis too
    stands_for       names of the linear layers that peft adapts it as, though it is a single parameter
    idle             would train, but never gets a gradient: the run's operations do not use it, or only without
                     gradients
    gradient         shape of its gradient's storage, if it differs from the weight's: for a part of a table, that of
                     the whole table
    accumulates      the product that computes its gradient adds it to the gradient buffer, so none is allocated
    adapter          rank of the adapter on it, an axis or a number, if the run chooses modules by their paths
    kernel           kernel that runs an inference-only format (`memplan.catalogue.quantization.inference_formats`)
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
    is_read_as_view: bool = False
    returns_more: bool = False
    bypasses_module: bool = False
    chosen: str = ""
    stacked: bool = False
    stands_for: tuple[str, ...] = ()
    idle: bool = False
    gradient: str = ""
    accumulates: bool = False
    adapter: str = ""
    kernel: str = ""

    @property
    def requires_grad(self) -> bool:
        """Whether torch would compute its gradient, if the loss depended on it."""
        return self.trains or self.idle


class Keep(NamedTuple):
    """The operation keeps `what` from forward to backward if `of` (a read or a weight) needs a gradient.

    is_gradient  the gradient of `of` is `what` itself, overwritten in place or computed in forward
    seen         shape of an expanded view that is kept; a copy of the view has all of its elements
    """

    what: str
    of: str
    is_gradient: bool = False
    seen: str = ""


class Scratch(NamedTuple):
    """A tensor alive only inside the operation's backward, if `of` needs a gradient (any read or weight, if empty).

    unless  a read or weight that needs no gradient then: a function computes its gradient in vain
    early   freed before the gradients are allocated
    summed  the gradient of `of` itself, in the broadcast shape: it is summed to the shape of `of` once all gradients of
            the operation are computed
    """

    tensor: Tensor
    of: str = ""
    early: bool = False
    summed: bool = False
    unless: str = ""


MODEL = "model"  # value of `Op.returns`


class Op(NamedTuple):
    """One kernel call.

    reads              names of the tensors it reads
    writes             the tensors it writes
    weights            the parameters it uses
    keeps              what it keeps for backward, and for whose gradient
    scratch            tensors alive only inside the forward call
    scratch_back       tensors alive only inside the backward call
    gradient           storage of the gradient of a read: new   new storage view  a view of new storage, which autograd
                       cannot add into in place same  the incoming gradient itself, or a cast of it if dtypes or shapes
                       differ own   new storage in the read's dtype, even if the output has another part  a view of part
                       of the incoming gradient; that of what is `past` stays until all blocks' backward is over none
                       no gradient flows through
    view               the output aliases the first read
    is_view_again      the output aliases the first read when a checkpointed block is recomputed
    cast               only changes the dtype; dropped if the tensor has that dtype already
    uncast_dtype       a dtype that need not be cast, because the next kernel reads it directly
    only_dtype         runs only if the first read has this dtype; otherwise the output is the read itself
    copies_layout      copies a tensor into the memory layout that the product reading both needs; dropped if autocast
                       casts the tensor for the product, since the cast has that layout
    autocast           under autocast, inputs are cast to the compute dtype (`lower`) or to fp32 (`fp32`), or only the
                       output is fp32 (`wide`)
    holds              keeps a reference to its outputs to the end of `autocast` (casts of weights), of `call` (the
                       model's variables), of `forward` (what it returns) or of the `step`; an encoder's `states` until
                       an operation outside of blocks that `releases` them; a `cache` until the next pass, or that of a
                       model inside another one's step until its loss is computed. `past`: the blocks find it as what
                       is `past`, with its gradients. `model`: the model's own attribute to its next pass, and with it
                       the embeddings before it that require a gradient, and that gradient
    releases           what it lets go that operations hold: all `states`, the `last states`, or casts of `autocast`
    past               tensors left by the previous pass, by their names in this one; each is freed after its last
                       reader
    caches             axis of the tokens in a cache after its reads are appended; from here on their names mean all of
                       these tokens. A view: another layer has appended them. With `holds`: the first pass keeps the
                       reads themselves, without a copy. `memplan.catalogue.inference.decoding` turns it into operations
    captures           reads that the backward node itself references until the graph is freed at the end of the step,
                       so that checkpointing does not free them
    wraps              parameters that it creates from its reads, without a copy. They train: their gradients are
                       computed though nothing reads them, and stay until the graph is freed
    requires_gradient  its output requires a gradient under checkpointing though nothing before it trains, as that of
                       embeddings does; with `gradient` none, also without checkpointing
    lends              path of a module whose weights it hands to the operations after it; their gradients are
                       accumulated only when its own backward would run
    returns            path of the module that ends here and began with the operation that `lends` its weights, or
                       `MODEL` if the model itself ends before the loss
    skipped            not run: only its weights exist
    recorded           outputs that it makes only if a gradient flows through it
    needs_recording    runs only while autograd records, so not in the forward pass of a checkpoint; and if it `keeps`
                       anything, only if a gradient needs that
    unit               operations that one fused kernel may replace: the kernel's name, and a name of the unit
    product            kind of matrix product, empty for an elementwise operation: matrix           a read times the
                       weights, or times another read grouped          each row of a read times one of several matrices
                       fold             the matrices of an adapter times each other attention        both products of
                       attention in one kernel, which skips what a causal mask hides whole attention  the same without a
                       mask either followed by `over` and the axis of the keys, if that is not s
    model              a model that it runs forward first, without gradients and in a phase named like the operation
    source             where the facts come from
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
    is_view_again: bool = False
    cast: bool = False
    uncast_dtype: str = ""
    only_dtype: str = ""
    copies_layout: bool = False
    autocast: str = ""
    holds: str = ""
    releases: str = ""
    past: tuple[Tensor, ...] = ()
    caches: str = ""
    captures: tuple[str, ...] = ()
    wraps: tuple[Tensor, ...] = ()
    requires_gradient: bool = False
    lends: str = ""
    returns: str = ""
    skipped: bool = False
    recorded: tuple[str, ...] = ()
    needs_recording: bool = False
    unit: str = ""
    product: str = ""
    source: str = ""
    model: Stack | None = None


class Block(NamedTuple):
    """One layer of the model, and what checkpointing recomputes as a unit: reads `x` (and names of `Stack.before`),
    writes `y`.

    shares              names that everything after the block may read, also of its input and output; the block is not
                        repeated
    returned            the model itself passes on what it shares. Otherwise that is in a dictionary that all blocks'
                        checkpoints reference, and recomputation replaces it there
    never_checkpointed  never checkpointed, like the layers of a tower that the library does not checkpoint
    by_name             gets what it reads besides `x` as keyword arguments, which reentrant checkpointing references
                        until the graph is freed
    replaces            names shared by earlier blocks that the model drops, before it shares others, maybe by that name
    passed              names that an earlier block returned and the model passes to it, which a checkpoint keeps
    recomputes_all      a checkpoint recomputes all of it, instead of stopping at the last tensor that is kept
    unread              nothing reads its output: what it keeps is freed when forward ends, and its weights are idle. If
                        it returns its input, nothing reads what it makes of it, and that is freed when the block ends
    """

    name: str
    ops: tuple[Op, ...]
    shares: tuple[str, ...] = ()
    returned: bool = False
    never_checkpointed: bool = False
    by_name: bool = False
    replaces: tuple[str, ...] = ()
    passed: tuple[str, ...] = ()
    recomputes_all: bool = False
    unread: bool = False


class Run(NamedTuple):
    """`blocks` in sequence, repeated as often as the axis `times` says.

    `before` are operations between the previous run and this one, outside of blocks. They read the output of the
    previous run's last block as `x` and write `stream`, the `x` of this run's first block; everything after them may
    read their other outputs.
    """

    blocks: tuple[Block, ...]
    times: str
    before: tuple[Op, ...] = ()


class Stack(NamedTuple):
    """A model.

    before  operations before the blocks; they write `embeds`
    runs    runs of blocks. In an encoder-decoder, the decoder's run has operations before it
    after   reads the last block's output as `x`; ends with the logits, or the hidden states that a fused loss reads
    loss    ends with the tensor `loss`
    """

    before: tuple[Op, ...]
    runs: tuple[Run, ...]
    after: tuple[Op, ...]
    loss: tuple[Op, ...] = ()


def outside(stack: Stack) -> tuple[tuple[Op, ...], ...]:
    """Return the lists of operations outside of blocks, in order and without the loss."""
    return (stack.before, *(run.before for run in stack.runs if run.before), stack.after)


def operations(stack: Stack) -> Iterator[Op]:
    """Yield every operation of the stack in order, once if several layers share it."""
    inside = (ops for run in stack.runs for ops in (run.before, *[block.ops for block in run.blocks]))
    lists = {id(ops): ops for ops in (stack.before, *inside, stack.after, stack.loss)}
    yield from {id(op): op for ops in lists.values() for op in ops}.values()


class UndefinedName(NamedTuple):
    """A name that an operation uses and that nothing before it writes; `where` is the list that the operation is in."""

    where: str
    operation: str
    name: str


def undefined_names(stack: Stack) -> Iterator[UndefinedName]:
    """Yield names that operations read, keep or take a dtype from though nothing wrote them; a valid stack has none.

    An operation can use what its own list wrote before it, what was written outside of blocks, and what earlier blocks
    share; operations after the blocks can also use what the last block wrote or was passed.
    """
    known = set[str]()
    yield from _unwritten("before", stack.before, known, "embeds")
    last = set[str]()
    for run in stack.runs:
        if run.before:
            known = known | {"x"}
            yield from _unwritten(f"before {run.times}", run.before, known, "stream")
        for block in run.blocks:
            last = known | {"x", *block.passed}
            yield from _unwritten(block.name, block.ops, last, "y", *block.shares)
            known = known.difference(block.replaces).union(block.shares)
    known = known | last | {"x"}
    yield from _unwritten("after", stack.after, known)
    yield from _unwritten("loss", stack.loss, known, *(("loss",) if stack.loss else ()))


def _unwritten(where: str, operations: tuple[Op, ...], known: set[str], *handed_on: str) -> Iterator[UndefinedName]:
    """Yield the unwritten names of one list, which must write `handed_on`; adds the names that it writes to `known`."""
    taken, written = taken_and_written(Identity(operations))
    yield from (UndefinedName(where, operation, name) for operation, name in taken if name not in known)
    known |= written
    yield from (UndefinedName(where, "", name) for name in handed_on if name not in known)


@lru_cache(maxsize=64)
def taken_and_written(operations: Identity[tuple[Op, ...]]) -> tuple[tuple[tuple[str, str], ...], frozenset[str]]:
    """Return the names that a list, which equal layers share, takes from outside, each with the operation that does,
    and the names that it writes."""
    written = {w.name for op in operations.value for w in op.weights}
    taken: dict[tuple[str, str], None] = {}
    for op in operations.value:
        if op.past:
            written.update([t.name for t in op.past])
        for name in op.reads:
            if name not in written:
                taken[op.name, name] = None
        for t in op.writes:
            written.add(t.name)
        if op.wraps:
            written.update([t.name for t in op.wraps])
        for name in named(op):
            if name not in written:
                taken[op.name, name] = None
    return tuple(taken), frozenset(written)


def named(op: Op) -> list[str]:
    """Return the names that an operation keeps, captures, or takes a dtype from."""
    names = [*op.captures]
    for keep in op.keeps:
        names += keep.what, keep.of
    tensors = op.writes
    if op.scratch or op.scratch_back or op.past or op.wraps:  # unlike most operations
        tensors = (*op.past, *tensors, *op.wraps, *op.scratch, *[s.tensor for s in op.scratch_back])
    for t in tensors:
        if "=" in t.dtype or "!" in t.dtype:
            own, _, source = t.dtype.partition("!")
            if source:
                names.append(source)
            if own.startswith("="):
                names.append(own[1:].partition("/")[0])
    return names


class SavedTensors(NamedTuple):
    """Saved tensors are offloaded to host memory, with one copy per operation that keeps them.

    They are copied when the operation runs, and copied back for the duration of its backward.

    weights  kept weights are copied too, though they stay on the GPU anyway
    source   where the facts come from
    stash    saves after which a copied tensor leaves the GPU, while another stream copies it: until then it is not
             copied again, but stays if it is saved again. A copy then stays until the next operation with copies has
             run backward. 0 if there is no other stream
    stays    with a stash: operations whose names begin so save their tensors as usual; none if empty
    """

    weights: bool
    source: str
    stash: int = 0
    stays: str = ""


class Unit(NamedTuple):
    """Weights that are sharded over ranks and gathered together while they are used.

    whole     the gathered weights
    message   output of the all-gather, if the weights are copied out of it
    cast      the rank's shard in the dtype that is sent, if it is stored in another
    joined    the gradients as the reduce-scatter reads them
    padded    a padded copy of them, if the reduce-scatter reads that
    received  the rank's shard of the gradients, if it is cast to the dtype of its weights afterwards
    parts     the rank's shard of the gradients, which stays
    summed    whole gradients of earlier passes, if gradients are reduced only after several passes
    laid      `parts` are the gradients copied next to each other, without another tensor in between
    nested    weights inside that are units of their own, gathered for the operation that uses them: name and unit
    modules   modules inside that are units of their own, gathered from the operation that `lends` their weights to the
              one that `returns`: path and unit
    divided   a copy of the joined gradients, divided by the number of batches, made once the rank's shard is there
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
    """How the weights of a stack are sharded over ranks (FSDP, ZeRO-3): its units by name.

    A block's unit is named by the block's place in the stack (`memplan.engine.gather.unit_of`). Weights outside of
    blocks are in these units:

        root    gathered before everything else; whole to the end of the pass, unless it is `freed`
        tied    gathered before the first operation that uses it; whole to the end of the pass
        before  freed after the operations before the blocks, and gathered again for their backward
        after   whole until its own backward is over
        rest    whole as long as `root`, with its gradients; blocks in it are not units of their own

    units               names and units
    outside             names of weights outside of blocks, and their units
    keeps_buffers       the buffers of a collective stay until the next collective of its kind is over
    gathers_at          when backward gathers a unit: at the `first` operation of the backward of the unit after it, at
                        the `last`, when that unit's weights are `gone`, or `never` ahead of its own backward
    at_loss             the last block's unit is gathered when the loss's backward begins, or that of what the model
                        returns, not the head's
    sums                there are whole gradients of earlier passes, which are added to and freed as each unit is
                        reduced
    prefetches_forward  forward gathers a unit when the previous one begins; in backward, a unit's gradients are then
                        reduced only after the backward of the unit before it
    keeps               blocks whose weights stay whole from forward to backward: `all`, the `last`, or none if empty
    root_has_ends       the root has embeddings and head, and `stays` whole, or is `freed` after the forward pass and
                        gathered again at the loss's backward; empty if it has not
    waits               received shards stay until the pass is over, because replicas sum them
    returns             the loss is computed after the model has returned, which freed the output of the last all-gather
    alone               `after` holds the head alone, whose gradient is reduced before the backward of the last norm
    offloads_gradients  gradient shards move to the host as soon as they are reduced
    hooks               the input of a recomputed block and its gradient stay until the pass is over, referenced by a
                        hook
    whole               units outside of blocks that earlier passes without gradients left whole
    models              divisions of other models with weights of their own that run inside the pass, by phase; None
                        for a model that every rank has whole
    """

    units: tuple[tuple[str, Unit], ...]
    outside: tuple[tuple[str, str], ...]
    keeps_buffers: bool
    gathers_at: str
    source: str
    at_loss: bool = False
    sums: bool = False
    prefetches_forward: bool = False
    keeps: str = ""
    root_has_ends: str = ""
    waits: bool = False
    returns: bool = False
    alone: bool = False
    offloads_gradients: bool = False
    hooks: bool = False
    whole: tuple[str, ...] = ()
    models: tuple[tuple[str, Division | None], ...] = ()

    def with_axes(self) -> tuple[Division, dict[str, str]]:
        """Return the division with an axis for every number of elements, and each axis's number.

        Divisions among different numbers of ranks are equal then, unless their tensors differ.
        """
        axes: dict[str, str] = {}  # number -> axis

        def named(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(
                t._replace(shape=axes.setdefault(t.shape, f"sharded{len(axes)}")) if t.shape.isdigit() else t
                for t in tensors
            )

        def with_axes(unit: Unit) -> Unit:
            lists = {field: named(getattr(unit, field)) for field in _TENSORS_OF_UNIT}
            return unit._replace(
                **lists,
                nested=tuple((name, with_axes(inner)) for name, inner in unit.nested),
                modules=tuple((path, with_axes(inner)) for path, inner in unit.modules),
            )

        def divided(division: Division) -> Division:
            units = tuple((name, with_axes(unit)) for name, unit in division.units)
            return division._replace(units=units, models=tuple((name, d and divided(d)) for name, d in division.models))

        return divided(self), {axis: number for number, axis in axes.items()}


_TENSORS_OF_UNIT = ("whole", "message", "cast", "joined", "padded", "received", "parts", "summed", "divided")
