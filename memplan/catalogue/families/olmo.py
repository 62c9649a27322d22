"""OLMo and EXAONE 4: Llama with other norms, and from OLMo 2 on with the norms at the end of each branch."""

from __future__ import annotations

from functools import partial

from memplan.catalogue.attention.attention import attention, mask_name, one_head, repeats_by_view
from memplan.catalogue.decoder.attention import llama_attention
from memplan.catalogue.decoder.frame import decoder_block, returned, runs
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.windows import after, before, local, normed_block, tables
from memplan.catalogue.families.gemma import norm_and_rope
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Scratch, Stack, Tensor, Weight
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_Q, _K = "b s a d", "b s k d"


def layer_norm(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """OLMo's LayerNorm has no weight and is computed in fp32, which it keeps x in."""
    x32, y32 = f"{y}.x32", f"{y}.y32"
    return (
        ops.cast(f"{name}.float", x, x32, shape, "fp32"),
        ops.layer_norm(name, x32, y32, shape, axis, affine=False),
        ops.cast(f"{name}.cast", y32, y, shape, f"={x}"),
    )


def rms_norm(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """OLMo 2 multiplies by the weight before it casts: the normalised x is kept in fp32.

    Source: transformers 5.24 models/olmo2/modeling_olmo2.py Olmo2RMSNorm.
    """
    *normalise, _, _, _ = ops.rms_norm(name, x, y, shape, axis)
    n32, y32 = f"{y}.n32", f"{y}.y32"
    w = Weight(f"{name}.weight", axis, "norm")
    return (
        *normalise,
        ops.weigh(f"{name}.weight", n32, y32, shape, w),
        ops.cast(f"{name}.cast", y32, y, shape, f"={x}"),
        ops.leave(f"{y}.mean", n32),
    )


def rope(name: str, q: str, k: str) -> tuple[Op, ...]:
    """The rotary table is fp32, and so is what is multiplied by it; the result is cast back."""
    return (
        *ops.rotate(f"{name}.rope_q", q, "q.rotated", _Q, "b s a rot2"),
        *ops.rotate(f"{name}.rope_k", k, "k.rotated", _K, "b s k rot2"),
        ops.cast(f"{name}.cast_q", "q.rotated", "q", _Q, f"={q}"),
        ops.cast(f"{name}.cast_k", "k.rotated", "k", _K, f"={k}"),
        ops.leave("q.rotated", "k.rotated"),
        ops.leave(q, k),
    )


def _attention(
    m: ModelSpec, wiring: Wiring, projections: tuple[Op, ...], x: str, sliding: bool = False, name: str = "self_attn"
) -> tuple[Op, ...]:
    """`projections` of x make `q0`, `k0` and `v`, not seen as heads yet."""
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
        ops.leave("q", "k", "v", "o", x),
    )


def _projection(m: ModelSpec, t: str, x: str, y: str) -> Op:
    heads = "a d" if t == "q" else "k d"
    return ops.linear(f"self_attn.{t}_proj", x, y, heads, "h", "attention", m.get("attention_bias", False))


def normed_projections(m: ModelSpec, x: str) -> tuple[Op, ...]:
    """OLMo 2 normalises q and k across all heads."""
    return (
        *(
            op
            for t, width in (("q", "ad"), ("k", "kd"))
            for op in (
                _projection(m, t, x, f"{t}.raw"),
                *rms_norm(f"self_attn.{t}_norm", f"{t}.raw", f"{t}0", f"b s {width}", width),
                ops.leave(f"{t}.raw"),
            )
        ),
        _projection(m, "v", x, "v"),
    )


def clipped_projections(m: ModelSpec, x: str) -> tuple[Op, ...]:
    """OLMo 1 may clip q, k and v in place: autograd keeps a copy of what they were."""
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
    """Norms without weights, and a rotary table in fp32."""
    heads = _attention(m, wiring, clipped_projections(m, "n1"), "n1")
    block = decoder_block(heads, gated_mlp("n2", "mo"), norm=layer_norm, held=returned(wiring))
    return Stack(
        before(wiring, False, tables(dtype="fp32")), runs(m, lambda _: block), after(m, wiring, False, layer_norm)
    )


_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")


def olmo2(m: ModelSpec, wiring: Wiring, mixed: bool = False) -> Stack:
    """OLMo 2 and 3: the branches read the stream itself. OLMo 3's layers with a window have a table of their own."""

    def block(layer: Layer) -> Block:
        heads = _attention(m, wiring, normed_projections(m, "x"), "x", layer.sliding)
        made = normed_block(heads, gated_mlp("x1", "mo"), rms_norm, None, _AFTER, returned(wiring))
        return local(made) if layer.sliding else made

    two = any(layer.sliding for layer in m.layers)
    return Stack(before(wiring, mixed, tables(two, "fp32")), runs(m, block), after(m, wiring, mixed, rms_norm, two))


def exaone4(m: ModelSpec, wiring: Wiring) -> Stack:
    """OLMo 2's frame with Llama's norms, also over each head; layers without a window do not rotate."""
    mixed = any(layer.sliding for layer in m.layers)

    def block(layer: Layer) -> Block:
        turn = partial(norm_and_rope, norm=ops.rms_norm, rotary=layer.rotary)
        heads = llama_attention(m, wiring, "x", "ao", sliding=layer.sliding, turn=turn)
        return normed_block(heads, gated_mlp("x1", "mo"), ops.rms_norm, None, _AFTER, returned(wiring))

    return Stack(before(wiring, mixed, tables()), runs(m, block), after(m, wiring, mixed))


BUILDERS = {"exaone4": exaone4, "olmo": olmo, "olmo2": olmo2, "olmo3": partial(olmo2, mixed=True)}
