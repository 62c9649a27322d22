"""One token's step through layers that keep a state: a convolution over the last tokens, and a recurrence.

Both states are written in place. Each layer in turn allocates its own temporaries of the size of a state.
Source: transformers 5.24, the torch functions its modules use if no kernel packages are installed.
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


def cached_state(wiring: Wiring, name: str, state: str, shape: str, dtype: str, like: str) -> tuple[Op, ...]:
    """The point where a cached state is created or read, if there is a cache. `like`: a tensor of its dtype."""
    return (Op(name, (like,), (Tensor(state, shape, dtype),), caches="state"),) if wiring.caching else ()


def convolved(
    name: str, x: str, y: str, axis: str, weights: tuple[Weight, ...], activates: bool = True
) -> tuple[Op, ...]:
    """Join the last tokens with the new one and convolve them, which computes two rows of which one is used."""
    return (
        Op(f"{name}.join", ("conv.state", x), (Tensor(f"{y}.joined", f"b {axis} kernel1", f"={x}"),), source=_CONV),
        Op(name, (f"{y}.joined",), (Tensor(f"{y}.conv", f"b {axis} 2", f"={x}"),), weights, source=_CONV),
        (ops.activation if activates else ops.view)(f"{name}.act", f"{y}.conv", y, f"b {axis} s"),
        ops.release_names(f"{y}.joined"),
    )


def _broadcast(name: str, x: str, y: str, shape: str, dtype: str) -> Op:
    """Return a broadcast product with `x`, as large as a state."""
    return Op(name, (x,), (Tensor(y, shape, dtype),))


def selective_state_update(name: str, y: str) -> tuple[Op, ...]:
    """Return Mamba's update: `mixed.real`, `gate.z`, `dt.plus`, `rate`, `B.scan` and `C.scan` to the gated output."""
    n, shape, row = name, "b inner mn", "b inner"
    w = Weight(f"{n}.D", "inner", "mixer")
    return (
        _broadcast(f"{n}.A_dt", "dt.plus", "A.dt", shape, "fp32")._replace(reads=("dt.plus", "rate"), source=_MAMBA),
        _broadcast(f"{n}.discrete_A", "A.dt", "discrete.A", shape, "fp32"),
        _broadcast(f"{n}.discrete_B", "B.scan", "discrete.B", shape, "fp32"),
        _broadcast(f"{n}.delta_B_u", "discrete.B", "delta.B.u", shape, "fp32"),
        Op(f"{n}.decay", ("state", "discrete.A"), (Tensor("decayed", shape, "fp32"),), source=_MAMBA),
        Op(f"{n}.update", ("decayed", "delta.B.u"), (Tensor("state.now", shape, "fp32"),), source=_MAMBA),
        ops.cast(f"{n}.low", "state.now", "state.low", shape, "=mixed.real"),
        Op(f"{n}.read", ("state.low", "C.scan"), (Tensor("scanned", row, "=mixed.real"),), product="matrix"),
        Op(f"{n}.D", ("mixed.real",), (Tensor("x.skipped", row, "=mixed.real"),), (w,)),
        Op(f"{n}.skip", ("scanned", "x.skipped"), (Tensor("with_skip", row, "=mixed.real"),)),
        ops.release_names("scanned"),
        Op(f"{n}.silu", ("gate.z",), (Tensor("gate.act", row, "=mixed.real"),)),
        Op(f"{n}.gate", ("with_skip", "gate.act"), (Tensor(y, row, "=mixed.real"),)),
        ops.release_names("dt.plus", "discrete.A", "discrete.B", "delta.B.u", "state.now"),
    )


def selective_state_update_2(name: str, y: str) -> tuple[Op, ...]:
    """Return Mamba 2's update: `x.heads`, `B` and `C`, `dt` and `rate` to the output."""
    n, shape, row, low = name, "b mh mp mn", "b mh mp", "=dt"
    skip = Weight(f"{n}.D", "mh", "mixer")
    bias = Weight(f"{n}.dt_bias", "mh", "mixer")
    return (
        Op(f"{n}.dt", ("dt",), (Tensor("dt.biased", row, low),), (bias,), source=_MAMBA2),
        ops.activation(f"{n}.softplus", "dt.biased", "dt.plus", row),
        ops.cast(f"{n}.dt_float", "dt.plus", "dt32", row, "fp32"),
        Op(f"{n}.A_dt", ("dt32", "rate"), (Tensor("A.dt", shape, "fp32"),)),
        _broadcast(f"{n}.discrete_A", "A.dt", "discrete.A", shape, "fp32"),
        ops.copy(f"{n}.B_heads", "B", "B.heads", "b mh mn"),
        Op(f"{n}.discrete_B", ("dt.plus", "B.heads"), (Tensor("discrete.B", shape, low),), source=_MAMBA2),
        Op(f"{n}.delta_B_u", ("discrete.B", "x.heads"), (Tensor("delta.B.u", shape, low),), source=_MAMBA2),
        Op(f"{n}.decay", ("state", "discrete.A"), (Tensor("decayed", shape, "fp32"),), source=_MAMBA2),
        Op(
            f"{n}.update",
            ("decayed", "delta.B.u"),
            (Tensor("state.now", shape, "fp32"),),
            scratch=(Tensor("state.stored", shape, "=state!state.now"),),
            source=_MAMBA2,
        ),
        ops.copy(f"{n}.C_heads", "C", "C.heads", "b mh mn"),
        ops.cast(f"{n}.low", "state.now", "state.low", shape, low),
        Op(f"{n}.read", ("state.low", "C.heads"), (Tensor("scanned.read", row, low),), product="matrix"),
        Op(f"{n}.D", ("x.heads",), (Tensor("x.skipped", row, low),), (skip,)),
        Op(f"{n}.skip", ("scanned.read", "x.skipped"), (Tensor(y, row, low),)),
        ops.release_names("dt.plus", "B.heads", "C.heads", "discrete.A", "discrete.B", "delta.B.u", "state.low"),
    )


def _state_updated(
    n: str, shape: str, row: str, decay: str, key: str, delta: tuple[Op, ...], source: str
) -> tuple[Op, ...]:
    """Decay the state, add the product of the key and the `delta` computed from what it recalls, and read it.

    shape, row  shapes of the state and of a value
    """
    temporaries = (Tensor("queries times state", shape, "fp32"), Tensor("sum", row, "fp32"))
    recalled, keyed = (Tensor("recalled", row, "fp32"),), (Tensor("keys times state", shape, "fp32"),)
    return (
        Op(f"{n}.decay", ("state", decay), (Tensor("decayed", shape, "fp32"),), source=source),
        Op(f"{n}.recall", ("decayed", key), recalled, scratch=keyed, source=source),
        *delta,
        Op(f"{n}.write", (key, "delta"), (Tensor("written", shape, "fp32"),), source=source),
        Op(f"{n}.update", ("decayed", "written"), (Tensor("state.now", shape, "fp32"),), source=source),
        ops.release_names("decayed", "written"),
        Op(f"{n}.read", ("state.now", "q.scaled"), (), scratch=temporaries, source=source),
    )


def delta_step(name: str, y: str, repeats: bool) -> tuple[Op, ...]:
    """Return the delta rule for one token: `query`, `key`, `value`, `beta`, `g` to the output, in the value's dtype."""
    n, shape, qk, v = name, "b lv ldk ldv", "b lv ldk", "b lv ldv"
    spread = tuple(ops.copy(f"{n}.repeat_{t}", t, f"{t}.heads", "b lv ldk") for t in ("query", "key") if repeats)
    q, k = (f"{t}.heads" if repeats else t for t in ("query", "key"))
    return (
        *spread,
        *(ops.cast(f"{n}.{t}_float", t, f"{t}.wide", s, "fp32") for t, s in ((q, qk), (k, qk), ("value", v))),
        ops.release_names(*(f"{t}.heads" for t in ("query", "key") if repeats)),
        *(Op(f"{n}.{t}_norm", (f"{t}.wide",), (Tensor(f"{t}.unit", qk, "fp32"),)) for t in (q, k)),
        Op(f"{n}.scale", (f"{q}.unit",), (Tensor("q.scaled", qk, "fp32"),)),
        Op(f"{n}.outputs", ("value.wide",), (Tensor("outputs", v, "fp32"),)),
        *_state_updated(
            *(n, shape, v, "g", f"{k}.unit"),
            (Op(f"{n}.delta", ("value.wide", "recalled", "beta"), (Tensor("delta", v, "fp32"),)),),
            _DELTA,
        ),
        ops.cast(f"{n}.cast_back", "outputs", y, "b s lv ldv", "=value"),
        ops.release_names("q.scaled", f"{k}.unit", "value.wide", "delta", "recalled"),
    )


def kda_step(name: str, y: str) -> tuple[Op, ...]:
    """Return Kimi's delta rule for one token, whose keys decay per channel.

    Reads `query`, `key`, `value`, `beta` and `g`; the output has the query's dtype.
    """
    n, shape, row, head = name, "b lv ldk ldk", "b lv ldk", "b lv"
    f = "fp32"

    def normed(t: str) -> tuple[Op, ...]:
        return (
            Op(f"{n}.{t}_square", (f"{t}.wide",), (Tensor(f"{t}.square", row, f),)),
            Op(f"{n}.{t}_sum", (f"{t}.square",), (Tensor(f"{t}.sum", head, f),)),
            Op(f"{n}.{t}_eps", (f"{t}.sum",), (Tensor(f"{t}.shifted", head, f),)),
            Op(f"{n}.{t}_sqrt", (f"{t}.shifted",), (Tensor(f"{t}.root", head, f),)),
            Op(f"{n}.{t}_norm", (f"{t}.wide", f"{t}.root"), (Tensor(f"{t}.unit", row, f),), source=_KDA),
            ops.release_names(f"{t}.root"),
        )

    return (
        *(ops.cast(f"{n}.{t}_float", t, f"{t}.wide", row, f) for t in ("query", "key", "value")),
        ops.cast(f"{n}.beta_float", "beta", "beta.wide", head, f),
        *normed("query"),
        *normed("key"),
        Op(f"{n}.scale", ("query.unit",), (Tensor("q.scaled", row, f),)),
        Op(f"{n}.outputs", ("value.wide",), (Tensor("outputs", row, f),)),
        Op(f"{n}.decay_of_keys", ("g",), (Tensor("g.exp", row, f),)),
        *_state_updated(
            *(n, shape, row, "g.exp", "key.unit"),
            (
                Op(f"{n}.less", ("value.wide", "recalled"), (Tensor("less", row, f),)),
                Op(f"{n}.delta", ("less", "beta.wide"), (Tensor("delta", row, f),)),
            ),
            _KDA,
        ),
        ops.cast(f"{n}.cast_back", "outputs", y, "b s lv ldk", "=query"),
        ops.release_names("q.scaled", "key.unit", "value.wide", "beta.wide", "g.exp", "delta", "recalled"),
    )
