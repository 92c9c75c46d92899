"""A run as a chain of steps over a state, so that every sampler is driven, watched, saved and resumed alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx

from sega_jax.sampling.denoise import Conditioning, Velocity, add_noise, euler, initial_noise

State = Any  # a pytree of arrays: all that the next step needs, and what a checkpoint of a run holds


@dataclass(frozen=True)
class Noise:
    """Gaussian fields of a batch of pictures.

    Attributes:
        seed: of all of them, or one for each row.
        indices: image index of each row.
        given: field 0, f32 [B, h, w, C], in place of the seed's.
    """

    seed: int | tuple[int, ...]
    indices: tuple[int, ...]
    given: np.ndarray | None = None

    def field(self, shape: tuple[int, int, int], number: int = 0) -> jax.Array:
        """f32 [B, *shape]; depends on (seed, image index, number) alone, number 0 being the initial noise.

        Raises:
            ValueError: ``given`` has another shape.
        """
        if number or self.given is None:
            return initial_noise(self.seed, self.indices, shape, number)
        if self.given.shape != (len(self.indices), *shape):
            raise ValueError(f"initial noise {self.given.shape}: expected {(len(self.indices), *shape)}")
        return jax.numpy.asarray(self.given, jax.numpy.float32)


@dataclass(frozen=True)
class Stage:
    """Steps of a run that are one compiled program, as `sega_jax.costs.report` compiles and counts it without weights.

    Attributes:
        name: for people.
        steps: how many of them.
        velocity: what they call, once each.
        latents: (h, w, C) of its latents, or of each canvas by name.
        content: of layouts with traced content, its arrays for a batch of one (`jax.ShapeDtypeStruct` will do).
    """

    name: str
    steps: int
    velocity: Velocity
    latents: tuple[int, int, int] | Mapping[str, tuple[int, int, int]]
    content: Any = None


@runtime_checkable
class Sampler(Protocol):
    """How pictures come about from noise.  Pure: a step's result depends on its arguments alone."""

    @property
    def steps(self) -> int:
        """Number of steps, over all stages."""
        ...

    def start(self, noise: Noise, conditioning: Conditioning) -> State: ...

    def step(self, params: nnx.State, state: State, conditioning: Conditioning, index: int) -> State:
        """The state after step ``index``, counted from 0 over all stages."""
        ...

    def latents(self, state: State) -> jax.Array:
        """The picture in a finished state: model-scale latents f32 [B, h, w, C]."""
        ...

    def seen(self, state: State, index: int) -> tuple[jax.Array, float]:
        """Latents f32 [B, h, w, C] that step ``index`` left, of the size it worked on, and their noise level."""
        ...

    def stages(self) -> tuple[Stage, ...]:
        """What the steps compile to, in their order; needs no weights."""
        ...


@dataclass(frozen=True)
class Keep:
    """What of a picture stays: after every step it is put back, noised anew to the level of that step.

    Attributes:
        clean: latents of the picture, f32 [1, h, w, C].
        free: 1 where it may change and 0 where it stays, f32 [1, h, w, 1].
    """

    clean: jax.Array
    free: jax.Array

    def put_back(self, latents: jax.Array, noise: jax.Array, sigma: float) -> jax.Array:
        """The latents with what stays in its place, at noise level ``sigma``."""
        return jax.numpy.where(self.free > 0, latents, add_noise(self.clean, noise, sigma))


@dataclass(frozen=True)
class Euler:
    """One size, one layout, Euler steps from the first noise level to zero.

    Attributes:
        velocity: the model.
        sigmas: noise levels, f32 [steps + 1].
        shape: (h, w, C) of the latents.
        source: latents of a picture to start from, f32 [1, h, w, C], noised to the first level; None is noise.
        keep: what of that picture stays; None is nothing.
    """

    velocity: Velocity
    sigmas: np.ndarray
    shape: tuple[int, int, int]
    source: jax.Array | None = None
    keep: Keep | None = None

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def start(self, noise: Noise, conditioning: Conditioning) -> State:
        drawn = latents = noise.field(self.shape)
        if self.source is not None:
            latents = add_noise(self.source, latents, self.sigmas[0])
        state = {"latents": latents, "method": self.velocity.initial_state(latents, conditioning)}
        return state if self.keep is None else {**state, "noise": drawn}

    def step(self, params: nnx.State, state: State, conditioning: Conditioning, index: int) -> State:
        latents, sigma = state["latents"], self.sigmas[index]
        change, memory = self.velocity.advance(params, latents, sigma, conditioning, index, state["method"])
        latents = euler(latents, change, sigma, self.sigmas[index + 1])
        if self.keep is not None:
            latents = self.keep.put_back(latents, state["noise"], self.sigmas[index + 1])
        return {**state, "latents": latents, "method": memory}

    def latents(self, state: State) -> jax.Array:
        return state["latents"]

    def seen(self, state: State, index: int) -> tuple[jax.Array, float]:
        return state["latents"], float(self.sigmas[index + 1])

    def stages(self) -> tuple[Stage, ...]:
        return (Stage("denoise", self.steps, self.velocity, self.shape),)
