"""Ulysses attention: an all-to-all trades sequence shards for head shards, and back.

Every device then sees the whole sequence for its share of the heads, so any local kernel runs unchanged.  Key heads are
padded to a multiple of the devices, and query heads go where their keys go; with ``inner`` given, the sequence is still
sharded over a second axis and the inner scheme (`ring`) finishes the work: the 2-D product for more devices than heads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from sega_jax.attention.context.sharded import Run, Sharded, split_heads
from sega_jax.attention.kernels.contract import Request


def ulysses(
    q: Sharded,
    k: Sharded,
    v: Sharded,
    *,
    run: Run,
    scale: float,
    axis: str,
    total: int,
    text_length: jax.Array | None = None,
    inner: Callable[..., Sharded] | None = None,
) -> Sharded:
    """Joint attention of text and image with the image sharded over ``axis``; call inside `jax.shard_map`.

    Args:
        q, k, v: rotated queries, keys and values of this device.
        run: a local kernel's ``run``.
        scale: multiplies the logits.
        axis: name of the context axis.
        total: image tokens of the whole sequence, without padding.
        text_length: i32 [B], text tokens per sample that are keys (they come first); None is all.
        inner: the scheme for a second context axis, the outer one of the token order: `ring` with its ``axis``
            given; each of its shards then holds the tokens of all devices of ``axis``.

    Returns:
        Text output (replicated) and this device's image output, in the dtype of q.
    """
    devices, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    heads, kv_heads = q.image.shape[2], k.image.shape[2]
    padded = split_heads(kv_heads, devices)

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, (padded - kv_heads) * (x.shape[2] // kv_heads)), (0, 0)))

    def to_heads(x: Sharded) -> Sharded:
        share = padded // devices * (x.text.shape[2] // kv_heads)
        text = jax.lax.dynamic_slice_in_dim(pad(x.text), here * share, share, 2)
        image = jax.lax.all_to_all(pad(x.image), axis, split_axis=2, concat_axis=1, tiled=True)
        return Sharded(text, image)

    mine = tuple(to_heads(x) for x in (q, k, v))
    answer = partial(inner, run=run) if inner is not None else partial(_joint, run=run)
    out = answer(*mine, scale=scale, total=total, text_length=text_length)
    image = jax.lax.all_to_all(out.image, axis, split_axis=1, concat_axis=2, tiled=True)
    text = q.text  # nothing, where there is none
    if q.text.shape[1]:
        text = jax.lax.all_gather(out.text, axis, axis=2, tiled=True)[:, :, :heads]
    return Sharded(text, image[:, :, :heads])


def _joint(
    q: Sharded, k: Sharded, v: Sharded, *, run: Run, scale: float, total: int, text_length: jax.Array | None
) -> Sharded:
    """The whole sequence on this device; what is no key comes last, so that a key length hides it."""
    text, batch = q.text.shape[1], q.text.shape[0]
    joined, length = [jnp.concatenate(x, axis=1) for x in (q, k, v)], None
    if text_length is not None:
        joined[1:] = (jnp.concatenate([x.image[:, :total], x.text], axis=1) for x in (k, v))
        length = total + text_length
    elif total < q.image.shape[1]:
        length = jnp.full((batch,), text + total, jnp.int32)
    out, _ = run(Request(*joined, scale, length))
    return Sharded(out[:, :text], out[:, text:])
