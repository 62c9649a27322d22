"""A point in a serving engine's step, with the tensors alive at it."""

from __future__ import annotations

from memplan.core.ir import Tensor
from memplan.core.records import NamedTuple


class Instant(NamedTuple):
    """A point in a step: where it is, which tensors are alive, and where that was read."""

    where: str
    alive: tuple[Tensor, ...]
    source: str
    basis: str = "derived"
