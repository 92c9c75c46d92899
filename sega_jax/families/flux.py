"""FLUX.1 (dev, schnell, Krea-dev) and the demo model nano, which has its architecture."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import jax
from flax import nnx
from jax.typing import DTypeLike

from converters.components import open_component
from converters.errors import CheckpointError
from converters.lora import changes
from converters.reading.formats import read_json
from sega_jax.families import recipes
from sega_jax.families.base import Checkpoint, Outline, Parts, abstract_component, configured, load_component
from sega_jax.families.recipes import Recipe
from sega_jax.geometry import Grid
from sega_jax.models.clip import ClipConfig, ClipTextEncoder
from sega_jax.models.flux import PACKING, Flux, FluxConfig
from sega_jax.models.quantized import Weights, quantized
from sega_jax.models.t5 import T5Config, T5Encoder
from sega_jax.models.tokenize import TextTokenizer, load_clip_tokenizer, load_t5_tokenizer
from sega_jax.models.vae import Vae, VaeConfig
from sega_jax.sampling.denoise import classifier_free
from sega_jax.sampling.schedule import Schedule
from sega_jax.sharding.rules import Shardings
from sega_jax.weights.loras import LoraSpec

SCHNELL_TEXT_TOKENS = 256  # its tokenizer allows 512, the published pipeline uses 256
LONGEST_TEXT = 512
NARROW_TEXT = 1024  # no published T5 is narrower; nano's is
GUIDANCE = {"dev": 3.5, "krea-dev": 4.5}  # FLUX.1-dev's model card; the scripts of DyPE and SEGA for Krea-dev


def _flux_config(path: Path) -> FluxConfig:
    """Configuration of a FLUX.1 transformer; of a folder, its ``config.json`` is mostly enough."""
    if path.is_dir():
        folder = path / "transformer" if (path / "model_index.json").is_file() else path
        if "guidance_embeds" in read_json(folder / "config.json"):
            return configured(folder / "config.json", FluxConfig.from_dict)
    part = open_component(path, "transformer")  # where the configuration does not say, the tensors do
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
        rope=config.rope_spec((trained, trained), vae_config.factor * PACKING.patch),
        text_tokens=int(min(limit, longest)),
        packing=PACKING,
        takes_guidance=config.guidance_embeds,
        guidance=GUIDANCE["krea-dev" if _is_krea(folder, transformer) else "dev"],
    )


def _is_krea(folder: Path, transformer: Path | None) -> bool:
    """Whether weights are FLUX.1-Krea-dev's, which nothing but their name tells from FLUX.1-dev's.

    The name is that of the folder, of the hub's repository, or what the configuration says it was loaded from.
    """
    where = folder if transformer is None else transformer
    root = where.parent if where.name == "transformer" else where
    names = [where.name, root.name]
    if root.parent.name == "snapshots":  # of the hub: models--OWNER--NAME/snapshots/COMMIT
        names.append(root.parent.parent.name)
    for file in (where / "model_index.json", where / "config.json", where / "transformer" / "config.json"):
        if file.is_file():
            names.append(str(read_json(file).get("_name_or_path", "")))
    return any(re.search(r"krea[-_ ]?dev", name, re.IGNORECASE) for name in names)


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
        encoders={"clip": loaded["text_encoder"], "t5": loaded["text_encoder_2"]},
        tokenizers={"clip": clip_tokenizer, "t5": t5_tokenizer},
        vae=loaded["vae"],
    )


def _flux(config: FluxConfig, schedule: Schedule, text_tokens: int, variant: str = "dev") -> Outline:
    vae = VaeConfig.flux()
    rope = config.rope_spec((64, 64), PACKING.patch * vae.factor)
    guidance = GUIDANCE[variant]
    return Outline("flux", config, vae, schedule, rope, text_tokens, PACKING, config.guidance_embeds, guidance=guidance)


PRESETS = {  # with the sizes published in their configurations
    "flux-dev": lambda: _flux(FluxConfig.dev(), Schedule(), 512),
    "flux-krea-dev": lambda: _flux(FluxConfig.krea_dev(), Schedule(), 512, "krea-dev"),
    "flux-schnell": lambda: _flux(FluxConfig.schnell(), Schedule(dynamic=False, shift=1.0), 256),
}


def _abstract_parts(
    outline: Outline, clip: ClipConfig, t5: T5Config, dtype: DTypeLike, weights: Weights = "full"
) -> Parts:
    component = partial(abstract_component, dtype=dtype)
    return Parts(
        **vars(outline),
        transformer=component(network(outline, weights)),
        encoders={"clip": component(partial(ClipTextEncoder, clip)), "t5": component(partial(T5Encoder, t5))},
        tokenizers={},
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


_PROVEN = "every module and the key maps against diffusers on random weights; no picture from real weights yet"
_NON_COMMERCIAL = "FLUX.1 [dev] Non-Commercial License: not free for every use; gated on the hub"
CHECKPOINTS = (
    Checkpoint("nano", "Apache-2.0", (192, 192), "20 steps (its card)", "everything here; figures in docs/nano.md"),
    Checkpoint(
        "black-forest-labs/FLUX.1-dev", _NON_COMMERCIAL, (1024, 1024), "28 steps, guidance 3.5 (model card)", _PROVEN
    ),
    Checkpoint("black-forest-labs/FLUX.1-schnell", "Apache-2.0", (1024, 1024), "4 steps (model card)", _PROVEN),
    Checkpoint("black-forest-labs/FLUX.1-Krea-dev", _NON_COMMERCIAL, (1024, 1024), "28 steps (model card)", _PROVEN),
)


@partial(jax.jit, static_argnames=("graphdefs", "dtype"))
def encode(
    params: Mapping[str, nnx.State],
    ids: Mapping[str, jax.Array],
    *,
    graphdefs: tuple[tuple[str, nnx.GraphDef], ...],
    dtype: str,
) -> dict[str, jax.Array]:
    """T5's sequence as ``text`` [B, T, text_dim], CLIP's pooled vector as ``pooled`` [B, pooled_dim], in ``dtype``."""
    cast = partial(jax.tree.map, lambda x: x.astype(dtype))
    made = {name: nnx.merge(graphdef, cast(params[name]))(ids[name]) for name, graphdef in graphdefs}
    return {"text": made["t5"].astype(dtype), "pooled": made["clip"][1].astype(dtype)}


def token_counts(parts: Parts) -> Mapping[str, int]:
    """CLIP reads as many tokens as it has positions."""
    clip = parts.encoders["clip"]
    positions = nnx.merge(clip.graphdef, clip.params).positions
    return {"clip": jax.tree.leaves(nnx.state(positions))[0].shape[0], "t5": parts.text_tokens}


def conditioning_spec(outline: Outline, tokens: int | None = None) -> Mapping[str, tuple[int, ...]]:
    """Shapes without the batch."""
    config = outline.transformer_config
    return {
        "text": (outline.text_tokens if tokens is None else tokens, config.text_dim),
        "pooled": (config.pooled_dim,),
    }


def guidance_scales(outline: Outline, guidance: float | None) -> Mapping[str, float | None]:
    """The distilled guidance scale, for checkpoints that take it."""
    return {"guidance": guidance} if outline.takes_guidance else {}


def _is_nano(outline: Outline) -> bool:
    return outline.transformer_config.text_dim < NARROW_TEXT


def recipe(outline: Outline, grid: Grid) -> Recipe:
    """See `Family.recipe`."""
    return recipes.recipe(
        grid,
        guidance_embeds=outline.takes_guidance,
        dynamic_shift=outline.schedule.dynamic,
        text_width=outline.transformer_config.text_dim,
        guidance=outline.guidance,
    )


def guided_recipe(outline: Outline, known: Recipe, guidance: float, positional: str | None) -> Recipe:
    """See `Family.guided_recipe`."""
    return recipes.guided_recipe(known, guidance, nano=_is_nano(outline), positional=positional)


class Flux1:
    """The family; see `sega_jax.families.base.Family`."""

    name = "flux"
    pipeline_class = "FluxPipeline"
    presets = PRESETS
    checkpoints = CHECKPOINTS
    prompt_encoder = "t5"
    combine = staticmethod(classifier_free)
    outline = staticmethod(outline_flux)
    load = staticmethod(load_flux)
    network = staticmethod(network)
    abstract = staticmethod(abstract_flux)
    encode = staticmethod(encode)
    token_counts = staticmethod(token_counts)
    conditioning_spec = staticmethod(conditioning_spec)
    scales = staticmethod(guidance_scales)
    recipe = staticmethod(recipe)
    guided_recipe = staticmethod(guided_recipe)


FAMILY = Flux1()
