"""What NVIDIA's driver tells without torch, and so without a CUDA context: by nvidia-smi."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from memplan.core.units import MIB

_SECONDS = 20  # nvidia-smi may take

Ask = Callable[[str, str], str]
"""Fields and a card's uuid (empty: the first card) to what is said of them."""


def nvidia_smi(fields: str, uuid: str) -> str:
    """What nvidia-smi says of a card, in its own units (MiB); empty where it is not there or does not answer."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            [*command, f"--id={uuid}"] if uuid else command,
            check=False,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return ""
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return lines[0].strip() if lines else ""


def in_use(uuid: str, ask: Ask = nvidia_smi) -> int | None:
    """Bytes in use on the whole card, to a MiB; None where it is not told."""
    said = ask("memory.used", uuid)
    return int(said) * MIB if said.isascii() and said.isdigit() else None
