"""Mistral 3 with images: Pixtral's vision tower, and Mistral's or Ministral 3's decoder.

Source: transformers 5.24 models/mistral3/modeling_mistral3.py, models/pixtral/modeling_pixtral.py.
"""

from __future__ import annotations

from memplan.catalogue.decoder.decoder import stack_of
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.vision import towers as t
from memplan.catalogue.vision.towers import Tower
from memplan.catalogue.vision.vision import scattered, text_with_tower
from memplan.core.ir import Op, Run, Stack, Tensor
from memplan.models.configs import family
from memplan.models.model import ModelSpec


def mistral3(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Mistral 3. Pixtral's tower is built like Mistral's language model, and merges its patches four by four."""
    shape, heads, half = f"{t.P} vh", f"{t.P} va vd", f"{t.P} va vd2"
    attend = (
        *(
            op
            for n, back in (("q", "new"), ("k", "new"), ("v", "same"))
            for op in (
                t.linear(f"attention.{n}_proj", "v.n1", f"v.{n}0", "va vd", "vh", bias=False, flat=False),
                ops.view(f"attention.{n}_heads", f"v.{n}0", f"v.{n}1", heads, back),
            )
        ),
        *(op for n in "qk" for op in t.rotated(f"attention.rope_{n}", f"v.{n}1", f"v.{n}", heads, half)),
        ops.release_names("v.q1", "v.k1"),
        *t.joint_attention("attention", "v.q", "v.k", "v.v1", "v.o", wiring, t.PACKED, "v.mask"),
        t.linear("attention.o_proj", "v.o", "v.ao", "vh", "va vd", bias=False, flat=False),
        ops.release_names("v.q", "v.k", "v.v1", "v.o", "v.n1"),
    )
    block = t.block(
        "vision_tower.transformer.layers",
        attend,
        t.gated_mlp("feed_forward", "v.n2", "v.mo", bias=False, flat=False),
        t.rms_norm,
        ("attention_norm", "ffn_norm"),
        held=t.returned(wiring),
    )
    before = (
        *t.convolution("vision_tower.patch_conv", "pixel_values", "v.patches", shape, False, asks=True),
        ops.copy("vision_tower.cat", "v.patches", "v.packed", shape, gradient="new"),
        *t.rms_norm("vision_tower.ln_pre", "v.packed", "embeds", shape, "vh"),
        *t.axial_table("vision_tower.patch_positional_embedding", "vd2", "embeds"),
        Op("vision_tower.mask", (), (Tensor("v.mask", f"{t.P} {t.P}", "=embeds"),)),
    )
    n, bias = "multi_modal_projector", m.get("multimodal_projector_bias", False)
    g = "projector"
    after = (
        ops.release_names("v.patches", "v.mask", "v.cos", "v.sin", "v.positions"),
        *t.rms_norm(f"{n}.norm", "x", "v.normed", shape, "vh", g),
        ops.view(f"{n}.patch_merger.split", "v.normed", "v.images", shape, gradient="new"),
        ops.copy(f"{n}.patch_merger.unfold", "v.images", "v.unfolded", "b merged vm", gradient="new"),
        ops.copy(f"{n}.patch_merger.cat", "v.unfolded", "v.square", "b merged vm"),
        t.linear(f"{n}.patch_merger.merging_layer", "v.square", "v.merged", "vh", "vm", g, "b merged", bias=False),
        t.linear(f"{n}.linear_1", "v.merged", "v.m1", "h", "vh", g, "b merged", bias=bias),
        ops.activation(f"{n}.act", "v.m1", "v.m2", "b merged h"),
        t.linear(f"{n}.linear_2", "v.m2", "features", "h", "h", g, "b merged", bias=bias),
        *t.returned_states("x", "features"),
        ops.release_names("v.unfolded", "v.square", "v.merged", "embeds"),
    )
    tower = Tower((Tensor("pixel_values", f"{t.P} vin", "fp32"),), before, (Run((block,), "vL1"),), after)
    text = stack_of(m, wiring, family(m.family.wraps).stack, m.family.wraps)
    return text_with_tower(wiring, text, tower, scattered(), ("image_embeds", "image_mask"))


BUILDERS = {"mistral3": mistral3}
