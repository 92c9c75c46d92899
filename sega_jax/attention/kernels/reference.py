"""The oracle: the whole score matrix in the highest precision available.  Small sizes only."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sega_jax.attention.kernels.contract import Kernel, Refusal, Request, accumulator

LARGEST_SIDE = 4_096


def supports(request: Request) -> Refusal | None:
    side = max(request.q.shape[1], request.k.shape[1])
    if side > LARGEST_SIDE:
        return Refusal(f"it builds the [N, N] score matrix and stops at {LARGEST_SIDE} tokens, got {side}")
    return None


def run(request: Request) -> tuple[jax.Array, jax.Array]:
    q, k, v = request.q, request.k, request.v
    wide = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    scores = jnp.einsum("bqhd,bkhd->bqhk", q.astype(wide), k.astype(wide), precision="highest") * request.scale
    if request.kv_length is not None:
        valid = jnp.arange(k.shape[1])[None, :] < request.kv_length[:, None]
        scores = jnp.where(valid[:, None, None, :], scores, -jnp.inf)
    if request.block_map is not None:
        mask = request.block_map.dense(q.shape[1], k.shape[1])
        scores = jnp.where(mask[None, :, None, :], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - jnp.where(jnp.isneginf(lse), 0.0, lse)[..., None])
    out = jnp.einsum("bqhk,bkhd->bqhd", weights, v.astype(wide), precision="highest")
    return out.astype(q.dtype), lse.astype(accumulator(q.dtype))


KERNEL = Kernel("reference", supports, run)
