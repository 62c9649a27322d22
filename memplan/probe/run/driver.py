"""Query NVIDIA's driver through nvidia-smi, without torch and so without a CUDA context."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from memplan.core.units import MIB

_TIMEOUT = 20  # seconds for nvidia-smi

Ask = Callable[[str, str], str]
"""Maps query fields and a card's uuid (empty: the first card) to nvidia-smi's answer."""


def nvidia_smi(fields: str, uuid: str) -> str:
    """Return nvidia-smi's answer about a card, in its own units (MiB); empty if it is missing or does not answer."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        completed = subprocess.run(
            [*command, f"--id={uuid}"] if uuid else command,
            check=False,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return ""
    lines = completed.stdout.splitlines() if completed.returncode == 0 else []
    return lines[0].strip() if lines else ""


def in_use(uuid: str, ask: Ask = nvidia_smi) -> int | None:
    """Return the bytes in use on the card by all programs, to the MiB; None if unknown."""
    answer = ask("memory.used", uuid)
    return int(answer) * MIB if answer.isascii() and answer.isdigit() else None
