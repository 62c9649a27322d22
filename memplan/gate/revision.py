"""The run files of a git revision, in a folder of their own."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from memplan.core.errors import SpecError, printable
from memplan.gate.lock import NAME as LOCK

# Endings of files that a run may be read of; other files are left in the repository.
_ENDINGS = (
    *(".yaml", ".yml", ".json", ".toml", ".jinja", ".cfg", ".env", ".txt"),
    *(".sh", ".bash", ".sbatch", ".slurm", ".py", ".ipynb", ".modelfile"),
)
_MOST_BYTES = 2**20  # a run's file is smaller


def write_revision(name: str, folder: Path) -> Path:
    """Write the files of a revision that runs may be read of, and return the folder that is the working directory's
    there. Raises SpecError if there is no such revision, or no repository."""
    commit = _git(["rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"])
    if commit is None:
        raise _missing(name)
    listed = _git(["ls-tree", "-r", "-l", "-z", "--full-tree", commit.decode().strip()]) or b""
    wanted: list[tuple[str, str]] = []
    for entry in listed.decode("utf-8", "surrogateescape").split("\0"):
        about, _, path = entry.partition("\t")
        mode, kind, blob, size = about.split() if path else ("", "", "", "-")
        if kind == "blob" and mode != "120000" and size.isdecimal() and int(size) <= _MOST_BYTES and _may_be_read(path):
            wanted.append((path, blob))
    for path, content in zip((path for path, _ in wanted), _contents(blob for _, blob in wanted), strict=True):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    inside = folder / (_git(["rev-parse", "--show-prefix"]) or b"").decode().strip()
    inside.mkdir(parents=True, exist_ok=True)
    return inside


def _may_be_read(path: str) -> bool:
    name = PurePosixPath(path).name.lower()
    return name == LOCK or name.endswith(_ENDINGS) or name.startswith(("modelfile", "dockerfile")) or "." not in name


def _contents(blobs: Iterable[str]) -> list[bytes]:
    """Return the contents of git's blobs."""
    names = [*blobs]
    found = _git(["cat-file", "--batch"], "".join(f"{name}\n" for name in names).encode()) or b""
    out: list[bytes] = []
    at = 0
    for _ in names:
        end = found.index(b"\n", at)
        size = int(found[at:end].split()[2])
        out.append(found[end + 1 : end + 1 + size])
        at = end + 2 + size
    return out


def _missing(name: str) -> SpecError:
    shown = printable(name, 80)
    if shutil.which("git") is None:
        return SpecError(f"{shown}: is no folder or file here, and git is not installed", "revisions")
    if _git(["rev-parse", "--git-dir"]) is None:
        return SpecError(f"{shown}: is no folder or file here, and this is no git repository", "revisions")
    if (_git(["rev-parse", "--is-shallow-repository"]) or b"").strip() == b"true":
        fetch = f"git fetch --depth=1 origin {shown}"
        return SpecError(
            f"{shown}: this clone is shallow and does not have it; run {fetch}, or fetch-depth: 0", "revisions"
        )
    return SpecError(f"{shown}: is no revision of this repository, no folder and no check's JSON", "revisions")


def _git(words: list[str], text: bytes | None = None) -> bytes | None:
    """Return what git prints; None if it fails or is not installed."""
    try:
        done = subprocess.run(["git", *words], input=text, capture_output=True, check=False)
    except (OSError, ValueError):  # ValueError: NUL in a word
        return None
    return done.stdout if done.returncode == 0 else None
