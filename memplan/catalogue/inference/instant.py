"""A point in a serving engine's step, with the tensors alive at it."""

from __future__ import annotations

from typing import NamedTuple

from memplan.core.ir import Tensor


class Instant(NamedTuple):
    """A point in a step: where it is, which tensors are alive, and where that was read."""

    where: str
    alive: tuple[Tensor, ...]
    source: str
    basis: str = "derived"
