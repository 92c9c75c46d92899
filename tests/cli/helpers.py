"""Words and looks that tests of the command line share."""

from pathlib import Path

import numpy as np
from PIL import Image

from sega_jax.pipeline.pipeline import Pipeline

QUICK = ("--size", "64", "--steps", "2")
PROMPT = "a red circle"


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def files():
    return sorted(entry.name for entry in Path().iterdir())


def nothing_is_loaded(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Pipeline, "from_pretrained", refuse)


def refused(result):
    code, out, err = result
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("sega-jax: error: ")
    assert "Traceback" not in err
    return last
