"""Previews: what latents show, by one linear map from their channels to red, green and blue.

The map is fitted to the autoencoder at hand, whatever its family: patches of known colours are encoded, and the colours
regressed on the latents.  A preview costs next to nothing and has one pixel per latent pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jax.typing import ArrayLike

PATCHES = 16  # a side of the chart
_RIDGE = 1e-3


def chart(factor: int, patches: int = PATCHES) -> np.ndarray:
    """The picture the map is fitted on, f32 [1, H, W, 3] in [-1, 1]: patches of 4 x 4 latent pixels in all colours."""
    colours = np.random.default_rng(0).uniform(-1, 1, (patches, patches, 3)).astype(np.float32)
    return np.kron(colours, np.ones((4 * factor, 4 * factor, 1), np.float32))[None]


@dataclass(frozen=True, eq=False)
class LinearPreview:
    """Latents to pictures of their size.

    Attributes:
        weights: f32 [C, 3].
        offset: f32 [3].
    """

    weights: np.ndarray
    offset: np.ndarray

    @classmethod
    def fit(cls, encode: Callable[[np.ndarray], ArrayLike], factor: int) -> LinearPreview:
        """The map of an autoencoder.

        Args:
            encode: pictures f32 [B, H, W, 3] in [-1, 1] to model-scale latents [B, H / factor, W / factor, C].
            factor: pixels per latent pixel.
        """
        picture = chart(factor)
        latents = np.asarray(encode(picture), np.float64)[0]
        height, width, channels = latents.shape
        colours = picture[0].reshape(height, factor, width, factor, 3).mean((1, 3)).astype(np.float64)
        inputs = np.concatenate([latents, np.ones((height, width, 1))], -1).reshape(-1, channels + 1)
        penalty = _RIDGE * len(inputs) * np.eye(channels + 1)
        penalty[-1, -1] = 0  # the offset is free
        solved = np.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ colours.reshape(-1, 3))
        return cls(solved[:-1].astype(np.float32), solved[-1].astype(np.float32))

    def __call__(self, latents: ArrayLike) -> np.ndarray:
        """Pictures uint8 [B, h, w, 3] of clean latents [B, h, w, C]."""
        colours = np.asarray(latents, np.float32) @ self.weights + self.offset
        return np.rint(np.clip((colours + 1) * 127.5, 0, 255)).astype(np.uint8)
