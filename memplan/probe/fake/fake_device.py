"""A CUDA device that is not there: what torch must believe before it computes with fake tensors on "cuda".

Fake tensors have shapes and no data, so no kernel ever runs; but autograd and autocast ask for the device's guard and
its streams. A build of torch without CUDA has none, and one with CUDA asks the driver. A few lines of C++ answer for
both: one device, one stream, nothing done. They are compiled once for each installed torch, into the user's cache
folder, which needs a C++ compiler.

All of it changes the process it is loaded into, so a trace runs in one of its own: see `memplan.probe.run.child`.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from memplan.core.errors import ProbeError
from memplan.core.user_folders import caches

_COMPILERS = ("c++", "g++", "clang++")
_SOURCE = Path(__file__).with_name("fake_device.cpp")


def load() -> None:
    """Make torch see one CUDA device. Before torch is imported, in a process that ends with the trace.

    Raises ProbeError where torch is imported already, where no C++ compiler is there, or where it fails.
    """
    if "torch" in sys.modules:
        raise ProbeError("probe: torch is imported already; a trace must come first in its process")
    library = ctypes.CDLL(str(shim()), ctypes.RTLD_GLOBAL)
    import torch  # noqa: F401  # pyright: ignore[reportUnusedImport]

    library.memplan_register_guard()


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ProbeError("probe: torch is not installed; what a probe needs: pip install 'memplan[probe]'")
    return Path(spec.origin).parent


def shim() -> Path:
    """The compiled library for the installed torch; compiled if it is not there, and put in place whole.

    Raises ProbeError where there is no compiler, or it fails.
    """
    if sys.platform == "win32":
        raise ProbeError("probe: a trace needs Linux or macOS; under Windows it runs in WSL")
    torch_folder = _torch_folder()
    source = _SOURCE.read_bytes()
    named = f"{importlib.metadata.version('torch')} {torch_folder}".encode()
    digest = hashlib.sha256(source + named).hexdigest()[:16]
    target = caches() / f"fake_device-{digest}.so"
    if target.exists():
        return target
    compiler = os.environ.get("CXX") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        raise ProbeError(
            "probe: a trace needs a C++ compiler once (c++, g++ or clang++), and none is on the PATH; "
            "apt-get install g++, say"
        )
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [compiler, "-O1", "-shared", "-fPIC", "-std=c++20", f"-I{torch_folder / 'include'}"]
        command += [str(_SOURCE), "-o", str(made), f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
        command += [f"-Wl,-rpath,{torch_folder / 'lib'}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise ProbeError(f"probe: the C++ compiler {compiler} does not start ({error.strerror})") from None
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
            raise ProbeError(f"probe: {compiler} cannot compile against torch's headers: {' '.join(reason.split())}")
        made.replace(target)
    return target
