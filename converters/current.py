"""The current folder is no place to import from: it may hold anything, and Python puts it first for ``python -m``."""

import os
import sys


def leave(program: str) -> None:
    """Takes the current folder off the path, unless the program itself lies below it; before anything else is imported.

    Args:
        program: ``__file__`` of the program.
    """
    here = os.getcwd()
    if not sys.flags.safe_path and sys.path[:1] == [here] and not os.path.abspath(program).startswith(here + os.sep):
        del sys.path[0]
