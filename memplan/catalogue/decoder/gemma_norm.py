"""Gemma's RMSNorm, which computes in fp32 and scales by one plus the weight."""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.core.ir import Op, Tensor, Weight

_SOURCE = "transformers 5.24 models/gemma2/modeling_gemma2.py"


def rms_norm(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """Keeps the normalised x in fp32, which Llama casts first, and the fp32 factor `1 + weight`."""
    *normalise, _, _, _ = ops.rms_norm(name, x, y, shape, axis)
    n32, factor, y32 = f"{y}.n32", f"{y}.factor", f"{y}.y32"
    return (
        *normalise,
        Op(
            f"{name}.plus_one",
            (),
            (Tensor(factor, axis, "fp32"),),
            (Weight(f"{name}.weight", axis, "norm"),),
            scratch=(Tensor("weight", axis, "fp32"),),
            gradient="own",
            source=f"{_SOURCE} Gemma2RMSNorm",
        ),
        ops.spread(f"{name}.weight", n32, factor, y32, shape),
        ops.cast(f"{name}.type_as", y32, y, shape, f"={x}"),
    )
