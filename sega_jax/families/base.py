"""What a family is: the protocol, and what all families share in reading one.

A family says, as data and small functions, what differs between one kind of model and the next.  Nothing outside its
own modules (network, key map, this package's file of its name) names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
from flax import nnx
from jax.typing import DTypeLike

from converters.components import Part
from converters.errors import CheckpointError
from converters.keymap import Slot
from converters.reading.formats import read_json
from sega_jax.geometry import RopeSpec
from sega_jax.models.abstract import Component, build_abstract, parameters
from sega_jax.models.flux import FluxConfig
from sega_jax.models.quantized import Weights, scales
from sega_jax.models.tokenize import TextTokenizer
from sega_jax.models.vae import VaeConfig
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


class Family(Protocol):
    """How pipelines of a family are read.

    Attributes:
        name: of the family.
        pipeline_class: ``_class_name`` of its ``model_index.json``.
        presets: outlines of models known by name, with the sizes published in their configurations.
    """

    name: str
    pipeline_class: str
    presets: Mapping[str, Callable[[], Outline]]

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
