"""The latent's spectrum: axis and radial energy profiles and their flatness (sega.md §4).

Two real DFT matmuls in place of an FFT: the same power to rounding, and a form every backend compiles and shards.
Bin maps are exact integers computed on the host (sega.md §5); sums over bins are gathers, not scatters, so they are
the same on every run.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.geometry import Grid
from sega_jax.positional.rules import real_dtype

EPS = 1e-8  # sega.md §1


class Spectrum(NamedTuple):
    """Energy profiles of a latent, per sample.

    Attributes:
        height: energy per row frequency, lowest first, [B, max(H // 2, 8)].
        width: energy per column frequency, [B, max(W // 2, 8)].
        radial: energy per ring of the 2-D spectrum, [B, max(H, W) // 2].
        flatness: geometric over arithmetic mean of ``radial``, in [0, 1]; 1 is white noise, [B].
    """

    height: jax.Array
    width: jax.Array
    radial: jax.Array
    flatness: jax.Array


def measure(
    tokens: jax.Array,
    grid: Grid,
    probe: jax.Array | None = None,
    reduce: Literal["sample", "batch"] = "sample",
) -> Spectrum:
    """Spectrum of image tokens, the statistic SEGA reads.

    Args:
        tokens: [B, H * W, C] floats, image tokens row by row.  Extra tokens behind them are an error.
        grid: the tokens' grid.
        probe: weights of the channels in the map that is analysed, [C]; default: their mean.  With the latent as
            tokens and the image embedder's output-channel mean as probe this is the released statistic, as the
            embedder is affine and the map is centred (sega.md §4.1).
        reduce: ``"sample"``: one spectrum per sample; ``"batch"``: all samples get the spectrum of their mean map,
            as in the released code, where an image depends on its batch.

    Returns:
        `Spectrum` with a leading batch axis, float32 (float64 under x64).
    """
    power = power_spectrum(collapse(tokens, grid, probe, reduce))
    height, width = axis_profiles(power)
    radial = radial_profile(power)
    return Spectrum(height, width, radial, flatness(radial))


def collapse(
    tokens: jax.Array,
    grid: Grid,
    probe: jax.Array | None = None,
    reduce: Literal["sample", "batch"] = "sample",
) -> jax.Array:
    """Zero-mean map of the tokens' weighted channel sum: [B, H * W, C] -> [B, H, W]; arguments as `measure`."""
    if tokens.ndim != 3 or tokens.shape[1] != grid.tokens:
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)}: expected [batch, {grid.tokens}, channels] for a grid of "
            f"{grid.height} x {grid.width} tokens"
        )
    if reduce not in ("sample", "batch"):
        raise ValueError(f"reduce={reduce!r}: expected 'sample' or 'batch'")
    tokens = tokens.astype(real_dtype())
    if probe is None:
        image = tokens.mean(axis=-1)
    else:
        if probe.shape != tokens.shape[-1:]:
            channels = tokens.shape[-1]
            raise ValueError(f"probe of shape {tuple(probe.shape)}: expected one weight per channel, ({channels},)")
        image = jnp.einsum("bnc,c->bn", tokens, probe.astype(tokens.dtype), precision="highest")
    if reduce == "batch":
        image = jnp.broadcast_to(image.mean(axis=0, keepdims=True), image.shape)
    image = image - image.mean(axis=1, keepdims=True)
    return image.reshape(-1, grid.height, grid.width)


def _dft(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the DFT with frequencies in shifted order ``u - length // 2``, float64 [length, length]."""
    turns = np.outer(np.arange(length) - length // 2, np.arange(length)) % length  # exact integers before the angle
    angle = 2 * np.pi * turns / length
    return np.cos(angle), np.sin(angle)


def power_spectrum(image: jax.Array) -> jax.Array:
    """Shifted power ``|fftshift(FFT2(image))| ** 2`` of real maps: [..., H, W] -> [..., H, W]."""
    height, width = image.shape[-2:]
    rows = jnp.asarray(np.concatenate(_dft(height)), image.dtype)  # [2 H, H]
    columns = jnp.asarray(np.concatenate(_dft(width)), image.dtype)  # [2 W, W]
    half = jnp.einsum("uy,...yx->...ux", rows, image, precision="highest")
    both = jnp.einsum("...ux,vx->...uv", half, columns, precision="highest")
    cos_cos, cos_sin = both[..., :height, :width], both[..., :height, width:]
    sin_cos, sin_sin = both[..., height:, :width], both[..., height:, width:]
    return (cos_cos - sin_sin) ** 2 + (cos_sin + sin_cos) ** 2


@functools.cache
def axis_bins(length: int) -> tuple[np.ndarray, int]:
    """Bin of every frequency ``0 .. length // 2`` of an axis, and the number of bins (sega.md §4.2)."""
    half = length // 2 + 1
    bins = max(length // 2, 8)
    index = np.minimum(np.arange(half) * bins // max(half - 1, 1), bins - 1)
    return index, bins


@functools.cache
def radial_bins(height: int, width: int) -> tuple[np.ndarray, int]:
    """Ring of every cell of the shifted plane [height, width], and the number of rings.

    Exact integer form of sega.md §5.2: ties on ring boundaries go outwards.
    """
    bins = max(max(height, width) // 2, 1)
    i = 2 * np.arange(height, dtype=np.int64) - height
    j = 2 * np.arange(width, dtype=np.int64) - width
    squared = bins**2 * (i[:, None] ** 2 + j[None, :] ** 2) // (height**2 + width**2)
    return np.minimum(np.floor(np.sqrt(squared)).astype(np.int64), bins - 1), bins


def _members(index: np.ndarray, bins: int) -> np.ndarray:
    """Flat positions of each bin's members, padded with one past the end: [bins, largest bin]."""
    index = index.ravel()
    sizes = np.bincount(index, minlength=bins)
    order = np.argsort(index, kind="stable")
    members = np.full((bins, sizes.max()), index.size, np.int32)
    members[index[order], np.arange(index.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)] = order
    return members


@functools.cache
def _axis_members(length: int) -> tuple[np.ndarray, np.ndarray]:
    index, bins = axis_bins(length)
    return _members(index, bins), np.bincount(index, minlength=bins)


@functools.cache
def _ring_members(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Members in the folded quarter of the plane; counts of the whole plane."""
    index, bins = radial_bins(height, width)
    return _members(index[: height // 2 + 1, : width // 2 + 1], bins), np.bincount(index.ravel(), minlength=bins)


def _bin_means(values: jax.Array, members: np.ndarray, counts: np.ndarray) -> jax.Array:
    """Mean of every bin's members: [..., M] -> [..., bins]; empty bins are 0."""
    padded = jnp.concatenate([values, jnp.zeros_like(values[..., :1])], axis=-1)
    sums = jnp.take(padded, members, axis=-1, mode="clip").sum(axis=-1)
    weights = jnp.asarray(1.0 / (counts + EPS), values.dtype)
    return sums * weights.reshape((1,) * (sums.ndim - 1) + weights.shape)


def axis_profiles(power: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row and column profiles of shifted power [..., H, W]: ``[..., max(H // 2, 8)], [..., max(W // 2, 8)]``.

    By Parseval the power of the 1-D transforms, averaged over the other axis, is the mean of the 2-D power over the
    other frequency divided by that axis' length (sega.md §4.2).
    """
    height, width = power.shape[-2:]
    rows = power.mean(axis=-1)[..., : height // 2 + 1][..., ::-1] / width  # frequencies 0, -1, .. as 0, 1, ..
    columns = power.mean(axis=-2)[..., : width // 2 + 1][..., ::-1] / height
    return _bin_means(rows, *_axis_members(height)), _bin_means(columns, *_axis_members(width))


def radial_profile(power: jax.Array) -> jax.Array:
    """Ring means of shifted power: [..., H, W] -> [..., max(H, W) // 2] (sega.md §4.3)."""
    height, width = power.shape[-2:]
    folded = _fold(_fold(power, axis=-2), axis=-1)
    return _bin_means(folded.reshape(*folded.shape[:-2], -1), *_ring_members(height, width))


def _fold(power: jax.Array, axis: int) -> jax.Array:
    """Sum of the cells ``i`` and ``length - i``, which share every ring: length -> length // 2 + 1."""
    length = power.shape[axis]
    near = jax.lax.slice_in_dim(power, 0, length // 2 + 1, axis=axis)
    far = jnp.flip(jax.lax.slice_in_dim(power, length // 2 + 1, length, axis=axis), axis)  # length - 1, .., downwards
    missing = near.shape[axis] - 1 - far.shape[axis]
    ends = [(0, 0)] * power.ndim
    ends[axis] = (1, missing)
    return near + jnp.pad(far, ends)


def flatness(radial: jax.Array) -> jax.Array:
    """Geometric over arithmetic mean of the rings, each with equal weight: [..., rings] -> [...] (sega.md §4.4)."""
    energy = jnp.maximum(radial, EPS)
    ratio = jnp.exp(jnp.log(energy).mean(axis=-1)) / (energy.mean(axis=-1) + EPS)
    return jnp.clip(ratio, 0.0, 1.0)
