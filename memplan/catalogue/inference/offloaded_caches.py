"""Keys and values in host memory: on the card are those of the layer that runs, and of the next one.

A layer's update first asks for what the next layer has there, which comes on a stream of its own, then takes what is
new, and sends its own back. What it hands on stays on the card until attention has read it. After the last layer comes
the first: that one's are on the card from there on, through the head and to the next pass.

A block of the stack is given what came for it when it begins, which is when the block before lets go of the same. So
each block says by itself what it has, whatever lies between two layers that have any.

Source: transformers 5.24 cache_utils.py Cache.update, Cache.prefetch, Cache.offload.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from memplan.catalogue.kernels import ops
from memplan.core.ir import Block, Op, Run, Stack, Tensor

# What `Op.holds` says of what goes to the host, until a stack is rewritten here: of all tokens, and of a window.
AWAY, AWAY_WINDOW = "away", "away_window"
KEPT = "kept_window"  # the axis of tokens that a layer with a window has once a pass is over

_SOURCE = "transformers 5.24 cache_utils.py Cache.prefetch"


class _Layer(NamedTuple):
    """What a layer has in host memory: `before` a pass, and `after` it."""

    before: tuple[Tensor, ...]
    after: tuple[Tensor, ...]


def offloaded(stack: Stack, axes: Mapping[str, int], dtype: str) -> tuple[Stack, dict[str, int]]:
    """The stack whose operations say what goes AWAY, with what comes back of it, in `dtype`; and the axes of its runs,
    whose last copies are apart, since another layer follows those.

    Without a layer that has any it is as it was. A single one is followed by itself: its own come when it asks.
    """
    away = [[_layer(block, dtype) for block in run.blocks] for run in stack.runs]
    count = sum(axes[run.times] * sum(map(bool, layers)) for run, layers in zip(stack.runs, away, strict=True))
    if not count:
        return stack, dict(axes)
    first = next(layer for layers in away for layer in layers if layer)
    more: dict[str, int] = {}
    runs: list[Run] = []
    for i, (run, layers) in enumerate(zip(stack.runs, away, strict=True)):
        if count == 1:
            blocks = tuple(map(_alone, run.blocks, layers))
            runs.append(run._replace(blocks=blocks))
            continue
        later = (layer.before for found in away[i + 1 :] for layer in found if layer)
        then = next(later, first.after)
        own = next((layer.before for layer in layers if layer), then)
        rest, last = f"{run.times}_rest", f"{run.times}_last"
        apart = own != then and axes[run.times] > 1
        if apart:
            more |= {rest: axes[run.times] - 1, last: 1}
            runs.append(Run(_blocks(run, layers, own), rest, run.before))
        times, before = (last, ()) if apart else (run.times, run.before)
        runs.append(Run(_blocks(run, layers, then), times, before))
    stack = stack._replace(runs=tuple(runs))
    return (stack if count == 1 else _around(stack, first)), {**axes, **more}


def _alone(block: Block, layer: _Layer | None) -> Block:
    """The block, whose layer is the only one that has any, or one of those that have none."""
    if layer is None:
        return block
    made: list[Op] = []
    for op in block.ops:
        if _goes(op) and layer.before and not any(t in layer.before for made_ in made for t in made_.writes):
            made.append(Op("cache.fetched", (), layer.before, source=_SOURCE))
        made.append(op._replace(holds="", past=()) if _goes(op) else op)
    return block._replace(ops=tuple(made))


def _layer(block: Block, dtype: str) -> _Layer | None:
    """What the block's layer has in host memory; None where it has nothing there."""
    made = [op for op in block.ops if _goes(op)]
    if not made:
        return None
    before = tuple(t._replace(dtype=dtype) for op in made for t in op.past)
    after = tuple(t._replace(dtype=dtype, shape=_left(t.shape, op.holds)) for op in made for t in op.writes)
    return _Layer(before, after)


def _goes(op: Op) -> bool:
    return op.holds in (AWAY, AWAY_WINDOW)


def _left(shape: str, holds: str) -> str:
    """The shape of what is kept of a tensor: of a window's, the window."""
    tokens = shape.split()
    return " ".join(KEPT if holds == AWAY_WINDOW and token in ("s", "kv_window") else token for token in tokens)


def _blocks(run: Run, layers: list[_Layer | None], then: tuple[Tensor, ...]) -> tuple[Block, ...]:
    """The blocks of a copy of the run, after whose last layer with any comes what is `then` asked for."""
    out: list[Block] = []
    for i, (block, layer) in enumerate(zip(run.blocks, layers, strict=True)):
        later = next((other.before for other in layers[i + 1 :] if other), then)
        waits = next((other.before for other in layers[i:] if other), then)
        out.append(block._replace(ops=tuple(_of_block(block, layer, later if layer else waits))))
    return tuple(out)


def _of_block(block: Block, layer: _Layer | None, later: tuple[Tensor, ...]) -> Iterator[Op]:
    coming = _called(later, "next")
    fetch = Op("cache.prefetch", (), coming, source=_SOURCE)
    if layer is None:
        yield from (fetch, *block.ops) if coming else block.ops
    else:
        if layer.before:
            yield Op("cache.fetched", (), layer.before, source=_SOURCE)
        asked = False
        for op in block.ops:
            if not _goes(op):
                yield op
                continue
            if not asked and coming:
                yield fetch
            asked = True
            yield op._replace(holds="", past=())
    if coming:
        yield ops.leave(*(t.name for t in coming))


def _around(stack: Stack, first: _Layer) -> Stack:
    """The first layer's are there before the blocks, and after them."""
    before, after = stack.before, stack.after
    if first.before:
        there = _called(first.before, "first")
        fetched = Op("cache.first", (), there, source=_SOURCE)
        before = (fetched, *before, ops.leave(*(t.name for t in there)))
    last = Op("cache.first", (), _called(first.after, "first"), holds="forward", source=_SOURCE)
    return stack._replace(before=before, after=(last, *after))


def _called(tensors: tuple[Tensor, ...], which: str) -> tuple[Tensor, ...]:
    return tuple(t._replace(name=f"{t.name.removesuffix(' before')} of the {which} layer") for t in tensors)
