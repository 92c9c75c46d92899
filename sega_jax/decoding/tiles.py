"""Autoencoding in overlapping tiles: device memory bounded by one tile, at the price of exactness.

Group norms and the mid-block attention of the autoencoder see the whole image; in tiles they see only the tile,
so tones can drift from tile to tile and the result differs from the plain one.  The linear cross-fade hides the
seams, it does not remove the drift.  Larger tiles come closer; one tile that holds everything is exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import jax
import numpy as np

Positions = list[int]


def tile_positions(length: int, tile: int, overlap: float) -> Positions:
    """First index of every tile along an axis of ``length``, all tiles of size ``tile`` and inside the axis.

    Tiles are spread evenly, so neighbours overlap by at least ``overlap * tile`` (rounded down) everywhere, and
    by more where the length asks for it.
    """
    stride = max(1, math.ceil(tile * (1.0 - overlap)))
    count = 1 + math.ceil(max(0, length - tile) / stride)
    return [round(i * (length - tile) / max(1, count - 1)) for i in range(count)]


def fade_weights(positions: Positions, tile: int, scale: int) -> np.ndarray:
    """Weight of every output pixel of every tile, float32 [tiles, tile * scale].

    Between neighbours the weight passes linearly from one to the other over their overlap; at every pixel of the
    axis the weights of all tiles add up to 1.
    """
    steps = np.arange(tile * scale) + 0.5

    def risen(i: int, pixels: np.ndarray) -> np.ndarray:
        """How far tile ``i`` has taken over from the tiles before it."""
        if i == 0:
            return np.ones_like(pixels)
        if i == len(positions):
            return np.zeros_like(pixels)
        start, end = positions[i] * scale, (positions[i - 1] + tile) * scale
        if start == end:
            return (pixels > start).astype(pixels.dtype)
        return np.clip((pixels - start) / (end - start), 0.0, 1.0)

    pixels = [steps + first * scale for first in positions]
    weights = [risen(i, at) - risen(i + 1, at) for i, at in enumerate(pixels)]
    return np.stack(weights).astype(np.float32)


def decode_tiled(
    decode: Callable[[np.ndarray], jax.Array], latents: jax.Array | np.ndarray, *, tile: int = 64, overlap: float = 0.25
) -> np.ndarray:
    """Decodes latents tile by tile on the device, blending on the host.

    Args:
        decode: latents [B, t, u, C] -> images [B, f*t, f*u, 3], jitted by the caller; it is called with one static
            shape only, so it compiles once.  ``t`` is ``tile``, or the latent's side where that is smaller.
        latents: [B, h, w, C].
        tile: side of a tile in latent pixels.
        overlap: least share of a tile's side that it has in common with its neighbour, in [0, 1).

    Returns:
        Images float32 [B, f*h, f*w, 3] on the host.  If one tile covers the latents they equal ``decode(latents)``.

    Raises:
        ValueError: if the latents, the tile or the overlap are unusable.
    """
    (image,) = _tiled(lambda x: (decode(x),), latents, unit=1, tile=tile, overlap=overlap)
    return image


def encode_tiled(
    encode: Callable[[np.ndarray], tuple[jax.Array, jax.Array]],
    images: jax.Array | np.ndarray,
    *,
    factor: int = 8,
    tile: int = 64,
    overlap: float = 0.25,
) -> tuple[np.ndarray, np.ndarray]:
    """Encodes images tile by tile on the device, blending the moments on the host.

    Args:
        encode: images [B, f*t, f*u, 3] -> mean and log-variance [B, t, u, C], jitted by the caller; called with one
            static shape only.
        images: [B, f*h, f*w, 3].
        factor: pixels per latent pixel, `VaeConfig.factor`.
        tile, overlap: as in `decode_tiled`; the tile is in latent pixels here too.

    Returns:
        Mean and log-variance, float32 [B, h, w, C] each, on the host.

    Raises:
        ValueError: if the images, the tile or the overlap are unusable.
    """
    mean, logvar = _tiled(encode, images, unit=factor, tile=tile, overlap=overlap)
    return mean, logvar


def _tiled(
    function: Callable[[np.ndarray], tuple[jax.Array, ...]],
    array: jax.Array | np.ndarray,
    *,
    unit: int,
    tile: int,
    overlap: float,
) -> tuple[np.ndarray, ...]:
    """Applies ``function`` to tiles of ``tile * unit`` pixels of ``array`` and blends each of its results."""
    if tile < 1 or not 0.0 <= overlap < 1.0:
        raise ValueError(f"tiles: got tile={tile}, overlap={overlap}; expected tile >= 1 and 0 <= overlap < 1")
    if array.ndim != 4 or any(side < unit or side % unit for side in array.shape[1:3]):
        raise ValueError(f"tiles: got shape {array.shape}; expected [B, H, W, C] with H, W multiples of {unit}")
    source = np.asarray(array)  # slicing on the host: on the device every position would compile anew
    sides = [side // unit for side in source.shape[1:3]]
    tiles = [min(tile, side) for side in sides]
    positions = [tile_positions(side, size, overlap) for side, size in zip(sides, tiles, strict=True)]
    canvases: list[np.ndarray] = []
    for (row, y), (column, x) in itertools.product(*map(enumerate, positions)):
        results = function(source[:, y * unit : (y + tiles[0]) * unit, x * unit : (x + tiles[1]) * unit])
        if not canvases:
            scale = results[0].shape[1] // tiles[0]
            weights = [fade_weights(p, size, scale) for p, size in zip(positions, tiles, strict=True)]
            canvases = [
                np.zeros((r.shape[0], *(side * scale for side in sides), r.shape[3]), np.float32) for r in results
            ]
        weight = weights[0][row][:, None] * weights[1][column][None, :]
        window = np.s_[:, y * scale : (y + tiles[0]) * scale, x * scale : (x + tiles[1]) * scale]
        for canvas, result in zip(canvases, results, strict=True):
            canvas[window] += np.asarray(result).astype(np.float32, copy=False) * weight[None, :, :, None]
    return tuple(canvases)
