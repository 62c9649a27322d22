"""Lara Mini: Qwen3.5's gated delta nets, attention rotated only in windows, and experts next to a shared one.

Source: transformers 5.24 models/lara_mini/modeling_lara_mini.py.
"""

from __future__ import annotations

from functools import partial

from memplan.catalogue.attention.attention import KEYS, QUERIES, attention, keys_and_values, mask_name
from memplan.catalogue.decoder.attention import project_heads, rope
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


def _attention(m: ModelSpec, wiring: Wiring, layer: Layer, name: str = "self_attn") -> tuple[Op, ...]:
    """Attention with normalised heads, rotated only in windows."""
    n, bias = f"{name}.attention", m.get("attention_bias", False)
    repeated, k, v, heads, grouped = keys_and_values(m, n, wiring, layer.sliding)
    unrotated = (ops.view(f"{name}.q", "q1", "q", QUERIES), ops.view(f"{name}.k", "k1", "k", KEYS))
    return (
        *project_heads(name, "n1", bias, norm=rms_norm_of_cast_weight, gradient="new"),
        *(rope(m, name, "q1", "k1") if layer.rotary else unrotated),
        *repeated,
        *attention(n, "q", k, v, "o", heads, grouped, layer.sliding, mask_name(layer.sliding)),
        ops.linear(f"{name}.o_proj", "o", "ao", "h", "a d", "attention", bias),
        ops.release_names("q", "k", "v", "o", "n1"),
    )


def lara_mini(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Lara Mini."""
    mixture = _mixture(m)
    kinds = tuple(sorted({layer.sliding for layer in m.layers if layer.mixer == "attention"}))
    linear = (
        *unpadded(wiring, "n1", "n1.real", "b s h"),
        *gated_delta_net(m, wiring, "n1.real", "ao", norm=_NORM),
        ops.release_names("n1"),
    )

    def block(layer: Layer) -> Block:
        attends = layer.mixer == "attention"
        heads = _attention(m, wiring, layer) if attends else linear
        return decoder_block(heads, mixture, norm=rms_norm_of_cast_weight, held=returned(wiring) if attends else ())

    return Stack(before(wiring, kinds), runs(m, block), after(m, wiring, kinds, norm=rms_norm_of_cast_weight))


BUILDERS = {"lara_mini": lara_mini}
