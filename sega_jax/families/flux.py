"""FLUX.1 (dev, schnell, Krea-dev) and the demo model nano, which has its architecture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from jax.typing import DTypeLike

from converters.components import open_component
from converters.errors import CheckpointError
from converters.lora import changes
from converters.reading.formats import read_json
from sega_jax.families.base import Outline, Parts, abstract_component, configured, load_component
from sega_jax.models.clip import ClipConfig, ClipTextEncoder
from sega_jax.models.flux import Flux, FluxConfig
from sega_jax.models.quantized import Weights, quantized
from sega_jax.models.t5 import T5Config, T5Encoder
from sega_jax.models.tokenize import TextTokenizer, load_clip_tokenizer, load_t5_tokenizer
from sega_jax.models.vae import Vae, VaeConfig
from sega_jax.sampling.schedule import Schedule
from sega_jax.sharding.rules import Shardings
from sega_jax.weights.loras import LoraSpec

SCHNELL_TEXT_TOKENS = 256  # its tokenizer allows 512, the published pipeline uses 256
LONGEST_TEXT = 512


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


def _check_vocabulary(folder: Path, config: ClipConfig | T5Config, tokens: TextTokenizer) -> None:
    if tokens.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: {config.vocab_size} token embeddings for a tokenizer of {tokens.vocab_size} tokens; "
            "encoder and tokenizer are of different models"
        )


def outline_flux(folder: Path, transformer: Path | None = None) -> Outline:
    """The outline of a FLUX.1 pipeline folder; arguments as of `Family.outline`."""
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


def network(outline: Outline, weights: Weights = "full") -> Callable[..., Flux]:
    """Makes a transformer from ``rngs``."""
    config = outline.transformer_config
    return partial(Flux, config) if weights == "full" else lambda rngs: quantized(Flux(config, rngs=rngs))


def load_flux(
    folder: Path,
    dtype: DTypeLike,
    transformer: Path | None = None,
    shardings: Shardings | None = None,
    loras: Sequence[LoraSpec] = (),
    weights: Weights = "full",
) -> Parts:
    """FLUX.1 (dev, schnell, Krea-dev, nano) from a pipeline folder; arguments as of `Family.load`."""
    outline = outline_flux(folder, transformer)
    clip_tokenizer = load_clip_tokenizer(folder / "tokenizer")
    t5_tokenizer = load_t5_tokenizer(folder / "tokenizer_2", outline.text_tokens)
    clip_config = configured(folder / "text_encoder" / "config.json", ClipConfig.from_dict)
    t5_config = configured(folder / "text_encoder_2" / "config.json", T5Config.from_dict)
    _check_vocabulary(folder / "text_encoder", clip_config, clip_tokenizer)
    _check_vocabulary(folder / "text_encoder_2", t5_config, t5_tokenizer)
    builds = {
        "transformer": (transformer or folder / "transformer", network(outline, weights)),
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
            name: load_component(path, parts[name], build, dtype, shardings, wanted[name])
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


def _flux(config: FluxConfig, schedule: Schedule, text_tokens: int) -> Outline:
    vae = VaeConfig.flux()
    return Outline("flux", config, vae, schedule, config.rope_spec((64, 64), 2 * vae.factor), text_tokens)


PRESETS = {  # with the sizes published in their configurations
    "flux-dev": lambda: _flux(FluxConfig.dev(), Schedule(), 512),
    "flux-krea-dev": lambda: _flux(FluxConfig.krea_dev(), Schedule(), 512),
    "flux-schnell": lambda: _flux(FluxConfig.schnell(), Schedule(dynamic=False, shift=1.0), 256),
}


def _abstract_parts(
    outline: Outline, clip: ClipConfig, t5: T5Config, dtype: DTypeLike, weights: Weights = "full"
) -> Parts:
    component = partial(abstract_component, dtype=dtype)
    return Parts(
        **vars(outline),
        transformer=component(network(outline, weights)),
        clip=component(partial(ClipTextEncoder, clip)),
        t5=component(partial(T5Encoder, t5)),
        clip_tokenizer=None,
        t5_tokenizer=None,
        vae=component(partial(Vae, outline.vae_config)),
    )


def abstract_flux(
    source: str | Path, dtype: DTypeLike, transformer: Path | None = None, weights: Weights = "full"
) -> Parts:
    """Parts with abstract parameters in ``dtype``, but for what ``weights`` has in int8; see `Family.abstract`."""
    if isinstance(source, str):
        return _abstract_parts(PRESETS[source](), ClipConfig.large(), T5Config.xxl(), dtype, weights)
    clip = configured(source / "text_encoder" / "config.json", ClipConfig.from_dict)
    t5 = configured(source / "text_encoder_2" / "config.json", T5Config.from_dict)
    return _abstract_parts(outline_flux(source, transformer), clip, t5, dtype, weights)


class Flux1:
    """The family; see `sega_jax.families.base.Family`."""

    name = "flux"
    pipeline_class = "FluxPipeline"
    presets = PRESETS
    outline = staticmethod(outline_flux)
    load = staticmethod(load_flux)
    network = staticmethod(network)
    abstract = staticmethod(abstract_flux)


FAMILY = Flux1()
