"""The command `memplan`. Heavy modules are imported where they are used, as imports dominate a short command."""

import atexit
import gc
import os
import sys


def main() -> None:
    """The entry point."""
    gc.disable()  # a command ends before collecting garbage pays off,
    atexit.register(gc.freeze)  # and Python need not look for any at its end
    try:
        if "_MEMPLAN_COMPLETE" not in os.environ:
            from memplan.cli.plain import run_plain

            code = run_plain(sys.argv[1:])
            if code is not None:
                sys.exit(code)
        from memplan.cli.app import app

        app()
    except KeyboardInterrupt:  # also while modules are imported
        sys.exit(130)
