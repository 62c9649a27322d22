"""The command `memplan`. Heavy modules are imported where they are used, as imports dominate a short command."""

import gc
import os
import sys

from memplan.cli.plain import run_plain


def main() -> None:
    """The entry point."""
    gc.disable()  # a command ends before collecting garbage pays off
    completes = "_MEMPLAN_COMPLETE" in os.environ
    try:
        code = None if completes else run_plain(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
    if code is not None:
        sys.exit(code)
    from memplan.cli.app import app

    app()
