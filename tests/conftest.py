"""Settings every test runs under: strict dtypes and ranks, eight fake devices, warnings as errors."""

import gc
import os
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

# Array code is checked at run time; modules that answer bad arguments with messages of their own are not.
CHECKED = ("geometry", "positional", "layouts", "attention", "models")
install_import_hook([f"sega_jax.{module}" for module in CHECKED], "beartype.beartype")

hypothesis.settings.register_profile("suite", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("suite")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 20_000  # a Linux process may have 65,530; at the next one XLA crashes


@pytest.fixture(autouse=True, scope="session")
def own_compilation_cache(tmp_path_factory):
    """JAX writes and reads that folder without a lock: one for each worker, and none of the user's."""
    os.environ["SEGA_JAX_CACHE"] = str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_dropped():
    """Every compiled program holds seven or more memory mappings until JAX forgets it."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
