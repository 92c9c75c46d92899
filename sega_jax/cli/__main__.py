"""``python -m sega_jax.cli``."""

import os
import sys

import sega_jax

# For -m Python looks for modules in the current folder first; there may be anything, so it is only looked at for this
# package itself, where it is run out of its own repository.
here = os.getcwd()
if not sys.flags.safe_path and sys.path[0] == here and not os.path.abspath(sega_jax.__file__).startswith(here + os.sep):
    del sys.path[0]

from sega_jax.cli import main  # noqa: E402

sys.exit(main())
