"""What a family is: the protocol, and what all families share in reading one.

A family says, as data and small functions, what differs between one kind of model and the next.  Nothing outside its
own modules (network, key map, this package's file of its name) names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
from flax import nnx
from jax.typing import DTypeLike

from converters.components import Part
from converters.errors import CheckpointError
from converters.keymap import Slot
from converters.reading.formats import read_json
from sega_jax.families.recipes import Recipe
from sega_jax.geometry import Grid, RopeSpec
from sega_jax.models.abstract import Component, build_abstract, parameters
from sega_jax.models.codec import CodecConfig
from sega_jax.models.denoiser import NetworkConfig
from sega_jax.models.packing import Packing
from sega_jax.models.quantized import Weights, scales
from sega_jax.models.tokenize import TextTokenizer
from sega_jax.sampling.denoise import Combine
from sega_jax.sampling.schedule import Schedule
from sega_jax.sharding.rules import Shardings
from sega_jax.weights.load import Change, load_part
from sega_jax.weights.loras import LoraSpec


@dataclass(frozen=True)
class Outline:
    """What configurations alone say about a pipeline: enough to plan a picture, without any weights.

    Attributes:
        family: name of the family.
        transformer_config, vae_config: configurations.
        schedule: of the noise.
        rope: rotary geometry.
        text_tokens: tokens a prompt is padded to.
        packing: latents to tokens.
        takes_guidance: whether a guidance scale was distilled into the network, as an input.
        guidance: distilled guidance the checkpoint is published with, where it takes any.
    """

    family: str
    transformer_config: NetworkConfig
    vae_config: CodecConfig
    schedule: Schedule
    rope: RopeSpec
    text_tokens: int
    packing: Packing
    takes_guidance: bool
    guidance: float = field(default=3.5, kw_only=True)

    def latent_shape(self, grid: Grid) -> tuple[int, int, int]:
        """(h, w, C) of the latents of a token grid."""
        return *self.packing.latents(grid.height, grid.width), self.packing.channels(
            self.transformer_config.in_channels
        )


@dataclass(frozen=True)
class Parts(Outline):
    """Everything a text-to-image pipeline of a family consists of.

    Attributes:
        transformer, vae: the denoising network and the autoencoder.
        encoders: text encoders, by the family's name for them.
        tokenizers: of the encoders, by the same names; empty where parts are abstract.
    """

    transformer: Component
    encoders: Mapping[str, Component]
    tokenizers: Mapping[str, TextTokenizer]
    vae: Component


@dataclass(frozen=True)
class Checkpoint:
    """A published model of a family, for people who choose one.

    Attributes:
        model: what ``--model`` takes: a hub id, or the embedded demo's name.
        licence: of the weights, with what it does not allow.
        trained: pixels (height, width) it was trained at.
        defaults: steps and guidance, with their source.
        checked: what of it has been run, and where.
    """

    model: str
    licence: str
    trained: tuple[int, int]
    defaults: str
    checked: str


class Family(Protocol):
    """How pipelines of a family are read, and what is their own on the way from a prompt to a prediction.

    Attributes:
        name: of the family.
        pipeline_class: ``_class_name`` of its ``model_index.json``.
        presets: outlines of models known by name, with the sizes published in their configurations.
        checkpoints: published models that run.
        prompt_encoder: name of the encoder whose tokens are the text stream.
        combine: predictions with and without the prompt to one (`sampling.denoise.classifier_free`).
    """

    name: str
    pipeline_class: str
    presets: Mapping[str, Callable[[], Outline]]
    checkpoints: tuple[Checkpoint, ...]
    prompt_encoder: str
    combine: Combine

    def outline(self, folder: Path, transformer: Path | None = None) -> Outline:
        """The outline of a pipeline folder; arguments as in `load`."""

    def load(
        self,
        folder: Path,
        dtype: DTypeLike,
        transformer: Path | None = None,
        shardings: Shardings | None = None,
        loras: Sequence[LoraSpec] = (),
        weights: Weights = "full",
    ) -> Parts:
        """The pipeline of a folder, each component in diffusers' or Orbax layout.

        Args:
            folder: the pipeline folder.
            dtype: of parameters.
            transformer: weights to use instead of the folder's transformer: anything `converters` opens that has one
                (component folder, Orbax folder, single file, GGUF).
            shardings: where parameters go, see `weights.load.fill`; None: the default device.
            loras: merged into the weights in float32, before the one cast to ``dtype``, or to int8.
            weights: of the transformer: ``"full"``, or ``"int8"`` for its blocks' matrices (`models.quantized`).

        Raises:
            CheckpointError: a component that does not load.
        """

    def network(self, outline: Outline, weights: Weights = "full") -> Callable[..., nnx.Module]:
        """Makes the denoising network from ``rngs``."""

    def abstract(
        self, source: str | Path, dtype: DTypeLike, transformer: Path | None = None, weights: Weights = "full"
    ) -> Parts:
        """The parts without numbers or tokenizers, of a preset's name or of a folder's configurations."""

    def encode(
        self,
        params: Mapping[str, nnx.State],
        ids: Mapping[str, Any],
        *,
        graphdefs: tuple[tuple[str, nnx.GraphDef], ...],
        dtype: str,
    ) -> dict[str, jax.Array]:
        """Token ids i32 [B, T] by encoder to the arrays of a `Conditioning`; compiled, with all but arrays static."""

    def token_counts(self, parts: Parts) -> Mapping[str, int]:
        """Tokens of a prompt, by encoder."""

    def conditioning_spec(self, outline: Outline, tokens: int | None = None) -> Mapping[str, tuple[int, ...]]:
        """Shapes of what `encode` gives, without the batch; ``tokens``: of the text stream, default the outline's."""

    def scales(self, outline: Outline, guidance: float | None) -> Mapping[str, float | None]:
        """The scalars that the network reads (`Conditioning.scales`), of which distilled guidance is one."""

    def recipe(self, outline: Outline, grid: Grid) -> Recipe:
        """Defaults for a picture of this grid."""

    def guided_recipe(self, outline: Outline, known: Recipe, guidance: float, positional: str | None) -> Recipe:
        """Defaults of layout ``scale-dit``, from those of the plain layout.

        Args:
            known: defaults of the plain layout.
            guidance: of the large picture, where the checkpoint takes it.
            positional: what the LoRA was trained with, if it says so.
        """


def configured(what: Path, build: Callable[[Mapping], Any]) -> Any:
    """A configuration object from a JSON file, with the file named in any complaint."""
    config = read_json(what)
    try:
        return build(config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what}: {error}") from error


def load_component(
    path: Path,
    part: Part,
    build: Callable,
    dtype: DTypeLike,
    shardings: Shardings | None = None,
    changes: Mapping[Slot, Change] | None = None,
) -> Component:
    """A component of any layout `converters` opens; ``path`` names it in errors."""
    try:
        module = load_part(lambda rngs: build(rngs=rngs), part, dtype=dtype, shardings=shardings, changes=changes)
    except CheckpointError as error:
        raise type(error)(f"{path}: {error}") from error
    return Component.of(module)


def abstract_component(build: Callable[..., nnx.Module], dtype: DTypeLike) -> Component:
    """What ``build`` makes from ``rngs``, with abstract parameters in ``dtype``, but for what it has in int8."""
    module = build_abstract(lambda rngs: build(rngs=rngs))
    kept = {path for pair in scales(module).items() for path in pair}
    for path, param in parameters(module).items():
        if path not in kept:
            param.set_value(jax.ShapeDtypeStruct(param.shape, dtype))
    return Component.of(module)
