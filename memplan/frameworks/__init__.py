"""Express a change of a run in memplan's options and in the config keys of training frameworks.

Each framework has a table of keys in its own file, with the version it was read from.
"""

from __future__ import annotations

from memplan.frameworks.axolotl import AXOLOTL
from memplan.frameworks.change_table import Framework, Lines, change_lines
from memplan.frameworks.command import option_lines, options
from memplan.frameworks.llamafactory import LLAMAFACTORY
from memplan.frameworks.swift import SWIFT
from memplan.frameworks.trl import TRL
from memplan.spec.run import RunSpec

__all__ = ["FRAMEWORKS", "WRITERS", "Framework", "Lines", "lines", "options"]

FRAMEWORKS = (TRL, AXOLOTL, LLAMAFACTORY)  # whose keys every plan shows
WRITERS = (*FRAMEWORKS, SWIFT)  # whose own files are patched by their tables


def lines(asked: RunSpec, changed: RunSpec) -> tuple[Lines, ...]:
    """Return what to write to turn `asked` into `changed`, as memplan's options and for each framework."""
    return (option_lines(asked, changed), *(change_lines(framework, asked, changed) for framework in FRAMEWORKS))
