"""Model families: from a checkpoint folder to the parts of a pipeline.

A family is a row of `FAMILIES`: the ``_class_name`` of its ``model_index.json``, how its configurations are read, and
a loader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from converters.errors import CheckpointError
from converters.formats import Kind, detect, open_tensors, read_json
from converters.keymap import Dims, Rename, Row
from converters.keymaps import clip as clip_keys
from converters.keymaps import flux as flux_keys
from converters.keymaps import t5 as t5_keys
from converters.keymaps import vae as vae_keys
from sega_jax import checkpoint
from sega_jax.checkpoint import TensorSource
from sega_jax.geometry import RopeSpec
from sega_jax.models.clip import ClipConfig, ClipTextEncoder
from sega_jax.models.flux import Flux, FluxConfig
from sega_jax.models.t5 import T5Config, T5Encoder
from sega_jax.models.tokenize import TextTokenizer, load_clip_tokenizer, load_t5_tokenizer
from sega_jax.models.vae import Vae, VaeConfig
from sega_jax.sampling.schedule import Schedule

SCHNELL_TEXT_TOKENS = 256  # its tokenizer allows 512, the published pipeline uses 256
LONGEST_TEXT = 512


@dataclass(frozen=True)
class Component:
    """A module split once into static structure and parameters, so that pure state crosses `jit`."""

    graphdef: nnx.GraphDef
    params: nnx.State

    @classmethod
    def of(cls, module: nnx.Module) -> Component:
        return cls(*nnx.split(module))


@dataclass(frozen=True)
class Outline:
    """What configurations alone say about a pipeline: enough to plan a picture, without any weights.

    Attributes:
        family: name of the family.
        transformer_config, vae_config: configurations.
        schedule: of the noise.
        rope: rotary geometry.
        text_tokens: tokens a prompt is padded to.
    """

    family: str
    transformer_config: FluxConfig
    vae_config: VaeConfig
    schedule: Schedule
    rope: RopeSpec
    text_tokens: int


@dataclass(frozen=True)
class Parts(Outline):
    """Everything a text-to-image pipeline of a family consists of."""

    transformer: Component
    clip: Component
    t5: Component
    clip_tokenizer: TextTokenizer
    t5_tokenizer: TextTokenizer
    vae: Component


def _configured(what: Path, build: Callable[[Mapping], Any]) -> tuple[Any, dict]:
    """A configuration object from a JSON file, with the file named in any complaint."""
    config = read_json(what)
    try:
        return build(config), config
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what}: {error}") from error


def _flux_map(path: Path) -> tuple[FluxConfig, Sequence[Row], Dims]:
    """Configuration and key map of a FLUX.1 transformer; reads no tensors."""
    if path.is_dir():
        config, raw = _configured(path / "config.json", FluxConfig.from_dict)
        return config, flux_keys.DIFFUSERS, flux_keys.dims({**config.to_dict(), **raw})
    kind = detect(path).kind
    if kind is not Kind.BFL_TRANSFORMER:
        raise CheckpointError(f"{path}: expected a Black Forest Labs FLUX.1 transformer, found {kind.value}")
    with open_tensors(path) as source:
        raw = flux_keys.config_from_bfl({name: source.shape(name) for name in source.keys()})  # noqa: SIM118
    return FluxConfig.from_dict(raw), flux_keys.BFL, flux_keys.dims(raw)


def load_flux_transformer(path: Path, dtype: DTypeLike) -> tuple[Component, FluxConfig]:
    """A FLUX.1 transformer from a diffusers component folder or a Black Forest Labs single file."""
    config, rows, dims = _flux_map(path)
    with open_tensors(path) as source:
        try:
            module = checkpoint.load(lambda rngs: Flux(config, rngs=rngs), rows, dims, source, dtype=dtype)
        except CheckpointError as error:
            raise type(error)(f"{path}: {error}") from error
    return Component.of(module), config


def _load(
    folder: Path,
    config_class: Any,
    build: Callable,
    key_map: Callable[[Any, TensorSource], tuple[Sequence[Row], Dims]],
    dtype: DTypeLike,
    rename: Rename | None = None,
) -> tuple[Component, Any]:
    """A component from its folder; ``key_map`` gives rows and sizes for the configuration and the tensors."""
    config, raw = _configured(folder / "config.json", config_class.from_dict)
    with open_tensors(folder) as source:
        tensors = source if rename is None else checkpoint.RenamedSource(source, rename)
        rows, dims = key_map({**asdict(config), **raw}, tensors)
        try:
            module = checkpoint.load(lambda rngs: build(config, rngs=rngs), rows, dims, tensors, dtype=dtype)
        except CheckpointError as error:
            raise type(error)(f"{folder}: {error}") from error
    return Component.of(module), config


def _vae_map(config: Mapping, source: TensorSource) -> tuple[Sequence[Row], Dims]:
    layout = vae_keys.detect({name: source.shape(name) for name in source.keys()})  # noqa: SIM118
    return vae_keys.rows(config, layout), vae_keys.dims(config)


def _text_encoder(folder: Path, config_class: Any, build: Callable, keys: Any, dtype: DTypeLike, tokens: TextTokenizer):
    component, config = _load(
        folder, config_class, build, lambda raw, _: (keys.ROWS, keys.dims(raw)), dtype, keys.rename
    )
    if tokens.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: {config.vocab_size} token embeddings for a tokenizer of {tokens.vocab_size} tokens; "
            "encoder and tokenizer are of different models"
        )
    return component


def outline_flux(folder: Path, transformer: Path | None = None) -> Outline:
    """The outline of a FLUX.1 pipeline folder; arguments as in `load_flux`."""
    schedule, _ = _configured(folder / "scheduler" / "scheduler_config.json", Schedule.from_dict)
    config, _, _ = _flux_map(transformer or folder / "transformer")
    vae_config, _ = _configured(folder / "vae" / "config.json", VaeConfig.from_dict)
    limit = read_json(folder / "tokenizer_2" / "tokenizer_config.json").get("model_max_length", LONGEST_TEXT)
    # schnell alone has neither guidance input nor dynamic shift
    longest = LONGEST_TEXT if config.guidance_embeds or schedule.dynamic else SCHNELL_TEXT_TOKENS
    trained = math.isqrt(schedule.max_tokens)  # the upper anchor of the shift is the trained token count
    return Outline(
        family="flux",
        transformer_config=config,
        vae_config=vae_config,
        schedule=schedule,
        rope=config.rope_spec((trained, trained), vae_config.factor * 2),
        text_tokens=int(min(limit, longest)),
    )


def load_vae(folder: Path, dtype: DTypeLike) -> tuple[Component, VaeConfig]:
    """The autoencoder of a pipeline folder, without the rest."""
    return _load(folder / "vae", VaeConfig, Vae, _vae_map, dtype)


def load_flux(folder: Path, dtype: DTypeLike, transformer: Path | None = None) -> Parts:
    """FLUX.1 (dev, schnell, Krea-dev, nano) from a diffusers folder.

    Args:
        folder: the pipeline folder.
        dtype: of parameters.
        transformer: weights to use instead of the folder's transformer: a component folder or a BFL single file.
    """
    outline = outline_flux(folder, transformer)
    dit, _ = load_flux_transformer(transformer or folder / "transformer", dtype)
    clip_tokenizer = load_clip_tokenizer(folder / "tokenizer")
    t5_tokenizer = load_t5_tokenizer(folder / "tokenizer_2", outline.text_tokens)
    vae, _ = load_vae(folder, dtype)
    return Parts(
        **vars(outline),
        transformer=dit,
        clip=_text_encoder(folder / "text_encoder", ClipConfig, ClipTextEncoder, clip_keys, dtype, clip_tokenizer),
        t5=_text_encoder(folder / "text_encoder_2", T5Config, T5Encoder, t5_keys, dtype, t5_tokenizer),
        clip_tokenizer=clip_tokenizer,
        t5_tokenizer=t5_tokenizer,
        vae=vae,
    )


@dataclass(frozen=True)
class Family:
    """How pipelines of a family are read."""

    outline: Callable[[Path, Path | None], Outline]
    load: Callable[[Path, DTypeLike, Path | None], Parts]


FAMILIES: dict[str, Family] = {"FluxPipeline": Family(outline_flux, load_flux)}


def family_of(folder: Path) -> Family:
    """The family of the pipeline in ``folder``.

    Raises:
        CheckpointError: not a pipeline folder, or an unknown family.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise CheckpointError(f"{folder}: no model_index.json; give a diffusers pipeline folder, a hub id, or 'nano'")
    name = read_json(index).get("_class_name")
    if name not in FAMILIES:
        raise CheckpointError(f"{index}: pipeline class {name!r} is not supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def load_parts(folder: Path, *, dtype: DTypeLike = jnp.float32, transformer: Path | None = None) -> Parts:
    """The parts of the pipeline in ``folder``.

    Raises:
        CheckpointError: not a pipeline folder, an unknown family, or a component that does not load.
    """
    return family_of(folder).load(folder, dtype, transformer)
