"""``python -m sega_jax.cli``."""

import sys

from sega_jax.cli import main

sys.exit(main())
