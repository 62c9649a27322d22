"""Rotary embeddings applied in fp32, as in Ernie 4.5 and Cohere."""

from __future__ import annotations

from memplan.catalogue.attention.attention import KEYS, QUERIES
from memplan.catalogue.decoder.norms import layer_norm_in_fp32
from memplan.catalogue.kernels import ops
from memplan.core.ir import Keep, Op, Tensor
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 models/ernie4_5/modeling_ernie4_5.py apply_rotary_pos_emb"


def rope_in_fp32(m: ModelSpec, name: str, q: str, k: str) -> tuple[Op, ...]:
    """Rotate q and k in fp32. Every layer expands cos and sin to pairs again and keeps the result."""
    return (
        ops.copy(f"{name}.pairs_of_cos", "cos", "cos.pairs", "s rot"),
        ops.copy(f"{name}.pairs_of_sin", "sin", "sin.pairs", "s rot"),
        *_rotate_in_fp32(f"{name}.rope_q", q, "q.rotated", "a"),
        *_rotate_in_fp32(f"{name}.rope_k", k, "k.rotated", "k"),
        ops.cast(f"{name}.cast_q", "q.rotated", "q", QUERIES, f"={q}"),
        ops.cast(f"{name}.cast_k", "k.rotated", "k", KEYS, f"={k}"),
        ops.release_names("q.rotated", "k.rotated", "cos.pairs", "sin.pairs"),
        ops.release_names(q, k),
    )


def rope_in_table_dtype(m: ModelSpec, name: str, q: str, k: str) -> tuple[Op, ...]:
    """Rotate q and k, as in OLMo. The rotary table is fp32, and so are its products, which are cast back."""
    return (
        *ops.rotate(f"{name}.rope_q", q, "q.rotated", QUERIES, "b s a rot2"),
        *ops.rotate(f"{name}.rope_k", k, "k.rotated", KEYS, "b s k rot2"),
        ops.cast(f"{name}.cast_q", "q.rotated", "q", QUERIES, f"={q}"),
        ops.cast(f"{name}.cast_k", "k.rotated", "k", KEYS, f"={k}"),
        ops.release_names("q.rotated", "k.rotated"),
        ops.release_names(q, k),
    )


def _rotate_in_fp32(name: str, x: str, y: str, heads: str) -> tuple[Op, ...]:
    shape, half = f"b s {heads} d", f"b s {heads} rot2"
    x32, cosine, turned, turned32, sine = (f"{y}.{t}" for t in ("wide", "cosine", "turned", "turned32", "sine"))
    return (
        ops.cast(f"{name}.float", x, x32, shape, "fp32"),
        Op(f"{name}.cos", (x32, "cos.pairs"), (Tensor(cosine, shape),), (), (Keep("cos.pairs", x32),), source=_SOURCE),
        ops.rotate_half(f"{name}.rotate_half", x, turned, shape, half),
        ops.cast(f"{name}.float_turned", turned, turned32, shape, "fp32"),
        Op(
            f"{name}.sin",
            (turned32, "sin.pairs"),
            (Tensor(sine, shape),),
            (),
            (Keep("sin.pairs", turned32),),
            source=_SOURCE,
        ),
        ops.add(f"{name}.add", cosine, sine, y, shape),
    )


def rope_of_casts(m: ModelSpec, name: str, q: str, k: str) -> tuple[Op, ...]:
    """Cast q and k to fp32, rotate them pair by pair, and cast them back, as in Cohere."""
    return (
        ops.cast(f"{name}.float_q", q, "q.wide", QUERIES, "fp32"),
        ops.cast(f"{name}.float_k", k, "k.wide", KEYS, "fp32"),
        *ops.rotate(f"{name}.rope_q", "q.wide", "q.rotated", QUERIES, "b s a rot2"),
        *ops.rotate(f"{name}.rope_k", "k.wide", "k.rotated", KEYS, "b s k rot2"),
        ops.cast(f"{name}.cast_q", "q.rotated", "q", QUERIES, f"={q}"),
        ops.cast(f"{name}.cast_k", "k.rotated", "k", KEYS, f"={k}"),
        ops.release_names("q.wide", "k.wide", "q.rotated", "k.rotated"),
        ops.release_names(q, k),
    )


def norm_and_rope_of_casts(m: ModelSpec, name: str, q: str, k: str) -> tuple[Op, ...]:
    """Normalise q and k with a separate weight for each head, if the config's `use_qk_norm` is set; then rotate."""
    if not m.get("use_qk_norm", False):
        return rope_of_casts(m, name, q, k)
    return (
        *layer_norm_in_fp32(f"{name}.q_norm", q, "q.normed", QUERIES, "a d"),
        ops.release_names(q),
        *layer_norm_in_fp32(f"{name}.k_norm", k, "k.normed", KEYS, "k d"),
        ops.release_names(k),
        *rope_of_casts(m, name, "q.normed", "k.normed"),
    )
