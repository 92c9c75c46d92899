"""The latent's spectrum: axis and radial energy profiles and their flatness (SEGA, arXiv 2605.22668).

Two real DFT matmuls in place of an FFT: the same power to rounding, and a form every backend compiles and shards.
Bin maps are computed on the host, by exact integers or as the released code rounds them; sums over bins are gathers,
not scatters, so they are the same on every run.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.geometry import Grid
from sega_jax.positional.rules import real_dtype

EPS = 1e-8  # of the released code, wherever it keeps a logarithm or a quotient finite

Bins = Literal["exact", "float32"]


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
    bins: Bins = "exact",
) -> Spectrum:
    """Spectrum of image tokens, the statistic SEGA reads.

    Args:
        tokens: [B, H * W, C] floats, image tokens row by row.  Extra tokens behind them are an error.
        grid: the tokens' grid.
        probe: weights of the channels in the map that is analysed, [C]; default: their mean.  With the latent as
            tokens and the image embedder's output-channel mean as probe this is the released statistic, as the
            embedder is affine and the map is centred.
        reduce: ``"sample"``: one spectrum per sample; ``"batch"``: all samples get the spectrum of their mean map,
            as in the released code, where an image depends on its batch.
        bins: which frequency counts to which bin.  ``"exact"``: by integers.  ``"float32"``: as the released code's
            float32 arithmetic truncates, which at most sizes leaves some bins empty and doubles their neighbours.

    Returns:
        `Spectrum` with a leading batch axis, float32 (float64 under x64).
    """
    power = power_spectrum(collapse(tokens, grid, probe, reduce))
    height, width = axis_profiles(power, bins)
    radial = radial_profile(power, bins)
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


def _checked_bins(bins: str) -> None:
    if bins not in ("exact", "float32"):
        raise ValueError(f"bins={bins!r}: expected 'exact' or 'float32'")


@functools.cache
def axis_bins(length: int, bins: Bins = "exact") -> tuple[np.ndarray, int]:
    """Bin of every frequency ``0 .. length // 2`` of an axis, and the number of bins.

    Frequency ``u`` of the ``half`` others belongs to bin ``floor(u * count / half)``.  The released code
    (``compute_axis_spectral_profiles`` of its transformer) truncates a float32 ``linspace(0, 1) * count`` instead:
    where ``1 / count`` is no binary fraction some products fall just short of the whole number.
    """
    _checked_bins(bins)
    half, count = length // 2, max(length // 2, 8)
    if bins == "exact":
        index = np.arange(half + 1) * count // max(half, 1)
    else:
        index = (_linspace32(half + 1) * np.float32(count)).astype(np.int64)
    return np.minimum(index, count - 1), count


def _linspace32(points: int) -> np.ndarray:
    """``torch.linspace(0, 1, points)`` in float32, bit for bit: from both ends inwards, rounded once."""
    index = np.arange(points)
    step = np.float64(np.float32(1) / np.float32(max(points - 1, 1)))
    upwards, downwards = step * index, 1 - step * (points - 1 - index)  # float64 holds both exactly
    return np.where(index < points // 2, upwards, downwards).astype(np.float32)


@functools.cache
def radial_bins(height: int, width: int, bins: Bins = "exact") -> tuple[np.ndarray, int]:
    """Ring of every cell of the shifted plane [height, width], and the number of rings.

    Radii are in index units and relative to the corner's.  Exactly, cells on a ring's boundary go outwards; the
    released code (``compute_spectral_energy_profile``) rounds radius, quotient and product to float32.
    """
    _checked_bins(bins)
    count = max(max(height, width) // 2, 1)
    i = 2 * np.arange(height, dtype=np.int64) - height
    j = 2 * np.arange(width, dtype=np.int64) - width
    squared = i[:, None] ** 2 + j[None, :] ** 2  # four times the radius', a whole number
    if bins == "exact":
        ring = np.floor(np.sqrt(count**2 * squared // (height**2 + width**2))).astype(np.int64)
    else:
        radius = np.sqrt(squared.astype(np.float32) / np.float32(4))
        ring = (radius / (radius.max() + np.float32(EPS)) * np.float32(count)).astype(np.int64)
    return np.minimum(ring, count - 1), count


def _members(index: np.ndarray, bins: int) -> np.ndarray:
    """Flat positions of each bin's members, padded with one past the end: [bins, largest bin]."""
    index = index.ravel()
    sizes = np.bincount(index, minlength=bins)
    order = np.argsort(index, kind="stable")
    members = np.full((bins, sizes.max()), index.size, np.int32)
    members[index[order], np.arange(index.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)] = order
    return members


@functools.cache
def _axis_members(length: int, bins: Bins) -> tuple[np.ndarray, np.ndarray]:
    index, count = axis_bins(length, bins)
    return _members(index, count), np.bincount(index, minlength=count)


@functools.cache
def _ring_members(height: int, width: int, bins: Bins) -> tuple[np.ndarray, np.ndarray]:
    """Members in the folded quarter of the plane; counts of the whole plane."""
    index, count = radial_bins(height, width, bins)
    return _members(index[: height // 2 + 1, : width // 2 + 1], count), np.bincount(index.ravel(), minlength=count)


def _bin_means(values: jax.Array, members: np.ndarray, counts: np.ndarray) -> jax.Array:
    """Mean of every bin's members: [..., M] -> [..., bins]; empty bins are 0."""
    padded = jnp.concatenate([values, jnp.zeros_like(values[..., :1])], axis=-1)
    sums = jnp.take(padded, members, axis=-1, mode="clip").sum(axis=-1)
    weights = jnp.asarray(1.0 / (counts + EPS), values.dtype)
    return sums * weights.reshape((1,) * (sums.ndim - 1) + weights.shape)


def axis_profiles(power: jax.Array, bins: Bins = "exact") -> tuple[jax.Array, jax.Array]:
    """Row and column profiles of shifted power [..., H, W]: ``[..., max(H // 2, 8)], [..., max(W // 2, 8)]``.

    By Parseval the power of the 1-D transforms, averaged over the other axis, is the mean of the 2-D power over the
    other frequency divided by that axis' length.
    """
    height, width = power.shape[-2:]
    rows = power.mean(axis=-1)[..., : height // 2 + 1][..., ::-1] / width  # frequencies 0, -1, .. as 0, 1, ..
    columns = power.mean(axis=-2)[..., : width // 2 + 1][..., ::-1] / height
    return _bin_means(rows, *_axis_members(height, bins)), _bin_means(columns, *_axis_members(width, bins))


def radial_profile(power: jax.Array, bins: Bins = "exact") -> jax.Array:
    """Ring means of shifted power: [..., H, W] -> [..., max(H, W) // 2]."""
    height, width = power.shape[-2:]
    folded = _fold(_fold(power, axis=-2), axis=-1)
    return _bin_means(folded.reshape(*folded.shape[:-2], -1), *_ring_members(height, width, bins))


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
    """Geometric over arithmetic mean of the rings, each with equal weight: [..., rings] -> [...]."""
    energy = jnp.maximum(radial, EPS)
    ratio = jnp.exp(jnp.log(energy).mean(axis=-1)) / (energy.mean(axis=-1) + EPS)
    return jnp.clip(ratio, 0.0, 1.0)
