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
    heads, width = q.shape[2], v.shape[3]
    grouped = q.astype(wide).reshape(*q.shape[:2], request.kv_heads, request.group, q.shape[3])
    scores = jnp.einsum("bqhgd,bkhd->bqhgk", grouped, k.astype(wide), precision="highest") * request.scale
    if request.kv_length is not None:
        valid = jnp.arange(k.shape[1])[None, :] < request.kv_length[:, None]
        scores = jnp.where(valid[:, None, None, None, :], scores, -jnp.inf)
    if request.block_map is not None:
        mask = request.block_map.dense(q.shape[1], k.shape[1])
        scores = jnp.where(mask[None, :, None, None, :], scores, -jnp.inf)
    if request.causal:
        mask = jnp.arange(k.shape[1])[None, :] <= jnp.arange(q.shape[1])[:, None]
        scores = jnp.where(mask[None, :, None, None, :], scores, -jnp.inf)
    highest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))  # a shift, whose gradient would cancel
    highest = jnp.where(jnp.isneginf(highest), 0.0, highest)
    weights = jnp.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)
    out = jnp.einsum("bqhgk,bkhd->bqhgd", weights, v.astype(wide), precision="highest") / safe
    lse = jnp.where(empty, -jnp.inf, highest + jnp.log(safe))
    out, lse = out.reshape(*q.shape[:2], heads, width), lse.reshape(q.shape[:3])
    return out.astype(q.dtype), lse.astype(accumulator(q.dtype))


KERNEL = Kernel("reference", supports, run)
