"""The record of a picture: all that determines it, the same from the command line and from Python."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from converters.files import expanded
from sega_jax.media.images import Image
from sega_jax.pipeline.planning import Plan
from sega_jax.sampling.resume import digest
from sega_jax.weights.loras import LoraSpec

# Inputs that come from files, or from arrays in Python.
INPUTS = ("init_image", "mask", "init_latents", "embeddings")


def file_digest(path: str) -> str:
    """SHA-256 of a file's content."""
    with open(expanded(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def origin(value: Any) -> dict[str, Any] | None:
    """What a record says of an input: its file (None for what is in memory) and the digest of its content."""
    if value is None:
        return None
    if isinstance(value, str | os.PathLike):
        return {"file": os.fspath(value), "row": None, "sha256": file_digest(os.fspath(value))}
    if isinstance(value, Mapping):
        arrays: Any = {name: np.asarray(value[name]) for name in sorted(value)}
    else:
        arrays = value.array if isinstance(value, Image) else np.asarray(value)
    return {"file": None, "row": None, "sha256": digest(arrays)}


def model_fields(
    *,
    model: str,
    revision: str | None,
    transformer: str | None,
    dtype: str,
    backend: str,
    weights: str = "full",
    loras: Sequence[LoraSpec] = (),
) -> dict[str, Any]:
    """The fields of the model, which all pictures of a run share."""
    return {
        "dtype": dtype,
        "backend": backend,
        "model": model,
        "revision": revision,
        "transformer": transformer,
        **({"weights": weights} if weights != "full" else {}),
        **({"loras": [lora.record() for lora in loras]} if loras else {}),
    }


def picture_fields(
    plan: Plan, index: int, model: Mapping[str, Any], inputs: Mapping[str, Mapping[str, Any] | None], vae: str
) -> dict[str, Any]:
    """The record of picture ``index`` of a plan, less what is known only when it is made.

    Args:
        plan: of the request.
        index: image index.
        model: `model_fields`.
        inputs: `origin` of each of `INPUTS`, with the row that is used where a file has several.
        vae: how it is decoded.
    """
    started = {name: inputs.get(name) for name in INPUTS}
    if started["mask"] is None:
        del started["mask"]
    return {**plan.record(index), **model, **started, "vae": vae}
