"""Checkpointing of only some layers: transformers' `every_n_layers`, torchtitan's `selective_ac_option`."""

from __future__ import annotations

from math import lcm

from memplan.core.ir import Block, Run, Stack


def checkpoint_every(stack: Stack, axes: dict[str, int], n: int, last: bool) -> tuple[Stack, dict[str, int]]:
    """Return the stack with only the first of every `n` layers checkpointed, or the `last`, counted through all runs.

    A run of equal layers becomes a run of groups of layers, and one of what is left.

    Source: transformers 5.24 modeling_utils.py _set_gradient_checkpointing; torchtitan 0.2.2
    distributed/activation_checkpoint.py _apply_layer_sac.
    """
    axes, runs, number = dict(axes), list[Run](), int(last)
    for run in stack.runs:
        layers = len(run.blocks) * axes[run.times]
        group = min(lcm(len(run.blocks), n), layers)
        kept = {id(b): b._replace(never_checkpointed=True) for b in run.blocks}

        def layer(i: int, run: Run = run, kept: dict[int, Block] = kept, first: int = number) -> Block:
            block = run.blocks[i % len(run.blocks)]
            return block if (first + i) % n == 0 else kept[id(block)]

        between = run.before
        for name, start, length, count in (
            ("groups", 0, group, layers // group if group else 0),
            ("left", layers - layers % group if group else 0, layers % group if group else 0, 1),
        ):
            axes[f"{run.times}.{name}"] = count if length else 0
            if length and count:
                runs.append(Run(tuple(map(layer, range(start, start + length))), f"{run.times}.{name}", between))
                between = ()
        number += layers
    return stack._replace(runs=tuple(runs)), axes
