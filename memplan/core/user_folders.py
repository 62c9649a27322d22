"""The folders of memplan's files in the user's home folder."""

from __future__ import annotations

import os
from pathlib import Path

from memplan.core.errors import MemplanError


def calibrations() -> Path:
    """Return the folder of this machine's calibration profiles, below $XDG_CONFIG_HOME or ~/.config.

    Raises MemplanError if there is no home folder. Source: XDG Base Directory Specification 0.8, which ignores relative
    paths.
    """
    configured = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    try:
        config = configured if configured.is_absolute() else Path.home() / ".config"
    except RuntimeError:
        raise MemplanError("calibration: there is no home folder; set XDG_CONFIG_HOME", "calibration") from None
    return config / "memplan" / "calibration"


def has_calibrations() -> bool:
    """Whether this user can access a folder of calibration profiles.

    False if there is no home folder or it belongs to another user, which is common in containers.
    """
    try:
        return calibrations().is_dir()
    except (MemplanError, OSError):
        return False


def caches() -> Path:
    """Return the cache folder, created if missing: $XDG_CACHE_HOME/memplan or ~/.cache/memplan.

    If this user cannot use it, it is a folder in the temporary folder. Raises MemplanError if that cannot be used
    either. Source: as for `calibrations`.
    """
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = (configured if configured.is_absolute() else Path.home() / ".cache") / "memplan"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    import tempfile

    uid = os.getuid() if hasattr(os, "getuid") else None
    try:
        folder = Path(tempfile.gettempdir()) / f"memplan-{'user' if uid is None else uid}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        reason = f"no folder can be written ({error.strerror})"
        raise MemplanError(f"cache: {reason}; set XDG_CACHE_HOME to a folder of your own") from None
    if uid is not None and owner != uid:  # files there are loaded, so nobody else may have written them
        raise MemplanError(f"cache: {folder} belongs to another user; set XDG_CACHE_HOME to a folder of your own")
    return folder
