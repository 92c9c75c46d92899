"""Golden arrays, and the two precisions they are checked in."""

import contextlib
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

DATA = Path(__file__).parents[1] / "data"


@functools.cache
def _load(name):
    with np.load(DATA / f"{name}.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    if "meta" in arrays:
        arrays["meta"] = json.loads(str(arrays["meta"]))
    return arrays


@pytest.fixture(scope="session")
def golden():
    """``golden(name)``: arrays of ``tests/data/<name>.npz``, ``meta`` decoded."""
    return _load


@pytest.fixture
def run():
    """``run(x64, function, *arguments)``: float64 eagerly, or float32 with every argument traced."""

    def call(x64, function, *arguments):
        with jax.enable_x64(True) if x64 else contextlib.nullcontext():
            arguments = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, arguments)
            return jax.tree.map(np.asarray, (function if x64 else jax.jit(function))(*arguments))

    return call
