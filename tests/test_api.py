"""The public API as it is, name by name: a rename that would break users' scripts shows here.

A change that is meant to change it writes the snapshot anew::

    SEGA_JAX_WRITE_PINS=1 python -m pytest -n 0 tests/test_api.py
"""

import dataclasses
import importlib
import inspect
import os
from pathlib import Path

import sega_jax as sj
from sega_jax.cli import Generate
from sega_jax.cli.generation.requests import ROW_SCHEMA
from sega_jax.pipeline.planning import plan

SNAPSHOT = Path(__file__).parent / "data" / "api.txt"
MODULES = ("sega_jax", "sega_jax.positional", "sega_jax.attention", "sega_jax.sharding", "sega_jax.cli")
CLASSES = (sj.Pipeline, sj.Grid, sj.RopeSpec, sj.Result, sj.Conditioning)


def parameters(function) -> str:
    """Names of what a function takes, with ``=`` where there is a default."""
    names = []
    for name, parameter in inspect.signature(function).parameters.items():
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        names.append(f"{star}{name}{'' if parameter.default is parameter.empty else '='}")
    return f"({', '.join(names)})"


def lines() -> list[str]:
    """A line per public name: of modules with ``__all__``, and of the classes users hold in their hands."""
    found = []
    for module in MODULES:
        loaded = importlib.import_module(module)
        for name in sorted(loaded.__all__):
            value = getattr(loaded, name)
            takes = parameters(value) if inspect.isfunction(value) else ""
            found.append(f"{module}.{name}{takes}")
    for cls in CLASSES:
        for name, value in sorted(vars(cls).items()):
            if name.startswith("_"):
                continue
            function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            found.append(f"{cls.__name__}.{name}{parameters(function) if inspect.isfunction(function) else ''}")
        if hasattr(cls, "__dataclass_fields__"):
            found += [f"{cls.__name__}: {name}" for name in cls.__dataclass_fields__]
    return found


def test_public_names_are_those_of_the_snapshot():
    now = "\n".join(lines()) + "\n"
    if os.environ.get("SEGA_JAX_WRITE_PINS") == "1":
        SNAPSHOT.write_text(now)
    assert now == SNAPSHOT.read_text()


# -- the options of a picture, as every face knows them ------------------------------------------------------------

FILES = {"out", "save_latents"}  # of the command line alone: Python hands pictures and latents over
PYTHON_ONLY = {"image_indices", "batch_size", "decode", "on_step", "on_latents", "checkpoint", "progress"}  # of a run
SIZE = {"size"}  # one word for width and height where options are typed
INPUTS = {"init_image": "photo"}  # planning knows only what it must: the size of the photo
LOADED = {"mask", "init_latents", "embeddings", "vae"}  # planning needs none of them


def faces() -> dict[str, set[str]]:
    """Options that decide a picture, by face: the command line, rows of a prompts file, Python, and planning."""
    rows = set(ROW_SCHEMA)
    command = {field.name for field in dataclasses.fields(Generate)}
    python = set(inspect.signature(sj.Pipeline.generate).parameters) - {"self"}
    planned = set(inspect.signature(plan).parameters) - {"outline", "guidance_lora"}
    return {
        "rows": rows - FILES - SIZE,
        "command": command & (rows | python) - FILES - SIZE - PYTHON_ONLY,
        "python": python - PYTHON_ONLY,
        "planning": {known for known in planned if known not in INPUTS.values()} | LOADED | set(INPUTS),
    }


def missing(faces: dict[str, set[str]]) -> dict[str, list[str]]:
    """Per face, the options that another has and it has not."""
    every = set().union(*faces.values())
    return {face: sorted(every - known) for face, known in faces.items() if every - known}


def test_every_face_knows_the_options_of_a_picture():
    assert missing(faces()) == {}


def test_a_planted_difference_is_found():
    known = faces()
    assert missing({**known, "python": known["python"] - {"strength"}}) == {"python": ["strength"]}
