"""`memplan plan FILE`: the file's levers, and the patched copy that --write makes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan.cli.commands import COMMAND
from memplan.cli.run_files import run_file, spec_name
from memplan.cli.runs import runs_of
from memplan.core.errors import MemplanError, SpecError, printable
from memplan.spec.options import FIELDS

if TYPE_CHECKING:
    from memplan.frameworks.reading.run_file import RunFile
    from memplan.planning.file_levers import FileLevers, FilePatch
    from memplan.spec.run import RunSpec

_TYPED_AGAIN = ("model", "gpu", "profile", "parallelism.")  # fields of options that a patch leaves to the command line


def file_levers(given: Mapping[str, Any], file: RunFile | None, asked: RunSpec) -> FileLevers | None:
    """Return the levers of a run's file; None for a run that is not of a file with a name and keys of its own.

    The patched file says what options change too, except the model, the card, the profile and the number of GPUs; if it
    cannot, all options are to be typed again.
    """
    name = str(spec_name(given) or given.get("model"))
    if file is None or name == "-" or name.startswith(COMMAND):
        return None
    from memplan.frameworks.patching.patch import original_of
    from memplan.frameworks.reading.run_file import has_own_keys
    from memplan.planning.file_levers import FileLevers

    if not has_own_keys(name):
        return None

    again = {key: value for key, value in given.items() if FIELDS.get(key, "model").startswith(_TYPED_AGAIN)}
    for typed in (again, given):

        def read(text: str, typed: Mapping[str, Any] = typed) -> RunSpec:
            return runs_of(typed, run_file(typed, text))[0]

        try:
            is_typed = typed is given and len(given) > len(again)
            levers = FileLevers(original_of(str(name), file, read), asked, is_typed)
            levers.write(())
        except (MemplanError, ValueError):  # the file alone is no run, or cannot say what options change
            continue
        return levers
    return None


def write_copy(patch: FilePatch | None) -> str:
    """Write the patched file next to the original and return a line about it. Raises SpecError if its path is taken."""
    if patch is None or not patch.text:
        return "nothing is written: there is no patch"
    path = Path(patch.name).expanduser()
    copy = path.with_name(f"{path.stem}.patched{path.suffix}")
    try:
        with copy.open("x", encoding="utf-8", newline="") as file:
            file.write(patch.text)
    except FileExistsError:
        raise SpecError(f"write: {printable(str(copy), 200)} exists already; move it away", "write") from None
    return f"written to {copy}"
