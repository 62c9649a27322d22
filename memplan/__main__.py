"""`python -m memplan`."""

import sys
from pathlib import Path

if not sys.flags.safe_path and sys.path[:1] == [str(Path.cwd())]:
    del sys.path[0]  # a yaml.py in the current folder is not the library

from memplan.cli import main

main()
