"""The loops of each optimizer's step, in `memplan.catalogue.optimizers.step_language`.

Sizes of storages come first, then the loops.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from memplan.catalogue.optimizers.parameter_rules import bytes_of
from memplan.catalogue.optimizers.step_language import (
    Action,
    CreateState,
    Loop,
    New,
    Rename,
    Size,
    Turn,
    free,
    hold,
    later,
    lose,
    projecting,
)
from memplan.core.units import rounded


def _size(shape: Callable[[Turn], tuple[int, ...]], dtype: str) -> Size:
    """Return the size of a tensor of that shape, in `own` (the parameter's dtype), `moment` or a named dtype."""

    def bytes_in_turn(t: Turn) -> int:
        return bytes_of(shape(t), {"own": t.dtype, "moment": t.moment}.get(dtype, dtype))

    return bytes_in_turn


def _unless_fp32(size: Size) -> Size:
    """Return the size of a cast, which does not copy if the parameter is in fp32."""
    return lambda t: 0 if t.dtype == "fp32" else size(t)


# Sizes of the parameter's shape, and of the projected one

own, moment, fp32, bf16, int64 = (
    _size(lambda t: t.shape, dtype) for dtype in ("own", "moment", "fp32", "bf16", "int64")
)
upcast = _unless_fp32(fp32)  # `.float()`
low, low_moment, low_fp32 = (_size(lambda t: t.low, dtype) for dtype in ("own", "moment", "fp32"))


def low_rows(t: Turn) -> int:
    """One fp32 number per row of the projected matrix; 0 for a vector."""
    return bytes_of(t.low[:-1], "fp32") if len(t.low) > 1 else 0


def low_columns(t: Turn) -> int:
    """One fp32 number per column of the projected matrix; 0 for a vector."""
    return bytes_of((*t.low[:-2], t.low[-1]), "fp32") if len(t.low) > 1 else 0


def norm_if_small(t: Turn) -> int:
    """Bytes of the norm that bitsandbytes takes of parameters with 32-bit states, including the copy of `.float()`."""
    return 0 if prod(t.low) >= 4096 else _unless_fp32(low_fp32)(t) + 512


# Sizes of a projection, and of its singular value decomposition: a vector per element of the narrow side

svd_u = _size(lambda t: (t.shape[0], min(t.shape)), "fp32")
svd_s = _size(lambda t: (min(t.shape),), "fp32")
svd_vh = _size(lambda t: (min(t.shape), t.shape[1]), "fp32")
rank_squared = _size(lambda t: (t.rank, t.rank), "fp32")
projection_fp32 = _size(lambda t: (t.rank, min(t.shape)), "fp32")
projection_cast = _unless_fp32(_size(lambda t: (t.rank, min(t.shape)), "own"))

# Other sizes

gram = _size(
    lambda t: (min(t.shape), min(t.shape)), "bf16"
)  # product of a matrix and its transpose, over the long side
long_vector = _size(lambda t: (max(t.shape),), "own")  # a number per vector along the narrow side
number = _size(lambda t: (), "fp32")  # the allocator's smallest block


def scales(t: Turn) -> int:
    """One fp32 number per 256 elements."""
    return rounded(4 * (prod(t.shape) // 256))


# Loops of torch and torchao

ADAMW: Loop = (
    New("root", moment),
    New("denom", moment),
    free("root"),
)
ROOT: Loop = (New("root", moment),)
ANYPRECISION: Loop = (CreateState("states"), *ADAMW)

# Newton-Schulz in bf16. torch 2.13 optim/_muon.py.
MUON: Loop = (
    New("update", own),
    New("orthogonal", bf16),
    New("gram", gram),
    New("gram_update", gram),
    New("next", bf16),
    free("update", "orthogonal", "gram", "gram_update", "next"),
)

# torchao's single_param_adam as Inductor compiles it: both new moments exist before they are quantised.
TORCHAO_8BIT: Loop = (
    New("exp_avg", fp32),
    New("exp_avg_sq", fp32),
    New("scale", scales),
    New("scale_sq", scales),
    free("exp_avg", "exp_avg_sq", "scale", "scale_sq"),
)
TORCHAO_4BIT: Loop = (
    New("codes", int64),
    New("codes_sq", int64),
    *TORCHAO_8BIT,
    free("codes", "codes_sq"),
)

# States live on the host: each is copied to the GPU for its parameter's turn, and back.
GROKADAMW: Loop = (
    New("new_exp_avg", moment),
    New("new_exp_avg_sq", moment),
    Rename("new_exp_avg", to="exp_avg"),
    Rename("new_exp_avg_sq", to="exp_avg_sq"),
    New("grok_ema", moment),
    New("product", own),
    New("grok_grad", own),
    free("product"),
    New("root", moment),
    free("root"),
)

# Loops that run in backward: a parameter is updated with its gradient when the next parameter's gradient comes.

LOMO: Loop = (
    New("gradient", own),
    New("gradient_fp32", upcast),
    free("gradient"),
    New("parameter", upcast),
    free("gradient_fp32", "parameter"),
)
ADALOMO: Loop = (
    New("gradient", fp32),
    New("square", fp32),
    New("update", fp32),
    free("square"),
    New("row_factor", low_rows),
    New("column_factor", low_columns),
    New("update", fp32),
    free("row_factor", "column_factor"),
    New("parameter", upcast),
    free("gradient", "update", "parameter"),
)

# GaLore projects with a slice of the gradient's singular vectors. cuSOLVER overwrites its input, so torch gives it a
# copy; cuSOLVER's workspace is left out. torch 2.13 aten/.../linalg/BatchLinearAlgebraLib.cpp.

_SVD: tuple[Action, ...] = (
    New("u", svd_u),
    New("s", svd_s),
    New("vh", svd_vh),
    New("overwritten", fp32),
    free("overwritten"),
    New("diagonal", rank_squared),
    New("product", low_fp32),
    free("diagonal"),
)
_GALORE_PROJECTION: Loop = (
    projecting(
        New("matrix", upcast),
        *_SVD,
        New("projection", projection_cast),
        free("matrix", "u", "s", "vh", "product", "projection"),
    ),
    CreateState("projection"),
)
_SCALED_BACK: Loop = (New("full", own), New("scaled", own))

# Parameters that are not targets, in GaLore and APOLLO.
GALORE_OTHERS: Loop = (
    free("gradient"),
    CreateState("states"),
    New("denom", moment),
    New("update", moment),
)
GALORE_ADAMW: Loop = (
    free("gradient"),
    *_GALORE_PROJECTION,
    New("gradient", low),
    CreateState("states"),
    New("denom", low_moment),
    New("update", low_moment),
    *_SCALED_BACK,
    free("full"),
    Rename("scaled", to="update"),
)
GALORE_8BIT_OTHERS: Loop = (
    CreateState("states"),
    New("norm", norm_if_small),
    free("norm"),
)
# The parameter's data is set aside, and the projected gradient replaces the gradient until zero_grad.
GALORE_8BIT: Loop = (
    *_GALORE_PROJECTION,
    New("gradient", low),
    New("saved", own),
    New("data", low),
    free("saved", "gradient"),
    hold(low),
    lose(own),
    CreateState("states"),
    New("norm", norm_if_small),
    free("norm"),
    *_SCALED_BACK,
    free("full", "scaled", "data"),
)

# transformers' Adafactor, and GaLore's copy of it. `update` and the fp32 parameter live on into the next turn.

_FACTORED_UPDATE: Loop = (
    CreateState("states"),
    free("parameter"),
    New("parameter", upcast),
    New("square", low_fp32),
    New("update", low_fp32),
    free("square"),
    New("row_factor", low_rows),
    New("column_factor", low_columns),
    New("update", low_fp32),
    free("row_factor", "column_factor"),
)
ADAFACTOR: Loop = (
    free("gradient"),
    New("gradient", upcast),
    *_FACTORED_UPDATE,
)
GALORE_ADAFACTOR: Loop = (
    free("gradient"),
    New("gradient", upcast),
    projecting(*_SVD, free("u", "s", "vh", "product")),
    CreateState("projection"),
    New("gradient", low_fp32),
    *_FACTORED_UPDATE,
    New("full", fp32),
    New("scaled", fp32),
    free("full"),
    Rename("scaled", to="update"),
)

# The fp32 copy of the gradient is made only to read its shape. The norm's growth is limited from the second step on.
APOLLO: Loop = (
    free("gradient"),
    projecting(
        New("matrix", upcast),
        New("random", projection_fp32),
        New("scaled_random", projection_fp32),
        free("random"),
        New("projection", projection_cast),
        free("matrix", "scaled_random", "projection"),
    ),
    CreateState("projection"),
    New("gradient", low),
    CreateState("states"),
    New("denom", low_moment),
    New("update", low_moment),
    New("norm", long_vector),
    New("norm_of_gradient", long_vector),
    New("norm_plus_eps", long_vector),
    Rename("norm", to="factor"),
    free("norm_of_gradient", "norm_plus_eps"),
    New("scaled", own),
    CreateState("scaled_grad"),
    later(
        New("scaled_norm", number),
        New("limiter", number),
        New("limited", own),
        Rename("limited", to="scaled"),
    ),
    free("update"),
)
