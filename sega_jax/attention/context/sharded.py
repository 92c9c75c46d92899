"""What both context schemes share: the shape of their problem.

Inside `jax.shard_map`, image tokens are sharded over the context axis and text tokens are replicated on it.  The
sequence is padded at its end so that every shard holds the same number of image tokens; padding is never a key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sega_jax.attention.kernels.contract import Request

Run = Callable[[Request], tuple[jax.Array, jax.Array]]


class Sharded(NamedTuple):
    """One of q, k, v on a device: replicated text [B, T, H, D] and its shard of the image [B, N / P, H, D].

    Keys and values may have fewer heads, as of `Request`.
    """

    text: jax.Array
    image: jax.Array


def valid_tokens(total: int, shard: jax.Array, size: int) -> jax.Array:
    """How many of the ``size`` image tokens of shard number ``shard`` are real, of ``total`` in all."""
    return jnp.clip(total - shard * size, 0, size)


def split_heads(heads: int, devices: int) -> int:
    """Heads after padding to a multiple of the devices."""
    return -(-heads // devices) * devices
