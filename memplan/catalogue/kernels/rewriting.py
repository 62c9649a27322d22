"""Rewrite a stack: replace operations or weights, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain

from memplan.catalogue.kernels import ops
from memplan.core.ir import Block, Keep, Op, Run, Stack, Tensor, Weight


def rewrite(stack: Stack, change: Callable[[Op], Iterable[Op]]) -> Stack:
    """Return the stack with `change` applied to every operation, once if several layers share it."""
    rewritten: dict[int, tuple[Op, ...]] = {}

    def changed(op: Op) -> tuple[Op, ...]:
        new = rewritten.get(id(op))
        if new is None:
            made = tuple(change(op))
            new = rewritten[id(op)] = tuple(o._replace(skipped=True) for o in made) if op.skipped else made
        return new

    return rewrite_lists(stack, lambda operations: tuple(chain.from_iterable(map(changed, operations))))


def rewrite_lists(stack: Stack, change: Callable[[tuple[Op, ...]], tuple[Op, ...]]) -> Stack:
    """Return the stack with `change` applied to the operation lists before, in and after its blocks, and to the loss.

    A list shared by several blocks is changed once.
    """
    changed = once_each(change)
    runs = tuple(
        Run(tuple(b._replace(ops=changed(b.ops)) for b in r.blocks), r.times, change(r.before)) for r in stack.runs
    )
    return Stack(change(stack.before), runs, change(stack.after), change(stack.loss))


def once_each(change: Callable[[tuple[Op, ...]], tuple[Op, ...]]) -> Callable[[tuple[Op, ...]], tuple[Op, ...]]:
    """Return the change of a stack's lists, so that a list shared by several blocks is changed once and still shared.

    The stack must exist as long as the returned function.
    """
    rewritten: dict[int, tuple[Op, ...]] = {}

    def changed(operations: tuple[Op, ...]) -> tuple[Op, ...]:
        if id(operations) not in rewritten:
            rewritten[id(operations)] = change(operations)
        return rewritten[id(operations)]

    return changed


def rewrite_weights(stack: Stack, change: Callable[[Weight], Weight]) -> Stack:
    """Return the stack with `change` applied to every weight, except buffers with a dtype."""

    def changed(op: Op) -> Iterable[Op]:
        if not op.weights:
            return (op,)
        return (op._replace(weights=tuple(w if w.group == "buffer" and w.dtype else change(w) for w in op.weights)),)

    return rewrite(stack, changed)


def renamed(operations: tuple[Op, ...], names: dict[str, str]) -> tuple[Op, ...]:
    """Return the operations with some tensors renamed."""

    def new(name: str) -> str:
        return names.get(name, name)

    return tuple(ops.renamed(op, new) for op in operations)


def skipped(operations: tuple[Op, ...]) -> tuple[Op, ...]:
    """Return the operations that have weights, marked as not run."""
    return tuple(op._replace(skipped=True, unit="", requires_gradient=False) for op in operations if op.weights)


def idle(op: Op) -> Op:
    """Return the operation with weights that get no gradient, though they would train."""
    return op._replace(weights=tuple(w._replace(trains=False, idle=w.trains) for w in op.weights))


def matrix(op: Op) -> Weight | None:
    """Return the weight matrix of a linear layer, or None if the operation is not one."""
    return next((w for w in op.weights if w.matrix), None)


def adaptable(op: Op) -> Weight | None:
    """Return the weight that LoRA wraps: a linear layer's, or those of a rank's experts in Megatron-core, all at once.

    Source: megatron-bridge 0.3.1 peft/utils.py TECL, TERL: a grouped linear layer is one module.
    """
    return next((w for w in op.weights if w.matrix or w.shape.startswith("Eown ")), None)


def rewrite_blocks(stack: Stack, change: Callable[[Block], Block]) -> Stack:
    """Return the stack with every block changed."""
    return stack._replace(runs=tuple(run._replace(blocks=tuple(map(change, run.blocks))) for run in stack.runs))


def with_all_gradients(block: Block) -> Block:
    """Return the block with a gradient for every weight, frozen ones included."""

    def with_gradients(op: Op) -> Op:
        return op._replace(weights=tuple(w if w.group == "buffer" else w._replace(trains=True) for w in op.weights))

    return block._replace(ops=tuple(map(with_gradients, block.ops)))


def with_last_input(after: tuple[Op, ...]) -> tuple[Op, ...]:
    """Let the first operation after the blocks also keep a tensor as large as its input until its backward.

    That is the last block's input, which the block's recomputation needs next; elsewhere it counts as offloaded.
    """
    at, op = next((i, op) for i, op in enumerate(after) if op.reads)
    kept = Tensor("last_checkpoint", "b s h", f"={op.reads[0]}")
    first = op._replace(writes=(*op.writes, kept), keeps=(*op.keeps, Keep(kept.name, op.reads[0])))
    return (*after[:at], first, *after[at + 1 :])
