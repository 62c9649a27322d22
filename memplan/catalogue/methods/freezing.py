"""Freeze tuning: only the last layers train, as in LLaMA-Factory."""

from __future__ import annotations

from memplan.core.ir import Op, Run, Stack


def freeze(stack: Stack, axes: dict[str, int], trainable: int) -> tuple[Stack, dict[str, int]]:
    """Return the stack with only the last `trainable` layers training, runs split where the frozen layers end.

    Embeddings, final norm and head are frozen too, as in LLaMA-Factory's freeze tuning.
    """

    def frozen_ops(operations: tuple[Op, ...]) -> tuple[Op, ...]:
        return tuple(o._replace(weights=tuple(w._replace(trains=False) for w in o.weights)) for o in operations)

    axes = dict(axes)
    frozen = sum(len(r.blocks) * axes[r.times] for r in stack.runs) - trainable
    runs: list[Run] = []
    for run in stack.runs:
        period, copies = len(run.blocks), axes[run.times]
        periods = min(copies, frozen // period)
        part = min(period * (copies - periods), frozen - periods * period)
        frozen -= periods * period + part
        frozen_blocks = tuple(b._replace(ops=frozen_ops(b.ops)) for b in run.blocks)
        mixed = (*frozen_blocks[:part], *run.blocks[part:])
        between = frozen_ops(run.before)
        for blocks, name, count in (
            (frozen_blocks, "frozen", periods),
            (mixed, "mixed", 1 if part else 0),
            (run.blocks, "trained", copies - periods - (1 if part else 0)),
        ):
            axes[f"{run.times}.{name}"] = count
            if count:
                runs.append(Run(blocks, f"{run.times}.{name}", between))
                between = ()
    return Stack(frozen_ops(stack.before), tuple(runs), frozen_ops(stack.after), stack.loss), axes
