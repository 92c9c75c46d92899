"""The families this package knows, and pipelines by folder or by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from converters.components import open_component
from converters.errors import CheckpointError
from converters.others import refuse_pipeline
from converters.reading.formats import read_json
from sega_jax.families import flux
from sega_jax.families.base import Family, Outline, Parts, configured, load_component
from sega_jax.models.abstract import Component
from sega_jax.models.quantized import Weights
from sega_jax.models.vae import Vae, VaeConfig
from sega_jax.sampling.denoise import Conditioning
from sega_jax.sharding.rules import Shardings
from sega_jax.weights.hub import resolve
from sega_jax.weights.loras import LoraSpec

FAMILIES: dict[str, Family] = {family.pipeline_class: family for family in (flux.FAMILY,)}


def family_named(name: str) -> Family:
    """The family of this name, as `Outline.family` has it."""
    return next(family for family in FAMILIES.values() if family.name == name)


def family_of(folder: Path) -> Family:
    """The family of the pipeline in ``folder``.

    Raises:
        CheckpointError: not a pipeline folder, or an unknown family.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise CheckpointError(f"{folder}: no model_index.json; give a diffusers pipeline folder, a hub id, or 'nano'")
    name = read_json(index).get("_class_name")
    refuse_pipeline(name, str(folder))
    if name not in FAMILIES:
        raise CheckpointError(f"{index}: pipeline class {name!r} is not supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def load_parts(
    folder: Path,
    *,
    dtype: DTypeLike = jnp.float32,
    transformer: Path | None = None,
    shardings: Shardings | None = None,
    loras: Sequence[LoraSpec] = (),
    weights: Weights = "full",
) -> Parts:
    """The parts of the pipeline in ``folder``; arguments as of `Family.load`.

    Raises:
        CheckpointError: not a pipeline folder, an unknown family, or a component that does not load.
    """
    return family_of(folder).load(folder, dtype, transformer, shardings, loras, weights)


def load_vae(folder: Path, dtype: DTypeLike, shardings: Shardings | None = None) -> tuple[Component, VaeConfig]:
    """The autoencoder of a pipeline folder, without the rest."""
    config = configured(folder / "vae" / "config.json", VaeConfig.from_dict)
    part = open_component(folder / "vae", "vae")
    with closing(part.source):
        return load_component(folder / "vae", part, partial(Vae, config), dtype, shardings), config


def skeleton(
    model: str | Path,
    dtype: DTypeLike = "bfloat16",
    *,
    transformer: Path | None = None,
    weights: Weights = "full",
    **hub: Any,
) -> Parts:
    """The parts of a pipeline with `jax.ShapeDtypeStruct` for parameters, and no tokenizers.

    Args:
        model: ``"flux-dev"``, ``"flux-krea-dev"``, ``"flux-schnell"``, ``"nano"``, a diffusers folder or a hub id, of
            which configurations alone are fetched.
        dtype: of parameters.
        transformer, weights: as of `Pipeline.from_pretrained`.
        **hub: see `sega_jax.weights.hub.resolve`.

    Raises:
        CheckpointError, ValueError: as `sega_jax.weights.hub.resolve` and `family_of`.
    """
    for family in FAMILIES.values():
        if model in family.presets:
            return family.abstract(str(model), dtype, transformer, weights)
    folder = resolve(model, weights=False, **hub)
    return family_of(folder).abstract(folder, dtype, transformer, weights)


def abstract_conditioning(
    outline: Outline,
    array: Callable[[tuple[int, ...], Any], Any],
    *,
    rows: int,
    dtype: Any,
    guided: bool,
    tokens: int | None = None,
) -> Conditioning:
    """What a run conditions on, with shapes for numbers.

    Args:
        outline: of the pipeline.
        array: makes an abstract array from its shape and dtype.
        rows: pictures of a call.
        dtype: of encoded prompts.
        guided: whether a negative prompt is given.
        tokens: of the text stream; default the outline's.
    """
    family = family_named(outline.family)
    shapes = family.conditioning_spec(outline, tokens)
    encoded = {name: array((rows, *shape), dtype) for name, shape in shapes.items()}
    scales = {name: array((), jnp.float32) for name in family.scales(outline, None)}
    return Conditioning(encoded, scales, encoded if guided else None, array((), jnp.float32) if guided else None)
