"""The loops of each optimizer's step, in `memplan.catalogue.optimizers.step_language`.

Sizes of storages come first, then the loops.
"""

from __future__ import annotations

from math import prod

from memplan.catalogue.optimizers.parameter_rules import bytes_of
from memplan.catalogue.optimizers.step_language import (
    Action,
    Loop,
    Turn,
    free,
    hold,
    keep,
    later,
    lose,
    new,
    projecting,
    rename,
)
from memplan.core.units import rounded

# Sizes of the parameter's shape


def own(t: Turn) -> int:
    """In the parameter's dtype."""
    return bytes_of(t.shape, t.dtype)


def moment(t: Turn) -> int:
    """In the dtype of moments."""
    return bytes_of(t.shape, t.moment)


def fp32(t: Turn) -> int:
    """In fp32."""
    return bytes_of(t.shape, "fp32")


def bf16(t: Turn) -> int:
    """In bf16."""
    return bytes_of(t.shape, "bf16")


def int64(t: Turn) -> int:
    """In int64."""
    return bytes_of(t.shape, "int64")


def upcast(t: Turn) -> int:
    """Bytes of `.float()`, which does not copy an fp32 tensor."""
    return 0 if t.dtype == "fp32" else fp32(t)


# Sizes of a projected matrix


def low(t: Turn) -> int:
    """In the parameter's dtype."""
    return bytes_of(t.low, t.dtype)


def low_moment(t: Turn) -> int:
    """In the dtype of moments."""
    return bytes_of(t.low, t.moment)


def low_fp32(t: Turn) -> int:
    """In fp32."""
    return bytes_of(t.low, "fp32")


def low_rows(t: Turn) -> int:
    """One fp32 number per row; 0 for a vector."""
    return bytes_of(t.low[:-1], "fp32") if len(t.low) > 1 else 0


def low_columns(t: Turn) -> int:
    """One fp32 number per column; 0 for a vector."""
    return bytes_of((*t.low[:-2], t.low[-1]), "fp32") if len(t.low) > 1 else 0


def norm_if_small(t: Turn) -> int:
    """Bytes of the norm that bitsandbytes takes of parameters with 32-bit states, including the copy of `.float()`."""
    if prod(t.low) >= 4096:
        return 0
    return (0 if t.dtype == "fp32" else low_fp32(t)) + 512


# Sizes of a projection and its inputs


def svd_u(t: Turn) -> int:
    """Left singular vectors, one per element of the narrow side."""
    return bytes_of((t.shape[0], min(t.shape)), "fp32")


def svd_s(t: Turn) -> int:
    """Singular values."""
    return bytes_of((min(t.shape),), "fp32")


def svd_vh(t: Turn) -> int:
    """Right singular vectors, one per element of the narrow side."""
    return bytes_of((min(t.shape), t.shape[1]), "fp32")


def rank_squared(t: Turn) -> int:
    """A rank by rank matrix in fp32."""
    return bytes_of((t.rank, t.rank), "fp32")


def projection_fp32(t: Turn) -> int:
    """The projection before it is cast to the parameter's dtype."""
    return bytes_of((t.rank, min(t.shape)), "fp32")


def projection_cast(t: Turn) -> int:
    """The projection in the parameter's dtype; 0 if that is fp32, which needs no copy."""
    return 0 if t.dtype == "fp32" else bytes_of((t.rank, min(t.shape)), t.dtype)


# Other sizes


def scales(t: Turn) -> int:
    """One fp32 number per 256 elements."""
    return rounded(4 * (prod(t.shape) // 256))


def gram(t: Turn) -> int:
    """The product of a matrix and its transpose, over the long side, in bf16."""
    return bytes_of((min(t.shape), min(t.shape)), "bf16")


def long_vector(t: Turn) -> int:
    """One number per vector along the narrow side."""
    return bytes_of((max(t.shape),), t.dtype)


def number(t: Turn) -> int:
    """A tensor with one number: the allocator's smallest block."""
    return 512


# Loops of torch and torchao

ADAMW: Loop = (
    new("root", moment),
    new("denom", moment),
    free("root"),
)
ROOT: Loop = (new("root", moment),)
ANYPRECISION: Loop = (keep("states"), *ADAMW)

# Newton-Schulz in bf16. torch 2.13 optim/_muon.py.
MUON: Loop = (
    new("update", own),
    new("orthogonal", bf16),
    new("gram", gram),
    new("gram_update", gram),
    new("next", bf16),
    free("update", "orthogonal", "gram", "gram_update", "next"),
)

# torchao's single_param_adam as Inductor compiles it: both new moments exist before they are quantised.
TORCHAO_8BIT: Loop = (
    new("exp_avg", fp32),
    new("exp_avg_sq", fp32),
    new("scale", scales),
    new("scale_sq", scales),
    free("exp_avg", "exp_avg_sq", "scale", "scale_sq"),
)
TORCHAO_4BIT: Loop = (
    new("codes", int64),
    new("codes_sq", int64),
    *TORCHAO_8BIT,
    free("codes", "codes_sq"),
)

# States live on the host: each is copied to the GPU for its parameter's turn, and back.
GROKADAMW: Loop = (
    new("new_exp_avg", moment),
    new("new_exp_avg_sq", moment),
    rename("new_exp_avg", to="exp_avg"),
    rename("new_exp_avg_sq", to="exp_avg_sq"),
    new("grok_ema", moment),
    new("product", own),
    new("grok_grad", own),
    free("product"),
    new("root", moment),
    free("root"),
)

# Loops that run in backward: a parameter is updated with its gradient when the next parameter's gradient comes.

LOMO: Loop = (
    new("gradient", own),
    new("gradient_fp32", upcast),
    free("gradient"),
    new("parameter", upcast),
    free("gradient_fp32", "parameter"),
)
ADALOMO: Loop = (
    new("gradient", fp32),
    new("square", fp32),
    new("update", fp32),
    free("square"),
    new("row_factor", low_rows),
    new("column_factor", low_columns),
    new("update", fp32),
    free("row_factor", "column_factor"),
    new("parameter", upcast),
    free("gradient", "update", "parameter"),
)

# GaLore projects with a slice of the gradient's singular vectors. cuSOLVER overwrites its input, so torch gives it a
# copy; cuSOLVER's workspace is left out. torch 2.13 aten/.../linalg/BatchLinearAlgebraLib.cpp.

_SVD: tuple[Action, ...] = (
    new("u", svd_u),
    new("s", svd_s),
    new("vh", svd_vh),
    new("overwritten", fp32),
    free("overwritten"),
    new("diagonal", rank_squared),
    new("product", low_fp32),
    free("diagonal"),
)
_GALORE_PROJECTION: Loop = (
    projecting(
        new("matrix", upcast),
        *_SVD,
        new("projection", projection_cast),
        free("matrix", "u", "s", "vh", "product", "projection"),
    ),
    keep("projection"),
)
_SCALED_BACK: Loop = (new("full", own), new("scaled", own))

# Parameters that are not targets, in GaLore and APOLLO.
GALORE_OTHERS: Loop = (
    free("gradient"),
    keep("states"),
    new("denom", moment),
    new("update", moment),
)
GALORE_ADAMW: Loop = (
    free("gradient"),
    *_GALORE_PROJECTION,
    new("gradient", low),
    keep("states"),
    new("denom", low_moment),
    new("update", low_moment),
    *_SCALED_BACK,
    free("full"),
    rename("scaled", to="update"),
)
GALORE_8BIT_OTHERS: Loop = (
    keep("states"),
    new("norm", norm_if_small),
    free("norm"),
)
# The parameter's data is set aside, and the projected gradient replaces the gradient until zero_grad.
GALORE_8BIT: Loop = (
    *_GALORE_PROJECTION,
    new("gradient", low),
    new("saved", own),
    new("data", low),
    free("saved", "gradient"),
    hold(low),
    lose(own),
    keep("states"),
    new("norm", norm_if_small),
    free("norm"),
    *_SCALED_BACK,
    free("full", "scaled", "data"),
)

# transformers' Adafactor, and GaLore's copy of it. `update` and the fp32 parameter live on into the next turn.

_FACTORED_UPDATE: Loop = (
    keep("states"),
    free("parameter"),
    new("parameter", upcast),
    new("square", low_fp32),
    new("update", low_fp32),
    free("square"),
    new("row_factor", low_rows),
    new("column_factor", low_columns),
    new("update", low_fp32),
    free("row_factor", "column_factor"),
)
ADAFACTOR: Loop = (
    free("gradient"),
    new("gradient", upcast),
    *_FACTORED_UPDATE,
)
GALORE_ADAFACTOR: Loop = (
    free("gradient"),
    new("gradient", upcast),
    projecting(*_SVD, free("u", "s", "vh", "product")),
    keep("projection"),
    new("gradient", low_fp32),
    *_FACTORED_UPDATE,
    new("full", fp32),
    new("scaled", fp32),
    free("full"),
    rename("scaled", to="update"),
)

# The fp32 copy of the gradient is made only to read its shape. The norm's growth is limited from the second step on.
APOLLO: Loop = (
    free("gradient"),
    projecting(
        new("matrix", upcast),
        new("random", projection_fp32),
        new("scaled_random", projection_fp32),
        free("random"),
        new("projection", projection_cast),
        free("matrix", "scaled_random", "projection"),
    ),
    keep("projection"),
    new("gradient", low),
    keep("states"),
    new("denom", low_moment),
    new("update", low_moment),
    new("norm", long_vector),
    new("norm_of_gradient", long_vector),
    new("norm_plus_eps", long_vector),
    rename("norm", to="factor"),
    free("norm_of_gradient", "norm_plus_eps"),
    new("scaled", own),
    keep("scaled_grad"),
    later(
        new("scaled_norm", number),
        new("limiter", number),
        new("limited", own),
        rename("limited", to="scaled"),
    ),
    free("update"),
)
