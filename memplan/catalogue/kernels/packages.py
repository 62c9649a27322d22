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

    `repeats`: each key head serves several value heads, whose gradients of the key are summed.
    """
    q, k, v, row = "b s lk ldk", "b s lv ldk", "b s lv ldv", "b s lv"
    back = (
        Tensor("gradient of w", k, "=key"),
        Tensor("gradient of u", v, "=value"),
        Tensor("key's part by w and u", k, "=key"),
        Tensor("g's part by w and u", row, "fp32"),
        *((Tensor("key's part, summed", q, "=key"),) if repeats else ()),
    )
    rule = _delta_rule(name, y, (q, k, v, row), ("inverse",), (), back)
    source = "flash-linear-attention 0.6.0 ops/gated_delta_rule/chunk.py ChunkGatedDeltaRuleFunction"
    return rule._replace(source=source)


def kimi_delta_rule(name: str, y: str) -> Op:
    """Return chunk_kda, the delta rule with a decay `g` per channel, which it also keeps.

    Two kernels compute gradients in fp32, the second from those of the first. The gradient of `beta` is a sum over
    blocks of 32 channels.
    """
    k, row, square = "b s lv ldk", "b s lv", "b s lv chunk"
    decayed = Tensor("key, decayed to the chunk's end", k, "=key")
    first = tuple(Tensor(f"gradient of {t}, first part", k, "fp32") for t in ("query", "key", "g"))
    back = (
        Tensor("query, decayed", k, "=query"),
        *first,
        Tensor("gradient of beta, first part", row, "fp32"),
        Tensor("gradient of beta by blocks", k, "fp32/32"),
        *(Tensor(f"gradient of the {t}", square, "fp32") for t in ("scores", "inverse")),
    )
    rule = _delta_rule(name, y, (k, k, k, k), ("inverse", "scores"), (decayed,), back)
    wide = {"query": k, "key": k, "beta": row}
    return rule._replace(
        keeps=(*rule.keeps, Keep("g", "g")),
        scratch_back=(
            *rule.scratch_back,
            *(Scratch(Tensor(f"gradient of {t}", shape, "fp32"), t, summed=True) for t, shape in wide.items()),
        ),
        source="flash-linear-attention 0.6.0 ops/kda/chunk.py ChunkKDAFunction",
    )


def _delta_rule(
    name: str,
    y: str,
    shapes: tuple[str, str, str, str],
    squares: tuple[str, ...],
    more: tuple[Tensor, ...],
    back: tuple[Tensor, ...],
) -> Op:
    """Return a delta rule that keeps queries and keys normalised, and contiguous values.

    shapes   of queries, keys of each value head, values, and decays
    squares  what it keeps with a number for every two rows of a chunk
    more     what it computes from the keys, again in backward, in addition to `w`, `u`, the states and the new values
    back     temporaries of backward, in addition to these and the gradient of the states
    """
    q, k, v, decays = shapes
    heads, states = q.removesuffix(" ldk"), f"b chunks {k.removeprefix('b s ')} {v.removeprefix('b s lv ')}"
    saved = (
        *(Tensor(f"{t}.normed", q, f"={t}") for t in ("query", "key")),
        *(Tensor(f"{t}.rstd", heads, "fp32") for t in ("query", "key")),
        Tensor("value.contiguous", v, "=value"),
        Tensor("g.cumulated", decays, "fp32"),
        *(Tensor(t, "b s lv chunk", "=key") for t in squares),
    )
    inputs = ("query", "key", "value", "g", "beta")
    again = (
        Tensor("w", k, "=key"),
        Tensor("u", v, "=value"),
        *more,
        Tensor("states", states, "=key"),
        Tensor("corrected values", v, "=value"),
    )
    return Op(
        name,
        inputs,
        (Tensor(y, v, "=query"), *saved),
        (),
        _saved((*(t.name for t in saved), "beta"), inputs),
        scratch=(*(Tensor(f"{t}, contiguous", q, f"={t}") for t in ("query", "key")), *again),
        scratch_back=tuple(map(Scratch, (*again, Tensor("gradient of the states", states, "=key"), *back))),
        gradient="own",
    )


_CHANNELS, _PARTS = "b inner s", ("B", "C")
_SELECTIVE = "mamba-ssm 2.3.2 mamba_ssm/ops/selective_scan_interface.py"


def _scan_outputs(name: str, like: str) -> tuple[Tensor, ...]:
    """Outputs of selective_scan_cuda: without the gate, the states after each part, and with it."""
    states = Tensor(f"{name}.states", "b inner scan_parts 2 mn", "fp32")
    return Tensor(f"{name}.scanned", _CHANNELS, like), states, Tensor(f"{name}.gated", _CHANNELS, like)


def _in_vain(inputs: dict[str, tuple[str, str]]) -> tuple[Scratch, ...]:
    """Gradients of inputs, by shape and dtype, which a function computes for those that need none, too."""
    return tuple(Scratch(Tensor(f"gradient of {t}", shape, dtype), unless=t) for t, (shape, dtype) in inputs.items())


_SMALL = {"rate": ("inner mn", "fp32"), "D32": ("inner", "fp32"), "bias32": ("inner", "fp32")}


def selective_scan(name: str, x: str, y: str) -> Op:
    """Return selective_scan_fn: from `x`, `gate.z`, `dt.channels`, `rate`, `B.scan`, `C.scan`, `D32` and `bias32`.

    It keeps copies of x, B, C and the gate laid out by channel.
    """
    low, rows = f"={x}", "b mn s"
    copied = (
        *(Tensor(f"{t}.by_channel", _CHANNELS, low) for t in (x, "gate.z")),
        *(Tensor(f"{t}.by_channel", rows, low) for t in _PARTS),
    )
    scanned, states, gated = _scan_outputs(name, low)
    inputs = (x, "dt.channels", "B.scan", "C.scan", "gate.z", *_SMALL)
    kept = (*(t.name for t in (*copied, scanned, states)), "dt.channels", *_SMALL)
    return Op(
        name,
        inputs,
        (gated._replace(name=y), *copied, scanned, states),
        (),
        _saved(kept, inputs),
        scratch_back=(
            Scratch(Tensor("contiguous gradient", _CHANNELS, low)),
            *(Scratch(Tensor(f"gradient of {t} in fp32", rows, f"fp32!{t}.scan")) for t in _PARTS),
            *_in_vain(_SMALL),
        ),
        gradient="own",
        source=f"{_SELECTIVE} SelectiveScanFn",
    )


def _matrix(name: str, out: str, into: str) -> Op:
    """The weight of a linear layer, which is read without calling the layer."""
    (w,) = ops.linear(name, "", "", out, into, "mixer").weights
    written = (Tensor(f"{name}.matrix", f"{out} {into}", f"={w.name}"),)
    return Op(name, (), written, (w._replace(bypasses_module=True),), cast=True)


def mamba_inner(name: str, x: str, y: str, normed: bool, conv_bias: bool) -> tuple[Op, ...]:
    """Return mamba_inner_fn: from the projection `x`, `rate`, `D32` and `bias32` to the layer's output.

    It convolves, projects, scans, and multiplies by the output projection's weight; it calls no module. Backward
    computes the convolution and the time steps again, and gradients of all weights. It holds the most when it computes
    that of x_proj, or lays out that of B by token, if the batch is one sequence.

    normed     time steps, B and C are normalised. Backward normalises B and C again, which frees what a checkpoint has
               recomputed
    conv_bias  the convolution has a bias
    """
    n, low, shape = name, f"={x}", "b mn s"
    scanned, states, gated = _scan_outputs(n, low)
    rows, mixed, steps = (
        Tensor(f"{n}.{t}", s, low) for t, s in (("rows", "b 2 inner s"), ("mixed", _CHANNELS), ("steps", _CHANNELS))
    )
    dbc, copy = Tensor(f"{n}.dbc", "b s dbc", low), Tensor("convolved, by token", "several s inner", low)
    parts = tuple(Tensor(f"{n}.{t}", shape, low) for t in _PARTS)
    forward = (
        Op(f"{n}.contiguous", (x,), (rows,)),
        Op(f"{n}.convolve", (rows.name,), (mixed,)),
        Op(f"{n}.project", (mixed.name,), (dbc,), scratch=(copy,)),
        Op(f"{n}.time_steps", (dbc.name,), (steps,)),
        *(Op(f"{n}.{t}", (dbc.name,), (part,), is_view_again=normed) for t, part in zip(_PARTS, parts, strict=True)),
        Op(f"{n}.scan", (mixed.name, steps.name, *(t.name for t in parts)), (scanned, states, gated)),
    )
    layers = (("x_proj", "dbc", "inner"), ("dt_proj", "inner", "dtr"), ("out_proj", "h", "inner"))
    matrices = tuple(_matrix(f"{n}.{layer}", out, into) for layer, out, into in layers)
    weights = {t.name: (t.shape, f"={t.name}") for op in matrices for t in op.writes}
    convolution = (
        Weight(f"{n}.conv1d.weight", "inner 1 kernel", "mixer", is_read_as_view=True),
        *((Weight(f"{n}.conv1d.bias", "inner", "mixer"),) if conv_bias else ()),
    )
    kept = (rows.name, dbc.name, *(t.name for t in (*parts, scanned, states)), *_SMALL)
    read, source = f"{x}.read", f"{_SELECTIVE} MambaInnerFn"
    again = (
        *(Tensor(t, _CHANNELS, low) for t in ("convolved", "time steps", "gated output")),
        *(Tensor(f"gradient of the {t}", _CHANNELS, low) for t in ("gated output", "time steps", "convolution")),
        Tensor("gradient of dbc", "b s dbc", low),
        *((Tensor(f"{t}, normalised again", shape, low) for t in _PARTS) if normed else ()),
    )
    by_token = (
        *again,
        Tensor("gradient of the projection", "b 2 inner s", low),
        *(Tensor(f"gradient of {t}", *kind) for t, kind in (*_SMALL.items(), [*weights.items()][-1])),
        *(Tensor(f"gradient of {t}", shape, low) for t in (*_PARTS, "B, by token")),
    )
    function = Op(
        n,
        (read, *_SMALL, *weights, gated.name),
        (Tensor(f"{y}.of_parts", "b s h", low),),
        (),
        _saved(kept, (read, *_SMALL, *weights)),
        scratch_back=(*map(Scratch, (*again, copy)), *_in_vain(_SMALL | weights)),
        gradient="own",
        source=source,
    )
    return (
        *(op._replace(gradient="none", source=source) for op in forward),
        *matrices,
        Op(
            f"{n}.conv1d",
            (x,),
            (Tensor(read, "b s 2 inner"),),
            convolution,
            _saved(kept, (x, *(w.name for w in convolution))),
            gradient="same",
            view=True,
            source=source,
        ),
        function,
        Op(
            f"{n}.of_parts",
            (f"{y}.of_parts",),
            (Tensor(y, "b s h"),),
            (),
            _saved(kept, (f"{y}.of_parts",)),
            scratch_back=tuple(map(Scratch, by_token)),
            gradient="same",
            view=True,
            source=source,
        ),
        ops.release_names(*(t.name for t in (rows, dbc, *parts, scanned, states))),
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
