"""Laguna: heads gated by softplus, more of them in windows; sigmoid routers, and a shared expert that comes first.

Source: transformers 5.24 models/laguna/modeling_laguna.py.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import KEYS, QUERIES, keys_and_values, mask_name
from memplan.catalogue.decoder.decoder import Decoder, decoder
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.rotation import attend_heads_first, partly_rotated
from memplan.catalogue.experts import experts, routers
from memplan.catalogue.families.mixtures import X, Y
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Op, Stack, Tensor, Weight
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_LOCAL = {"rot": "wrot", "rot2": "wrot2"}  # axes of layers with a window


def _attention(m: ModelSpec, wiring: Wiring, layer: Layer, name: str = "self_attn") -> tuple[Op, ...]:
    """Attention whose heads, or all their numbers, are multiplied by the softplus of a projection of its input."""
    bias, group, each = m.get("attention_bias", False), "attention", m.config["gating"] in (True, "per-head")
    repeated, k, v, heads, grouped = keys_and_values(m, f"{name}.attention", wiring, layer.sliding, layer.k != layer.a)
    gates = "b s a" if each else QUERIES
    operations = (
        *(
            op
            for t, shape in (("q", "a d"), ("k", "k d"))
            for op in (
                ops.linear(f"{name}.{t}_proj", "n1", f"{t}0", shape, "h", group, bias),
                ops.view(f"{name}.{t}_heads", f"{t}0", f"{t}1", f"b s {shape}", "new"),
            )
        ),
        ops.linear(f"{name}.v_proj", "n1", "v", "k d", "h", group, bias),
        *ops.rms_norm(f"{name}.q_norm", "q1", "q2", QUERIES, "d"),
        ops.release_names("q1"),
        *ops.rms_norm(f"{name}.k_norm", "k1", "k2", KEYS, "d"),
        ops.release_names("k1"),
        *partly_rotated(m, f"{name}.rope", "q2", "k2", partial=True),
        ops.release_names("q2", "k2"),
        *repeated,
        *attend_heads_first(
            f"{name}.attention", "q", k, v, "oh", heads, grouped, layer.sliding, mask_name(layer.sliding)
        ),
        ops.linear(f"{name}.g_proj", "n1", "closed", "a" if each else "a d", "h", group),
        ops.cast(f"{name}.float", "closed", "closed32", gates, "fp32"),
        ops.release_names("closed"),
        ops.activation(f"{name}.softplus", "closed32", "open32", gates),
        ops.release_names("closed32"),
        ops.cast(f"{name}.cast", "open32", "open", gates, "=oh"),
        ops.release_names("open32"),
        ops.spread(f"{name}.gate", "oh", "open", "o", QUERIES)
        if each
        else ops.mul(f"{name}.gate", "oh", "open", "o", QUERIES),
        ops.release_names("oh"),
        ops.linear(f"{name}.o_proj", "o", "ao", "h", "a d", group, bias),
        ops.release_names("q", "k", "v", "o", "open", "n1"),
    )
    return ops.with_axes(operations, {"a": f"a{layer.a}", **(_LOCAL if layer.sliding else {})})


def _mixture(m: ModelSpec, name: str = "mlp.gate") -> tuple[Op, ...]:
    """A shared expert, then those with the largest sigmoids, chosen with a bias that is a parameter."""
    capped = m.get("moe_router_logit_softcapping", 0.0) > 0
    wide, shape = "router.wide" if capped else "router.logits", "b s E"
    gates = (
        routers.gate(name, X, "router.narrow", stands_for=()),
        ops.cast(f"{name}.float", "router.narrow", wide, shape, "fp32"),
        ops.release_names("router.narrow"),
        *((*ops.softcap(f"{name}.softcap", wide, "router.logits", shape), ops.release_names(wide)) if capped else ()),
    )
    picked, scores, ranked = "router.picked", "router.sigmoids", "router.biased"
    bias = Weight(f"{name}.e_score_correction_bias", "E", "router", trains=False)
    routed = (
        *gates,
        routers.sigmoid(f"{name}.sigmoid", "router.logits", scores, shape),
        Op(
            f"{name}.bias",
            (scores,),
            (Tensor(ranked, shape, "fp32"),),
            (bias,),
            scratch=(Tensor("bias", "E", f"fp32!{bias.name}"),),
            gradient="none",
        ),
        routers.top_k(f"{name}.topk", ranked, "router.top")._replace(gradient="none"),
        routers.gathered(f"{name}.gather", scores, routers.CHOSEN, picked),
        *routers.divided(f"{name}.normalise", picked, "router.normal"),
        ops.cast(f"{name}.cast", "router.normal", routers.SCORES, routers.PAIRS, f"={X}"),
        ops.release_names("router.normal", scores, ranked, "router.top"),
    )
    return (
        *gated_mlp(X, "shared", "mlp.shared_experts", width="fs", flat=True),
        *routed,
        *experts.experts(X, "chosen", gate_up=(), down=()),
        *experts.scaled_and_shared("mlp", X, Y),
    )


def laguna(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Laguna. Layers with a window have their own rotary table, of their own width."""
    stack = decoder(m, wiring, Decoder(attention=_attention, experts=_mixture, local_table=True))
    before = tuple(
        op
        for table in stack.before
        for op in (
            ops.with_axes((table,), _LOCAL) if any(t.name.endswith(".local") for t in table.writes) else (table,)
        )
    )
    return stack._replace(before=before)


BUILDERS = {"laguna": laguna}
