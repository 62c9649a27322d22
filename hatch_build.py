"""Build hook: compiles memplan/engine/native.c if there is a C compiler, and adds the web page if web/dist has it.

memplan works without either: more slowly, and without `memplan web`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).parent


def compile_library() -> Path | None:
    """Return the path of the compiled library, built with `$CC` or cc and `$ARCHFLAGS`; None if that does not work."""
    sys.path.insert(0, str(ROOT))
    from memplan.engine.native import SOURCE, library_path

    path = library_path()
    part = path.with_suffix(f".{os.getpid()}.lib")  # which git ignores, so that a build at the same time does, too
    named = f"{os.environ.get('CC') or 'cc'} {os.environ.get('ARCHFLAGS', '')}"  # the latter on a Mac, as in setuptools
    command = [*shlex.split(named), "-O3", "-shared", "-fPIC", "-o", str(part), str(SOURCE)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        part.replace(path)
    except (OSError, subprocess.SubprocessError):
        part.unlink(missing_ok=True)
        return None
    return path


def page_files() -> dict[str, str]:
    """Return the files of the built page, and where they are in a wheel; the browser's engine is not among them."""
    pages = ROOT / "web" / "dist"
    paths = [path.relative_to(ROOT) for path in pages.rglob("*") if path.is_file() and path.parent.name != "engine"]
    return {str(ROOT / path): f"memplan/{path.as_posix()}" for path in paths}


class NativeLibraryHook(BuildHookInterface[Any]):
    """Puts the page and the library into the wheel, which with the library is one of this platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the library; an editable install finds it in the checkout."""
        if version != "editable":
            build_data["force_include"] |= page_files()
        path = compile_library()
        if path is not None and version != "editable":
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
            build_data["force_include"][str(path)] = f"memplan/engine/{path.name}"
