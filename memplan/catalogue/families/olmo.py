"""OLMo and EXAONE 4: Llama with other norms, from OLMo 2 on at the end of each branch."""

from __future__ import annotations

from memplan.catalogue.attention.attention import KEYS, QUERIES, attention, keys_and_values, mask_name
from memplan.catalogue.decoder.attention import llama_attention, rope
from memplan.catalogue.decoder.decoder import Decoder
from memplan.catalogue.decoder.frame import BOTH, FULL
from memplan.catalogue.decoder.norms import layer_norm_without_weight, rms_norm_in_fp32
from memplan.catalogue.decoder.rotation_fp32 import rope_in_table_dtype
from memplan.catalogue.families.gemma import norm_heads
from memplan.catalogue.families.mixtures import X, softmax_mixture
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Keep, Op, Scratch, Tensor
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec


def _attention(
    m: ModelSpec, wiring: Wiring, projections: tuple[Op, ...], x: str, sliding: bool = False, name: str = "self_attn"
) -> tuple[Op, ...]:
    """Attention from `projections` of x, which write `q0`, `k0` and `v` before they are viewed as heads."""
    repeated, k, v, heads, grouped = keys_and_values(m, f"{name}.attention", wiring, sliding)
    return (
        *projections,
        ops.view(f"{name}.q_heads", "q0", "q1", QUERIES, "new"),
        ops.view(f"{name}.k_heads", "k0", "k1", KEYS, "new"),
        *rope_in_table_dtype(m, name, "q1", "k1"),
        *repeated,
        *attention(f"{name}.attention", "q", k, v, "o", heads, grouped, sliding, mask_name(sliding)),
        ops.linear(f"{name}.o_proj", "o", "ao", "h", "a d", "attention", m.get("attention_bias", False)),
        ops.release_names("q", "k", "v", "o", x),
    )


def _projection(m: ModelSpec, t: str, x: str, y: str) -> Op:
    heads = "a d" if t == "q" else "k d"
    return ops.linear(f"self_attn.{t}_proj", x, y, heads, "h", "attention", m.get("attention_bias", False))


def normed_projections(m: ModelSpec, x: str) -> tuple[Op, ...]:
    """OLMo 2's q, k and v, with q and k normalised across all heads."""
    return (
        *(
            op
            for t, width in (("q", "ad"), ("k", "kd"))
            for op in (
                _projection(m, t, x, f"{t}.raw"),
                *rms_norm_in_fp32(f"self_attn.{t}_norm", f"{t}.raw", f"{t}0", f"b s {width}", width),
                ops.release_names(f"{t}.raw"),
            )
        ),
        _projection(m, "v", x, "v"),
    )


def clipped_projections(m: ModelSpec, x: str) -> tuple[Op, ...]:
    """OLMo 1's q, k and v. If the config clips them in place, autograd keeps a copy of the unclipped values."""
    if m.get("clip_qkv", 0.0) <= 0:
        return tuple(_projection(m, t, x, "v" if t == "v" else f"{t}0") for t in "qkv")
    return (
        *(_projection(m, t, x, f"{t}.raw") for t in "qkv"),
        *(op for t in "qkv" for op in _clip(f"self_attn.clip_{t}", f"{t}.raw", "v" if t == "v" else f"{t}0", t)),
    )


def _clip(name: str, x: str, y: str, t: str) -> tuple[Op, ...]:
    shape = QUERIES if t == "q" else KEYS
    before = f"{x}.copy"
    inside = (Scratch(Tensor("at least", shape, "bool")), Scratch(Tensor("at most", shape, "bool")))
    return (
        ops.copy(f"{name}.copy", x, before, shape)._replace(gradient="none"),
        ops.view(name, x, y, shape, gradient="new")._replace(
            reads=(x, before),
            keeps=(Keep(before, x),),
            scratch_back=(*inside, Scratch(Tensor("zero", "", f"={x}"))),
            source=f"{ops.DERIVATIVES}: clamp",
        ),
    )


def _clipped_attention(m: ModelSpec, wiring: Wiring, layer: Layer) -> tuple[Op, ...]:
    return _attention(m, wiring, clipped_projections(m, "n1"), "n1")


def _normed_attention(m: ModelSpec, wiring: Wiring, layer: Layer) -> tuple[Op, ...]:
    return _attention(m, wiring, normed_projections(m, "x"), "x", layer.sliding)


def exaone_attention(m: ModelSpec, wiring: Wiring, layer: Layer, x: str = "x") -> tuple[Op, ...]:
    """Attention to x with normalised heads. Layers without a window do not rotate them."""

    def rotate(m: ModelSpec, name: str, q: str, k: str) -> tuple[Op, ...]:
        if not layer.rotary:
            return norm_heads(name, q, k, "q", "k", ops.rms_norm)
        normed = norm_heads(name, q, k, "q.normed", "k.normed", ops.rms_norm)
        return (*normed, *rope(m, name, "q.normed", "k.normed"))

    return llama_attention(m, wiring, x, "ao", sliding=layer.sliding, rotate=rotate)


def _flex_experts(m: ModelSpec) -> tuple[Op, ...]:
    """OLMoE's mixture of the residual stream."""
    return renamed(softmax_mixture(m), {X: "x1"})


# Branches read the residual stream without a norm.
_EXAONE_4 = Decoder(
    attention=exaone_attention,
    norms=("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    masks=FULL,
)
_OLMO_2 = _EXAONE_4._replace(attention=_normed_attention, norm=rms_norm_in_fp32, table_dtype="fp32", local_table=True)

BUILDERS = {
    "exaone4": _EXAONE_4,
    "flex_olmo": _OLMO_2._replace(experts=_flex_experts),
    "olmo": Decoder(attention=_clipped_attention, norm=layer_norm_without_weight, table_dtype="fp32"),
    "olmo2": _OLMO_2,
    "olmo3": _OLMO_2._replace(masks=BOTH),
}
