"""AFMoE (Arcee's Trinity): gated attention, rotated only in windows, norms before and after branches, an fp32 router.

Source: transformers 5.24 models/afmoe/modeling_afmoe.py.
"""

from __future__ import annotations

from memplan.catalogue.attention.attention import KEYS, QUERIES, attention, keys_and_values, mask_name
from memplan.catalogue.decoder.attention import rope
from memplan.catalogue.decoder.decoder import Decoder, decoder
from memplan.catalogue.decoder.frame import BOTH
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.scaling import scaled_embeddings
from memplan.catalogue.experts import experts, routers
from memplan.catalogue.families.gpt_oss import rms_norm
from memplan.catalogue.families.mixtures import X, Y
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Op, Stack
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm")


def _attention(m: ModelSpec, wiring: Wiring, layer: Layer, name: str = "self_attn") -> tuple[Op, ...]:
    """Attention with normalised heads, multiplied by the sigmoid of a projection of its input."""
    bias, group = m.get("attention_bias", False), "attention"
    repeated, k, v, heads, grouped = keys_and_values(m, f"{name}.attention", wiring, layer.sliding)
    rotated = (
        rope(m, name, "q2", "k2")
        if layer.rotary
        else (ops.view(f"{name}.q", "q2", "q", QUERIES), ops.view(f"{name}.k", "k2", "k", KEYS))
    )
    return (
        ops.linear(f"{name}.q_proj", "n1", "q0", "a d", "h", group, bias),
        ops.view(f"{name}.q_heads", "q0", "q1", QUERIES, "new"),
        ops.linear(f"{name}.k_proj", "n1", "k0", "k d", "h", group, bias),
        ops.view(f"{name}.k_heads", "k0", "k1", KEYS, "new"),
        ops.linear(f"{name}.v_proj", "n1", "v", "k d", "h", group, bias),
        ops.linear(f"{name}.gate_proj", "n1", "closed", "a d", "h", group),
        *rms_norm(f"{name}.q_norm", "q1", "q2", QUERIES, "d"),
        ops.release_names("q1"),
        *rms_norm(f"{name}.k_norm", "k1", "k2", KEYS, "d"),
        ops.release_names("k1"),
        *rotated,
        *repeated,
        *attention(f"{name}.attention", "q", k, v, "o", heads, grouped, layer.sliding, mask_name(layer.sliding)),
        routers.sigmoid(f"{name}.sigmoid", "closed", "open", QUERIES),
        ops.mul(f"{name}.gated", "o", "open", "o.gated", QUERIES),
        ops.linear(f"{name}.o_proj", "o.gated", "ao", "h", "a d", group, bias),
        ops.release_names("q", "k", "v", "o.gated", "closed", "n1"),
    )


def _mixture(m: ModelSpec, name: str = "mlp.router") -> tuple[Op, ...]:
    """Shared experts, then routed ones. What balances them is a parameter that never trains, not a buffer."""
    gates = (
        routers.gate(f"{name}.gate", X, "router.narrow", matrix=True),
        ops.cast(f"{name}.float", "router.narrow", "router.logits", "b s E", "fp32"),
        ops.release_names("router.narrow"),
    )
    router = routers.scaled_sigmoid_router(name, X, "mlp.expert_bias", True, gates)
    return (
        *(op._replace(weights=tuple(w._replace(group="router") for w in op.weights)) for op in router),
        *gated_mlp(X, "shared", "mlp.shared_experts", width="fs", flat=True),
        *experts.experts(X, "routed"),
        ops.add("mlp.add", "shared", "routed", Y, "b s h"),
        ops.release_names("shared", "routed", *routers.HELD, X),
    )


_AFMOE = Decoder(attention=_attention, experts=_mixture, norm=rms_norm, norms=_NORMS, masks=BOTH)


def afmoe(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build AFMoE, which may scale embeddings: the model holds the unscaled ones."""
    if not m.get("mup_enabled", False):
        return decoder(m, wiring, _AFMOE)
    stack = decoder(m, wiring, _AFMOE._replace(embedded=scaled_embeddings()))
    return stack._replace(after=renamed(stack.after, {"embeds": "unscaled_embeds"}))


BUILDERS = {"afmoe": afmoe}
