"""Mamba 1's state space: Mamba, Falcon Mamba and Jamba.

transformers scans with mamba-ssm's kernels if they are installed (`memplan.catalogue.kernels.packages`), otherwise
token by token in a Python loop. Below is the loop, exact against a trace of it but for rounding: each token's output is
a tensor until they are stacked.

Axes:

inner  channels, each with a state
mn     numbers in a state
dtr    rank of the time steps
dbc    numbers that a token's time step and the two projections of its state are made of
"""

from __future__ import annotations

from memplan.catalogue.decoder.attention import llama_attention
from memplan.catalogue.decoder.frame import after, before, decoder_block, returned, runs
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.experts import experts, routers
from memplan.catalogue.families.ssm import mixer_model
from memplan.catalogue.kernels import ops, packages
from memplan.catalogue.kernels.recurrent import causal_conv, exp, negative_exp, unpadded
from memplan.catalogue.kernels.recurrent_step import cached_state, selective_state_update
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Scratch, Stack, Tensor, Weight
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 models/mamba/modeling_mamba.py"
_ROWS, _STATES = "b inner s", "b inner s mn"
_PARTS = {"dt": "b s dtr", "B": "b s mn", "C": "b s mn"}


def weightless_norm(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """RMSNorm in fp32 without a weight."""
    *normalise, _, _, returns = ops.rms_norm(name, x, y, shape, axis)
    return (*normalise, ops.cast(f"{name}.type_as", f"{y}.n32", y, shape, f"={x}"), returns)


def _ones(name: str) -> Op:
    """The weights of weightless norms, which only mamba-ssm's function reads; it normalises time steps by channel."""
    axes = {"dt": "inner", "b": "mn", "c": "mn"}
    weights = (Weight(f"{name}.{t}_layernorm.weight", axis, "buffer", "", False) for t, axis in axes.items())
    return Op(f"{name}.ones", (), (), tuple(weights), gradient="none")


def _in_fp32(name: str, y: str, weight: str) -> Op:
    """`weight.float()` of a vector along the channels."""
    return Op(name, (), (Tensor(y, "inner", "fp32"),), (Weight(weight, "inner", "mixer"),), cast=True, source=_SOURCE)


def _time_steps(name: str, x: str, wiring: Wiring) -> tuple[Op, ...]:
    """The time steps, which mamba-ssm's kernel makes positive itself, and their bias.

    The layer's weight is multiplied directly, and the product is laid out by channel.

    A quantised layer is called, and its bias subtracted again, which takes the same.
    """
    layer = ops.linear(f"{name}.dt_proj", x, "dt.flat", "inner", "dtr", "mixer")
    (matrix,) = layer.weights
    channels = (
        layer._replace(weights=(matrix._replace(bypasses_module=True),)),
        ops.copy(f"{name}.by_channel", "dt.flat", "dt.channels", _ROWS, gradient="new"),
        ops.release_names("dt.flat"),
        _in_fp32(f"{name}.bias_float", "bias32", f"{name}.dt_proj.bias"),
    )
    if "mamba_ssm" in wiring.packages:
        return channels
    return (
        *channels,
        ops.add(f"{name}.dt_bias", "dt.channels", "bias32", "dt.biased", _ROWS)._replace(
            writes=(Tensor("dt.biased", _ROWS, "=dt.channels"),),
            scratch=(Tensor("bias of the time steps", "inner", "=dt.channels!bias32"),),
        ),
        ops.activation(f"{name}.softplus", "dt.biased", "dt.plus", _ROWS)._replace(autocast="fp32"),
    )


def selective_scan(name: str, x: str, y: str, is_single: bool) -> tuple[Op, ...]:
    """mamba_selective_scan: from `x`, `gate.z` (`b inner s`), `dt.plus`, `rate`, `B.scan` and `C.scan` to the output.

    The loop keeps every token's state, and copies of it and of C in the dtype of x. Backward is largest at the token
    before the last, once it has freed the state before the last token, and the copies of the last two.
    """
    of = name
    operands = ("discrete.A", "delta.B.u", "C.scan")
    token, states = "b inner mn", ("states", "states.low", "state.first")
    shapes = {"states": "b inner earlier mn", "state.late": "b inner second_last mn"}
    low = {"C.low": "scanned_C", "C.late": "b second_last mn", "C.last": "b mn"}
    late = ("state.late", "state.late.low", "state.last", "C.late", "C.last")
    return (
        ops.spread(f"{of}.A_dt", "dt.plus", "rate", "A.dt", _STATES)._replace(
            scratch_back=(Scratch(Tensor("product", _STATES, "fp32")),)
        ),
        exp(f"{of}.discrete_A", "A.dt", "discrete.A", _STATES)._replace(autocast="fp32"),
        ops.cast(f"{of}.B_float", "B.scan", "B32", "b s mn", "fp32"),
        ops.spread(f"{of}.discrete_B", "dt.plus", "B32", "discrete.B", _STATES),
        ops.cast(f"{of}.x_float", x, "x32", _ROWS, "fp32"),
        ops.spread(f"{of}.delta_B_u", "discrete.B", "x32", "delta.B.u", _STATES),
        Op(
            f"{of}.scan.kept",
            ("discrete.A",),
            (
                *(Tensor(t, shape, "fp32") for t, shape in shapes.items()),
                Tensor("state.first", token, f"={x}"),
                Tensor("state.last", token, f"={x}"),
            ),
            gradient="none",
            needs_recording=True,
        ),
        *(
            ops.cast(f"{of}.scan.{t}", t, f"{t}.low", shape, f"={x}")._replace(needs_recording=True)
            for t, shape in shapes.items()
        ),
        *(  # by autocast, if a weight in fp32 scaled C
            ops.cast(f"{of}.scan.{t}", "C.scan", t, shape, f"={x}")._replace(needs_recording=True, gradient="none")
            for t, shape in low.items()
        ),
        Op(
            f"{of}.scan",
            (*operands, *states, "C.low"),
            (Tensor("scanned.tokens", "scanned", f"={x}"), Tensor("state", token, "fp32")),
            (),
            tuple(Keep(what, of_) for of_ in operands for what in (operands[0], "C.low", *states)),
            scratch=(
                Tensor("product", token, "fp32"),
                Tensor("state in the dtype of x", token, f"={x}"),
                Tensor("C in the dtype of x", "b mn", f"={x}!C.scan"),
            ),
            scratch_back=(
                Scratch(Tensor("of the token before", _STATES, "fp32")),
                Scratch(Tensor("state's gradient", token, "fp32")),
            ),
            gradient="own",
            source=f"{_SOURCE} mamba_selective_scan",
        ),
        ops.copy(f"{of}.stack", "scanned.tokens", "scanned", _ROWS, "part" if is_single else "same")._replace(
            keeps=tuple(Keep(what, "scanned.tokens") for what in late)
        ),
        ops.release_names(*states, "C.low", *late)._replace(needs_recording=True),
        *_skip(of, x, y),
        ops.release_names("D32", "dt.plus", "delta.B.u", "discrete.A", "discrete.B", "state", "scanned.tokens"),
    )


def _skip(name: str, x: str, y: str) -> tuple[Op, ...]:
    """`(scanned + x * D) * silu(z)`, in fp32 like D."""
    return (
        _in_fp32(f"{name}.D_float", "D32", f"{name}.D"),
        ops.spread(f"{name}.D", x, "D32", "x.skipped", _ROWS),
        ops.add(f"{name}.skip", "scanned", "x.skipped", "with_skip", _ROWS),
        ops.activation(f"{name}.silu", "gate.z", "gate.act", _ROWS),
        ops.mul(f"{name}.product", "with_skip", "gate.act", y, _ROWS),
    )


def mamba_mixer(
    m: ModelSpec,
    wiring: Wiring,
    y: str,
    name: str = "mixer",
    keys: tuple[str, str] = ("use_bias", "use_conv_bias"),
    norms: str = "",
) -> tuple[Op, ...]:
    """Projection, convolution, projections of time step and state, the scan, and the output projection.

    It reads `n1`.

    keys   of the config, which say whether projections and convolution have biases
    norms  of time step, B and C: `weightless`, `weighed`, or empty for none
    """
    x, n, bias, conv_bias = "n1", name, m.get(keys[0], False), m.get(keys[1], True)
    norm, ones = (weightless_norm, (_ones(n),)) if norms == "weightless" else (ops.rms_norm, ())
    names = {t: f"{t}.scan" if norms else t for t in _PARTS}
    parts = tuple(Tensor(t, shape) for t, shape in _PARTS.items())
    if "mamba_ssm" in wiring.packages and norms != "weighed":
        return (
            *unpadded(wiring, x, "real", "b s h"),
            ops.linear(f"{n}.in_proj", "real", "xz", "2 inner", "h", "mixer", bias),
            *negative_exp(f"{n}.A_log", "rate", "inner mn"),
            _in_fp32(f"{n}.D_float", "D32", f"{n}.D"),
            _in_fp32(f"{n}.bias_float", "bias32", f"{n}.dt_proj.bias"),
            *ones,
            *packages.mamba_inner(n, "xz", y, bool(norms), conv_bias),
            ops.release_names("real", "xz", "rate", x),
        )
    transposed = ops.view if wiring.is_single_sequence else ops.copy  # a product reads one sequence as it is
    by_token = ops.view if "causal_conv1d" in wiring.packages else transposed
    scan = (
        (_in_fp32(f"{n}.D_float", "D32", f"{n}.D"), packages.selective_scan(n, "mixed.real", "gated"))
        if "mamba_ssm" in wiring.packages
        else selective_scan(n, "mixed.real", "gated", wiring.is_single_sequence)
    )
    return (
        *unpadded(wiring, x, "real", "b s h"),
        ops.linear(f"{n}.in_proj", "real", "xz.flat", "2 inner", "h", "mixer", bias),
        ops.view(f"{n}.xz", "xz.flat", "xz", "b s 2 inner", gradient="new"),
        *negative_exp(f"{n}.A_log", "rate", "inner mn"),
        ops.split(f"{n}.chunk", "xz", (Tensor("x.part", "b s inner"), Tensor("gate.z", _ROWS))),
        *causal_conv(f"{n}.conv1d", "x.part", "mixed", "inner", conv_bias, wiring=wiring),
        *unpadded(wiring, "mixed", "mixed.real", _ROWS),
        by_token(f"{n}.by_token", "mixed.real", "mixed.tokens", "b s inner"),
        ops.linear(f"{n}.x_proj", "mixed.tokens", "dbc", "dbc", "inner", "mixer"),
        ops.release_names("mixed.tokens"),
        ops.split(f"{n}.split", "dbc", parts),
        *ones,
        *(
            op
            for t, axis in (("dt", "dtr"), ("B", "mn"), ("C", "mn"))
            if norms
            for op in norm(f"{n}.{t.lower()}_layernorm", t, names[t], _PARTS[t], axis)
        ),
        *_time_steps(n, names["dt"], wiring),
        *(ops.view(f"{n}.{t}", t, f"{t}.scan", _PARTS[t]) for t in "BC" if not norms),
        *(() if wiring.decodes else scan),
        *cached_state(
            wiring, f"{n}.state", "state.kept" if not wiring.decodes else "state", "b inner mn", "fp32", "rate"
        ),
        *(selective_state_update(n, "gated") if wiring.decodes else ()),
        ops.cast(f"{n}.cast", "gated", "gated.low", _ROWS, f"={x}"),
        transposed(f"{n}.rows", "gated.low", "gated.rows", "b s inner"),
        ops.linear(f"{n}.out_proj", "gated.rows", y, "h", "inner", "mixer", bias),
        ops.release_names(
            "gated", "gated.low", "dt.channels", "mixed.real", "xz", "rate", "B.scan", "C.scan", "bias32"
        ),
        ops.release_names("real", x),
        *((ops.release_names("state"),) if wiring.caching else ()),
    )


def mamba(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Mamba, or Falcon Mamba, which normalises the inputs of the scan."""
    mixer = mamba_mixer(m, wiring, "mo", norms="weightless" if m.model_type == "falcon_mamba" else "")
    return mixer_model(m, wiring, mixer)


def jamba(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Jamba: attention without positions in one of several layers, and experts in every other one."""
    name = "feed_forward"
    mixer = mamba_mixer(m, wiring, "ao", "mamba", ("mamba_proj_bias", "mamba_conv_bias"), "weighed")
    heads = llama_attention(m, wiring, "n1", "ao", rotary=False)
    routed = routers.softmax_router(f"{name}.router", "n2", normalise=False, stands_for=())
    mixture = experts.mixture("n2", routed, experts.experts("n2", "mo", f"{name}.experts", (), ()))
    mlp = gated_mlp("n2", "mo", name)

    def block(layer: Layer) -> Block:
        attends = layer.mixer == "attention"
        return decoder_block(
            heads if attends else mixer,
            mixture if layer.ffn == "experts" else mlp,
            norms=("input_layernorm", "", "pre_ff_layernorm", ""),
            held=returned(wiring) if attends else (),
        )

    last = after(m, wiring, table=(), name="model.final_layernorm")
    return Stack(before(wiring, table=()), runs(m, block), last)


BUILDERS = {"falcon_mamba": mamba, "jamba": jamba, "mamba": mamba}
