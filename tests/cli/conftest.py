"""The command line is mostly called in this process, at tiny sizes.

The model is the embedded demo with its transformer's weights shaken, so that every input matters however far the demo
was trained; the demo itself is used where nothing is computed.
"""

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sega_jax import cli
from sega_jax.pipeline.pipeline import Pipeline
from sega_jax.weights.hub import resolve
from tests.cli.helpers import PROMPT, QUICK

load = cache(Pipeline.from_pretrained.__func__)  # one load for all tests


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = Path(shutil.copytree(resolve("nano"), tmp_path_factory.mktemp("model") / "shaken"))
    random = np.random.default_rng(0)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    shaken = {
        name: array + random.normal(0, 0.05, array.shape).astype(array.dtype)
        for name, array in load_file(weights).items()
    }
    save_file(shaken, weights)
    return str(folder)


@pytest.fixture
def pipe(model):
    """The model through the Python API."""
    return load(
        Pipeline,
        model,
        dtype="float32",
        transformer=None,
        backend="auto",
        revision=None,
        cache_dir=None,
        local_files_only=False,
    )


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder of its own, no compilation cache, and no second load of the same model."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SEGA_JAX_CACHE", "off")
    monkeypatch.delenv("SEGA_JAX_DEBUG", raising=False)
    monkeypatch.setattr(Pipeline, "from_pretrained", classmethod(load))
    return folder


@pytest.fixture
def run(capsys):
    """Runs a command line; gives exit code, standard output and standard error."""

    def run(*words):
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def make(run, model):
    """Makes a picture and gives its result; fails if that fails."""

    def make(*words, prompt=(PROMPT,)):
        code, out, err = run("generate", *prompt, *QUICK, "--model", model, "--json", *words)
        assert code == 0, err
        return json.loads(out)

    return make
