"""Where the user's own files of memplan lie."""

from __future__ import annotations

import os
from pathlib import Path

from memplan.errors import MemplanError


def calibrations() -> Path:
    """Where profiles of cards are kept: $XDG_CONFIG_HOME/memplan/calibration, or ~/.config/memplan/calibration.

    Raises MemplanError where there is no home. Source: XDG Base Directory Specification 0.8, which ignores paths that
    are not absolute.
    """
    said = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    try:
        config = said if said.is_absolute() else Path.home() / ".config"
    except RuntimeError:
        raise MemplanError("calibration: there is no home folder; set XDG_CONFIG_HOME", "calibration") from None
    return config / "memplan" / "calibration"
