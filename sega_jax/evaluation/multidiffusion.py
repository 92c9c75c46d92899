"""MultiDiffusion: the whole model on overlapping native windows, predictions averaged; the baseline of ScaleDiff.

Windows are as large as the trained grid and half a window apart, so that ``(2 s - 1)^2`` model calls serve a canvas
``s`` times as large per side (arXiv 2302.08113; counted as in ScaleDiff, arXiv 2510.25818).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sega_jax.geometry import Grid
from sega_jax.layouts.streams import Content, Layout
from sega_jax.sampling.denoise import Conditioning, Velocity
from sega_jax.sampling.ladder import Ladder


def window_starts(side: int, window: int) -> list[int]:
    """First index of every window along a side, half a window apart.

    Raises:
        ValueError: the side is no multiple of half a window, or shorter than one.
    """
    if window % 2 or side < window or side % (window // 2):
        raise ValueError(f"side={side}: expected a multiple of {window // 2}, at least {window}")
    return list(range(0, side - window + 1, window // 2))


@dataclass(frozen=True)
class MultiDiffusion:
    """A `Velocity` that sees the canvas through windows; takes its place in a `ladder.Level`.

    Attributes:
        velocity: the model on one window.
        window: (h, w) in latent pixels.
    """

    velocity: Velocity
    window: tuple[int, int]

    @property
    def layout(self) -> Layout:
        return self.velocity.layout

    def grid(self, latents: jax.Array, conditioning: Conditioning) -> Grid:
        return self.velocity.grid(latents[:, : self.window[0], : self.window[1]], conditioning)

    def initial_state(self, latents: jax.Array, conditioning: Conditioning) -> Any:
        """None: positional methods that remember are not served, windows have nothing to remember in common."""
        del latents, conditioning
        return None

    def advance(
        self,
        params: nnx.State,
        latents: jax.Array,
        sigma: Any,
        conditioning: Conditioning,
        step: int = 0,
        state: Any = None,
        content: Content = None,
    ) -> tuple[jax.Array, Any]:
        """Velocity f32 [B, H, W, C]: the mean over the windows that hold a pixel."""
        height, width = self.window
        total, times = jnp.zeros_like(latents), jnp.zeros((1, *latents.shape[1:3], 1), latents.dtype)
        starts = (window_starts(n, w) for n, w in zip(latents.shape[1:3], self.window, strict=True))
        for y, x in itertools.product(*starts):
            at = (slice(None), slice(y, y + height), slice(x, x + width))
            part, _ = self.velocity.advance(params, latents[at], sigma, conditioning, step, None, content)
            total, times = total.at[at].add(part), times.at[at].add(1.0)
        return total / times, state


def multidiffusion(ladder: Ladder, velocity: Velocity) -> Ladder:
    """A ladder whose levels above the first see the canvas through windows of the first one's size.

    Args:
        ladder: to change.
        velocity: the model with the dense layout.
    """
    first, *others = ladder.levels
    windowed = [replace(level, velocity=MultiDiffusion(velocity, first.shape[:2])) for level in others]
    return replace(ladder, levels=(first, *windowed))
