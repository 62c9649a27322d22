"""Freeze tuning: only the last layers train, as in LLaMA-Factory."""

from __future__ import annotations

from collections.abc import Callable

from memplan.core.ir import Op, Run, Stack

Ops = tuple[Op, ...]


def freeze(stack: Stack, axes: dict[str, int], trainable: int) -> tuple[Stack, dict[str, int]]:
    """Return the stack with only the last `trainable` layers training, runs split where the frozen layers end.

    Embeddings, final norm and head are frozen too, as in LLaMA-Factory's freeze tuning.
    """

    def frozen_ops(operations: Ops) -> Ops:
        return tuple(o._replace(weights=tuple(w._replace(trains=False) for w in o.weights)) for o in operations)

    runs, axes = split(stack.runs, axes, trainable, frozen_ops)
    return Stack(frozen_ops(stack.before), runs, frozen_ops(stack.after), stack.loss), axes


def split(
    whole: tuple[Run, ...], axes: dict[str, int], last: int, change: Callable[[Ops], Ops]
) -> tuple[tuple[Run, ...], dict[str, int]]:
    """Return the runs split before the `last` layers, with the operations before these changed, and all axes."""
    axes = dict(axes)
    first = sum(len(r.blocks) * axes[r.times] for r in whole) - last
    runs: list[Run] = []
    for run in whole:
        period, copies = len(run.blocks), axes[run.times]
        periods = min(copies, first // period)
        part = min(period * (copies - periods), first - periods * period)
        first -= periods * period + part
        changed = tuple(b._replace(ops=change(b.ops)) for b in run.blocks)
        mixed = (*changed[:part], *run.blocks[part:])
        between = change(run.before)
        for blocks, name, count in (
            (changed, "frozen", periods),
            (mixed, "mixed", 1 if part else 0),
            (run.blocks, "trained", copies - periods - (1 if part else 0)),
        ):
            axes[f"{run.times}.{name}"] = count
            if count:
                runs.append(Run(blocks, f"{run.times}.{name}", between))
                between = ()
    return tuple(runs), axes
