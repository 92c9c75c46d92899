"""JAX's own splash attention for TPU, dense: the peer of our kernel there, at the same contract.

It returns one log-sum-exp per query and lane, 128 times what is needed, and it wants whole tiles; its key lengths
are segment ids.  Its own backward pass is not defined where the log-sum-exp is asked for, ours serves.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from sega_jax.attention.kernels import xla
from sega_jax.attention.kernels.contract import Kernel, Refusal, Request, platform

HEAD_SIZES = (64, 128)
TILE = 512
LANES = 128


def supports(request: Request) -> Refusal | None:
    q, v = request.q, request.v
    if platform() != "tpu":
        return Refusal(f"it runs on TPU, the default device is {platform()}")
    if request.block_map is not None:
        return Refusal("it takes no block map of ours")
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return Refusal(f"it takes bfloat16 and float32, got {q.dtype}")
    if q.shape[-1] not in HEAD_SIZES or v.shape[-1] not in HEAD_SIZES:
        return Refusal(f"it takes head sizes {HEAD_SIZES}, got {q.shape[-1]} and {v.shape[-1]}")
    return None


def _whole_tiles(count: int) -> tuple[int, int]:
    tile = min(TILE, -(-count // LANES) * LANES)
    return tile, -(-count // tile) * tile


def _forward(request: Request, interpret: bool):
    q, k, v = request.q, request.k, request.v
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    (tile_q, padded_q), (tile_k, padded_k) = _whole_tiles(queries), _whole_tiles(keys)
    # scaled in float32: rounding the scale into bfloat16 queries would cost a part of their accuracy
    q = (q.astype(jnp.float32) * request.scale).astype(q.dtype)
    q, k, v = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, n - x.shape[1]), (0, 0)))
        for x, n in ((q, padded_q), (k, padded_k), (v, padded_k))
    )
    mask = masks.CausalMask if request.causal else masks.FullMask  # both count queries and keys from the first
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask((padded_q, padded_k))] * heads),
        block_sizes=splash.BlockSizes(block_q=tile_q, block_kv=tile_k, block_kv_compute=tile_k),
        save_residuals=True,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segments = None
    length = request.kv_length
    if length is not None or padded_k != keys:
        limit = jnp.full((batch,), keys, jnp.int32) if length is None else length
        hidden = (jnp.arange(padded_k)[None, :] >= limit[:, None]).astype(jnp.int32)
        segments = splash.SegmentIds(jnp.zeros((batch, padded_q), jnp.int32), hidden)
    out, (lse,) = jax.vmap(kernel)(q, k, v, segments)
    out, lse = out[:, :, :queries].swapaxes(1, 2), lse[:, :, :queries].swapaxes(1, 2)
    if length is not None:  # without any key splash averages the hidden ones
        empty = (length == 0)[:, None, None]
        out, lse = jnp.where(empty[..., None], 0, out), jnp.where(empty, -jnp.inf, lse)
    return out, lse


def run(request: Request, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Serve a request; ``interpret`` runs it on a CPU."""
    return xla.with_backward(lambda r: _forward(r, interpret))(request)


KERNEL = Kernel("splash", supports, run)
