"""Where the user's own files of memplan lie."""

from __future__ import annotations

import os
import tempfile
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


def caches() -> Path:
    """Where what can be made again is kept, made if need be: $XDG_CACHE_HOME/memplan or ~/.cache/memplan, or a folder
    of the temporary one where that cannot be written.

    Raises MemplanError where even that belongs to somebody else. Source: as for `calibrations`.
    """
    said = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = (said if said.is_absolute() else Path.home() / ".cache") / "memplan"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    mine = os.getuid() if hasattr(os, "getuid") else None
    folder = Path(tempfile.gettempdir()) / f"memplan-{'user' if mine is None else mine}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if mine is not None and folder.stat().st_uid != mine:  # what is read or loaded from there must be ours
        raise MemplanError(f"cache: {folder} belongs to another user; set XDG_CACHE_HOME to a folder of your own")
    return folder
