"""Rotary position embedding: base frequencies, tables, rotation.

A `Rope` is what every positional method returns for a stream: one frequency vector and one magnitude vector per
rotary axis.  The magnitude of pair ``p`` multiplies its rotation on queries *and* keys, so the pair's share of
every attention logit scales by its square.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sega_jax.geometry import Grid


class Rope(NamedTuple):
    """Frequencies and magnitudes of one stream.

    Attributes:
        frequencies: per axis, radians per token, ``[..., d_a / 2]``.
        magnitude: per axis, ``[..., d_a / 2]``.

    Leading axes, where present, are ``[batch, d_a/2]`` or ``[batch, heads, d_a/2]``; size 1 broadcasts.
    """

    frequencies: tuple[jax.Array, ...]
    magnitude: tuple[jax.Array, ...]


def base_frequencies(channels: int, theta: float) -> np.ndarray:
    """``theta ** (-2 i / channels)`` for ``i < channels / 2``, float64 [channels / 2]."""
    return np.float64(theta) ** (-2.0 * np.arange(channels // 2, dtype=np.float64) / channels)


def plain(grid: Grid) -> Rope:
    """The rotation the model was trained with: base frequencies, magnitude one."""
    frequencies = tuple(jnp.asarray(base_frequencies(d, grid.spec.theta)) for d in grid.spec.dims)
    return Rope(frequencies, tuple(jnp.ones_like(f) for f in frequencies))


def phases(rope: Rope, ids: ArrayLike) -> jax.Array:
    """Angles ``position * frequency`` of every pair: ids [..., N, axes] -> [..., N, D/2].

    Leading axes of the rope come first, then those of the ids.
    """
    ids = jnp.asarray(ids)
    parts = []
    for axis, frequency in enumerate(rope.frequencies):
        position = ids[..., axis].astype(frequency.dtype)
        lead = frequency.shape[:-1]
        frequency = frequency.reshape(*lead, *(1,) * position.ndim, frequency.shape[-1])
        parts.append(position.reshape(*(1,) * len(lead), *position.shape, 1) * frequency)
    return jnp.concatenate(_broadcast_leading(parts), axis=-1)


def magnitudes(rope: Rope) -> jax.Array:
    """Magnitude of every pair, axes concatenated: [..., D/2]."""
    return jnp.concatenate(_broadcast_leading(list(rope.magnitude)), axis=-1)


def _broadcast_leading(parts: list[jax.Array]) -> list[jax.Array]:
    rank = max(part.ndim for part in parts)
    parts = [part.reshape(*(1,) * (rank - part.ndim), *part.shape) for part in parts]
    lead = np.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return [jnp.broadcast_to(part, (*lead, part.shape[-1])) for part in parts]


def tables(rope: Rope, ids: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine tables with the magnitude included.

    Args:
        rope: frequencies and magnitudes, optionally with leading batch or batch and head axes.
        ids: positions, f32 [N, axes].

    Returns:
        ``cos, sin`` [..., N, D/2], one column per pair (a pair owns channels ``2p`` and ``2p + 1``), in the
        dtype of the frequencies: float32, or float64 under x64.
    """
    angle = phases(rope, ids)
    scale = magnitudes(rope)[..., None, :]
    rank = max(angle.ndim, scale.ndim)
    angle, scale = (x.reshape(*(1,) * (rank - x.ndim), *x.shape) for x in (angle, scale.astype(angle.dtype)))
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate interleaved pairs ``(2p, 2p + 1)`` of the last axis.

    Args:
        x: [..., D].
        cos, sin: broadcastable to [..., D/2].

    Returns:
        Dtype of ``x``, shape broadcast with the tables; computed in at least float32.
    """
    dtype = np.promote_types(cos.dtype, np.float32)  # not jnp: strict promotion refuses float64 with float32
    even, odd = x[..., 0::2].astype(dtype), x[..., 1::2].astype(dtype)
    rank = max(even.ndim, cos.ndim)
    cos, sin = (t.astype(dtype).reshape(*(1,) * (rank - t.ndim), *t.shape) for t in (cos, sin))
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(*turned.shape[:-2], x.shape[-1]).astype(x.dtype)
