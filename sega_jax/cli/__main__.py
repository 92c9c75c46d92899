"""``python -m sega_jax.cli``."""

from converters.current import leave

leave(__file__)

import sys

from sega_jax.cli import main

sys.exit(main())
