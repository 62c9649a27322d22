"""A run's file on the command line: in place of MODEL, or given by --spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from memplan.cli.commands import COMMAND
from memplan.cli.gpu_names import typed_cards
from memplan.core.errors import SpecError
from memplan.core.files import is_file, is_folder
from memplan.spec.options import FIELDS

if TYPE_CHECKING:
    from memplan.estimate.answer import Estimate
    from memplan.frameworks.reading.run_file import RunFile

_YAML = (".yaml", ".yml")
_OTHERS = (
    ".sh",
    ".mk",
    ".bash",
    ".sbatch",
    ".slurm",
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".py",
    ".ipynb",
    ".toml",
)
_LAUNCHERS = ("accelerate", "docker", "srun", "bash", "make", "sbatch")
_WITH_OPTIONS = ("torchrun", "deepspeed", "python", "python3", "llama-server", "llama-cli", "text-generation-launcher")
COMPANIONS = ("accelerate", "deepspeed")
# Typed ones replace the file's before a framework's rules see it.
_RULED = ("batch.", "method.", "parallelism.world", "profile")


def spec_name(given: Mapping[str, Any]) -> str | None:
    """Return the file that --spec names. Raises SpecError if it names several, which only an estimate takes."""
    names: Sequence[str] = given.get("spec", ())
    if len(names) > 1:
        raise SpecError("spec: only memplan estimate takes several files; name one", "spec")
    return names[0] if names else None


def run_file(given: Mapping[str, Any], text: str | None = None) -> RunFile | None:
    """Return the run's file that is given by --spec or in place of the model; None if there is none.

    text  what to read instead of the file's text, as if the file had it

    Raises SpecError or ConfigError for one that cannot be read, or for options that only apply to such a file.
    """
    name = spec_name(given) or (given["model"] if is_run_file(given.get("model")) else None)
    if name is None:
        for option, instead in {"framework": "; a model is answered under --profile NAME", "explain_run": ""}.items():
            if option in given:
                raise SpecError(f"--{option.replace('_', '-')} only applies to a run's file{instead}")
        return None
    from memplan.frameworks.reading.run_file import read_command, read_run

    companions = {kind: given[kind] for kind in COMPANIONS if kind in given}
    typed = {FIELDS[option]: value for option, value in given.items() if FIELDS.get(option, "").startswith(_RULED)}
    numbers = [card.number or 0 for card in typed_cards(given.get("gpu", ()))]
    if numbers and min(numbers):  # rules ask whether there are several
        typed.setdefault("parallelism.world", max(numbers))
    if "spec" in given and "model" in given:
        typed["model"] = given["model"]
    if name.startswith(COMMAND):
        return read_command(name.removeprefix(COMMAND), given.get("framework"), companions, typed)
    return read_run(name, given.get("framework"), companions, typed, text)


def is_run_file(model: object) -> bool:
    """Whether what is typed in place of a model is a run's file rather than a model's config or checkpoint."""
    if not isinstance(model, str):
        return False
    try:
        return _is_run_file(model.lower(), Path(model))
    except (OSError, ValueError):  # a name that is too long; NUL in it
        return False


def _is_run_file(name: str, path: Path) -> bool:
    if ("modelfile" in name or "makefile" in name) and is_file(path):
        return not name.endswith((".json", ".gguf"))
    if is_folder(path):
        return (path / "adapter_config.json").is_file() and not (path / "config.json").is_file()
    if name.endswith((*_YAML, *_OTHERS)):
        return name.endswith(_YAML) or is_file(path)
    if not name.endswith(".json") or not is_file(path):
        return False
    from memplan.frameworks.reading.run_file import is_known

    return is_known(str(path))


def is_command(words: Sequence[str]) -> bool:
    """Whether words are a command that starts a run, rather than a model with options."""
    first = PurePath(words[0]).name
    if len(words) == 1 or "=" in first or first in _WITH_OPTIONS:
        return len(words) > 1
    if words[1].startswith("-"):
        return False
    from memplan.frameworks.reading.run_format import PROGRAMS

    return first in PROGRAMS or first in _LAUNCHERS


def companions(given: Mapping[str, Any], file: RunFile | None) -> Mapping[str, Mapping[str, Any]]:
    """Return the parts of a run that accelerate's and DeepSpeed's files set; a framework's file is read with them."""
    if file is not None and not file.is_own:
        return {}
    out: dict[str, Mapping[str, Any]] = {}
    if "accelerate" in given:
        from memplan.frameworks.reading.run_file import read_accelerate

        out = {**read_accelerate(given["accelerate"], given.get("method", "full"))}
    if "deepspeed" in given:
        from memplan.frameworks.deepspeed import read_deepspeed

        for part, fields in read_deepspeed(given["deepspeed"]).items():
            out[part] = {**out.get(part, {}), **fields}
    return out


def headline(file: RunFile | None, format: str, with_notes: bool = False) -> str:
    """Return what was read of a run's file as the first line of a table, and perhaps a line for each key left out.

    Empty for other formats and for other runs.
    """
    if format != "table" or file is None or file.is_own:
        return ""
    notes = [f"not supported, and left out: {note}\n" for note in file.notes if with_notes]
    return f"{file.headline}\n{''.join(notes)}\n"


def explained(answer: Estimate, file: RunFile, format: str = "table", is_wide: bool = False) -> str:
    """Return the values of a run's file, and what each changes.

    is_wide  whether a table is for a file, of any width
    """
    from memplan.estimate.effects import effects
    from memplan.estimate.estimate import estimate
    from memplan.report.listing import wide_screen
    from memplan.report.origins import render
    from memplan.report.text import Screen

    read = answer.read_from(file.origins_of(answer.asked), file.notes)
    return render(format, effects(read, estimate), Screen() if is_wide else wide_screen())
