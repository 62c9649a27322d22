"""Positions, and the cosines and sines of rotary embeddings."""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.core.ir import Op, Tensor, Weight


def rotary_table(x: str, dtype: str = "") -> tuple[Op, ...]:
    """Return cos and sin of every position, computed in fp32 and cast to the dtype of `x` or to `dtype`."""
    f, source = "fp32", "transformers 5.24 models/llama/modeling_llama.py LlamaRotaryEmbedding"
    return (
        rotary_angles(source),
        Op("rotary.cat", ("angles",), (Tensor("both", "s rot", f),)),
        Op("rotary.cos", ("both",), (Tensor("cos32", "s rot", f),), scratch=(Tensor("cosine", "s rot", f),)),
        Op("rotary.sin", ("both",), (Tensor("sin32", "s rot", f),), scratch=(Tensor("sine", "s rot", f),)),
        Op("rotary.cast_cos", ("cos32",), (Tensor("cos", "s rot", dtype or f"={x}"),), cast=True, source=source),
        Op("rotary.cast_sin", ("sin32",), (Tensor("sin", "s rot", dtype or f"={x}"),), cast=True, source=source),
        ops.release_names("angles", "both", "cos32", "sin32"),
    )


def rotary_angles(source: str, counted: str = "s") -> Op:
    """Return the angle of each of the `counted` positions and each pair of a head's dimensions, in fp32."""
    buffers = tuple(
        Weight(f"model.rotary_emb.{n}", "rot2", "buffer", "fp32", False) for n in ("inv_freq", "original_inv_freq")
    )
    angles, scratch = (Tensor("angles", f"{counted} rot2", "fp32"),), (Tensor("positions", counted, "fp32"),)
    return Op("rotary.angles", ("positions",), angles, buffers, scratch=scratch, source=source)


def given_positions() -> Op:
    """Return the positions that a packed batch comes with."""
    return Op("positions", ("position_ids",), (Tensor("positions", "b s", "int64"),), gradient="none", view=True)


def positions() -> Op:
    return Op("positions", (), (Tensor("positions", "s", "int64"),), scratch=(Tensor("arange", "s", "int64"),))
