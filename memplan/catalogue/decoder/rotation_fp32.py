"""Rotary embeddings applied in fp32, as in Ernie 4.5 and Cohere 2."""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.core.ir import Keep, Op, Tensor

_SOURCE = "transformers 5.24 models/ernie4_5/modeling_ernie4_5.py apply_rotary_pos_emb"


def rope_in_fp32(name: str, q: str, k: str) -> tuple[Op, ...]:
    """Rotate q and k in fp32. Every layer expands cos and sin to pairs again and keeps the result."""
    return (
        ops.copy(f"{name}.pairs_of_cos", "cos", "cos.pairs", "s rot"),
        ops.copy(f"{name}.pairs_of_sin", "sin", "sin.pairs", "s rot"),
        *_rotate_in_fp32(f"{name}.rope_q", q, "q.rotated", "a"),
        *_rotate_in_fp32(f"{name}.rope_k", k, "k.rotated", "k"),
        ops.cast(f"{name}.cast_q", "q.rotated", "q", "b s a d", f"={q}"),
        ops.cast(f"{name}.cast_k", "k.rotated", "k", "b s k d", f"={k}"),
        ops.release_names("q.rotated", "k.rotated", "cos.pairs", "sin.pairs"),
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
