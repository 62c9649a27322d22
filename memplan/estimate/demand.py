"""What counts as fitting."""

from __future__ import annotations

from typing import NamedTuple

from memplan.catalogue.hardware.gpu import GPU
from memplan.core.errors import SpecError
from memplan.core.units import gib
from memplan.estimate.answer import Estimate


class Demand(NamedTuple):
    """What a plan is to reach: that the run fits, or is no more than `tight`, with `headroom` bytes free."""

    tight: bool = False
    headroom: int = 0

    def met(self, answer: Estimate) -> bool:
        if answer.gpu is None or not (answer.fits or (self.tight and answer.verdict.answer == "tight")):
            return False
        if not self.headroom:
            return True
        left = answer.gpu.usable - self.headroom
        return answer.least <= left and (answer.verdict.headroom or 0) >= self.headroom  # spares replays

    def told(self, answer: Estimate, usable: int) -> bool | None:
        """Whether the demand is met on a card of the answer's kind with so many usable bytes, as far as bounds tell."""
        left = usable - self.headroom
        if self.tight or self.headroom:  # a run may live in less than it shows, and show less than it might
            return False if answer.least > left else None
        return answer.told(left)

    def check(self, gpu: GPU) -> None:
        """Raise SpecError where the headroom is more than the card has."""
        if not 0 <= self.headroom < gpu.usable:
            has = f"{gpu.title} has {gib(gpu.usable)} usable"
            raise SpecError(f"headroom: {gib(self.headroom)} cannot be left free, {has}", "headroom")


FITS = Demand()
MAY_FIT = Demand(tight=True)
