"""Kernels of flash-linear-attention, causal-conv1d and mamba-ssm, each one autograd function.

transformers calls them instead of its torch code if the packages are installed (`kernels.packages`). A function keeps
everything that it saves if any input needs a gradient, and computes the gradients of all of them.
"""

from __future__ import annotations

from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight

_CONV = "causal-conv1d 1.7.0 causal_conv1d/causal_conv1d_interface.py CausalConv1dFn"


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
