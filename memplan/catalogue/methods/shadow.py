"""peft's shadow: the hidden states of a smaller model go through the frozen one's layers with its own.

Before each layer what differs between the two streams is added to the layer's input, and after it the second stream is
mixed with the layer's output. Only the layer itself is checkpointed. The smaller model, a copy of the class with fewer
layers, runs first; its hidden states predict the labels too, through the frozen head.

Source: peft 0.21.2 tuners/shadow/layers.py ShadowLayer, model.py ShadowModel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from memplan.catalogue import build
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.losses import begins_head, nll, shifted_rows
from memplan.catalogue.kernels.own_axes import joined, own_sizes, with_own_axes, with_own_names
from memplan.catalogue.kernels.rewriting import idle, renamed, rewrite, rewrite_blocks
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.methods.freezing import split
from memplan.catalogue.methods.methods import Recipe
from memplan.core.ir import Block, Op, Run, Stack, Tensor, Weight
from memplan.engine.dtypes import FLOATING
from memplan.models.model import ModelSpec
from memplan.models.peft_methods import leads_stream

SHADOW = "shadow_backbone"
_STREAM, _SEED = "shadow", "shadow.first"
_SIZES = ("num_hidden_layers", "intermediate_size")
_HELD = ("hidden", "injected")  # the wrapped layer's input, and what it is called with
_SHAPE = "b s h"


def shadow_model(model: ModelSpec, options: Mapping[str, Any]) -> ModelSpec:
    """Return the smaller model: the model's class with fewer layers, and other sizes if the options say so."""
    sizes = {name: options[f"shadow_{name}"] for name in _SIZES if options[f"shadow_{name}"] is not None}
    return model.resized(**{"num_hidden_layers": 1, **sizes})


def with_shadow(
    stack: Stack, axes: dict[str, int], model: ModelSpec, wiring: Wiring, recipe: Recipe, trains: bool
) -> tuple[Stack, dict[str, int]]:
    """Return the frozen `stack` of a model with the smaller model before it, if the method trains one, and all axes."""
    if not leads_stream(recipe.kind):
        return stack, axes
    options, dtype = dict(recipe.options), recipe.adapter_dtype
    small = shadow_model(model, options)
    first = _backbone(build(small, wiring), stack, bool(options["share_embeddings"]))
    enter = tuple(_injected(dtype, trains and bool(options["shadow_dropout"])))
    leave = tuple(_updated(dtype, str(options["update_hidden_size"] or "r")))
    parts, axes = split(stack.runs, axes, 1, lambda operations: operations)
    runs = [_wrapped(run, enter, leave) for run in parts]
    last = runs[-1].blocks[-1]
    ended = last._replace(ops=tuple(map(idle, last.ops)), shares=(), unread=True)
    runs[-1] = runs[-1]._replace(blocks=(*runs[-1].blocks[:-1], ended))
    before = tuple(op for op in stack.before if op.name != "inputs")
    frozen = stack._replace(before=before, runs=tuple(runs), after=_of_the_model(stack))
    return joined(first, frozen), axes | own_sizes(small.axes(), SHADOW)


def _wrapped(run: Run, enter: tuple[Op, ...], leave: tuple[Op, ...]) -> Run:
    """Return a run of layers with a block before and after each, which no checkpoint covers."""

    def around(block: Block) -> tuple[Block, ...]:
        return (
            Block(f"{block.name}.shadow_injection", enter, _HELD, True, True),
            block,
            Block(f"{block.name}.shadow_update", leave, (_STREAM,), True, True, replaces=(_STREAM, *_HELD)),
        )

    return run._replace(blocks=tuple(each for block in run.blocks for each in around(block)))


def _linear(name: str, x: str, y: str, out: str, into: str, dtype: str, bias: bool = False) -> Op:
    op = ops.linear(name, x, y, out, into, "adapter", bias)
    return op._replace(weights=tuple(w._replace(dtype=dtype, matrix=False) for w in op.weights))


def _injected(dtype: str, drops: bool) -> Iterator[Op]:
    """ShadowLayer.shadow_inject: the difference of both streams, through two small matrices, is added to `x`."""
    n, delta = "shadow_delta", "delta.wide"
    yield ops.view("hidden", "x", "hidden", _SHAPE)._replace(gradient="none")
    yield ops.view(f"{n}.negative", _STREAM, "minus", _SHAPE, "new")
    yield ops.add(f"{n}.sub", "x", "minus", "delta", _SHAPE)
    yield ops.cast(f"{n}.cast", "delta", delta, _SHAPE, dtype)
    if drops:
        yield ops.dropout("shadow_dropout", delta, "delta.dropped", _SHAPE)
        delta = "delta.dropped"
    yield _linear("shadow_down", delta, "delta.low", "r", "h", dtype)
    yield _linear("shadow_up", "delta.low", "delta.up", "h", "r", dtype)
    yield ops.release_names(delta, "delta.low")
    yield ops.scale(f"{n}.scale", "delta.up", "delta.scaled", _SHAPE)
    yield ops.cast(f"{n}.cast_back", "delta.scaled", "delta.back", _SHAPE, "=x")
    yield ops.add(f"{n}.add", "x", "delta.back", "y", _SHAPE)
    yield ops.view("injected", "y", "injected", _SHAPE)._replace(gradient="none")
    yield ops.release_names("delta.up", "x")


def _updated(dtype: str, width: str) -> Iterator[Op]:
    """ShadowLayer.shadow_update: the second stream, mixed with what a small network makes of the layer's output."""
    n, x = "shadow_update", "wide"
    yield ops.cast(f"{n}.cast", "x", x, _SHAPE, dtype)
    made: list[str] = []
    for part in ("transform", "gate"):
        yield _linear(f"{n}_{part}.0", x, f"{part}.0", width, "h", dtype, bias=True)
        yield ops.activation(f"{n}_{part}.1", f"{part}.0", f"{part}.1", f"b s {width}")
        yield ops.release_names(f"{part}.0")
        yield _linear(f"{n}_{part}.2", f"{part}.1", f"{part}.2", "h", width, dtype, bias=True)
        yield ops.release_names(f"{part}.1")
        made.append(f"{part}.2")
    yield ops.keeping_output(f"{n}.sigmoid", made[1], "gate", _SHAPE, "sigmoid")
    yield ops.scale(f"{n}.rest", "gate", "rest", _SHAPE)
    yield ops.cast(f"{n}.cast_shadow", _STREAM, "shadow.wide", _SHAPE, dtype)
    yield ops.mul(f"{n}.kept", "rest", "shadow.wide", "kept", _SHAPE)
    yield ops.mul(f"{n}.taken", "gate", made[0], "taken", _SHAPE)
    yield ops.add(f"{n}.add", "kept", "taken", "shadow.new", _SHAPE)
    yield ops.cast(f"{n}.cast_back", "shadow.new", "shadow.back", _SHAPE, f"={_STREAM}")
    yield ops.view(f"{n}.stream", "shadow.back", _STREAM, _SHAPE)
    yield ops.view("hidden", "x", "y", _SHAPE)
    yield ops.release_names(x, made[0], "gate", "shadow.new")


def _of_the_model(stack: Stack) -> tuple[Op, ...]:
    """Return the operations after the blocks without names of what the last block returned besides its output."""
    known = {"x"}.union(t.name for op in (*stack.before, *stack.after) for t in op.writes)
    return tuple(op._replace(reads=tuple(filter(known.__contains__, op.reads))) for op in stack.after)


def _backbone(stack: Stack, base: Stack, shares: bool) -> Stack:
    """Return the smaller model up to the hidden states that enter the layers, with names and axes of its own.

    peft casts it, with its buffers, to the dtype of the frozen embeddings. If it `shares` these, its own are left out
    if they are called `embed_tokens`; a table of another name stays, and gets no gradient.
    """
    lookup = next(op for op in stack.before if op.reads == ("ids",) and any(w.group == "embedding" for w in op.weights))
    (table,), inputs = ([op for op in base.before if op.name == name] for name in (lookup.name, "inputs"))
    dtype = table.weights[0].dtype

    def own(w: Weight) -> Weight:
        if w.group == "buffer":
            return w._replace(dtype=dtype) if w.dtype in FLOATING else w
        return w._replace(dtype=dtype, group="adapter", matrix=False)

    def changed(op: Op) -> Iterator[Op]:
        if op.name == "inputs":
            yield op._replace(writes=(), holds="")
        elif op.name != lookup.name or not shares:
            yield op
        else:
            yield from renamed((table,), {table.writes[0].name: op.writes[0].name})
            if "embed_tokens" not in op.name:
                yield Op(f"{SHADOW}.{op.name}", weights=idle(op).weights, gradient="none")

    head = next(i for i, op in enumerate(stack.after) if begins_head(op))
    stack = stack._replace(after=_of_the_model(stack)[:head])
    stack = rewrite(stack, lambda op: (op._replace(weights=tuple(map(own, op.weights))),))
    stack = rewrite_blocks(stack, lambda block: block._replace(never_checkpointed=True))
    stack = with_own_axes(with_own_names(stack, SHADOW, {t.name for op in inputs for t in op.writes}), SHADOW)
    before = (*inputs, *(new for op in stack.before for new in changed(op)))
    seed = ops.view("shadow", f"{SHADOW}.n", _SEED, _SHAPE)._replace(holds="model")
    return stack._replace(before=before, after=(*stack.after, seed, ops.view("shadow", _SEED, _STREAM, _SHAPE)))


def with_stream_loss(stack: Stack, single: bool) -> Stack:
    """Return the stack with the loss of the stream that enters the layers, in the dtype of its logits.

    It follows the model's own, whose logits are still there. `single`: see `shifted_rows`.
    """
    source = "peft 0.21.2 tuners/shadow/model.py ShadowModel.forward"
    logits = next(op for op in reversed(stack.after) if op.writes).writes[0].name
    at = next((i for i, op in enumerate(stack.loss) if op.name == "loss.end_autocast"), len(stack.loss))
    own, rest = renamed(stack.loss[:at], {"loss": "loss.base"}), stack.loss[at:]
    own = tuple(
        op._replace(reads=tuple(r for r in op.reads if r != logits)) if op.name == "return" else op for op in own
    )
    head = next(op for op in reversed(stack.after) if any(w.rows for w in op.weights))
    rows, names = "shifted_rows v", {head.reads[0]: _SEED, head.writes[0].name: "shadow.logits"}
    second = (
        head._replace(name="shadow.lm_head", holds=""),
        *shifted_rows("shadow.logits", Tensor("shadow.shifted", rows), source, single),
        *nll("shadow.loss", "shadow.shifted", "shadow.log_probs", "targets", rows),
        ops.release_names("shadow.shifted", "targets", "shadow.logits"),
        ops.scale("shadow.weight", "shadow.loss", "shadow.weighed", ""),
        ops.add("shadow.add", "loss.base", "shadow.weighed", "loss", ""),
        ops.view("shadow.logged", "shadow.loss", "shadow.detached", "", "none")._replace(holds="model"),
        ops.release_names("shadow.loss"),
    )
    second = renamed(second, {**names, "targets": "shadow.targets"})
    return stack._replace(loss=(*own, *second, ops.release_names(logits), *rest))
