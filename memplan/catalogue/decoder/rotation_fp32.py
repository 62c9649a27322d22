"""Rotary embeddings that are applied in fp32, as Ernie 4.5 and Cohere 2 do."""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.core.ir import Keep, Op, Tensor

_SOURCE = "transformers 5.24 models/ernie4_5/modeling_ernie4_5.py apply_rotary_pos_emb"


def rope_in_fp32(name: str, q: str, k: str) -> tuple[Op, ...]:
    """cos and sin are spread over the pairs anew in every layer, which keeps them; q and k are rotated in fp32."""
    return (
        ops.copy(f"{name}.pairs_of_cos", "cos", "cos.pairs", "s rot"),
        ops.copy(f"{name}.pairs_of_sin", "sin", "sin.pairs", "s rot"),
        *_rotate_in_fp32(f"{name}.rope_q", q, "q.rotated", "a"),
        *_rotate_in_fp32(f"{name}.rope_k", k, "k.rotated", "k"),
        ops.cast(f"{name}.cast_q", "q.rotated", "q", "b s a d", f"={q}"),
        ops.cast(f"{name}.cast_k", "k.rotated", "k", "b s k d", f"={k}"),
        ops.leave("q.rotated", "k.rotated", "cos.pairs", "sin.pairs"),
        ops.leave(q, k),
    )


def _rotate_in_fp32(name: str, x: str, y: str, heads: str) -> tuple[Op, ...]:
    shape, half = f"b s {heads} d", f"b s {heads} rot2"
    wide, cosine, turned, turned_wide, sine = (f"{y}.{t}" for t in ("wide", "cosine", "turned", "turned32", "sine"))
    return (
        ops.cast(f"{name}.float", x, wide, shape, "fp32"),
        Op(
            f"{name}.cos", (wide, "cos.pairs"), (Tensor(cosine, shape),), (), (Keep("cos.pairs", wide),), source=_SOURCE
        ),
        ops.rotate_half(f"{name}.rotate_half", x, turned, shape, half),
        ops.cast(f"{name}.float_turned", turned, turned_wide, shape, "fp32"),
        Op(
            f"{name}.sin",
            (turned_wide, "sin.pairs"),
            (Tensor(sine, shape),),
            (),
            (Keep("sin.pairs", turned_wide),),
            source=_SOURCE,
        ),
        ops.add(f"{name}.add", cosine, sine, y, shape),
    )
