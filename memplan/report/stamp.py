"""The command, the version and the date that a report shows."""

from __future__ import annotations

from memplan.core.records import NamedTuple
from memplan.core.version import __version__


class Stamp(NamedTuple):
    """The command that gave a report, and a date.

    There is no date unless one is given, so that the same command writes the same file.
    """

    command: str = ""
    date: str = ""

    @property
    def line(self) -> str:
        """The version, and the date if there is one."""
        return f"memplan {__version__}, {self.date}" if self.date else f"memplan {__version__}"
