"""Operators on latents for climbing from size to size: low-pass, bicubic, frequency mixing, structure guidance.

Pure linear algebra on channel-last arrays of any model; nothing here knows a network.  Formulas are those of ScaleDiff
(arXiv 2510.25818) as its code has them (KSH00906/ScaleDiff).  All in float32, or float64 where that is what comes in.
"""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

CUBIC = -0.75  # the kernel's free parameter as in PyTorch and OpenCV; jax.image.resize has -0.5


@lru_cache(maxsize=64)
def triangle_matrix(tokens: int, fewer: int) -> np.ndarray:
    """Antialiased bilinear reduction, float64 [fewer, tokens]: triangles of half-width ``tokens / fewer``."""
    step = tokens / fewer
    centre = (np.arange(fewer) + 0.5) * step - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(tokens)[None] - centre[:, None]) / step)
    return weights / weights.sum(1, keepdims=True)


@lru_cache(maxsize=64)
def linear_matrix(fewer: int, tokens: int) -> np.ndarray:
    """Bilinear enlargement with pixel centres at halves and edges repeated, float64 [tokens, fewer]."""
    at = np.maximum(0, (np.arange(tokens) + 0.5) * fewer / tokens - 0.5)
    low = np.minimum(np.floor(at).astype(int), fewer - 1)
    matrix = np.zeros((tokens, fewer))
    np.add.at(matrix, (np.arange(tokens), low), 1 - (at - low))
    np.add.at(matrix, (np.arange(tokens), np.minimum(low + 1, fewer - 1)), at - low)
    return matrix


@lru_cache(maxsize=64)
def lowpass_matrix(tokens: int, ratio: float) -> np.ndarray:
    """Reduction to ``floor(tokens * ratio)`` (at least 1) and back, float64 [tokens, tokens]."""
    fewer = max(1, int(tokens * ratio + 1e-9))
    return linear_matrix(fewer, tokens) @ triangle_matrix(tokens, fewer)


@lru_cache(maxsize=64)
def bicubic_matrix(tokens: int, more: int, a: float = CUBIC) -> np.ndarray:
    """Bicubic resizing without antialiasing, pixel centres at halves, edges repeated: float64 [more, tokens]."""
    at = (np.arange(more) + 0.5) * tokens / more - 0.5
    low = np.floor(at).astype(int)
    matrix = np.zeros((more, tokens))
    for tap in range(-1, 3):
        x = np.abs(at - (low + tap))
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        weight = np.where(x <= 1, near, np.where(x < 2, far, 0))
        np.add.at(matrix, (np.arange(more), np.clip(low + tap, 0, tokens - 1)), weight)
    return matrix


def _apply(x: ArrayLike, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """Rows and columns of x [B, H, W, C], each through its matrix."""
    x = jnp.asarray(x)
    x = jnp.einsum("yh,bhwc->bywc", rows.astype(x.dtype), x, precision="highest")
    return jnp.einsum("xw,bywc->byxc", columns.astype(x.dtype), x, precision="highest")


def lowpass(x: ArrayLike, ratio: float) -> jax.Array:
    """The low band of x [B, H, W, C]: antialiased bilinear reduction by ``ratio`` in (0, 1], bilinear enlargement."""
    height, width = x.shape[1:3]
    return _apply(x, lowpass_matrix(height, ratio), lowpass_matrix(width, ratio))


def bicubic(x: ArrayLike, height: int, width: int) -> jax.Array:
    """x [B, H, W, C] resized to ``height`` x ``width`` with a = -0.75; values are not clipped."""
    return _apply(x, bicubic_matrix(x.shape[1], height), bicubic_matrix(x.shape[2], width))


def mix(image: ArrayLike, latent: ArrayLike, ratio: float) -> jax.Array:
    """Latent frequency mixing: the high band of one latent with the low band of another, both [B, H, W, C].

    Args:
        image: latent of the enlarged picture, sharp.
        latent: the enlarged latent, free of the look of an enlarged photograph.
        ratio: of `lowpass`.
    """
    return image + lowpass(latent, ratio) - lowpass(image, ratio)


def guide(clean: ArrayLike, low_reference: ArrayLike, gamma: ArrayLike, ratio: float) -> jax.Array:
    """Structure guidance: the low band of a predicted clean latent moved by ``gamma`` towards the reference's.

    Args:
        clean: prediction, f32 [B, H, W, C].
        low_reference: `lowpass` of the reference with the same ratio.
        gamma: share, 0 leaves the prediction.
        ratio: of `lowpass`.
    """
    return clean + gamma * (low_reference - lowpass(clean, ratio))


def gamma_of_flow(sigmas: ArrayLike) -> np.ndarray:
    """Share of structure guidance for flow models: the noise level itself, f32 [steps] for sigmas [steps + 1]."""
    return np.asarray(sigmas)[:-1].astype(np.float32)


def gamma_of_diffusion(sigmas: ArrayLike) -> np.ndarray:
    """Share for variance-exploding noise levels: ``1 - alpha`` relative to the first step's, f32 [steps].

    ``1 - alpha = sigma^2 / (1 + sigma^2)`` with the cumulative alpha of the diffusion.
    """
    noise = np.square(np.asarray(sigmas, np.float64)[:-1])
    noise = noise / (1 + noise)
    return (noise / noise[0]).astype(np.float32)


def clean_of(x: ArrayLike, output: ArrayLike, sigma: ArrayLike) -> jax.Array:
    """Predicted clean latent, ``x - sigma * output``: velocity of a flow, or noise of variance-exploding diffusion."""
    return x - sigma * output


def euler_to(x: ArrayLike, clean: ArrayLike, sigma: ArrayLike, sigma_next: ArrayLike) -> jax.Array:
    """Euler step towards a clean prediction, ``clean + sigma_next / sigma * (x - clean)``; both families."""
    return clean + (sigma_next / sigma) * (x - clean)
