"""One token's step of layers that keep a state: a convolution over the last tokens, and a recurrence.

Both states are written in place. What is as large as a state is made anew for every layer, one layer after the other.
Source: transformers 5.24, the functions in torch that its modules take without kernels from other packages.
"""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Op, Tensor, Weight

_MAMBA = "transformers 5.24 models/mamba/modeling_mamba.py mamba_selective_state_update"
_MAMBA2 = "transformers 5.24 models/mamba2/modeling_mamba2.py mamba2_selective_state_update"
_DELTA = "transformers 5.24 models/qwen3_next/modeling_qwen3_next.py torch_recurrent_gated_delta_rule"
_KDA = "transformers 5.24 models/kimi_linear/modeling_kimi_linear.py recurrent_kimi_delta_attention"
_CONV = "transformers 5.24 models/mamba2/modeling_mamba2.py causal_conv1d_update"


def kept(wiring: Wiring, name: str, state: str, shape: str, dtype: str, like: str) -> tuple[Op, ...]:
    """The place where a state is made for the tokens to come, or found; `like` is a tensor of the dtype's."""
    return (Op(name, (like,), (Tensor(state, shape, dtype),), caches="state"),) if wiring.caching else ()


def convolved(name: str, x: str, y: str, axis: str, weights: tuple[Weight, ...]) -> tuple[Op, ...]:
    """The last tokens and the new one side by side, and one row of the two that their convolution makes."""
    return (
        Op(f"{name}.join", ("conv.state", x), (Tensor(f"{y}.joined", f"b {axis} kernel1", f"={x}"),), source=_CONV),
        Op(name, (f"{y}.joined",), (Tensor(f"{y}.conv", f"b {axis} 2", f"={x}"),), weights, source=_CONV),
        ops.activation(f"{name}.act", f"{y}.conv", y, f"b {axis} s"),
        ops.leave(f"{y}.joined"),
    )


def _widened(name: str, x: str, y: str, shape: str, dtype: str) -> Op:
    """A product of `x` with what it is spread over: as large as a state."""
    return Op(name, (x,), (Tensor(y, shape, dtype),))


def selective_state_update(name: str, y: str) -> tuple[Op, ...]:
    """Mamba's: `mixed.real`, `gate.z`, `dt.plus`, `rate`, `B.scan` and `C.scan` to the gated output."""
    of, shape, row = name, "b inner mn", "b inner"
    w = Weight(f"{of}.D", "inner", "mixer")
    return (
        _widened(f"{of}.A_dt", "dt.plus", "A.dt", shape, "fp32")._replace(reads=("dt.plus", "rate"), source=_MAMBA),
        _widened(f"{of}.discrete_A", "A.dt", "discrete.A", shape, "fp32"),
        _widened(f"{of}.discrete_B", "B.scan", "discrete.B", shape, "fp32"),
        _widened(f"{of}.delta_B_u", "discrete.B", "delta.B.u", shape, "fp32"),
        Op(f"{of}.decay", ("state", "discrete.A"), (Tensor("decayed", shape, "fp32"),), source=_MAMBA),
        Op(f"{of}.update", ("decayed", "delta.B.u"), (Tensor("state.now", shape, "fp32"),), source=_MAMBA),
        ops.cast(f"{of}.low", "state.now", "state.low", shape, "=mixed.real"),
        Op(f"{of}.read", ("state.low", "C.scan"), (Tensor("scanned", row, "=mixed.real"),), product="matrix"),
        Op(f"{of}.D", ("mixed.real",), (Tensor("x.skipped", row, "=mixed.real"),), (w,)),
        Op(f"{of}.skip", ("scanned", "x.skipped"), (Tensor("with_skip", row, "=mixed.real"),)),
        ops.leave("scanned"),
        Op(f"{of}.silu", ("gate.z",), (Tensor("gate.act", row, "=mixed.real"),)),
        Op(f"{of}.gate", ("with_skip", "gate.act"), (Tensor(y, row, "=mixed.real"),)),
        ops.leave("discrete.A", "discrete.B", "delta.B.u", "state.now"),
    )


def selective_state_update_2(name: str, y: str) -> tuple[Op, ...]:
    """Mamba 2's: `x.heads`, `B` and `C`, `dt` and `rate` to the output."""
    of, shape, row, low = name, "b mh mp mn", "b mh mp", "=dt"
    skip = Weight(f"{of}.D", "mh", "mixer")
    bias = Weight(f"{of}.dt_bias", "mh", "mixer")
    return (
        Op(f"{of}.dt", ("dt",), (Tensor("dt.biased", row, low),), (bias,), source=_MAMBA2),
        ops.activation(f"{of}.softplus", "dt.biased", "dt.plus", row),
        ops.cast(f"{of}.dt_float", "dt.plus", "dt32", row, "fp32"),
        Op(f"{of}.A_dt", ("dt32", "rate"), (Tensor("A.dt", shape, "fp32"),)),
        _widened(f"{of}.discrete_A", "A.dt", "discrete.A", shape, "fp32"),
        ops.copy(f"{of}.B_heads", "B", "B.heads", "b mh mn"),
        Op(f"{of}.discrete_B", ("dt.plus", "B.heads"), (Tensor("discrete.B", shape, low),), source=_MAMBA2),
        Op(f"{of}.delta_B_u", ("discrete.B", "x.heads"), (Tensor("delta.B.u", shape, low),), source=_MAMBA2),
        Op(f"{of}.decay", ("state", "discrete.A"), (Tensor("decayed", shape, "fp32"),), source=_MAMBA2),
        Op(f"{of}.update", ("decayed", "delta.B.u"), (Tensor("state.now", shape, "fp32"),), source=_MAMBA2),
        ops.copy(f"{of}.C_heads", "C", "C.heads", "b mh mn"),
        ops.cast(f"{of}.low", "state.now", "state.low", shape, low),
        Op(f"{of}.read", ("state.low", "C.heads"), (Tensor("scanned.read", row, low),), product="matrix"),
        Op(f"{of}.D", ("x.heads",), (Tensor("x.skipped", row, low),), (skip,)),
        Op(f"{of}.skip", ("scanned.read", "x.skipped"), (Tensor(y, row, low),)),
        ops.leave("dt.plus", "B.heads", "C.heads", "discrete.A", "discrete.B", "delta.B.u", "state.low"),
    )


def delta_step(name: str, y: str, repeats: bool) -> tuple[Op, ...]:
    """The delta rule for one token: `query`, `key`, `value`, `beta` and `g` to the output, in the value's dtype."""
    of, shape, qk, v = name, "b lv ldk ldv", "b lv ldk", "b lv ldv"
    spread = tuple(ops.copy(f"{of}.repeat_{t}", t, f"{t}.heads", "b lv ldk") for t in ("query", "key") if repeats)
    q, k = (f"{t}.heads" if repeats else t for t in ("query", "key"))
    return (
        *spread,
        *(ops.cast(f"{of}.{t}_float", t, f"{t}.wide", s, "fp32") for t, s in ((q, qk), (k, qk), ("value", v))),
        ops.leave(*(f"{t}.heads" for t in ("query", "key") if repeats)),
        *(Op(f"{of}.{t}_norm", (f"{t}.wide",), (Tensor(f"{t}.unit", qk, "fp32"),)) for t in (q, k)),
        Op(f"{of}.scale", (f"{q}.unit",), (Tensor("q.scaled", qk, "fp32"),)),
        Op(f"{of}.outputs", ("value.wide",), (Tensor("outputs", v, "fp32"),)),
        Op(f"{of}.decay", ("state", "g"), (Tensor("decayed", shape, "fp32"),), source=_DELTA),
        Op(
            f"{of}.recall",
            ("decayed", f"{k}.unit"),
            (Tensor("recalled", v, "fp32"),),
            scratch=(Tensor("keys times state", shape, "fp32"),),
            source=_DELTA,
        ),
        Op(f"{of}.delta", ("value.wide", "recalled", "beta"), (Tensor("delta", v, "fp32"),)),
        Op(f"{of}.write", (f"{k}.unit", "delta"), (Tensor("written", shape, "fp32"),), source=_DELTA),
        Op(f"{of}.update", ("decayed", "written"), (Tensor("state.now", shape, "fp32"),), source=_DELTA),
        ops.leave("decayed", "written"),
        Op(
            f"{of}.read",
            ("state.now", "q.scaled"),
            (),
            scratch=(Tensor("queries times state", shape, "fp32"), Tensor("sum", v, "fp32")),
            source=_DELTA,
        ),
        ops.cast(f"{of}.cast_back", "outputs", y, "b s lv ldv", "=value"),
        ops.leave("q.scaled", f"{k}.unit", "value.wide", "delta", "recalled"),
    )


def kda_step(name: str, y: str) -> tuple[Op, ...]:
    """Kimi's delta rule for one token, whose keys decay channel by channel: `query`, `key`, `value`, `beta` and `g` to
    the output, in the query's dtype."""
    of, shape, row, head = name, "b lv ldk ldk", "b lv ldk", "b lv"
    f = "fp32"

    def normed(t: str) -> tuple[Op, ...]:
        return (
            Op(f"{of}.{t}_square", (f"{t}.wide",), (Tensor(f"{t}.square", row, f),)),
            Op(f"{of}.{t}_sum", (f"{t}.square",), (Tensor(f"{t}.sum", head, f),)),
            Op(f"{of}.{t}_eps", (f"{t}.sum",), (Tensor(f"{t}.shifted", head, f),)),
            Op(f"{of}.{t}_sqrt", (f"{t}.shifted",), (Tensor(f"{t}.root", head, f),)),
            Op(f"{of}.{t}_norm", (f"{t}.wide", f"{t}.root"), (Tensor(f"{t}.unit", row, f),), source=_KDA),
            ops.leave(f"{t}.root"),
        )

    return (
        *(ops.cast(f"{of}.{t}_float", t, f"{t}.wide", row, f) for t in ("query", "key", "value")),
        ops.cast(f"{of}.beta_float", "beta", "beta.wide", head, f),
        *normed("query"),
        *normed("key"),
        Op(f"{of}.scale", ("query.unit",), (Tensor("q.scaled", row, f),)),
        Op(f"{of}.outputs", ("value.wide",), (Tensor("outputs", row, f),)),
        Op(f"{of}.decay_of_keys", ("g",), (Tensor("g.exp", row, f),)),
        Op(f"{of}.decay", ("state", "g.exp"), (Tensor("decayed", shape, f),), source=_KDA),
        Op(
            f"{of}.recall",
            ("decayed", "key.unit"),
            (Tensor("recalled", row, f),),
            scratch=(Tensor("keys times state", shape, f),),
            source=_KDA,
        ),
        Op(f"{of}.less", ("value.wide", "recalled"), (Tensor("less", row, f),)),
        Op(f"{of}.delta", ("less", "beta.wide"), (Tensor("delta", row, f),)),
        Op(f"{of}.write", ("key.unit", "delta"), (Tensor("written", shape, f),), source=_KDA),
        Op(f"{of}.update", ("decayed", "written"), (Tensor("state.now", shape, f),), source=_KDA),
        ops.leave("decayed", "written"),
        Op(
            f"{of}.read",
            ("state.now", "q.scaled"),
            (),
            scratch=(Tensor("queries times state", shape, f), Tensor("sum", row, f)),
            source=_KDA,
        ),
        ops.cast(f"{of}.cast_back", "outputs", y, "b s lv ldk", "=query"),
        ops.leave("q.scaled", "key.unit", "value.wide", "beta.wide", "g.exp", "delta", "recalled"),
    )
