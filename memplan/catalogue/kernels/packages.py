"""Kernels of flash-linear-attention, causal-conv1d and mamba-ssm, each one autograd function.

transformers calls them instead of its torch code if the packages are installed (`kernels.packages`). A function keeps
everything that it saves if any input needs a gradient, and computes the gradients of all of them.
"""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight

_CONV = "causal-conv1d 1.7.0 causal_conv1d/causal_conv1d_interface.py CausalConv1dFn"
_SCAN = "mamba-ssm 2.3.2 mamba_ssm/ops/triton/ssd_combined.py MambaSplitConv1dScanCombinedFn"


def _saved(names: tuple[str, ...], inputs: tuple[str, ...]) -> tuple[Keep, ...]:
    return tuple(Keep(what, of) for of in inputs for what in names)


def causal_conv1d(name: str, x: str, y: str, axis: str, weights: tuple[Weight, ...]) -> Op:
    """Return the convolution with its activation. The gradients of its weights, summed in fp32, are not counted."""
    inputs = (x, *(w.name for w in weights))
    written = (Tensor(y, f"b {axis} s", f"={x}"),)
    return Op(name, (x,), written, weights, _saved(inputs, inputs), source=_CONV)


def gated_delta_rule(name: str, y: str, repeats: bool) -> Op:
    """Return chunk_gated_delta_rule of `query`, `key`, `value`, `g` and `beta`. Backward computes the states again.

    It keeps queries and keys normalised, and contiguous values. `repeats`: each key head serves several value heads,
    whose gradients of the key are summed.
    """
    q, k, v, row = "b s lk ldk", "b s lv ldk", "b s lv ldv", "b s lv"
    saved = (
        *(Tensor(f"{t}.normed", q, f"={t}") for t in ("query", "key")),
        *(Tensor(f"{t}.rstd", "b s lk", "fp32") for t in ("query", "key")),
        Tensor("value.contiguous", v, "=value"),
        Tensor("g.cumulated", row, "fp32"),
        Tensor("inverse", "b s lv chunk", "=key"),
    )
    inputs = ("query", "key", "value", "g", "beta")
    again = (
        Tensor("w", k, "=key"),
        Tensor("u", v, "=value"),
        Tensor("states", "b chunks lv ldk ldv", "=key"),
        Tensor("corrected values", v, "=value"),
    )
    back = (
        Tensor("gradient of the states", "b chunks lv ldk ldv", "=key"),
        Tensor("gradient of w", k, "=key"),
        Tensor("gradient of u", v, "=value"),
        Tensor("key's part by w and u", k, "=key"),
        Tensor("g's part by w and u", row, "fp32"),
        *((Tensor("key's part, summed", q, "=key"),) if repeats else ()),
    )
    return Op(
        name,
        inputs,
        (Tensor(y, v, "=query"), *saved),
        (),
        _saved((*(t.name for t in saved), "beta"), inputs),
        scratch=(*(Tensor(f"{t}, contiguous", q, f"={t}") for t in ("query", "key")), *again),
        scratch_back=tuple(map(Scratch, (*again, *back))),
        gradient="own",
        source="flash-linear-attention 0.6.0 ops/gated_delta_rule/chunk.py ChunkGatedDeltaRuleFunction",
    )


_WIDTH, _STATES, _SCORES, _STEPS = "b s inner", "b chunks mh mp mn", "b chunks mg chunk chunk", "b mh s_chunks"


def split_conv1d_scan(name: str, x: str, y: str, normed: bool, conv_bias: bool, out_bias: bool) -> tuple[Op, ...]:
    """Return mamba_split_conv1d_scan_combined: from the projection `x` and `rate` to the layer's output.

    It convolves, scans chunk by chunk, gates and normalises, and multiplies by the output projection's weight, whose
    module is not called. It keeps x and the scan's output.

    normed               the gated output is normalised
    conv_bias, out_bias  the convolution and the output projection have biases
    """
    shapes = {"conv1d.weight": "convolved 1 kernel", **({"conv1d.bias": "convolved"} if conv_bias else {})}
    shapes |= {"dt_bias": "mh", "D": "mh", **({"norm.weight": "inner"} if normed else {})}
    weights = tuple(
        Weight(f"{name}.{w}", shape, "norm" if w == "norm.weight" else "mixer", is_read_as_view=w == "conv1d.weight")
        for w, shape in shapes.items()
    )
    out = ops.linear(f"{name}.out_proj", x, y, "h", "inner", "mixer", out_bias)
    matrix, *biases = out.weights
    out_weights = (matrix._replace(bypasses_module=True), *biases)
    forward, moments = _scan_forward(name, x, normed), _scan_moments(name, x, normed)
    kept = (x, f"{name}.scanned", "rate", *((f"{name}.rstd",) if normed else ()))
    always = tuple(map(Scratch, _always(x, normed)))
    read, outputs = f"{x}.read", (*(f"{y}.{t}" for t in moments), y)
    projection = Op(
        out.name,
        (x,),
        (Tensor(read, "b s projected"),),
        out_weights,
        _saved(kept, (x, *(w.name for w in out_weights))),
        scratch_back=always,
        gradient="same",
        view=True,
        source=_SCAN,
    )
    function = Op(
        name,
        (read, "rate", f"{name}.gated"),
        (Tensor(outputs[0], "b s h", f"={x}"),),
        weights,
        _saved(kept, (read, "rate", *(w.name for w in weights))),
        scratch_back=always,
        source=_SCAN,
    )
    views = tuple(
        Op(
            f"{name}.{t}",
            (before,),
            (Tensor(after, "b s h"),),
            (),
            _saved(kept[:2], (before,)),
            scratch_back=tuple(map(Scratch, alive)),
            gradient="same",
            view=True,
            source=_SCAN,
        )
        for (t, alive), before, after in zip(moments.items(), outputs, outputs[1:], strict=False)
    )
    held = (t.name for op in forward for t in op.writes if t.name != f"{name}.states")
    return (*forward, projection, function, *views, ops.release_names(*held))


def _scan_forward(name: str, x: str, normed: bool) -> tuple[Op, ...]:
    """Its kernels in order. All that they write but the chunks' own states lives until the function returns."""
    low, n = f"={x}", name
    gated = Tensor(f"{n}.gated", _WIDTH, low)
    kernels = (
        Op(f"{n}.conv1d", (x,), (Tensor(f"{n}.convolved", "b s convolved", low),)),
        Op(f"{n}.steps", (x,), tuple(Tensor(f"{n}.{t}", _STEPS, "fp32") for t in ("decay", "step"))),
        Op(f"{n}.chunk_states", (f"{n}.convolved", f"{n}.decay"), (Tensor(f"{n}.states", _STATES, "fp32"),)),
        Op(
            f"{n}.pass_states",
            (f"{n}.states",),
            (Tensor(f"{n}.states.passed", _STATES, low), Tensor(f"{n}.state.last", "b mh mp mn", "fp32")),
        ),
        Op(
            f"{n}.scan",
            (f"{n}.states.passed",),
            (Tensor(f"{n}.scanned", _WIDTH, low), *(() if normed else (gated,))),
            scratch=(Tensor("scores", _SCORES, "fp32"),),
        ),
        *((Op(f"{n}.norm", (f"{n}.scanned",), (gated, Tensor(f"{n}.rstd", "b s mg", "fp32"))),) if normed else ()),
    )
    return tuple(op._replace(gradient="none", source=_SCAN) for op in kernels)


def _always(x: str, normed: bool) -> tuple[Tensor, ...]:
    """Temporaries of all of its backward."""
    low = f"={x}"
    of_norm = (Tensor("gradient of norm.weight", "inner", low),)
    of_gate = (Tensor("gated output", _WIDTH, low), Tensor("gradient of D by the gate", "mh", low))
    return (
        *(Tensor(t, _WIDTH, low) for t in ("output, again", "gradient of the output", "gradient of the scan")),
        *(Tensor(t, "b s convolved", low) for t in ("x, B and C", "gradients of x, B and C")),
        *(of_norm if normed else of_gate),
    )


def _scan_moments(name: str, x: str, normed: bool) -> dict[str, tuple[Tensor, ...]]:
    """Temporaries of each moment of the scan's backward that may be the largest, by the gradients it computes."""
    low, lowered = f"={x}", Tensor("states, lowered", _STATES, f"={x}")
    scan = (
        Tensor("gradient of the projection", "b s projected", low),
        *_always(x, normed),
        Tensor("steps, cloned", "b s mh", low),
        *(Tensor(t, _STEPS, "fp32") for t in ("decays", "steps")),
        Tensor("scores", _SCORES, "fp32"),
        Tensor("last state", "b mh mp mn", "fp32"),
        Tensor("gradients of the states, lowered", _STATES, low),
        Tensor("gradient of the chunks' decays, summed", "b mh chunks", "fp32"),
    )
    later = (
        *scan,
        lowered,
        Tensor("gradient of D", "mh", low),
        *(Tensor(f"gradient {i} of the decays", _STEPS, "fp32") for i in range(3)),
        *(Tensor(f"gradient of {t}, summed", "b s mg mn", "fp32") for t in "BC"),
    )
    of_scores = Tensor("gradient of the scores", _SCORES, "fp32")
    return {
        "states": (
            *scan,
            *(Tensor(t, _STATES, "fp32") for t in ("states", "gradients of the states")),
            lowered._replace(dtype=f"{low}!{name}.states"),
            Tensor("gradient of the chunks' decays", _STATES, "fp32/64"),
        ),
        "C": (*later, Tensor("parts", "b s scan_splits mg mn", "fp32")),
        "scores": (*later, of_scores, Tensor("parts", f"{_SCORES} scan_splits", "fp32")),
        "decays": (
            *later,
            of_scores,
            *(Tensor(f"gradient {i} of the decays", _STEPS, "fp32") for i in (3, 4)),
            Tensor("parts", f"{_STEPS} chunk", "fp32/32"),
        ),
    }
