"""Keys and values in host memory: the GPU holds those of the running layer and of the next.

A layer's update first prefetches the next layer's cache on a stream of its own, then appends the new tokens and
offloads its own cache. What it returns stays on the GPU until attention has read it. After the last layer the first
layer's cache is prefetched, and stays on the GPU through the head until the next pass.

Every block is given its prefetched cache as it starts, just when the previous block frees the same bytes. So each block
accounts for its own cache, whatever lies between two layers that have one.

Source: transformers 5.24 cache_utils.py Cache.update, Cache.prefetch, Cache.offload.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from memplan.catalogue.kernels import ops
from memplan.core.ir import Block, Op, Run, Stack, Tensor
from memplan.core.records import NamedTuple

# Values of `Op.holds` for offloaded tensors, until this module rewrites the stack: of all tokens, and of a window.
AWAY, AWAY_WINDOW = "away", "away_window"
KEPT = "kept_window"  # the axis of a sliding layer's tokens after a pass

_SOURCE = "transformers 5.24 cache_utils.py Cache.prefetch"


class _Layer(NamedTuple):
    """A layer's tensors in host memory, `before` and `after` a pass."""

    before: tuple[Tensor, ...]
    after: tuple[Tensor, ...]


def offloaded(stack: Stack, axes: Mapping[str, int], dtype: str) -> tuple[Stack, dict[str, int]]:
    """Return the stack with prefetches of offloaded caches in `dtype` in place of tensors marked AWAY, and its axes.

    A run's last repetition is split off, since the layer that follows it has another cache. A stack without offloaded
    layers is unchanged. A single offloaded layer fetches its own cache in its update.
    """
    away = [[_layer(block, dtype) for block in run.blocks] for run in stack.runs]
    count = sum(axes[run.times] * sum(map(bool, layers)) for run, layers in zip(stack.runs, away, strict=True))
    if not count:
        return stack, dict(axes)
    first = next(layer for layers in away for layer in layers if layer)
    split_axes: dict[str, int] = {}
    runs: list[Run] = []
    for i, (run, layers) in enumerate(zip(stack.runs, away, strict=True)):
        if count == 1:
            blocks = tuple(map(_block_of_single, run.blocks, layers))
            runs.append(run._replace(blocks=blocks))
            continue
        following = (layer.before for others in away[i + 1 :] for layer in others if layer)
        next_cache = next(following, first.after)
        this = next((layer.before for layer in layers if layer), next_cache)
        rest, last = f"{run.times}_rest", f"{run.times}_last"
        splits = this != next_cache and axes[run.times] > 1
        if splits:
            split_axes |= {rest: axes[run.times] - 1, last: 1}
            runs.append(Run(_blocks(run, layers, this), rest, run.before))
        times, before = (last, ()) if splits else (run.times, run.before)
        runs.append(Run(_blocks(run, layers, next_cache), times, before))
    stack = stack._replace(runs=tuple(runs))
    return (stack if count == 1 else _around(stack, first)), {**axes, **split_axes}


def _block_of_single(block: Block, layer: _Layer | None) -> Block:
    """Return the block, if at most one layer of the stack is offloaded."""
    if layer is None:
        return block
    operations: list[Op] = []
    for op in block.ops:
        if _is_offloaded(op) and layer.before and not any(t in layer.before for o in operations for t in o.writes):
            operations.append(Op("cache.fetched", (), layer.before, source=_SOURCE))
        operations.append(op._replace(holds="", past=()) if _is_offloaded(op) else op)
    return block._replace(ops=tuple(operations))


def _layer(block: Block, dtype: str) -> _Layer | None:
    """Return the tensors of the block's layer in host memory, or None."""
    offloading = [op for op in block.ops if _is_offloaded(op)]
    if not offloading:
        return None
    before = tuple(t._replace(dtype=dtype) for op in offloading for t in op.past)
    after = tuple(t._replace(dtype=dtype, shape=_kept_shape(t.shape, op.holds)) for op in offloading for t in op.writes)
    return _Layer(before, after)


def _is_offloaded(op: Op) -> bool:
    return op.holds in (AWAY, AWAY_WINDOW)


def _kept_shape(shape: str, holds: str) -> str:
    """Return the shape of what is kept of a tensor: of a sliding layer's, only the window."""
    tokens = shape.split()
    return " ".join(KEPT if holds == AWAY_WINDOW and token in ("s", "kv_window") else token for token in tokens)


def _blocks(run: Run, layers: list[_Layer | None], next_cache: tuple[Tensor, ...]) -> tuple[Block, ...]:
    """Return the run's blocks. The last block with an offloaded cache prefetches `next_cache`."""
    blocks: list[Block] = []
    for i, (block, layer) in enumerate(zip(run.blocks, layers, strict=True)):
        later = next((other.before for other in layers[i + 1 :] if other), next_cache)
        own_or_later = next((other.before for other in layers[i:] if other), next_cache)
        blocks.append(block._replace(ops=tuple(_block_ops(block, layer, later if layer else own_or_later))))
    return tuple(blocks)


def _block_ops(block: Block, layer: _Layer | None, later: tuple[Tensor, ...]) -> Iterator[Op]:
    coming = _labelled(later, "next")
    fetch = Op("cache.prefetch", (), coming, source=_SOURCE)
    if layer is None:
        yield from (fetch, *block.ops) if coming else block.ops
    else:
        if layer.before:
            yield Op("cache.fetched", (), layer.before, source=_SOURCE)
        asked = False
        for op in block.ops:
            if not _is_offloaded(op):
                yield op
                continue
            if not asked and coming:
                yield fetch
            asked = True
            yield op._replace(holds="", past=())
    if coming:
        yield ops.release_names(*(t.name for t in coming))


def _around(stack: Stack, first: _Layer) -> Stack:
    """Keep the first layer's cache on the GPU before and after the blocks."""
    before, after = stack.before, stack.after
    if first.before:
        first_cache = _labelled(first.before, "first")
        fetched = Op("cache.first", (), first_cache, source=_SOURCE)
        before = (fetched, *before, ops.release_names(*(t.name for t in first_cache)))
    last = Op("cache.first", (), _labelled(first.after, "first"), holds="forward", source=_SOURCE)
    return stack._replace(before=before, after=(last, *after))


def _labelled(tensors: tuple[Tensor, ...], which: str) -> tuple[Tensor, ...]:
    return tuple(t._replace(name=f"{t.name.removesuffix(' before')} of the {which} layer") for t in tensors)
