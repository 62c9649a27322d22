"""OLMo and EXAONE 4: Llama with other norms, from OLMo 2 on at the end of each branch."""

from __future__ import annotations

from functools import partial

from memplan.catalogue.attention.attention import attention, mask_name, one_head, repeats_by_view
from memplan.catalogue.decoder.attention import llama_attention
from memplan.catalogue.decoder.frame import decoder_block, returned, runs
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.windows import after, before, local, normed_block, tables
from memplan.catalogue.families.gemma import norm_then_rope
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Scratch, Stack, Tensor, Weight
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_Q, _K = "b s a d", "b s k d"


def layer_norm(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """OLMo's LayerNorm has no weight, runs in fp32, and keeps x in fp32."""
    x32, y32 = f"{y}.x32", f"{y}.y32"
    return (
        ops.cast(f"{name}.float", x, x32, shape, "fp32"),
        ops.layer_norm(name, x32, y32, shape, axis, affine=False),
        ops.cast(f"{name}.cast", y32, y, shape, f"={x}"),
    )


def rms_norm(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """OLMo 2's RMSNorm multiplies by the weight before it casts, and so keeps the normalised x in fp32.

    Source: transformers 5.24 models/olmo2/modeling_olmo2.py Olmo2RMSNorm.
    """
    *normalise, _, _, _ = ops.rms_norm(name, x, y, shape, axis)
    n32, y32 = f"{y}.n32", f"{y}.y32"
    w = Weight(f"{name}.weight", axis, "norm")
    return (
        *normalise,
        ops.multiply_weight(f"{name}.weight", n32, y32, shape, w),
        ops.cast(f"{name}.cast", y32, y, shape, f"={x}"),
        ops.release_names(f"{y}.mean", n32),
    )


def rope(name: str, q: str, k: str) -> tuple[Op, ...]:
    """Rotate q and k. The rotary table is fp32, and so are its products, which are cast back."""
    return (
        *ops.rotate(f"{name}.rope_q", q, "q.rotated", _Q, "b s a rot2"),
        *ops.rotate(f"{name}.rope_k", k, "k.rotated", _K, "b s k rot2"),
        ops.cast(f"{name}.cast_q", "q.rotated", "q", _Q, f"={q}"),
        ops.cast(f"{name}.cast_k", "k.rotated", "k", _K, f"={k}"),
        ops.release_names("q.rotated", "k.rotated"),
        ops.release_names(q, k),
    )


def _attention(
    m: ModelSpec, wiring: Wiring, projections: tuple[Op, ...], x: str, sliding: bool = False, name: str = "self_attn"
) -> tuple[Op, ...]:
    """Attention from `projections` of x, which write `q0`, `k0` and `v` before they are viewed as heads."""
    grouped = m.num_key_value_heads != m.num_attention_heads
    k, v, repeated, heads = "k", "v", (), wiring
    if grouped and m.num_key_value_heads == 1 and repeats_by_view(wiring, sliding):
        k, v, grouped = "k.all", "v.all", False
        repeated, heads = one_head(f"{name}.attention", wiring, sliding), wiring._replace(caching=False)
    return (
        *projections,
        ops.view(f"{name}.q_heads", "q0", "q1", _Q, "new"),
        ops.view(f"{name}.k_heads", "k0", "k1", _K, "new"),
        *rope(name, "q1", "k1"),
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
                *rms_norm(f"self_attn.{t}_norm", f"{t}.raw", f"{t}0", f"b s {width}", width),
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
    shape = _Q if t == "q" else _K
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


def olmo(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build OLMo: norms without weights, and a rotary table in fp32."""
    heads = _attention(m, wiring, clipped_projections(m, "n1"), "n1")
    block = decoder_block(heads, gated_mlp("n2", "mo"), norm=layer_norm, held=returned(wiring))
    return Stack(
        before(wiring, False, tables(dtype="fp32")), runs(m, lambda _: block), after(m, wiring, False, layer_norm)
    )


_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")


def olmo2(m: ModelSpec, wiring: Wiring, mixed: bool = False) -> Stack:
    """Build OLMo 2 or 3, whose branches read the residual stream without a norm.

    OLMo 3's sliding-window layers have a separate rotary table.
    """

    def block(layer: Layer) -> Block:
        heads = _attention(m, wiring, normed_projections(m, "x"), "x", layer.sliding)
        layer_block = normed_block(heads, gated_mlp("x1", "mo"), rms_norm, None, _AFTER, returned(wiring))
        return local(layer_block) if layer.sliding else layer_block

    has_sliding = any(layer.sliding for layer in m.layers)
    return Stack(
        before(wiring, mixed, tables(has_sliding, "fp32")),
        runs(m, block),
        after(m, wiring, mixed, rms_norm, has_sliding),
    )


def exaone4(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build EXAONE 4: OLMo 2's frame with Llama's norms, also over each head. Layers without a window do not rotate."""
    mixed = any(layer.sliding for layer in m.layers)

    def block(layer: Layer) -> Block:
        turn = partial(norm_then_rope, norm=ops.rms_norm, rotary=layer.rotary)
        heads = llama_attention(m, wiring, "x", "ao", sliding=layer.sliding, turn=turn)
        return normed_block(heads, gated_mlp("x1", "mo"), ops.rms_norm, None, _AFTER, returned(wiring))

    return Stack(before(wiring, mixed, tables()), runs(m, block), after(m, wiring, mixed))


BUILDERS = {"exaone4": exaone4, "olmo": olmo, "olmo2": olmo2, "olmo3": partial(olmo2, mixed=True)}
