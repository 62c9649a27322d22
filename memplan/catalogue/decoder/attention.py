"""Attention as in Llama: projections, rotation, the kernel, the output projection."""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue.attention.attention import KEYS, QUERIES, attention, keys_and_values, mask_name
from memplan.catalogue.decoder.frame import Norm
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Op
from memplan.models.model import ModelSpec

Rotation = Callable[[ModelSpec, str, str, str], tuple[Op, ...]]  # model, name, and the names of q and k
Attend = Callable[..., tuple[Op, ...]]  # with the arguments of `attention`


def rope(m: ModelSpec, name: str, q: str, k: str) -> tuple[Op, ...]:
    """Rotate q and k over the full width of each head."""
    return (
        *ops.rotate(f"{name}.rope_q", q, "q", QUERIES, "b s a rot2"),
        *ops.rotate(f"{name}.rope_k", k, "k", KEYS, "b s k rot2"),
        ops.release_names(q, k),
    )


def project_heads(
    name: str,
    x: str,
    bias: bool = False,
    *,
    norm: Norm | None = None,
    gradient: str = "same",
    value: tuple[str, str] = ("v", "d"),
) -> tuple[Op, ...]:
    """Return q and k of x as heads, `q1` and `k1`, each normalised if there is a `norm`; and v.

    gradient  of the views as heads
    value     name of v, and the axis of the width of its heads
    """

    def heads(t: str, axis: str, shape: str) -> tuple[Op, ...]:
        projection = ops.linear(f"{name}.{t}_proj", x, f"{t}0", f"{axis} d", "h", "attention", bias)
        if norm is None:
            return (projection, ops.view(f"{name}.{t}_heads", f"{t}0", f"{t}1", shape, gradient))
        return (
            projection,
            ops.view(f"{name}.{t}_heads", f"{t}0", f"{t}h", shape, gradient),
            *norm(f"{name}.{t}_norm", f"{t}h", f"{t}1", shape, "d"),
            ops.release_names(f"{t}h"),
        )

    v, width = value
    return (
        *heads("q", "a", QUERIES),
        *heads("k", "k", KEYS),
        ops.linear(f"{name}.v_proj", x, v, f"k {width}", "h", "attention", bias),
    )


def llama_attention(  # noqa: PLR0913 (each is a way in which families differ)
    m: ModelSpec,
    wiring: Wiring,
    x: str,
    y: str,
    *,
    bias: bool | tuple[str, ...] = False,
    out_bias: bool = False,
    qk_norm: str = "",
    rotary: bool = True,
    sliding: bool = False,
    rotate: Rotation = rope,
    attend: Attend = attention,
    grouped: bool | None = None,
    norm: Norm = ops.rms_norm,
    name: str = "self_attn",
) -> tuple[Op, ...]:
    """Return projections, rotation, attention and output projection.

    bias     of q, k and v, or of those named
    qk_norm  a `norm` over `each` head, as in Qwen3, or over `all` heads, as in OLMoE
    sliding  the layer has a sliding window
    rotate   `rotate(m, name, q, k)` computes the rotated `q` and `k`
    attend   replaces `attention`, with the same arguments
    grouped  fewer key heads than query heads, if the layer's head counts differ from the model's

    Without rotation the gradients of q and k are views of the projections' gradients, unless the kernel returns them
    head by head.
    """
    group, biased = "attention", ("q", "k", "v") if bias is True else bias or ()
    grouped = m.num_key_value_heads != m.num_attention_heads if grouped is None else grouped
    each = qk_norm == "each"
    q1, k1 = ("q2", "k2") if each else ("q1", "k1")
    backend = wiring.masked if wiring.has_mask(sliding) else wiring.backend
    back_q = "new" if rotary or each or backend in ("eager", "math") else "same"
    back_k = "new" if back_q == "new" or (grouped and backend == "efficient") else "same"
    repeated, k, v, heads, grouped = keys_and_values(m, f"{name}.attention", wiring, sliding, grouped)
    rotated = (
        rotate(m, name, q1, k1)
        if rotary
        else (ops.view(f"{name}.q", q1, "q", QUERIES), ops.view(f"{name}.k", k1, "k", KEYS))
    )

    def projected(t: str, heads: str, width: str) -> tuple[Op, ...]:
        if qk_norm != "all":
            return (ops.linear(f"{name}.{t}_proj", x, f"{t}0", heads, "h", group, t in biased),)
        return (
            ops.linear(f"{name}.{t}_proj", x, f"{t}.raw", heads, "h", group, t in biased),
            *norm(f"{name}.{t}_norm", f"{t}.raw", f"{t}0", f"b s {width}", width),
            ops.release_names(f"{t}.raw"),
        )

    return (
        *projected("q", "a d", "ad"),
        ops.view(f"{name}.q_heads", "q0", "q1", QUERIES, back_q),
        *((*norm(f"{name}.q_norm", "q1", "q2", QUERIES, "d"), ops.release_names("q1")) if each else ()),
        *projected("k", "k d", "kd"),
        ops.view(f"{name}.k_heads", "k0", "k1", KEYS, back_k),
        *((*norm(f"{name}.k_norm", "k1", "k2", KEYS, "d"), ops.release_names("k1")) if each else ()),
        ops.linear(f"{name}.v_proj", x, "v", "k d", "h", group, "v" in biased),
        *rotated,
        *repeated,
        *attend(f"{name}.attention", "q", k, v, "o", heads, grouped, sliding, mask_name(sliding)),
        ops.linear(f"{name}.o_proj", "o", y, "h", "a d", group, out_bias),
        ops.release_names("q", "k", "v", "o", x),
    )
