"""From a plan to the sampler that serves it: noise levels, velocities and the autoencoder between stages."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax import positional as pe
from sega_jax.decoding.decode import VaeMode
from sega_jax.layouts.streams import Layout
from sega_jax.pipeline.ladders import sigmas_of
from sega_jax.pipeline.planning import Plan
from sega_jax.sampling import rungs
from sega_jax.sampling.crpa import CoarseMixedFine, Crpa
from sega_jax.sampling.ladder import Codec, Ladder, Level
from sega_jax.sampling.regions import get_regions
from sega_jax.sampling.registry import get_layout
from sega_jax.sampling.sampler import Euler, Keep, Sampler
from sega_jax.sampling.scale_dit import Guided, TwoStage, enlarge, sharpen
from sega_jax.sampling.schedule import start_index

if TYPE_CHECKING:
    from sega_jax.pipeline.pipeline import Pipeline


def sampler_of(
    pipe: Pipeline,
    plan: Plan,
    method: str | pe.Method,
    layout: str | Layout | Crpa | Guided,
    source: np.ndarray | None = None,
    regions: Any = None,
    vae: VaeMode = "auto",
    mask: np.ndarray | None = None,
) -> Sampler:
    """How the pictures of a plan come about; arguments as in `Pipeline.sampler`."""
    if mask is not None:
        check_mask(plan)
    if plan.ladder is not None:
        return _ladder(pipe, plan, method, source, vae)
    layout = get_layout(layout)
    if isinstance(layout, Guided):
        return _two_stage(pipe, plan, method, vae)
    grid = pipe.grid(plan.height, plan.width)
    sigmas = pipe.parts.schedule.sigmas(plan.steps, grid.tokens, plan.mu)
    sigmas = sigmas[0 if plan.strength is None else start_index(plan.steps, plan.strength) :]
    shape = pipe.latent_shape(grid)
    latents = None if source is None else pipe.encode_image(source, plan.seed)
    if isinstance(layout, Crpa):
        chosen = get_regions(plan.regions if regions is None else regions)
        return CoarseMixedFine.of(pipe.velocity(method), sigmas, shape, layout, chosen, source=latents)
    keep = None if mask is None else Keep(latents, jnp.asarray(free_latents(mask, pipe.parts.vae_config.factor)))
    return Euler(pipe.velocity(method, layout), sigmas, shape, latents, keep)


def check_mask(plan: Plan) -> None:
    """Complains about a plan that has no single size all along, in which a mask could hold.

    Raises:
        ValueError: naming what the plan has instead.
    """
    if plan.ladder is not None or isinstance(get_layout(plan.layout), Crpa | Guided):
        what = "a ladder" if plan.ladder is not None else f"layout={plan.layout!r}"
        raise ValueError(f"mask with {what}: a mask holds in runs of one size; use layout='dense' without a ladder")


def free_latents(mask: np.ndarray, factor: int) -> np.ndarray:
    """Which latents may change, f32 [1, h, w, 1], for pixels that may, bool [H, W]: those with any such pixel."""
    height, width = mask.shape
    free = mask.reshape(height // factor, factor, width // factor, factor).any((1, 3))
    return free[None, ..., None].astype(np.float32)


def _ladder(pipe: Pipeline, plan: Plan, method: str | pe.Method, source: np.ndarray | None, vae: VaeMode) -> Ladder:
    levels = []
    for number, rung in enumerate(plan.ladder):
        sigmas = sigmas_of(plan.ladder, number, pipe.parts)
        # an object of one's own may have no name that leads back to it
        own = rung.positional == plan.positional
        levels.append(
            Level(
                pipe.velocity(method if own else rung.positional, rung.layout),
                sigmas,
                pipe.latent_shape(pipe.grid(rung.height, rung.width)),
                rungs.gammas_of(rung, sigmas),
                rung.rho_mix or rungs.RHO,
                rung.rho_guide or rungs.RHO,
                rung.reference or "mixed",
                rung.posterior != "mean",
            )
        )

    def encode(image: jax.Array, noise: jax.Array | None) -> jax.Array:
        mean, logvar = pipe.posterior(np.asarray(image))
        chosen = jnp.asarray(mean) if noise is None else mean + jnp.exp(0.5 * logvar) * noise
        return pipe.parts.vae_config.normalize(chosen)

    return Ladder(tuple(levels), Codec(partial(pipe.decode, vae=vae), encode), source)


def _two_stage(pipe: Pipeline, plan: Plan, method: str | pe.Method, vae: VaeMode) -> TwoStage:
    settings = get_layout(plan.layout)
    grid = pipe.grid(plan.height, plan.width)
    small = settings.layout.low_grid(grid)
    sigmas = pipe.parts.schedule.sigmas(plan.steps, grid.tokens, plan.mu)
    height, width, channels = pipe.latent_shape(grid)

    def by_latents(low: jax.Array) -> jax.Array:
        return enlarge(low, (height, width))

    def by_pixels(low: jax.Array) -> jax.Array:
        means = []
        for one in pipe.decode(low, vae=vae):  # a picture at a time: they are large, and none depends on its batch
            picture = sharpen(enlarge(jnp.asarray(one)[None], grid.pixels))
            means.append(pipe.posterior(np.asarray(picture))[0])
        return pipe.parts.vae_config.normalize(jnp.asarray(np.concatenate(means)))

    own = pipe.plan("", height=small.pixels[0], width=small.pixels[1], steps=plan.steps).positional
    return TwoStage(
        settings,
        pipe.velocity(own),
        pipe.velocity(method, settings.layout),
        pipe.parts.schedule.sigmas(plan.steps, small.tokens, plan.mu),
        sigmas[settings.first(plan.steps) :],
        (height, width, channels),
        {"pixels": by_pixels, "latents": by_latents}.get(settings.start),
    )
