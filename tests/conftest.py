"""Settings every test runs under: strict dtypes and ranks, eight fake devices, warnings as errors."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
from jaxtyping import install_import_hook

# Array code is checked at run time; modules that answer bad arguments with messages of their own are not.
CHECKED = ("geometry", "positional", "layouts", "attention", "models")
install_import_hook([f"sega_jax.{module}" for module in CHECKED], "beartype.beartype")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
