"""Gemma 3 with images: SigLIP's vision tower, and the decoder of `memplan.catalogue.families.gemma`.

Source: transformers 5.24 models/gemma3/modeling_gemma3.py, models/siglip/modeling_siglip.py.
"""

from __future__ import annotations

from memplan.catalogue.decoder.norms import gemma_norm
from memplan.catalogue.families.gemma import gemma3 as gemma3_text
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision import towers as t
from memplan.catalogue.vision.towers import Tower
from memplan.catalogue.vision.vision import scattered, text_with_tower
from memplan.core.ir import Keep, Op, Run, Stack, Tensor, Weight
from memplan.models.model import ModelSpec


def gemma3(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Gemma 3 with SigLIP. Images have one size; their features are pooled and projected to the decoder's width.

    Tokens of an image attend to each other, so all layers of the decoder have a mask.
    """
    lead = "b images grid"
    shape = f"{lead} vh"
    act = str(m.part("vision_config").get("hidden_act", "gelu_pytorch_tanh"))
    heads = (
        *(
            t.linear(f"self_attn.{n}_proj", "v.n1", f"v.{n}", "va vd", "vh", lead=lead, flat=False)
            for n in ("q", "k", "v")
        ),
        t.attention("self_attn", "v.q", "v.k", "v.v", "v.o", wiring.tower, t.BATCH),
        t.linear("self_attn.out_proj", "v.o", "v.ao", "vh", "va vd", lead=lead, flat=False),
        ops.release_names("v.q", "v.k", "v.v", "v.o", "v.n1"),
    )
    block = t.block(
        "vision_tower.encoder.layers",
        heads,
        t.mlp("mlp", "v.n2", "v.mo", act, lead=lead, flat=False),
        t.strided_norm,
        norms=("layer_norm1", "layer_norm2"),
        lead=lead,
    )
    n = "vision_tower.embeddings"
    position = Weight(f"{n}.position_embedding.weight", "vpositions vh", "vision", rows=1)
    ids = Weight(f"{n}.position_ids", "vpositions", "buffer", "int64", False)
    before = (
        *t.convolution(f"{n}.patch_embedding", "pixel_values", "v.patches", shape, True, asks=True),
        Op(
            f"{n}.position_embedding",
            (),
            (Tensor("v.position", "vpositions vh", f"={position.name}"),),
            (position, ids),
            source=f"{ops.DERIVATIVES}: embedding",
        ),
        ops.add(n, "v.patches", "v.position", "embeds", shape),
    )
    n = "multi_modal_projector"
    weight = Weight(f"{n}.mm_input_projection_weight", "vh h", "projector", rows=1)
    pooled = "b merged vh"
    after = (
        *t.strided_norm("vision_tower.post_layernorm", "x", "v.last", shape, "vh"),
        ops.release_names("x", "embeds"),
        ops.copy(f"{n}.contiguous", "v.last", "v.square", shape),
        Op(
            f"{n}.avg_pool",
            ("v.square",),
            (Tensor("v.pooled", pooled),),
            (),
            (Keep("v.square", "v.square"),),
            source=f"{ops.DERIVATIVES}: avg_pool2d",
        ),
        *t.grouped(gemma_norm(f"{n}.mm_soft_emb_norm", "v.pooled", "v.normed", pooled, "vh"), "projector"),
        ops.copy(f"{n}.reshape", "v.normed", "v.rows", pooled),
        Op(
            n,
            ("v.rows",),
            (Tensor("features", "b merged h"),),
            (weight,),
            (Keep(weight.name, "v.rows"), Keep("v.rows", weight.name)),
            autocast="lower",
            product="matrix",
            source=f"{ops.DERIVATIVES}: mm",
        ),
        *t.returned_states("v.last", "features"),
        ops.release_names("v.pooled", "v.square", "v.last", "v.normed"),
    )
    inputs = (Tensor("pixel_values", f"{lead} vin", "fp32"), Tensor("token_type_ids", "b s", "int64"))
    tower = Tower(inputs, before, (Run((block,), "vL1"),), after)
    text = gemma3_text(m, wiring._replace(padded=wiring.padded or wiring.images))
    if wiring.images and not wiring.padded:
        first = text.before[0]
        without_mask = first._replace(writes=tuple(w for w in first.writes if w.name != "attention_mask"))
        text = text._replace(before=(without_mask, *text.before[1:]))
    return text_with_tower(wiring, text, tower, scattered(joined=False), ("image_embeds", "image_mask"))


BUILDERS = {"gemma3": gemma3}
