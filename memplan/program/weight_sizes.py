"""Shapes and numbers of elements of weights, by the sizes of the axes."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from memplan.core.ir import Weight
from memplan.engine.walk import shared


def dims_of(w: Weight, axes: Mapping[str, int]) -> list[int]:
    """Return a weight's shape in numbers. An axis `x*y/n` is the number of blocks of n, rounded up."""
    return [int(t) if t.isdigit() else shared(t, axes) if "/" in t else axes[t] for t in w.shape.split()]


def elements(w: Weight, axes: Mapping[str, int]) -> int:
    """Return the number of elements of a weight."""
    return prod(dims_of(w, axes))


def active_elements(w: Weight, axes: Mapping[str, int]) -> int:
    """Return how many elements of a weight one token uses: of stacked experts, only those the router chooses."""
    if not w.chosen:
        return elements(w, axes)
    total, *rest = dims_of(w, axes)
    return min(total, axes[w.chosen]) * prod(rest)


def matrix_shape(w: Weight, axes: Mapping[str, int]) -> tuple[int, int]:
    """Return the rows and columns of a two-dimensional weight."""
    dims = dims_of(w, axes)
    return prod(dims[: w.rows]), prod(dims[w.rows :])


def shape_of(w: Weight, axes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the weight's shape in torch."""
    dims = dims_of(w, axes)
    if w.stacked:
        return dims[0], prod(dims[1 : w.rows]), prod(dims[w.rows :])
    return matrix_shape(w, axes) if w.rows else (prod(dims),)
