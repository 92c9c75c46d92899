"""Climbing to a size in stages: denoise, enlarge, add noise again, denoise (SDEdit), as ScaleDiff does it.

Between two stages the finished latent is enlarged twice, as a latent and as a picture through the autoencoder, and
the two are mixed by frequency; during a stage the low band of every prediction is pulled towards that reference
(arXiv 2510.25818).  The autoencoder comes in as a `Codec`, so decode and encode may be plain, exact or tiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sega_jax.geometry import Grid
from sega_jax.layouts.streams import Content, Layout, draw
from sega_jax.sampling import latent_ops as ops
from sega_jax.sampling.denoise import Conditioning, Velocity, add_noise, euler, initial_noise
from sega_jax.sampling.keys import key_of, pinned, words
from sega_jax.sampling.sampler import Noise, Stage, State

Reference = Literal["mixed", "image", "latent"]


@dataclass(frozen=True)
class Codec:
    """The autoencoder between stages.

    Attributes:
        decode: model-scale latents f32 [1, h, w, C] to a picture f32 [1, f h, f w, 3], not clipped.
        encode: a picture f32 [1, f h, f w, 3] and Gaussian noise f32 [1, h, w, C], or None for the posterior's mean,
            to model-scale latents f32 [1, h, w, C].
    """

    decode: Callable[[jax.Array], np.ndarray | jax.Array]
    encode: Callable[[jax.Array, jax.Array | None], jax.Array]


@dataclass(frozen=True)
class Level:
    """One size of a ladder.

    Attributes:
        velocity: the model, with this stage's positional method and layout.
        sigmas: noise levels from the stage's first step to 0, f32 [steps + 1].
        shape: (h, w, C) of the latents.
        gammas: share of structure guidance at every step, f32 [steps]; None is no guidance.
        rho_mix, rho_guide: low-pass ratios of frequency mixing and of structure guidance.
        reference: what the stage starts from: ``mixed``, the enlarged picture or the enlarged latent.
        posterior: whether the encoder's posterior is sampled; else its mean is taken.
    """

    velocity: Velocity
    sigmas: np.ndarray
    shape: tuple[int, int, int]
    gammas: np.ndarray | None = None
    rho_mix: float = 0.25
    rho_guide: float = 0.25
    reference: Reference = "mixed"
    posterior: bool = True

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


@partial(jax.jit, static_argnames="ratio")
def guided_euler(
    latents: jax.Array,
    velocity: jax.Array,
    low_reference: jax.Array,
    sigma: jax.Array,
    sigma_next: jax.Array,
    gamma: jax.Array,
    *,
    ratio: float,
) -> jax.Array:
    """One Euler step whose clean prediction is pulled towards a reference; float32 [B, H, W, C]."""
    clean = ops.guide(ops.clean_of(latents, velocity, sigma), low_reference, gamma, ratio)
    return ops.euler_to(latents, clean, sigma, sigma_next)


@partial(jax.jit, static_argnames=("number", "layout", "grid"))
def _drawn(seed: jax.Array, index: int, *, number: int, layout: Layout, grid: Grid) -> Content:
    key = jax.random.fold_in(jax.random.fold_in(key_of(seed), 2**31 + 1 + number), index)
    return draw(layout, key, grid)


def drawn(seed: jax.Array, index: int, *, number: int, layout: Layout, grid: Grid) -> Content:
    """What a layout draws for a step, once for the batch: a function of the first row's seed, of stage and step."""
    with pinned():
        return _drawn(seed, index, number=number, layout=layout, grid=grid)


_enlarged = jax.jit(ops.bicubic, static_argnums=(1, 2))
_mixed = jax.jit(ops.mix, static_argnums=2)
_low = jax.jit(ops.lowpass, static_argnums=1)


@dataclass(frozen=True)
class Ladder:
    """Stages one after the other; the first starts from noise, or is a picture that is there already.

    Attributes:
        levels: from small to large.
        codec: the autoencoder.
        source: picture f32 [1, H, W, 3] in [-1, 1] that takes the place of the first stage's result.
    """

    levels: tuple[Level, ...]
    codec: Codec
    source: np.ndarray | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """Steps per stage."""
        counts = [level.steps for level in self.levels]
        return (0 if self.source is not None else counts[0], *counts[1:])

    @property
    def steps(self) -> int:
        return sum(self.counts)

    def where(self, index: int) -> tuple[int, int]:
        """Stage and step in it of step ``index`` over all stages."""
        for number, count in enumerate(self.counts):
            if index < count:
                return number, index
            index -= count
        raise IndexError(f"a ladder of {self.steps} steps has no step {index + self.steps}")

    def start(self, noise: Noise, conditioning: Conditioning) -> State:
        first = self.levels[0]
        state = {
            "seed": jnp.asarray(np.broadcast_to(words(noise.seed), (len(noise.indices), 2))),
            "rows": jnp.asarray(noise.indices, jnp.uint32),
        }
        if self.source is None:
            latents = noise.field(first.shape)
        else:
            fresh = _field(state, first.shape, 1) if first.posterior else [None] * len(noise.indices)
            rows = [self.codec.encode(jnp.asarray(self.source), None if e is None else e[None]) for e in fresh]
            latents = jnp.concatenate(rows)
        return state | {"latents": latents, "method": first.velocity.initial_state(latents, conditioning)}

    def step(self, params: nnx.State, state: State, conditioning: Conditioning, index: int) -> State:
        number, i = self.where(index)
        stage = self.levels[number]
        if i == 0 and number:
            state = self._climb(state, conditioning, number)
        latents, sigma, sigma_next = state["latents"], stage.sigmas[i], stage.sigmas[i + 1]
        grid = stage.velocity.grid(latents, conditioning)
        content = drawn(state["seed"][0], i, number=number, layout=stage.velocity.layout, grid=grid)
        change, memory = stage.velocity.advance(params, latents, sigma, conditioning, i, state["method"], content)
        if number and stage.gammas is not None:
            latents = guided_euler(
                latents, change, state["low"], sigma, sigma_next, stage.gammas[i], ratio=stage.rho_guide
            )
        else:
            latents = euler(latents, change, sigma, sigma_next)
        return state | {"latents": latents, "method": memory}

    def latents(self, state: State) -> jax.Array:
        return state["latents"]

    def seen(self, state: State, index: int) -> tuple[jax.Array, float]:
        number, i = self.where(index)
        return state["latents"], float(self.levels[number].sigmas[i + 1])

    def stages(self) -> tuple[Stage, ...]:
        made = []
        for number, (level, count) in enumerate(zip(self.levels, self.counts, strict=True)):
            if count:
                grid = level.velocity.grid_of(*level.shape[:2], 0)
                content = jax.eval_shape(partial(draw, level.velocity.layout, grid=grid), key_of(words(0)))
                made.append(Stage(f"size {number + 1}", count, level.velocity, level.shape, content))
        return tuple(made)

    def _climb(self, state: State, conditioning: Conditioning, number: int) -> State:
        """The noisy start of a stage from the finished latents of the one before."""
        stage = self.levels[number]
        clean = self.reference(state, number)
        latents = add_noise(clean, _field(state, stage.shape, 2 * number), stage.sigmas[0])
        state = state | {"latents": latents, "method": stage.velocity.initial_state(latents, conditioning)}
        if stage.gammas is not None:
            state["low"] = _low(clean, stage.rho_guide)
        return state

    def reference(self, state: State, number: int) -> jax.Array:
        """What stage ``number`` is to look like: clean latents f32 [B, h, w, C] from the stage before."""
        stage, finished = self.levels[number], state["latents"]
        height, width, _ = stage.shape
        larger = _enlarged(finished, height, width)
        if stage.reference == "latent":
            return larger
        fresh = _field(state, stage.shape, 2 * number + 1) if stage.posterior else [None] * len(finished)
        rows = []
        for one, eps in zip(finished, fresh, strict=True):  # a picture at a time: they are large
            if number == 1 and self.source is not None:
                picture = jnp.asarray(self.source)
            else:
                picture = jnp.asarray(self.codec.decode(one[None]))
            factor = picture.shape[1] // one.shape[0]
            picture = _enlarged(picture, height * factor, width * factor)
            rows.append(self.codec.encode(picture, None if eps is None else eps[None]))
        sharp = jnp.concatenate(rows)
        return sharp if stage.reference == "image" else _mixed(sharp, larger, stage.rho_mix)


def _field(state: State, shape: tuple[int, int, int], number: int) -> jax.Array:
    """Gaussian field ``number`` of the run's pictures; 0 starts the run, 2 p and 2 p + 1 belong to stage p."""
    high, low = (column.astype(np.uint64) for column in np.asarray(state["seed"]).T)
    return initial_noise((high << np.uint64(32)) + low, np.asarray(state["rows"]), shape, number)
