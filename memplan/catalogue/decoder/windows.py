"""What families share whose layers differ in their windows, or whose branches are normalised at their end."""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue.decoder.frame import inputs, lm_head, masks
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.positions import positions, rotary_table
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op
from memplan.models.model import ModelSpec

Norm = Callable[[str, str, str, str, str], tuple[Op, ...]]

# What layers that have a window call the rotary table where the others have one of their own.
LOCAL = {"cos": "cos.local", "sin": "sin.local"}


def kinds(mixed: bool) -> tuple[bool, ...]:
    """Whether the masks a model makes are windows: a mixed model makes both, used or not."""
    return (False, True) if mixed else (False,)


def renamed(operations: tuple[Op, ...], names: dict[str, str]) -> tuple[Op, ...]:
    """The operations with other names for some tensors."""

    def new(name: str) -> str:
        return names.get(name, name)

    return tuple(ops.renamed(op, new) for op in operations)


def local(block: Block) -> Block:
    """The block with the rotary table of the layers that have a window."""
    return block._replace(ops=renamed(block.ops, LOCAL))


def tables(local: bool = False, dtype: str = "") -> tuple[Op, ...]:
    """The rotary table, and that of the layers that have a window if they have one of their own."""
    table = rotary_table("embeds", dtype=dtype)
    if not local:
        return table
    own = tuple(w._replace(name=f"{w.name}.local") for w in table[0].weights)
    written = {t.name: f"{t.name}.local" for op in table for t in op.writes}
    return (*table, *renamed((table[0]._replace(weights=own), *table[1:]), written))


def before(wiring: Wiring, mixed: bool, table: tuple[Op, ...], embedding: Op | None = None) -> tuple[Op, ...]:
    """Up to the first block. `embedding`: instead of a plain one."""
    return (
        inputs(wiring.padded),
        embedding or ops.embedding("model.embed_tokens", "ids", "embeds", "v", "h"),
        positions(),
        *(op for kind in kinds(mixed) for op in masks(wiring, "embeds", kind)),
        *table,
    )


def after(m: ModelSpec, wiring: Wiring, mixed: bool, norm: Norm = ops.rms_norm, local: bool = False) -> tuple[Op, ...]:
    """The last norm and the output projection. `local`: there are two rotary tables."""
    made = [op.name for kind in kinds(mixed) for op in masks(wiring, "embeds", kind)]
    table = (*LOCAL, *(LOCAL.values() if local else ()))
    return (
        *norm("model.norm", "x", "n", "b s h", "h"),
        ops.leave("x", "embeds", "positions", *table, *made),
        lm_head("n", "model.embed_tokens.weight" if m.tie_word_embeddings else ""),
    )


def normed_block(
    attention_ops: tuple[Op, ...],
    mlp_ops: tuple[Op, ...],
    norm: Norm,
    before: tuple[str, str] | None,
    after: tuple[str, str],
    held: tuple[str, ...],
) -> Block:
    """Each branch is normalised at its end; at its start too, if `before` names those norms.

    The attention reads `n1` and the MLP `n2`, or `x` and `x1` where nothing is normalised before.
    """
    return Block(
        "model.layers",
        (
            *(norm(before[0], "x", "n1", "b s h", "h") if before else ()),
            *attention_ops,
            *norm(after[0], "ao", "ao.normed", "b s h", "h"),
            ops.leave("ao"),
            ops.add("residual_1", "x", "ao.normed", "x1", "b s h"),
            *(norm(before[1], "x1", "n2", "b s h", "h") if before else ()),
            *mlp_ops,
            *norm(after[1], "mo", "mo.normed", "b s h", "h"),
            ops.leave("mo"),
            ops.add("residual_2", "x1", "mo.normed", "y", "b s h"),
            ops.leave("positions", *held),
        ),
    )
