"""MiniCPM3: latent attention in a decoder that scales its embeddings, branches and the input of its head."""

from __future__ import annotations

from memplan.catalogue.attention.latent import halves, latent_attention
from memplan.catalogue.decoder.frame import decoder_block, inputs, lm_head, masks, returned
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.scaling import scaled_branch, scaled_embedding
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.positions import positions, rotary_table
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Keep, Op, Run, Stack, Tensor
from memplan.models.model import ModelSpec


def model_around(
    m: ModelSpec,
    wiring: Wiring,
    blocks: tuple[Run, ...],
    embedded: Op | None = None,
    table: tuple[Op, ...] = (),
    last: tuple[Op, ...] = (),
    made: tuple[Op, ...] | None = None,
) -> Stack:
    """Assemble the model around its blocks.

    embedded  the embedding, in place of a plain lookup
    table     the rotation table, in place of cos and sin
    last      ops in place of the last norm
    made      ops that make the mask, in place of those the kernel needs
    """
    made = masks(wiring, "embeds") if made is None else made
    before = (
        inputs(wiring.padded),
        embedded or ops.embedding("model.embed_tokens", "ids", "embeds", "v", "h"),
        positions(),
        *made,
        *(table or rotary_table("embeds")),
    )
    held = ("turns",) if table else ("cos", "sin")
    after = (
        *(last or ops.rms_norm("model.norm", "x", "n", "b s h", "h")),
        ops.release_names("x", "embeds", "positions", *held, *(op.name for op in made)),
        lm_head("n", "model.embed_tokens.weight" if m.tie_word_embeddings else ""),
    )
    return Stack(before, blocks, after)


def _embedding(m: ModelSpec) -> Op:
    """The embedding, multiplied by a tensor. If `scale_emb` is an integer, the tensor is cast, and the cast is kept."""
    op = scaled_embedding()
    if not isinstance(m.get("scale_emb", 12), int):
        return op
    table, scale = op.weights
    cast = Tensor("embed_scale", "", f"={table.name}")
    return op._replace(
        writes=(*op.writes, cast),
        weights=(table, scale._replace(dtype="int64")),
        keeps=(*op.keeps, Keep(cast.name, table.name)),
    )


def minicpm3(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build MiniCPM3: dense layers with scaled branches, scaled embeddings and a scaled input to the head.

    The decoder's unscaled output stays alive until the model returns.
    """
    block = decoder_block(
        latent_attention(m, wiring, "n1", "ao", halves, m.get("attention_bias", False)),
        gated_mlp("n2", "mo", bias=m.get("mlp_bias", False)),
        scaled_branch,
        held=returned(wiring),
    )
    last = (
        *(
            op._replace(holds="forward") if any(t.name == "unscaled" for t in op.writes) else op
            for op in ops.rms_norm("model.norm", "x", "unscaled", "b s h", "h")
        ),
        ops.scale("logits_scaling", "unscaled", "n", "b s h"),
    )
    return model_around(m, wiring, (Run((block,), "L"),), _embedding(m), last=last)


BUILDERS = {"minicpm3": minicpm3}
