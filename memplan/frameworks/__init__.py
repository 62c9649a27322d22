"""A change of a run as what a user must write: memplan's options, and the keys of the frameworks that train.

One table of keys per framework, in its own file, each with the version it was read from.
"""

from __future__ import annotations

from memplan.frameworks.axolotl import AXOLOTL
from memplan.frameworks.change_table import Framework, Lines, read_off
from memplan.frameworks.command import options, own_lines
from memplan.frameworks.llamafactory import LLAMAFACTORY
from memplan.frameworks.trl import TRL
from memplan.spec.run import RunSpec

__all__ = ["FRAMEWORKS", "Framework", "Lines", "lines", "options"]

FRAMEWORKS = (TRL, AXOLOTL, LLAMAFACTORY)


def lines(asked: RunSpec, changed: RunSpec) -> tuple[Lines, ...]:
    """What turns the run `asked` into `changed`, in memplan's options and in each framework's words."""
    return (own_lines(asked, changed), *(read_off(framework, asked, changed) for framework in FRAMEWORKS))
