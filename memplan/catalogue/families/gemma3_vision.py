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
from memplan.catalogue.vision.vision import masked_text, scattered, text_with_tower
from memplan.core.ir import Keep, Op, Run, Stack, Tensor, Weight
from memplan.models.model import ModelSpec


def gemma3(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Gemma 3 with SigLIP. Images have one size; their features are pooled and projected to the decoder's width.

    Tokens of an image attend to each other, so all layers of the decoder have a mask.
    """
    lead = "b images grid"
    shape = f"{lead} vh"
    act = str(m.part("vision_config").get("hidden_act", "gelu_pytorch_tanh"))
    block = t.encoder_block("vision_tower.encoder.layers", act, wiring, t.strided_norm)
    before = t.embedded_patches("vision_tower.embeddings", shape)
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
    text = masked_text(wiring.images, wiring, lambda masked: gemma3_text(m, masked))
    return text_with_tower(wiring, text, tower, scattered(joined=False), ("image_embeds", "image_mask"))


BUILDERS = {"gemma3": gemma3}
