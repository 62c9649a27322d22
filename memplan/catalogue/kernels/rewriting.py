"""Rewriting a stack: replace operations or weights, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from memplan.core.ir import Op, Run, Stack, Weight


def rewrite(stack: Stack, change: Callable[[Op], Iterable[Op]]) -> Stack:
    """`change` applied to every operation of the stack; to one that several layers share, once."""
    done: dict[int, tuple[Op, ...]] = {}

    def changed(op: Op) -> tuple[Op, ...]:
        found = done.get(id(op))
        if found is None:
            made = change(op)
            found = done[id(op)] = tuple(new._replace(skipped=True) for new in made) if op.skipped else tuple(made)
        return found

    return rewrite_lists(stack, lambda operations: tuple(new for op in operations for new in changed(op)))


def rewrite_lists(stack: Stack, change: Callable[[tuple[Op, ...]], tuple[Op, ...]]) -> Stack:
    """`change` applied to the operations before the blocks, of every block, after them, and of the loss; to a list that
    several blocks share, once."""
    done: dict[int, tuple[Op, ...]] = {}

    def changed(operations: tuple[Op, ...]) -> tuple[Op, ...]:
        if id(operations) not in done:
            done[id(operations)] = change(operations)
        return done[id(operations)]

    runs = tuple(
        Run(tuple(b._replace(ops=changed(b.ops)) for b in r.blocks), r.times, change(r.before)) for r in stack.runs
    )
    return Stack(change(stack.before), runs, change(stack.after), change(stack.loss))


def reweigh(stack: Stack, change: Callable[[Weight], Weight]) -> Stack:
    """`change` applied to every weight of the stack; buffers that have a dtype stay as they are."""

    def changed(op: Op) -> Iterable[Op]:
        if not op.weights:
            return (op,)
        return (op._replace(weights=tuple(w if w.group == "buffer" and w.dtype else change(w) for w in op.weights)),)

    return rewrite(stack, changed)


def matrix(op: Op) -> Weight | None:
    """The weight matrix of a linear layer, if the operation is one."""
    return next((w for w in op.weights if w.matrix), None)
