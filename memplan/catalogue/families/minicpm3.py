"""MiniCPM3: latent attention in a decoder that scales its embeddings, branches and the input of its head."""

from __future__ import annotations

from memplan.catalogue.attention.latent import halves, latent_attention
from memplan.catalogue.decoder.decoder import Decoder, decoder
from memplan.catalogue.decoder.frame import after
from memplan.catalogue.decoder.scaling import scaled_branches, scaled_embedding
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Keep, Op, Stack, Tensor
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec


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


def _attention(m: ModelSpec, wiring: Wiring, layer: Layer) -> tuple[Op, ...]:
    return latent_attention(m, wiring, halves)


def minicpm3(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build MiniCPM3: dense layers with scaled branches, scaled embeddings and a scaled input to the head.

    The decoder's unscaled output stays alive until the model returns.
    """
    last = (
        *(
            op._replace(holds="forward") if any(t.name == "unscaled" for t in op.writes) else op
            for op in ops.rms_norm("model.norm", "x", "unscaled", "b s h", "h")
        ),
        ops.scale("logits_scaling", "unscaled", "n", "b s h"),
    )
    row = Decoder(attention=_attention, mlp_bias="mlp_bias", branch=scaled_branches, embedded=(_embedding(m),))
    return decoder(m, wiring, row)._replace(after=after(m, wiring, last=last))


BUILDERS = {"minicpm3": minicpm3}
