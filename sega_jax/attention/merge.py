"""Exact merging of partial attention results by their log-sum-exp."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def merge(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of two disjoint key sets.

    Args:
        first, second: ``(out [B, N, H, D], lse f32 [B, N, H])``; lse is the natural log of the softmax
            denominator, ``-inf`` where a query saw no key (its out is zero).

    Returns:
        ``(out, lse)`` of the union, out in the dtype of ``first``.
    """
    (out_a, lse_a), (out_b, lse_b) = first, second
    lse = jnp.logaddexp(lse_a, lse_b)
    safe = jnp.where(jnp.isneginf(lse), 0.0, lse)
    weight_a, weight_b = jnp.exp(lse_a - safe)[..., None], jnp.exp(lse_b - safe)[..., None]
    out = out_a.astype(lse.dtype) * weight_a + out_b.astype(lse.dtype) * weight_b
    return out.astype(out_a.dtype), lse
