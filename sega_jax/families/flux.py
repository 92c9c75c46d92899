"""Model families: from a checkpoint folder to the parts of a pipeline.

A family is a row of `FAMILIES`: the ``_class_name`` of its ``model_index.json``, how its configurations are read, and
a loader.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from converters.components import Part, open_component
from converters.errors import CheckpointError
from converters.keymap import Slot
from converters.lora.factors import changes
from converters.reading.formats import read_json
from sega_jax.geometry import RopeSpec
from sega_jax.models.clip import ClipConfig, ClipTextEncoder
from sega_jax.models.flux import Flux, FluxConfig
from sega_jax.models.quantized import Weights, quantized
from sega_jax.models.t5 import T5Config, T5Encoder
from sega_jax.models.tokenize import TextTokenizer, load_clip_tokenizer, load_t5_tokenizer
from sega_jax.models.vae import Vae, VaeConfig
from sega_jax.sampling.schedule import Schedule
from sega_jax.weights import load as checkpoint
from sega_jax.weights.load import Change, Shardings
from sega_jax.weights.loras import LoraSpec

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


def configured(what: Path, build: Callable[[Mapping], Any]) -> Any:
    """A configuration object from a JSON file, with the file named in any complaint."""
    config = read_json(what)
    try:
        return build(config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what}: {error}") from error


def _flux_config(path: Path) -> FluxConfig:
    """Configuration of a FLUX.1 transformer; of a folder, its ``config.json`` is enough."""
    if path.is_dir():
        folder = path / "transformer" if (path / "model_index.json").is_file() else path
        return configured(folder / "config.json", FluxConfig.from_dict)
    part = open_component(path, "transformer")
    part.source.close()
    try:
        return FluxConfig.from_dict(part.config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _load(
    path: Path,
    part: Part,
    build: Callable,
    dtype: DTypeLike,
    shardings: Shardings | None = None,
    changes: Mapping[Slot, Change] | None = None,
) -> Component:
    """A component of any layout `converters` opens; ``path`` names it in errors."""
    try:
        module = checkpoint.load_part(
            lambda rngs: build(rngs=rngs), part, dtype=dtype, shardings=shardings, changes=changes
        )
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error
    return Component.of(module)


def _check_vocabulary(folder: Path, config: ClipConfig | T5Config, tokens: TextTokenizer) -> None:
    if tokens.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: {config.vocab_size} token embeddings for a tokenizer of {tokens.vocab_size} tokens; "
            "encoder and tokenizer are of different models"
        )


def outline_flux(folder: Path, transformer: Path | None = None) -> Outline:
    """The outline of a FLUX.1 pipeline folder; arguments as in `load_flux`."""
    schedule = configured(folder / "scheduler" / "scheduler_config.json", Schedule.from_dict)
    config = _flux_config(transformer or folder / "transformer")
    vae_config = configured(folder / "vae" / "config.json", VaeConfig.from_dict)
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


def build_flux(config: FluxConfig, weights: Weights = "full") -> Callable[..., Flux]:
    """Makes a transformer from ``rngs``."""
    return partial(Flux, config) if weights == "full" else lambda rngs: quantized(Flux(config, rngs=rngs))


def load_vae(folder: Path, dtype: DTypeLike, shardings: Shardings | None = None) -> tuple[Component, VaeConfig]:
    """The autoencoder of a pipeline folder, without the rest."""
    config = configured(folder / "vae" / "config.json", VaeConfig.from_dict)
    part = open_component(folder / "vae", "vae")
    with closing(part.source):
        return _load(folder / "vae", part, partial(Vae, config), dtype, shardings), config


def load_flux(
    folder: Path,
    dtype: DTypeLike,
    transformer: Path | None = None,
    shardings: Shardings | None = None,
    loras: Sequence[LoraSpec] = (),
    weights: Weights = "full",
) -> Parts:
    """FLUX.1 (dev, schnell, Krea-dev, nano) from a pipeline folder, each component in diffusers' or Orbax layout.

    Args:
        folder: the pipeline folder.
        dtype: of parameters.
        transformer: weights to use instead of the folder's transformer: anything `converters` opens that has one
            (component folder, Orbax folder, single file of Black Forest Labs or ComfyUI, GGUF).
        shardings: where parameters go, see `weights.load.fill`; None: the default device.
        loras: merged into the weights in float32, before the one cast to ``dtype``, or to int8.
        weights: of the transformer: ``"full"``, or ``"int8"`` for its blocks' matrices (`models.quantized`).
    """
    outline = outline_flux(folder, transformer)
    clip_tokenizer = load_clip_tokenizer(folder / "tokenizer")
    t5_tokenizer = load_t5_tokenizer(folder / "tokenizer_2", outline.text_tokens)
    clip_config = configured(folder / "text_encoder" / "config.json", ClipConfig.from_dict)
    t5_config = configured(folder / "text_encoder_2" / "config.json", T5Config.from_dict)
    _check_vocabulary(folder / "text_encoder", clip_config, clip_tokenizer)
    _check_vocabulary(folder / "text_encoder_2", t5_config, t5_tokenizer)
    builds = {
        "transformer": (transformer or folder / "transformer", build_flux(outline.transformer_config, weights)),
        "text_encoder": (folder / "text_encoder", partial(ClipTextEncoder, clip_config)),
        "text_encoder_2": (folder / "text_encoder_2", partial(T5Encoder, t5_config)),
        "vae": (folder / "vae", partial(Vae, outline.vae_config)),
    }
    with ExitStack() as stack:
        parts = {}
        for name, (path, _) in builds.items():
            parts[name] = open_component(path, name)
            stack.callback(parts[name].source.close)
        wanted = changes(parts, [(lora.read(), lora.weight) for lora in loras], folder)
        loaded = {
            name: _load(path, parts[name], build, dtype, shardings, wanted[name])
            for name, (path, build) in builds.items()
        }
    return Parts(
        **vars(outline),
        transformer=loaded["transformer"],
        clip=loaded["text_encoder"],
        t5=loaded["text_encoder_2"],
        clip_tokenizer=clip_tokenizer,
        t5_tokenizer=t5_tokenizer,
        vae=loaded["vae"],
    )


@dataclass(frozen=True)
class Family:
    """How pipelines of a family are read."""

    outline: Callable[[Path, Path | None], Outline]
    load: Callable[[Path, DTypeLike, Path | None, Shardings | None, Sequence[LoraSpec], Weights], Parts]


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


def load_parts(
    folder: Path,
    *,
    dtype: DTypeLike = jnp.float32,
    transformer: Path | None = None,
    shardings: Shardings | None = None,
    loras: Sequence[LoraSpec] = (),
    weights: Weights = "full",
) -> Parts:
    """The parts of the pipeline in ``folder``; arguments as in `load_flux`.

    Raises:
        CheckpointError: not a pipeline folder, an unknown family, or a component that does not load.
    """
    return family_of(folder).load(folder, dtype, transformer, shardings, loras, weights)
