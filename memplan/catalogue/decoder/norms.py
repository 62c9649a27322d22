"""Norms other than Llama's RMSNorm and torch's LayerNorm kernel."""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight

_GEMMA = "transformers 5.24 models/gemma2/modeling_gemma2.py"


def layer_norm(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """LayerNorm with a bias, as one kernel."""
    return (ops.layer_norm(name, x, y, shape, axis),)


def layer_norm_without_weight(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """OLMo's LayerNorm has no weight, runs in fp32, and keeps x in fp32."""
    x32, y32 = f"{y}.x32", f"{y}.y32"
    return (
        ops.cast(f"{name}.float", x, x32, shape, "fp32"),
        ops.layer_norm(name, x32, y32, shape, axis, affine=False),
        ops.cast(f"{name}.cast", y32, y, shape, f"={x}"),
    )


def rms_norm_in_fp32(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """OLMo 2's RMSNorm, which multiplies by the weight before it casts, and so keeps the normalised x in fp32.

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


def rms_norm_without_weight(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """RMSNorm in fp32 without a weight, as in Llama 4 and nanochat."""
    *normalise, _, _, _ = ops.rms_norm(name, x, y, shape, axis)
    return (*normalise, ops.cast(f"{name}.type_as", f"{y}.n32", y, shape, f"={x}"))


def rms_norm_of_cast_weight(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """Helium's RMSNorm: OLMo 2's, with the weight cast to fp32 first. The cast is kept, as in Cohere's LayerNorm."""
    *normalise, product, cast, release = rms_norm_in_fp32(name, x, y, shape, axis)
    w32, weight = f"{y}.w32", product.weights[0]
    return (
        *normalise,
        product,
        Op(f"{name}.float_weight", (), (Tensor(w32, axis, "fp32"),), (weight._replace(trains=False),), cast=True),
        cast._replace(reads=(*cast.reads, w32), keeps=(Keep(w32, cast.reads[0]),)),
        release,
    )


def gemma_norm(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """Gemma's RMSNorm, scaled by one plus the weight in fp32.

    Keeps the normalised x in fp32, which Llama casts first, and the fp32 factor `1 + weight`.
    """
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
            source=f"{_GEMMA} Gemma2RMSNorm",
        ),
        ops.spread(f"{name}.weight", n32, factor, y32, shape),
        ops.cast(f"{name}.type_as", y32, y, shape, f"={x}"),
    )


def layer_norm_in_fp32(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """Cohere's LayerNorm, computed in fp32 without a bias.

    Keeps three fp32 tensors: the centred x twice, for the variance and for the product, and the normalised x.

    The cast of the weight is listed after the product, so that the trainable weight comes first.
    """
    row = shape.rsplit(" ", 1)[0]
    x32, mean, centred, square, again, n32, y32 = (
        f"{y}.{part}" for part in ("x32", "mean", "centred", "square", "centred_again", "n32", "y32")
    )
    variance, shifted, rstd, w32 = (f"{y}.{part}" for part in ("variance", "shifted", "rstd", "w32"))
    w = Weight(f"{name}.weight", axis, "norm")
    *_, pow_, mean_of_square, eps, rsqrt, scale, _, _, _ = ops.rms_norm(name, x, y, shape, axis)
    return (
        ops.cast(f"{name}.float", x, x32, shape, "fp32"),
        mean_of_square._replace(reads=(x32,), writes=(Tensor(mean, row),)),
        _centre(f"{name}.centre", x32, mean, centred, shape),
        pow_._replace(reads=(centred,), writes=(Tensor(square, shape),), keeps=(Keep(centred, centred),)),
        mean_of_square._replace(name=f"{name}.variance", reads=(square,), writes=(Tensor(variance, row),)),
        ops.release_names(centred),
        _centre(f"{name}.centre_again", x32, mean, again, shape),
        eps._replace(reads=(variance,), writes=(Tensor(shifted, row),)),
        rsqrt._replace(reads=(shifted,), writes=(Tensor(rstd, row),), keeps=(Keep(rstd, shifted),)),
        scale._replace(reads=(again, rstd), writes=(Tensor(n32, shape),), keeps=(Keep(rstd, again), Keep(again, rstd))),
        ops.release_names(x32, again),
        ops.multiply_weight(f"{name}.weight", n32, y32, shape, w),
        Op(f"{name}.float_weight", (), (Tensor(w32, axis, "fp32"),), (w._replace(trains=False),), cast=True),
        ops.cast(f"{name}.cast", y32, y, shape, f"={x}")._replace(reads=(y32, w32), keeps=(Keep(w32, y32),)),
        ops.release_names(mean, variance, y32),
    )


def _centre(name: str, x: str, mean: str, y: str, shape: str) -> Op:
    """Subtract the mean. The gradient of the mean is the negated gradient, summed."""
    return Op(
        name,
        (x, mean),
        (Tensor(y, shape),),
        gradient="same",
        scratch_back=(Scratch(Tensor("negative gradient", shape, f"={y}"), mean),),
        source=f"{ops.DERIVATIVES}: sub.Tensor",
    )
