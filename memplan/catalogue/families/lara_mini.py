"""Lara Mini: Qwen3.5's gated delta nets, attention rotated only in windows, and experts next to a shared one.

Source: transformers 5.24 models/lara_mini/modeling_lara_mini.py.
"""

from __future__ import annotations

from functools import partial

from memplan.catalogue.decoder.attention import llama_attention
from memplan.catalogue.decoder.frame import after, before, decoder_block, returned, runs
from memplan.catalogue.decoder.norms import rms_norm_of_cast_weight
from memplan.catalogue.experts import routers
from memplan.catalogue.families.gpt_oss import with_shared_expert
from memplan.catalogue.families.kimi_linear import gated_norm
from memplan.catalogue.families.qwen3_next import gated_delta_net
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.recurrent import unpadded
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Stack
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_NORM = partial(gated_norm, shape="b s lv ldv", axis="ldv", act=ops.activation)


def _mixture(m: ModelSpec, name: str = "mlp.gate") -> tuple[Op, ...]:
    """The largest of a softmax over fp32 logits, cast back to the dtype of x, and a shared expert."""
    normalise, top, probs = m.get("norm_topk_prob", True), "router.top", "router.probs"
    chosen = "router.normal" if normalise else top
    routed = (
        *routers.gate_of_casts(name, "n2"),
        *ops.softmax(f"{name}.softmax", "router.logits", probs, "b s E"),
        routers.top_k(f"{name}.topk", probs, top),
        *(routers.divided(f"{name}.normalise", top, chosen) if normalise else ()),
        ops.cast(f"{name}.cast", chosen, routers.SCORES, routers.PAIRS, "=n2"),
        ops.release_names(probs, chosen),
    )
    return with_shared_expert(routed)


def lara_mini(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Lara Mini."""
    mixture = _mixture(m)
    kinds = tuple(sorted({layer.sliding for layer in m.layers if layer.mixer == "attention"}))
    bias = m.get("attention_bias", False)
    attention = partial(
        llama_attention, m, wiring, "n1", "ao", bias=bias, out_bias=bias, qk_norm="each", norm=rms_norm_of_cast_weight
    )
    linear = (
        *unpadded(wiring, "n1", "n1.real", "b s h"),
        *gated_delta_net(m, wiring, "n1.real", "ao", norm=_NORM),
        ops.release_names("n1"),
    )

    def block(layer: Layer) -> Block:
        attends = layer.mixer == "attention"
        heads = attention(rotary=layer.rotary, sliding=layer.sliding) if attends else linear
        return decoder_block(heads, mixture, norm=rms_norm_of_cast_weight, held=returned(wiring) if attends else ())

    return Stack(before(wiring, kinds), runs(m, block), after(m, wiring, kinds, norm=rms_norm_of_cast_weight))


BUILDERS = {"lara_mini": lara_mini}
