"""Measures of pictures and of samples of pictures: pure functions on NumPy arrays, computed in float64.

Pictures are uint8 or float [N, H, W, 3] on the 0 to 255 scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import ndimage

CELLS = 8  # per side: structure is read relative to the canvas
BANDS = (3, 6, 12, 24)  # pixels: texture is read at its size in pixels
FEATURES = 48


def _box_blur(images: np.ndarray, size: int) -> np.ndarray:
    return ndimage.uniform_filter(images, size=(1, size, size, 1), mode="nearest")


def _cell_means(images: np.ndarray, cells: int) -> np.ndarray:
    """Area means of ``cells`` x ``cells`` parts of each picture: [N, H, W, C] -> [N, cells * cells * C]."""
    height, width = images.shape[1:3]
    rows = np.add.reduceat(images, np.arange(cells) * height // cells, axis=1)
    both = np.add.reduceat(rows, np.arange(cells) * width // cells, axis=2)
    ends = [np.diff([*(np.arange(cells) * length // cells), length]) for length in (height, width)]
    return (both / (ends[0][:, None] * ends[1])[None, :, :, None]).reshape(len(images), -1)


def features(images: np.ndarray) -> np.ndarray:
    """Fixed, unlearned features of pictures of one size, comparable between sizes: float64 [N, 48].

    The means of 8 x 8 cells (what is where, relative to the canvas) and the energies of four bands of 3 to 48 pixels
    in 4 x 4 cells (what texture, in pixels), mixed by a fixed Gaussian projection.  Values depend on the choice, so
    compare a Fréchet distance with that between two samples of truth of equal size.
    """
    images = np.asarray(images, np.float64) / 255.0
    structure = _cell_means(images, CELLS)
    grey = images.mean(-1, keepdims=True)
    texture = []
    for size in BANDS:
        band = _box_blur(grey, size) - _box_blur(grey, 2 * size)
        texture.append(np.sqrt(_cell_means(np.square(band), 4)))
    raw = np.concatenate([structure, 2.0 * np.concatenate(texture, 1)], 1)
    mix = np.random.default_rng(0).normal(size=(raw.shape[1], FEATURES)) / np.sqrt(raw.shape[1])
    return raw @ mix


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the normal distributions fitted to two samples [N, D] and [M, D].

    ``|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2))``; biased upwards for few samples, so compare at equal sizes.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"samples of shapes {a.shape} and {b.shape}: expected [N, D] and [M, D], two rows or more")
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    root = _root(cov_a)
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov_b @ root), 0.0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def objects(mask: np.ndarray, least: float = 0.1) -> int:
    """Number of connected parts of a bool [H, W] mask with at least ``least`` of the largest one's area."""
    labels, count = ndimage.label(mask)
    if not count:
        return 0
    areas = np.bincount(labels.ravel())[1:]
    return int((areas >= least * areas.max()).sum())


def autocorrelation_peak(image: np.ndarray, cells: int = 32, near: float = 0.15) -> float:
    """How much a picture [H, W, 3] repeats itself at large: 0 for noise, near 1 for a tiling.

    The highest circular autocorrelation of its ``cells`` x ``cells`` area means at a shift of more than ``near`` of
    the side in rows or in columns.
    """
    small = _cell_means(np.asarray(image, np.float64)[None], cells).reshape(cells, cells, -1)
    small = small - small.mean((0, 1))
    power = np.square(np.abs(np.fft.fft2(small, axes=(0, 1)))).sum(-1)
    correlation = np.fft.ifft2(power).real
    if correlation[0, 0] <= 1e-9 * cells**2:
        return 0.0
    shift = np.minimum(np.arange(cells), cells - np.arange(cells))
    far = np.maximum(shift[:, None], shift[None, :]) > near * cells
    return float(correlation[far].max() / correlation[0, 0])


def seam_energy(images: np.ndarray, pitch: int) -> np.ndarray:
    """Energy of steps across the boundaries of a ``pitch``-pixel grid over that elsewhere: float64 [N].

    1 means no seam: pixels of two neighbouring patches differ as much as neighbours inside a patch do.  NaN for a
    picture without any step.
    """
    images = np.asarray(images, np.float64)
    if images.ndim != 4 or pitch < 2 or max(images.shape[1:3]) <= pitch:
        raise ValueError(f"pictures {images.shape} with pitch={pitch}: expected [N, H, W, C] larger than a pitch >= 2")
    across, elsewhere = [], []
    for axis in (1, 2):
        steps = np.square(np.diff(images, axis=axis)).mean(axis=(3 - axis, 3))  # [N, length - 1]
        seam = np.arange(1, images.shape[axis]) % pitch == 0
        across.append(steps[:, seam])
        elsewhere.append(steps[:, ~seam])
    over, under = (np.concatenate(parts, 1).mean(1) for parts in (across, elsewhere))
    return np.divide(over, under, out=np.full_like(over, np.nan), where=under > 0)


class Interval(NamedTuple):
    """An estimate with its bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: np.ndarray,
    *,
    statistic: Callable[[np.ndarray], float] = np.mean,
    draws: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of ``statistic`` over the first axis of ``values``."""
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("bootstrap of no values")
    rng = np.random.default_rng(seed)
    drawn = [statistic(values[rng.integers(len(values), size=len(values))]) for _ in range(draws)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(values)), float(low), float(high))


def paired(a: np.ndarray, b: np.ndarray, **options) -> Interval:
    """Bootstrap of the mean difference ``a - b`` of values measured on the same cases."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired values differ in shape: {a.shape} and {b.shape}")
    return bootstrap(a - b, **options)
