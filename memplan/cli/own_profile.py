"""The calibration profile of this machine, if there is one for a card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from memplan.cli.outcome import warn
from memplan.core.errors import printable

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration

_MAX_PATH = 200  # characters of a path in a warning


def own_profile(gpu: str | None, given: Mapping[str, Any]) -> Calibration | None:
    """Return this machine's own profile of a card.

    None if it is not wanted, does not exist, or cannot be used, which prints a warning.
    """
    if gpu is None or given.get("calibration") is False:
        return None
    from memplan.core.user_folders import has_calibrations

    if not has_calibrations():
        return None
    profile, why_not = profile_of(gpu)
    if profile is None and why_not:
        warn(why_not)
    return profile


def profile_of(gpu: str) -> tuple[Calibration | None, str]:
    """Return this machine's profile of a card, and a sentence that names it or says why it is not used.

    Raises SpecError if the card's file holds no profile.
    """
    from memplan.catalogue.hardware.gpus import find_gpu
    from memplan.core.version import __version__
    from memplan.estimate.calibration import file_of, local

    name = find_gpu(gpu).name
    try:
        profile = local(name)
    except OSError as error:
        why = f"{printable(str(file_of(name)), _MAX_PATH)} cannot be read ({error.strerror})"
        return None, f"this machine's profile of {name} is ignored: {why}"
    if profile is None:
        return None, ""
    if profile.memplan != __version__:
        why = f"it was made with memplan {profile.memplan}; run memplan calibrate again"
        return None, f"this machine's profile of {name} is ignored: {why}"
    return profile, profile.named()
