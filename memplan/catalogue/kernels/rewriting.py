"""Rewrite a stack: replace operations or weights, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, wraps
from typing import Concatenate, ParamSpec

from memplan.catalogue.kernels import ops
from memplan.core.errors import InternalError
from memplan.core.identity import Identity
from memplan.core.ir import Block, Keep, Op, Run, Stack, Tensor, UndefinedName, Weight, undefined_names

_Arguments = ParamSpec("_Arguments")


@lru_cache(maxsize=64)
def first_equal(stack: Stack) -> Stack:
    """Return the first of the last stacks that is equal to this one: models of one family, whose sizes differ, share
    it."""
    return stack


def once_per_stack(
    change: Callable[Concatenate[Stack, _Arguments], Stack],
) -> Callable[Concatenate[Stack, _Arguments], Stack]:
    """Decorate a change of a stack that depends on nothing but the stack and hashable arguments: models that share the
    stack (see `first_equal`) share the result."""

    @lru_cache(maxsize=64)
    def changed(stack: Identity[Stack], *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Stack:
        return change(stack.value, *args, **kwargs)

    @wraps(change)
    def shared(stack: Stack, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Stack:
        return changed(Identity(stack), *args, **kwargs)

    return shared


def checked(stack: Stack, model_type: str) -> Stack:
    """Return the first equal stack. Raises InternalError if an operation uses a tensor that no earlier one writes."""
    first, missing = _first_checked(stack)
    if missing is not None:
        where, operation, name = missing
        raise InternalError(f"in {model_type} {where}, {operation} uses {name}, which nothing writes")
    return first


@lru_cache(maxsize=64)
def _first_checked(stack: Stack) -> tuple[Stack, UndefinedName | None]:
    return stack, next(undefined_names(stack), None)


def rewrite(stack: Stack, change: Callable[[Op], Iterable[Op]], *, weighted: bool = False) -> Stack:
    """Return the stack with `change` applied to every operation, once if several layers share it.

    weighted  only to operations with weights, which are few
    """
    rewritten: dict[int, tuple[Op, ...]] = {}

    def changed(op: Op) -> tuple[Op, ...]:
        new = rewritten.get(id(op))
        if new is None:
            made = tuple(change(op))
            new = rewritten[id(op)] = tuple(o._replace(skipped=True) for o in made) if op.skipped else made
        return new

    def changed_list(operations: tuple[Op, ...]) -> tuple[Op, ...]:
        out: list[Op] = []
        for op in operations:
            if op.weights or not weighted:
                out += changed(op)
            else:
                out.append(op)
        return tuple(out)

    return rewrite_lists(stack, changed_list)


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
        return (op._replace(weights=tuple(w if w.group == "buffer" and w.dtype else change(w) for w in op.weights)),)

    return rewrite(stack, changed, weighted=True)


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


@once_per_stack
def by_name(stack: Stack) -> Stack:
    """Return the stack whose blocks get what they read as keyword arguments."""
    return rewrite_blocks(stack, lambda block: block._replace(by_name=True))


@once_per_stack
def with_held_outputs(stack: Stack) -> Stack:
    """Return the stack whose outputs a variable of the script holds through backward."""
    return rewrite(stack, lambda op: (op._replace(holds="step") if op.holds == "forward" else op,))


def with_last_adapter_gathered(block: Block) -> Block:
    """Return the block whose last adapter is gathered already when it is recomputed, since its backward comes first:
    its weights have the dtype of its input then, which is not cast."""
    last = next(
        (op.name.removesuffix(".lora_A.cast") for op in block.ops[::-1] if op.name.endswith(".lora_A.cast")), ""
    )
    casts = (f"{last}.cast", f"{last}.lora_A.cast")
    return block._replace(ops=tuple(op._replace(is_view_again=op.name in casts) for op in block.ops))


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
