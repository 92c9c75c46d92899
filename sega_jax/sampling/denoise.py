"""One denoising step: spectrum, ropes, calls, model, guidance.  Pure, traced in everything that is not a shape.

`predict` is the whole step up to the velocity and `euler` the update.  They are compiled once per (shape, batch,
method class): sigma, guidance, spectra and the method's numbers are traced.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from sega_jax import positional as pe
from sega_jax.geometry import Grid
from sega_jax.layouts.blocks import Leaf
from sega_jax.layouts.streams import Layout, bind
from sega_jax.models.flux import pack, unpack


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Conditioning:
    """What the model is asked for.

    Attributes:
        text: T5 sequence [B, T, text_dim].
        pooled: pooled CLIP vector [B, pooled_dim].
        guidance: distilled guidance scale, f32 scalar, or None for models without the embedding.
        negative: ``(text, pooled)`` to steer away from (true classifier-free guidance), or None.
        true_guidance: scale of true guidance, f32 scalar; with a negative prompt only.
    """

    text: Leaf
    pooled: Leaf
    guidance: Leaf = None
    negative: Leaf = None
    true_guidance: Leaf = None


def _twice(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, x])


def _repeat_samples(rope: pe.Rope, batch: int) -> pe.Rope:
    """Ropes of a batch for the batch with and without the prompt."""

    def twice(x: jax.Array) -> jax.Array:
        return _twice(x) if x.ndim > 1 and x.shape[0] == batch and batch > 1 else x

    return jax.tree.map(twice, rope)


@partial(jax.jit, static_argnames=("graphdef", "layout", "grid", "dtype", "backend"))
def predict(
    params: nnx.State,
    method: pe.Method,
    latents: jax.Array,
    sigma: jax.Array,
    conditioning: Conditioning,
    step: jax.Array,
    state: Any,
    *,
    graphdef: nnx.GraphDef,
    layout: Layout,
    grid: Grid,
    dtype: str,
    backend: str = "auto",
) -> tuple[jax.Array, Any]:
    """Velocity ``noise - clean`` at one noise level, and the method's next state.

    Args:
        params: transformer parameters.
        method: positional method, in traceable form (`positional.traceable`).
        latents: model-scale latents, f32 [B, H, W, C].
        sigma: noise level, f32 scalar.
        conditioning: prompts and guidance.
        step: i32 scalar, index of the step.
        state: the method's memory, or None.
        graphdef: structure of the transformer.
        layout: where tokens sit and whom they see.
        grid: token grid.
        dtype: of activations.
        backend: attention kernel.
    """
    model = nnx.merge(graphdef, params)
    batch = latents.shape[0]
    tokens = pack(latents.astype(jnp.float32))
    # The embedder is affine, so its output averaged over channels is the latent times this vector (sega.md §4.1).
    probe = model.image_embed.kernel[...].astype(jnp.float32).mean(-1)

    ropes, new_state = {}, state
    for name, rope_grid in layout.grids(grid).items():
        spectrum = pe.statistic(method, tokens, rope_grid, probe)
        signals = pe.Signals(sigma=sigma, spectrum=spectrum, step=step, state=state)
        ropes[name] = method(rope_grid, signals)
        new_state = pe.next_state(method, rope_grid, signals)

    text, pooled = conditioning.text, conditioning.pooled
    guided = conditioning.negative is not None
    if guided:
        text = jnp.concatenate([text, conditioning.negative[0]])
        pooled = jnp.concatenate([pooled, conditioning.negative[1]])
        tokens = _twice(tokens)
        ropes = {n: {k: _repeat_samples(rope, batch) for k, rope in r.items()} for n, r in ropes.items()}
    rows = tokens.shape[0]
    guidance = conditioning.guidance
    velocity = model(
        {"text": text.astype(dtype), "image": tokens.astype(dtype)},
        jnp.broadcast_to(sigma, (rows,)),
        pooled,
        None if guidance is None else jnp.broadcast_to(guidance, (rows,)),
        bind(layout.calls(grid), ropes),
        streams=layout.streams(),
        backend=backend,
    )["image"].astype(jnp.float32)
    if guided:
        positive, negative = velocity[:batch], velocity[batch:]
        velocity = negative + conditioning.true_guidance * (positive - negative)
    return unpack(velocity, grid.height, grid.width), new_state


@jax.jit
def euler(latents: ArrayLike, velocity: ArrayLike, sigma: ArrayLike, sigma_next: ArrayLike) -> jax.Array:
    """One Euler step of the flow, ``x + (sigma_next - sigma) * velocity``, float32."""
    return latents + (sigma_next - sigma) * velocity


@jax.jit
def add_noise(clean: ArrayLike, noise: ArrayLike, sigma: ArrayLike) -> jax.Array:
    """``(1 - sigma) * clean + sigma * noise``, float32: where an image-to-image run starts."""
    return (1 - sigma) * clean + sigma * noise


@partial(jax.jit, static_argnames=("shape", "number"))
def _noise(seed: jax.Array, indices: jax.Array, shape: tuple[int, ...], number: int) -> jax.Array:
    def one(index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), index)
        return jax.random.normal(jax.random.fold_in(key, number) if number else key, shape, jnp.float32)

    return jax.vmap(one)(indices)


def initial_noise(seed: int, indices: list[int], shape: tuple[int, int, int], number: int = 0) -> jax.Array:
    """Gaussian latents f32 [len(indices), *shape]; each depends on (seed, image index, number) and on nothing else.

    Number 0 is where a run starts; stages that add noise again take others.
    """
    return _noise(jnp.asarray(seed, jnp.uint32), jnp.asarray(indices, jnp.uint32), shape, number)


@dataclass(frozen=True)
class Velocity:
    """The model as a pure function ``f(params, latents, sigma, conditioning) -> velocity``.

    Differentiable, vmappable, and exactly what `Pipeline.generate` steps with: an Euler loop over it reproduces
    its latents bit for bit.
    """

    graphdef: nnx.GraphDef
    method: pe.Method
    layout: Layout
    spec_grid: Any  # (latent height, latent width, text tokens) -> Grid
    dtype: str
    backend: str = "auto"

    def grid(self, latents: jax.Array, conditioning: Conditioning) -> Grid:
        """The token grid of these latents."""
        return self.spec_grid(latents.shape[1], latents.shape[2], conditioning.text.shape[1])

    def initial_state(self, latents: jax.Array, conditioning: Conditioning) -> Any:
        """The positional method's memory before the first step; None for methods without."""
        return pe.initial_state(self.method, self.grid(latents, conditioning), latents.shape[0])

    def advance(self, params, latents, sigma, conditioning, step=0, state=None) -> tuple[jax.Array, Any]:
        """Velocity and the method's next state; for methods that remember, or read the step index."""
        return predict(
            params,
            pe.traceable(self.method),
            latents,
            jnp.asarray(sigma, jnp.float32),
            conditioning,
            jnp.asarray(step, jnp.int32),
            state,
            graphdef=self.graphdef,
            layout=self.layout,
            grid=self.grid(latents, conditioning),
            dtype=self.dtype,
            backend=self.backend,
        )

    def __call__(self, params: nnx.State, latents: jax.Array, sigma: Any, conditioning: Conditioning) -> jax.Array:
        """Velocity f32 [B, H, W, C] at latents f32 [B, H, W, C] and sigma (scalar in [0, 1])."""
        return self.advance(params, latents, sigma, conditioning)[0]

    def with_method(self, method: pe.Method) -> Velocity:
        """The same function under another positional method."""
        return replace(self, method=method)
