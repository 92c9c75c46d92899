"""A pipeline without its numbers: abstract parts of a model known by name or by its configurations alone.

Everything that is compiled or counted ahead of time starts here; no weights are read, fetched or allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from sega_jax.families.flux import Component, Outline, Parts, build_flux, configured, family_of
from sega_jax.models.abstract import build_abstract, parameters
from sega_jax.models.clip import ClipConfig, ClipTextEncoder
from sega_jax.models.flux import FluxConfig
from sega_jax.models.quantized import Weights, scales
from sega_jax.models.t5 import T5Config, T5Encoder
from sega_jax.models.vae import Vae, VaeConfig
from sega_jax.sampling.schedule import Schedule
from sega_jax.weights.hub import resolve


def _flux(config: FluxConfig, schedule: Schedule, text_tokens: int) -> Outline:
    vae = VaeConfig.flux()
    return Outline("flux", config, vae, schedule, config.rope_spec((64, 64), 2 * vae.factor), text_tokens)


PRESETS = {  # with the sizes published in their configurations
    "flux-dev": lambda: _flux(FluxConfig.dev(), Schedule(), 512),
    "flux-krea-dev": lambda: _flux(FluxConfig.krea_dev(), Schedule(), 512),
    "flux-schnell": lambda: _flux(FluxConfig.schnell(), Schedule(dynamic=False, shift=1.0), 256),
}


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
        CheckpointError, ValueError: as `sega_jax.weights.hub.resolve` and `sega_jax.families.flux.family_of`.
    """
    if model in PRESETS:
        outline, clip, t5 = PRESETS[model](), ClipConfig.large(), T5Config.xxl()
    else:
        folder = resolve(model, weights=False, **hub)
        outline = family_of(folder).outline(folder, transformer)
        clip = configured(folder / "text_encoder" / "config.json", ClipConfig.from_dict)
        t5 = configured(folder / "text_encoder_2" / "config.json", T5Config.from_dict)
    return abstract_parts(outline, clip, t5, dtype, weights)


def abstract_component(build: Callable[..., nnx.Module], dtype: DTypeLike) -> Component:
    """What ``build`` makes from ``rngs``, with abstract parameters in ``dtype``, but for what it has in int8."""
    module = build_abstract(lambda rngs: build(rngs=rngs))
    kept = {path for pair in scales(module).items() for path in pair}
    for path, param in parameters(module).items():
        if path not in kept:
            param.set_value(jax.ShapeDtypeStruct(param.shape, dtype))
    return Component.of(module)


def abstract_parts(
    outline: Outline, clip: ClipConfig, t5: T5Config, dtype: DTypeLike, weights: Weights = "full"
) -> Parts:
    """Parts with abstract parameters in ``dtype``, but for what ``weights`` has in int8."""
    component = partial(abstract_component, dtype=dtype)
    return Parts(
        **vars(outline),
        transformer=component(build_flux(outline.transformer_config, weights)),
        clip=component(partial(ClipTextEncoder, clip)),
        t5=component(partial(T5Encoder, t5)),
        clip_tokenizer=None,
        t5_tokenizer=None,
        vae=component(partial(Vae, outline.vae_config)),
    )


def text_length(parts: Parts) -> tuple[int, int]:
    """Tokens of a prompt for CLIP and for T5."""
    positions = nnx.merge(parts.clip.graphdef, parts.clip.params).positions
    return jax.tree.leaves(nnx.state(positions))[0].shape[0], parts.text_tokens
