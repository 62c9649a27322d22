"""Parts of families whose layers differ in their sliding windows, or which normalise a branch's output."""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue.decoder.frame import inputs, lm_head, masks
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.positions import positions, rotary_table
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op
from memplan.models.model import ModelSpec

Norm = Callable[[str, str, str, str, str], tuple[Op, ...]]

# Names of the sliding layers' rotary table, if they have their own.
LOCAL = {"cos": "cos.local", "sin": "sin.local"}


def kinds(mixed: bool) -> tuple[bool, ...]:
    """Return which masks a model builds, by whether they are sliding. A mixed model builds both, used or not."""
    return (False, True) if mixed else (False,)


def renamed(operations: tuple[Op, ...], names: dict[str, str]) -> tuple[Op, ...]:
    """Return the operations with some tensors renamed."""

    def new(name: str) -> str:
        return names.get(name, name)

    return tuple(ops.renamed(op, new) for op in operations)


def local(block: Block) -> Block:
    """Return the block using the sliding layers' rotary table."""
    return block._replace(ops=renamed(block.ops, LOCAL))


def tables(local: bool = False, dtype: str = "") -> tuple[Op, ...]:
    """Return the rotary table, and if `local` the sliding layers' own table."""
    table = rotary_table("embeds", dtype=dtype)
    if not local:
        return table
    buffers = tuple(w._replace(name=f"{w.name}.local") for w in table[0].weights)
    local_names = {t.name: f"{t.name}.local" for op in table for t in op.writes}
    return (*table, *renamed((table[0]._replace(weights=buffers), *table[1:]), local_names))


def before(wiring: Wiring, mixed: bool, table: tuple[Op, ...], embedding: Op | None = None) -> tuple[Op, ...]:
    """Return the operations before the first block. `embedding` replaces a plain one."""
    return (
        inputs(wiring.padded),
        embedding or ops.embedding("model.embed_tokens", "ids", "embeds", "v", "h"),
        positions(),
        *(op for kind in kinds(mixed) for op in masks(wiring, "embeds", kind)),
        *table,
    )


def after(m: ModelSpec, wiring: Wiring, mixed: bool, norm: Norm = ops.rms_norm, local: bool = False) -> tuple[Op, ...]:
    """Return the last norm and the output projection. `local`: there are two rotary tables."""
    mask_names = [op.name for kind in kinds(mixed) for op in masks(wiring, "embeds", kind)]
    table = (*LOCAL, *(LOCAL.values() if local else ()))
    return (
        *norm("model.norm", "x", "n", "b s h", "h"),
        ops.release_names("x", "embeds", "positions", *table, *mask_names),
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
    """Return a block that normalises each branch's output, and its input if `before` names norms for that.

    Attention reads `n1` and the MLP `n2`, or `x` and `x1` without norms before.
    """
    return Block(
        "model.layers",
        (
            *(norm(before[0], "x", "n1", "b s h", "h") if before else ()),
            *attention_ops,
            *norm(after[0], "ao", "ao.normed", "b s h", "h"),
            ops.release_names("ao"),
            ops.add("residual_1", "x", "ao.normed", "x1", "b s h"),
            *(norm(before[1], "x1", "n2", "b s h", "h") if before else ()),
            *mlp_ops,
            *norm(after[1], "mo", "mo.normed", "b s h", "h"),
            ops.release_names("mo"),
            ops.add("residual_2", "x1", "mo.normed", "y", "b s h"),
            ops.release_names("positions", *held),
        ),
    )
