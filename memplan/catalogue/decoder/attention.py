"""Attention as in Llama: projections, rotation, the kernel, the output projection."""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue.attention.attention import attention, mask_name, one_head, repeats_by_view
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Op
from memplan.models.model import ModelSpec

QUERIES, KEYS = "b s a d", "b s k d"


def rope(name: str, q: str, k: str) -> tuple[Op, ...]:
    """Rotate q and k over the full width of each head."""
    return (
        *ops.rotate(f"{name}.rope_q", q, "q", QUERIES, "b s a rot2"),
        *ops.rotate(f"{name}.rope_k", k, "k", KEYS, "b s k rot2"),
        ops.release_names(q, k),
    )


def llama_attention(  # noqa: PLR0913 (each is a way in which families differ)
    m: ModelSpec,
    wiring: Wiring,
    x: str,
    y: str,
    *,
    bias: bool = False,
    out_bias: bool = False,
    qk_norm: bool = False,
    whole_norm: bool = False,
    rotary: bool = True,
    sliding: bool = False,
    turn: Callable[[str, str, str], tuple[Op, ...]] = rope,
    attend: Callable[..., tuple[Op, ...]] = attention,
    grouped: bool | None = None,
    name: str = "self_attn",
) -> tuple[Op, ...]:
    """Return projections, rotation, attention and output projection.

    qk_norm     an RMSNorm over each head, as in Qwen3
    whole_norm  an RMSNorm over all heads, as in OLMoE
    sliding     the layer has a sliding window
    turn        `turn(name, q, k)` computes the rotated `q` and `k`
    attend      replaces `attention`, with the same arguments
    grouped     fewer key heads than query heads, if the layer's head counts differ from the model's

    Without rotation the gradients of q and k are views of the projections' gradients, unless the kernel returns them
    head by head.
    """
    group = "attention"
    grouped = m.num_key_value_heads != m.num_attention_heads if grouped is None else grouped
    q1, k1 = ("q2", "k2") if qk_norm else ("q1", "k1")
    backend = wiring.masked if wiring.has_mask(sliding) else wiring.backend
    back_q = "new" if rotary or qk_norm or backend in ("eager", "math") else "same"
    back_k = "new" if back_q == "new" or (grouped and backend == "efficient") else "same"
    k, v, repeated, heads = "k", "v", (), wiring
    if grouped and m.num_key_value_heads == 1 and repeats_by_view(wiring, sliding):
        k, v, grouped = "k.all", "v.all", False
        repeated, heads = one_head(f"{name}.attention", wiring, sliding), wiring._replace(caching=False)
    turned = (
        turn(name, q1, k1)
        if rotary
        else (ops.view(f"{name}.q", q1, "q", QUERIES), ops.view(f"{name}.k", k1, "k", KEYS))
    )

    def projected(t: str, heads: str, width: str) -> tuple[Op, ...]:
        if not whole_norm:
            return (ops.linear(f"{name}.{t}_proj", x, f"{t}0", heads, "h", group, bias),)
        return (
            ops.linear(f"{name}.{t}_proj", x, f"{t}.raw", heads, "h", group, bias),
            *ops.rms_norm(f"{name}.{t}_norm", f"{t}.raw", f"{t}0", f"b s {width}", width),
            ops.release_names(f"{t}.raw"),
        )

    return (
        *projected("q", "a d", "ad"),
        ops.view(f"{name}.q_heads", "q0", "q1", QUERIES, back_q),
        *((*ops.rms_norm(f"{name}.q_norm", "q1", "q2", QUERIES, "d"), ops.release_names("q1")) if qk_norm else ()),
        *projected("k", "k d", "kd"),
        ops.view(f"{name}.k_heads", "k0", "k1", KEYS, back_k),
        *((*ops.rms_norm(f"{name}.k_norm", "k1", "k2", KEYS, "d"), ops.release_names("k1")) if qk_norm else ()),
        ops.linear(f"{name}.v_proj", x, "v", "k d", "h", group, bias),
        *turned,
        *repeated,
        *attend(f"{name}.attention", "q", k, v, "o", heads, grouped, sliding, mask_name(sliding)),
        ops.linear(f"{name}.o_proj", "o", y, "h", "a d", group, out_bias),
        ops.release_names("q", "k", "v", "o", x),
    )
