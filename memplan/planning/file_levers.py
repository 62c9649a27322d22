"""The smallest change that a run's file can say, as a patch of the file."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from memplan.core.errors import MemplanError, SpecError
from memplan.core.records import NamedTuple
from memplan.estimate.answer import Estimate
from memplan.frameworks.patching.patch import Original, Patched, diff, patched
from memplan.planning.levers import Lever, levers_of, pull
from memplan.planning.plan import Plan, Proposal, plan
from memplan.planning.search import Set
from memplan.planning.trials import attempt
from memplan.spec.base import Part
from memplan.spec.run import RunSpec

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration


class FilePatch(NamedTuple):
    """The first proposal that a run's file can say.

    name    the file's path, as typed
    before  its text
    text    its text with the change; empty if the file can say no proposal
    levers  the change
    answer  the estimate of the run that the text gives, read again; None without a text
    left    the milder proposals that the file cannot say, with the reason
    typed   whether all options of the run are to be typed again
    """

    name: str
    before: str
    text: str
    levers: Set
    answer: Estimate | None
    left: tuple[tuple[Set, str], ...]
    typed: bool = False

    @property
    def diff(self) -> str:
        """The change as a unified diff."""
        return diff(self.name, self.before, self.text) if self.text else ""


class FileLevers:
    """The levers of a run that a file describes.

    original  the file
    asked     its run, with what options have changed
    typed     whether the options stay on the command line: the file cannot say them
    """

    def __init__(self, original: Original, asked: RunSpec, typed: bool = False) -> None:
        self.original = original
        self.asked = asked
        self.typed = typed

    def __call__(self, run: RunSpec) -> tuple[Lever, ...]:
        """Return the levers of the decided run, mildest first."""
        return tuple(sorted(levers_of(run), key=lambda lever: lever.tier))

    def write(self, levers: Set) -> Patched:
        """Return the file with the levers. Raises SpecError if it cannot say them."""
        fields = [name for lever in levers for name, value in lever.fields if not isinstance(value, Part)]
        return patched(self.original, pull(self.asked, levers), fields)

    def can_say(self, lever: Lever) -> bool:
        try:
            self.write((lever,))
        except MemplanError:
            return False
        return True


def file_patch(found: Plan, levers: FileLevers, calibration: Calibration | None = None) -> FilePatch:
    """Return the patch of the first of the plan's proposals that the file can say.

    If it can say none of them, the plan is made again of levers that it can say. The patched file's run meets the
    plan's demand, and its estimate is the patch's answer.
    """
    left: list[tuple[Set, str]] = []

    def first(proposals: tuple[Proposal, ...]) -> FilePatch | None:
        for proposal in proposals:
            try:
                new = levers.write(proposal.levers)
                answer = proposal.answer if new.run == proposal.run else attempt(new.run, calibration)
                if answer is None or not found.demand.met(answer):
                    raise SpecError("what else the framework sets then takes more memory")
            except MemplanError as error:
                left.append((proposal.levers, str(error)))
                continue
            text = levers.original.text
            name = levers.original.name
            return FilePatch(name, text, new.text, proposal.levers, answer, tuple(left), levers.typed)
        return None

    patch = first(found.proposals)
    if patch is None:
        demand = found.demand

        def sayable(run: RunSpec) -> tuple[Lever, ...]:
            return tuple(filter(levers.can_say, levers(run)))

        again = partial(plan, headroom=demand.headroom, tight=demand.tight, calibration=calibration)
        patch = first(again(levers.asked, levers=sayable).proposals)
    text = levers.original.text
    return patch or FilePatch(levers.original.name, text, "", (), None, tuple(left))
