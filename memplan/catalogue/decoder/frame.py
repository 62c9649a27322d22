"""A decoder's frame: inputs and masks, the operations before and after the layers, and the runs of equal layers."""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue.attention.attention import mask, mask_name
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.positions import positions, rotary_table
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Run, Tensor, Weight
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec


def inputs(padded: bool) -> Op:
    """Return token ids, labels and, for a padded batch, the attention mask. The script holds them through the step."""
    names = ("ids", "labels", *(("attention_mask",) if padded else ()))
    return Op("inputs", (), tuple(Tensor(n, "b s", "int64") for n in names), holds="step")


def lm_head(x: str, tied_to: str = "", bias: bool = False) -> Op:
    """Return the output projection. If tied, it uses the embedding's weight."""
    op = ops.linear("lm_head", x, "logits", "v", "h", "lm_head", bias)
    if not tied_to:
        return op
    own_name = op.weights[0].name
    tied = Weight(tied_to, "v h", "embedding", matrix=True, rows=1)
    keeps = tuple(
        k._replace(what=k.what.replace(own_name, tied_to), of=k.of.replace(own_name, tied_to)) for k in op.keeps
    )
    return op._replace(weights=(tied, *op.weights[1:]), keeps=keeps)


def masks(wiring: Wiring, x: str, sliding: bool = False) -> tuple[Op, ...]:
    """Return the mask of the full or of the sliding layers, if one is built.

    Without padding sdpa builds a single mask for the batch: for a sliding window, or for a static cache's full length.
    Building a window's mask takes two boolean temporaries.
    """
    name = mask_name(sliding)
    if not wiring.has_mask(sliding):
        return ()
    if wiring.backend == "eager" or wiring.padded:
        return mask(wiring, x, name)
    parts = (Tensor("within the window", "s s", "bool"), Tensor("causal", "s s", "bool")) if sliding else ()
    dtype = f"={x}" if wiring.float_masks else "bool"
    return (Op(name, (), (Tensor(name, "s s", dtype),), scratch=parts, source="transformers 5.24 masking_utils.py"),)


def before(
    wiring: Wiring,
    sliding: tuple[bool, ...] = (False,),
    embedded: tuple[Op, ...] = (),
    table_dtype: str = "",
    rotary: bool = True,
) -> tuple[Op, ...]:
    """Return the operations before the first block.

    sliding   the kinds of layers in the model
    embedded  replaces plain embeddings
    rotary    heads are rotated, with one table for all layers
    """
    return (
        inputs(wiring.padded),
        *(embedded or (ops.embedding("model.embed_tokens", "ids", "embeds", "v", "h"),)),
        positions(),
        *(op for kind in sliding for op in masks(wiring, "embeds", kind)),
        *(rotary_table("embeds", dtype=table_dtype) if rotary else ()),
    )


def after(
    m: ModelSpec,
    wiring: Wiring,
    sliding: tuple[bool, ...] = (False,),
    bias: bool = False,
    norm: Callable[[str, str, str, str, str], tuple[Op, ...]] = ops.rms_norm,
    rotary: bool = True,
    name: str = "model.norm",
) -> tuple[Op, ...]:
    """Return the last norm and the output projection. `rotary` as in `before`."""
    mask_names = [op.name for kind in sliding for op in masks(wiring, "embeds", kind)]
    table = ("cos", "sin") if rotary else ()
    return (
        *norm(name, "x", "n", "b s h", "h"),
        ops.release_names("x", "embeds", "positions", *table, *mask_names),
        lm_head("n", "model.embed_tokens.weight" if m.tie_word_embeddings else "", bias),
    )


def returned(wiring: Wiring) -> tuple[str, ...]:
    """Return what an attention module returns besides its output; the block holds it without using it."""
    return ("probs",) if wiring.backend == "eager" else ()


def decoder_block(
    attention_ops: tuple[Op, ...],
    mlp_ops: tuple[Op, ...],
    branch: Callable[[str, str, str], tuple[Op, ...]] | None = None,
    norm: Callable[[str, str, str, str, str], tuple[Op, ...]] = ops.rms_norm,
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm"),
    held: tuple[str, ...] = (),
) -> Block:
    """Return a block: norm, attention from `n1` to `ao`, residual; norm, MLP from `n2` to `mo`, residual.

    `branch(name, x, y)` transforms each branch before it is added. `held` tensors live to the end of the block.
    """
    ao, mo = ("ao", "mo") if branch is None else ("ao.branch", "mo.branch")
    return Block(
        "model.layers",
        (
            *norm(norms[0], "x", "n1", "b s h", "h"),
            *attention_ops,
            *(branch("attention_branch", "ao", ao) if branch else ()),
            ops.add("residual_1", "x", ao, "x1", "b s h"),
            *((ops.release_names("ao"),) if branch else ()),
            *norm(norms[1], "x1", "n2", "b s h", "h"),
            *mlp_ops,
            *(branch("mlp_branch", "mo", mo) if branch else ()),
            ops.add("residual_2", "x1", mo, "y", "b s h"),
            ops.release_names("positions", *(("mo",) if branch else ()), *held),
        ),
    )


def runs(m: ModelSpec, block: Callable[[Layer], Block]) -> tuple[Run, ...]:
    """Return the model's layers as runs that repeat the config's pattern. Equal layers share one block."""
    blocks = {layer: block(layer) for layer in dict.fromkeys(layer for run in m.runs for layer in run.pattern)}
    return tuple(Run(tuple(map(blocks.__getitem__, run.pattern)), run.times) for run in m.runs)
