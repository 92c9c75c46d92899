"""Ring attention: keys and values travel around the context axis, partial results merge by log-sum-exp.

Each device holds one block of keys at a time, so temporaries do not grow with the number of devices; the loop is a
scan, and heads may be processed in chunks to bound the memory of the merge (tokamax's ring, unrolled, compiles to
5.4 GB of temporaries per chip for 24 heads and 147k tokens on eight chips).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sega_jax.attention.context.sharded import Run, Sharded, valid_tokens
from sega_jax.attention.kernels.contract import Request
from sega_jax.attention.merge import merge


def ring(
    q: Sharded,
    k: Sharded,
    v: Sharded,
    *,
    run: Run,
    scale: float,
    axis: str,
    total: int,
    text_length: jax.Array | None = None,
    head_chunks: int = 1,
) -> Sharded:
    """Joint attention of text and image with the image sharded over ``axis``; call inside `jax.shard_map`.

    Args:
        q, k, v: rotated queries, keys and values of this device.
        run: a local kernel's ``run``.
        scale: multiplies the logits.
        axis: name of the context axis.
        total: image tokens of the whole sequence, without padding.
        text_length: i32 [B], text tokens per sample that are keys (they come first); None is all.
        head_chunks: process the heads in this many groups, one after the other; those that share keys stay together.

    Returns:
        Text output (replicated) and this device's image output, in the dtype of q.

    Raises:
        ValueError: if the key heads do not divide into ``head_chunks``.
    """
    heads = k.image.shape[2]
    if heads % head_chunks:
        raise ValueError(f"head_chunks={head_chunks}: does not divide {heads} key heads")
    if head_chunks == 1:
        return _ring(q, k, v, run, scale, axis, total, text_length)

    def chunked(x: jax.Array) -> jax.Array:  # [B, N, H, D] -> [chunks, B, N, H / chunks, D]
        return jnp.moveaxis(x.reshape(*x.shape[:2], head_chunks, x.shape[2] // head_chunks, x.shape[-1]), 2, 0)

    def joined(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], -1, x.shape[-1])

    chunks = jax.tree.map(chunked, (q, k, v))
    return jax.tree.map(joined, jax.lax.map(lambda c: _ring(*c, run, scale, axis, total, text_length), chunks))


def _ring(
    q: Sharded,
    k: Sharded,
    v: Sharded,
    run: Run,
    scale: float,
    axis: str,
    total: int,
    text_length: jax.Array | None,
) -> Sharded:
    devices, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    (batch, size), tokens = q.image.shape[:2], q.text.shape[1]
    onward = [(i, (i + 1) % devices) for i in range(devices)]

    def lengths(shard: jax.Array) -> jax.Array:
        return jnp.broadcast_to(valid_tokens(total, shard, size), (batch,)).astype(jnp.int32)

    def step(carry, turn):
        state, keys, values = carry
        shard = (here - turn) % devices  # whose keys are here after this many turns
        part = run(Request(q.image, keys, values, scale, lengths(shard)))
        keys, values = (jax.lax.ppermute(x, axis, onward) for x in (keys, values))
        return (merge(state, part), keys, values), None

    if tokens:
        start = run(Request(q.image, k.text, v.text, scale, text_length))
        start = (start[0].astype(jnp.float32), start[1])
    else:
        rows = q.image.shape[:3]
        start = jnp.zeros((*rows, v.image.shape[3]), jnp.float32), jnp.full(rows, -jnp.inf, jnp.float32)
    (image, _), *_ = jax.lax.scan(step, (start, k.image, v.image), jnp.arange(devices))[0]

    image = image.astype(q.image.dtype)
    if not tokens:
        return Sharded(q.text, image)

    # Text rows: every device answers from its own keys, then the partial results merge over the axis.
    out, lse = run(Request(q.text, k.image, v.image, scale, lengths(here)))
    largest = jax.lax.pmax(jax.lax.stop_gradient(lse), axis)  # a constant shift: its gradient would cancel
    weight = jnp.where(jnp.isneginf(lse), 0.0, jnp.exp(lse - jnp.where(jnp.isneginf(largest), 0.0, largest)))
    weights = jax.lax.psum(weight, axis)
    mean = jax.lax.psum(out.astype(jnp.float32) * weight[..., None], axis)
    of_image = mean / jnp.where(weights == 0, 1.0, weights)[..., None], largest + jnp.log(weights)
    own, own_lse = run(Request(q.text, k.text, v.text, scale, text_length))
    text, _ = merge((own.astype(jnp.float32), own_lse), of_image)
    return Sharded(text.astype(q.text.dtype), image)
