"""Where the user's own files of memplan lie."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from memplan.core.errors import MemplanError


def calibrations() -> Path:
    """The folder of this machine's calibration profiles: $XDG_CONFIG_HOME/memplan/calibration, or
    ~/.config/memplan/calibration.

    Raises MemplanError if there is no home folder. Source: XDG Base Directory Specification 0.8, which ignores paths
    that are not absolute.
    """
    said = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    try:
        config = said if said.is_absolute() else Path.home() / ".config"
    except RuntimeError:
        raise MemplanError("calibration: there is no home folder; set XDG_CONFIG_HOME", "calibration") from None
    return config / "memplan" / "calibration"


def has_calibrations() -> bool:
    """Whether there is a folder of calibration profiles that this user can reach.

    In a container the home folder often belongs to another user, or there is none: then there are no profiles.
    """
    try:
        return calibrations().is_dir()
    except (MemplanError, OSError):
        return False


def caches() -> Path:
    """The folder for what can be made again, created if it is missing: $XDG_CACHE_HOME/memplan or ~/.cache/memplan, or
    one in the temporary folder if this user cannot use that.

    Raises MemplanError if the temporary folder cannot be used either. Source: as for `calibrations`.
    """
    said = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = (said if said.is_absolute() else Path.home() / ".cache") / "memplan"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    mine = os.getuid() if hasattr(os, "getuid") else None
    try:
        folder = Path(tempfile.gettempdir()) / f"memplan-{'user' if mine is None else mine}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        reason = f"no folder can be written ({error.strerror})"
        raise MemplanError(f"cache: {reason}; set XDG_CACHE_HOME to a folder of your own") from None
    if mine is not None and owner != mine:  # what is read or loaded from there must be ours
        raise MemplanError(f"cache: {folder} belongs to another user; set XDG_CACHE_HOME to a folder of your own")
    return folder
