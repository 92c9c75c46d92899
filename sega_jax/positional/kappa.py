"""How attention scores depend on the RoPE distance alone: the diagnostic behind phase alignment (crpa.md §1)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def kappa(q: jax.Array, k: jax.Array, frequencies: Sequence[jax.Array], axis: int, max_delta: int) -> jax.Array:
    """Mean of ``<q, R(delta) k>`` of normalised queries and keys over all their pairs, one axis rotated.

    Args:
        q, k: un-rotated queries and keys [..., heads, D]; leading axes are averaged over.
        frequencies: per rotary axis f32 [d_a / 2], radians per token.
        axis: the rotated one; the others are held at distance 0.
        max_delta: largest distance, in tokens.

    Returns:
        f32 [heads, 2 max_delta + 1], distances ``-max_delta .. max_delta``.

    Raises:
        ValueError: an axis there is not, or frequencies of another head size.
    """
    sizes = [len(f) for f in frequencies]
    if not 0 <= axis < len(sizes) or 2 * sum(sizes) != q.shape[-1] or q.shape[-2:] != k.shape[-2:]:
        raise ValueError(
            f"queries {q.shape}, keys {k.shape}, axis {axis} of {len(sizes)} with {sizes} pairs: expected heads and "
            "channels alike, and two channels per pair"
        )

    def mean(x: jax.Array) -> jax.Array:  # the score is linear in each, so the mean over pairs is that of the means
        x = x.astype(jnp.float32).reshape(-1, *x.shape[-2:])
        x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        x = x.mean(0)
        return jax.lax.complex(x[:, 0::2], x[:, 1::2])

    product = mean(q) * jnp.conj(mean(k))  # [heads, pairs]
    start = sum(sizes[:axis])
    turned = product[:, start : start + sizes[axis]]
    still = product.real.sum(-1) - turned.real.sum(-1)
    delta = np.arange(-max_delta, max_delta + 1, dtype=np.float32)
    angle = jnp.asarray(delta)[:, None] * jnp.asarray(frequencies[axis], jnp.float32)[None, :]
    phase = jax.lax.complex(jnp.cos(angle), -jnp.sin(angle))
    scores = jnp.einsum("hp,dp->hd", turned, phase, precision="highest")
    return still[:, None] + scores.real
