"""The smallest change that a run's file can say, as a patch of the file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from memplan.core.errors import MemplanError, SpecError
from memplan.core.records import NamedTuple
from memplan.estimate.answer import Estimate
from memplan.estimate.demand import Demand
from memplan.frameworks.patching.patch import Original, Patched, diff, patched
from memplan.planning.levers import Lever, levers_of, pull
from memplan.planning.plan import Plan, Proposal, plan
from memplan.planning.search import Set
from memplan.planning.trials import attempt
from memplan.spec.base import Part
from memplan.spec.run import RunSpec

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration
    from memplan.planning.inference import Questions


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
    demand, left = found.demand, list[tuple[Set, str]]()

    def first(proposals: tuple[Proposal, ...]) -> FilePatch | None:
        known = {proposal.levers: proposal.answer for proposal in proposals}
        return _first(known, left, demand, levers, calibration)

    patch = first(found.proposals)
    if patch is None:

        def sayable(run: RunSpec) -> tuple[Lever, ...]:
            return tuple(filter(levers.can_say, levers(run)))

        again = partial(plan, headroom=demand.headroom, tight=demand.tight, calibration=calibration)
        patch = first(again(levers.asked, levers=sayable).proposals)
    return patch or _nothing(levers, left)


def serving_patch(found: Questions, levers: FileLevers, calibration: Calibration | None = None) -> FilePatch | None:
    """Return the patch of a served run's file: requests as long as the card holds, or else a cache that fits; None if
    the run fits and starts, or nothing of that helps."""
    longest = found.context.value
    changes = [(f"requests of at most {longest:,} tokens", "max_model_len", longest)] if longest else []
    changes += [(f"a cache in {cache.name}", "cache_dtype", cache.name) for cache in found.caches if cache.fits]
    if found.fits or not changes:
        return None
    left: list[tuple[Set, str]] = []
    sets = [(Lever((), title, "serving", ((f"serving.{name}", value),)),) for title, name, value in changes]
    return _first(dict.fromkeys(sets), left, found.demand, levers, calibration) or _nothing(levers, left)


def _first(
    known: Mapping[Set, Estimate | None],
    left: list[tuple[Set, str]],
    demand: Demand,
    levers: FileLevers,
    calibration: Calibration | None,
) -> FilePatch | None:
    """Return the patch of the first changes that the file can say, of those whose answer may be known; None if it can
    say none. The others are added to `left` with the reason."""
    for changes, answer in known.items():
        try:
            new = levers.write(changes)
            found = answer if answer and new.run == answer.asked else attempt(new.run, calibration)
            if found is None or not demand.starts(found):
                raise SpecError("what else the framework sets then takes more memory")
        except MemplanError as error:
            left.append((changes, str(error)))
            continue
        original = levers.original
        return FilePatch(original.name, original.text, new.text, changes, found, tuple(left), levers.typed)
    return None


def _nothing(levers: FileLevers, left: list[tuple[Set, str]]) -> FilePatch:
    return FilePatch(levers.original.name, levers.original.text, "", (), None, tuple(left))
