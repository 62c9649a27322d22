"""The demand that counts as fitting."""

from __future__ import annotations

from memplan.catalogue.hardware.gpu import GPU
from memplan.core.errors import refused
from memplan.core.records import NamedTuple
from memplan.core.units import gib
from memplan.estimate.answer import Estimate


class Demand(NamedTuple):
    """The answer that a plan has to reach: the run fits, or is at most `tight`, with `headroom` bytes free."""

    tight: bool = False
    headroom: int = 0

    def met(self, answer: Estimate) -> bool:
        if answer.gpu is None or not (answer.fits or (self.tight and answer.may_fit)):
            return False
        if not self.headroom:
            return True
        left = answer.gpu.usable - self.headroom
        # `least` comes first because it needs no replay
        return answer.least <= left and (answer.verdict.headroom or 0) >= self.headroom

    def starts(self, answer: Estimate) -> bool:
        """Return whether the run meets the demand and no engine refuses to start it."""
        return self.met(answer) and answer.verdict.reason is None

    def rules_out(self, answer: Estimate) -> bool:
        """Return whether bounds tell that the run does not meet the demand."""
        if answer.gpu is None or not (self.tight or self.headroom):
            return answer.is_ruled_out
        return self.fits_card_of(answer, answer.gpu.usable) is False

    def fits_card_of(self, answer: Estimate, usable: int) -> bool | None:
        """Return whether a card with `usable` bytes meets the demand, or None if the bounds do not tell."""
        left = usable - self.headroom
        if self.tight or self.headroom:  # a run on a full card may need and show less than the bounds
            return False if answer.least > left else None
        return answer.fits_card_of(left)

    def check(self, gpu: GPU) -> None:
        """Raise SpecError if the card does not have that much headroom."""
        if not 0 <= self.headroom < gpu.usable:
            has = f"{gpu.title} has {gib(gpu.usable)} usable"
            raise refused("headroom", f"{gib(self.headroom)} cannot be left free, {has}")


FITS = Demand()
MAY_FIT = Demand(tight=True)
