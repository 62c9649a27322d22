"""A fake CUDA device, which torch needs to compute with fake tensors on "cuda".

Fake tensors have shapes and no data, so no kernel ever runs; but autograd and autocast ask for the device's guard and
streams. A build of torch without CUDA has none, and one with CUDA asks the driver. A few lines of C++ stand in for
both: one device and one stream that do nothing. They are compiled once per installed torch, into the user's cache
folder, which needs a C++ compiler.

This changes the process it is loaded into, so traces run in a separate one: see `memplan.probe.run.child`.
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
    """Make torch see one CUDA device. Call it before torch is imported, in a process used only for traces.

    Raises ProbeError if torch is already imported, or if the C++ compiler is missing or fails.
    """
    if "torch" in sys.modules:
        raise ProbeError("probe: torch is already imported; a trace must load its fake device first")
    library = ctypes.CDLL(str(shim()), ctypes.RTLD_GLOBAL)
    import torch  # noqa: F401  # pyright: ignore[reportUnusedImport]

    library.memplan_register_guard()


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise ProbeError("probe: torch is not installed; what a probe needs: pip install 'memplan[probe]'")
    return Path(spec.origin).parent


def shim() -> Path:
    """Return the path of the library compiled for the installed torch, compiling it first if it is missing.

    Raises ProbeError if the compiler is missing or fails.
    """
    if sys.platform == "win32":
        raise ProbeError("probe: a trace needs Linux or macOS; under Windows it runs in WSL")
    torch_folder = _torch_folder()
    source = _SOURCE.read_bytes()
    torch_build = f"{importlib.metadata.version('torch')} {torch_folder}".encode()
    digest = hashlib.sha256(source + torch_build).hexdigest()[:16]
    target = caches() / f"fake_device-{digest}.so"
    if target.exists():
        return target
    compiler = os.environ.get("CXX") or next(filter(shutil.which, _COMPILERS), None)
    if compiler is None:
        raise ProbeError(
            "probe: a trace needs a C++ compiler once (c++, g++ or clang++), and none is on the PATH; "
            "install one, for example with apt-get install g++"
        )
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        compiled = Path(folder) / target.name
        command = [compiler, "-O1", "-shared", "-fPIC", "-std=c++20", f"-I{torch_folder / 'include'}"]
        command += [str(_SOURCE), "-o", str(compiled), f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
        command += [f"-Wl,-rpath,{torch_folder / 'lib'}"]
        try:
            compilation = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise ProbeError(f"probe: the C++ compiler {compiler} does not start ({error.strerror})") from None
        if compilation.returncode:
            reason = next((line for line in compilation.stderr.splitlines() if "error" in line), "no reason given")
            raise ProbeError(f"probe: {compiler} cannot compile against torch's headers: {' '.join(reason.split())}")
        compiled.replace(target)
    return target
