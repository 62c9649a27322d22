"""A decoder's frame: inputs and masks, the operations before and after the layers, blocks, and runs of equal layers."""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue.attention.attention import mask, mask_name
from memplan.catalogue.attention.flex_attention import block_mask
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.positions import given_positions, positions, rotary_table
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Run, Tensor, Weight
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

Ops = tuple[Op, ...]
Norm = Callable[[str, str, str, str, str], Ops]  # name, input, output, shape, axis of the weight
Branch = Callable[[str, str, str], Ops]  # name, input, output

FULL, BOTH = (False,), (False, True)  # kinds of layers: without and with a sliding window
PRE_NORM = ("input_layernorm", "", "post_attention_layernorm", "")
LOCAL = {"cos": "cos.local", "sin": "sin.local"}  # names of the sliding layers' rotary table, if they have their own


def inputs(padded: bool, *more: Tensor) -> Op:
    """Return token ids, labels and, for a padded batch, the attention mask. The script holds them through the step."""
    names = ("ids", "labels", *(("attention_mask",) if padded else ()))
    return Op("inputs", (), (*(Tensor(n, "b s", "int64") for n in names), *more), holds="step")


def packed_inputs(wiring: Wiring) -> tuple[Tensor, ...]:
    """Return what a packed batch comes with: positions, and maybe a mask of all pairs of tokens."""
    if wiring.packed is None:
        return ()
    given = (Tensor("pairs_mask", "b s s", wiring.target),) if wiring.packed.mask == "given" else ()
    return (Tensor("position_ids", "b s", "int64"), *given)


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


def masks(wiring: Wiring, x: str, sliding: bool = False) -> Ops:
    """Return the mask of the full or of the sliding layers, if one is built.

    Without padding sdpa builds a single mask for the batch: for a sliding window, or for a static cache's full length.
    Building a window's mask takes two boolean temporaries.
    """
    name = mask_name(sliding)
    if not wiring.has_mask(sliding):
        return ()
    if wiring.backend == "flex":
        return block_mask(name, wiring.padded)
    if wiring.packed is not None and wiring.packed.mask == "given":
        return (ops.view(name, "pairs_mask", name, "b s s"),)
    if wiring.backend == "eager" or wiring.masks_rows:
        return mask(wiring, x, name)
    parts = (Tensor("within the window", "s s", "bool"), Tensor("causal", "s s", "bool")) if sliding else ()
    dtype = f"={x}" if wiring.float_masks else "bool"
    return (Op(name, (), (Tensor(name, "s s", dtype),), scratch=parts, source="transformers 5.24 masking_utils.py"),)


def masks_of(wiring: Wiring, kinds: tuple[bool, ...]) -> Ops:
    """Return the masks of several kinds of layers."""
    return tuple(op for kind in kinds for op in masks(wiring, "embeds", kind))


def rotary_tables(local: bool = False, dtype: str = "") -> Ops:
    """Return the rotary table, and if `local` the sliding layers' own table."""
    table = rotary_table("embeds", dtype=dtype)
    if not local:
        return table
    buffers = tuple(w._replace(name=f"{w.name}.local") for w in table[0].weights)
    local_names = {t.name: f"{t.name}.local" for op in table for t in op.writes}
    return (*table, *renamed((table[0]._replace(weights=buffers), *table[1:]), local_names))


def table_names(local: bool = False) -> tuple[str, ...]:
    """Return the names of `rotary_tables`."""
    return (*LOCAL, *(LOCAL.values() if local else ()))


def before(
    wiring: Wiring,
    kinds: tuple[bool, ...] = FULL,
    *,
    embedded: Ops = (),
    table: Ops | None = None,
    made: Ops | None = None,
) -> Ops:
    """Return the operations before the first block.

    kinds     kinds of layers whose masks are made: without and with a sliding window
    embedded  replaces plain embeddings
    table     replaces the rotary table
    made      replaces the masks
    """
    table = rotary_tables() if table is None else table
    packed = wiring.packed
    return (
        inputs(wiring.padded, *packed_inputs(wiring)),
        *(embedded or (ops.embedding("model.embed_tokens", "ids", "embeds", "v", "h"),)),
        positions() if packed is None else given_positions(),
        *(masks_of(wiring, kinds) if made is None else made),
        *(table if packed is None or packed.is_one_row else ops.with_axes(table, {"s": "b s"})),
    )


def after(  # noqa: PLR0913 (each is a way in which families differ)
    m: ModelSpec,
    wiring: Wiring,
    kinds: tuple[bool, ...] = FULL,
    *,
    norm: Norm = ops.rms_norm,
    name: str = "model.norm",
    last: Ops = (),
    bias: bool = False,
    table: tuple[str, ...] = tuple(LOCAL),
    made: Ops | None = None,
    embedding: str = "model.embed_tokens",
    held: str = "embeds",
) -> Ops:
    """Return the last norm and the output projection.

    kinds, made  as in `before`
    name, last   the last norm's name; the operations in place of it
    table        names of the rotary table
    embedding    name of the embedding, whose weight the head may use
    held         the embeddings that the model's frame references
    """
    mask_names = (op.name for op in (masks_of(wiring, kinds) if made is None else made))
    return (
        *(last or norm(name, "x", "n", "b s h", "h")),
        ops.release_names("x", held, "positions", *table, *mask_names),
        lm_head("n", f"{embedding}.weight" if m.tie_word_embeddings else "", bias),
    )


def returned(wiring: Wiring) -> tuple[str, ...]:
    """Return what an attention module returns besides its output; the block holds it without using it."""
    return ("probs",) if wiring.backend in ("eager", "flex") else ()


def decoder_block(
    attention_ops: Ops,
    mlp_ops: Ops,
    *,
    norm: Norm = ops.rms_norm,
    norms: tuple[str, str, str, str] = PRE_NORM,
    branch: Branch | None = None,
    held: tuple[str, ...] = (),
    first_held: tuple[str, ...] = (),
    given: str = "positions",
) -> Block:
    """Return a block: norm, attention to `ao`, norm, residual; norm, MLP to `mo`, norm, residual.

    norms       names of the four norms; empty for a norm that the block does not have. Attention reads `n1` and the
                MLP `n2`, or `x` and `x1` without a norm before them
    branch      changes each branch before it is added
    held        tensors that live to the end of the block; `first_held` are released before them
    given       further arguments of the block, which a checkpoint keeps
    """
    before_attention, after_attention, before_mlp, after_mlp = norms

    def ended(name: str, x: str, end: str) -> tuple[str, Ops, Ops]:
        """Return what is added, the operations that make it, and those after it is added."""
        made: Ops = ()
        if end:
            made, x = (*norm(end, x, f"{x}.normed", "b s h", "h"), ops.release_names(x)), f"{x}.normed"
        if branch:
            return f"{x}.branch", (*made, *branch(name, x, f"{x}.branch")), (ops.release_names(x),)
        return x, made, ()

    ao, attention_end, released = ended("attention_branch", "ao", after_attention)
    mo, mlp_end, _ = ended("mlp_branch", "mo", after_mlp)
    return Block(
        "model.layers",
        (
            *(norm(before_attention, "x", "n1", "b s h", "h") if before_attention else ()),
            *attention_ops,
            *attention_end,
            ops.add("residual_1", "x", ao, "x1", "b s h"),
            *released,
            *(norm(before_mlp, "x1", "n2", "b s h", "h") if before_mlp else ()),
            *mlp_ops,
            *mlp_end,
            ops.add("residual_2", "x1", mo, "y", "b s h"),
            ops.release_names(*first_held, *given.split(), *(("mo",) if branch else ()), *held),
        ),
    )


def local(block: Block) -> Block:
    """Return the block using the sliding layers' rotary table."""
    return block._replace(ops=renamed(block.ops, LOCAL))


def runs(m: ModelSpec, block: Callable[[Layer], Block]) -> tuple[Run, ...]:
    """Return the model's layers as runs that repeat the config's pattern. Equal layers share one block."""
    blocks = {layer: block(layer) for layer in dict.fromkeys(layer for run in m.runs for layer in run.pattern)}
    return tuple(Run(tuple(map(blocks.__getitem__, run.pattern)), run.times) for run in m.runs)
