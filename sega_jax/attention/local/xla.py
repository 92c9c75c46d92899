"""Chunked online-softmax attention in plain XLA: the path for CPU and for anything without a kernel of its own.

Queries are processed in chunks against key chunks, so memory is bounded by ``CHUNK_SCORES`` float32 scores
whatever the sequence length.  Each query chunk is rematerialised in the backward pass.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sega_jax.attention.local.contract import Kernel, Refusal, Request

CHUNK_SCORES = 16 * 1024 * 1024  # 64 MB of float32 scores in flight
LONGEST_KEY_CHUNK = 4_096


def supports(request: Request) -> Refusal | None:
    del request
    return None


def _pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    extra = -x.shape[axis] % multiple
    return x if extra == 0 else jnp.pad(x, [(0, extra if a == axis else 0) for a in range(x.ndim)])


def _combine(state, scores: jax.Array, v: jax.Array):
    """One online-softmax update; scores [B, H, q, k], v [B, k, H, D], state (acc, maximum, total)."""
    acc, maximum, total = state
    new_maximum = jnp.maximum(maximum, scores.max(-1))
    shift = jnp.where(jnp.isneginf(new_maximum), 0.0, new_maximum)
    weights = jnp.exp(scores - shift[..., None])
    keep = jnp.exp(maximum - shift)
    update = jnp.einsum("bhqk,bkhd->bhqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return acc * keep[..., None] + update, new_maximum, total * keep + weights.sum(-1)


def _initial(q: jax.Array, width: int):
    batch, count, heads, _ = q.shape
    shape = (batch, heads, count)
    return jnp.zeros((*shape, width), jnp.float32), jnp.full(shape, -jnp.inf), jnp.zeros(shape)


def _finish(state, dtype) -> tuple[jax.Array, jax.Array]:
    acc, maximum, total = state
    out = acc / jnp.where(total == 0, 1.0, total)[..., None]
    lse = jnp.where(total == 0, -jnp.inf, maximum + jnp.log(jnp.where(total == 0, 1.0, total)))
    return out.transpose(0, 2, 1, 3).astype(dtype), lse.transpose(0, 2, 1)


def _scores(q: jax.Array, k: jax.Array, scale: float) -> jax.Array:
    return jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * scale


def _dense(request: Request) -> tuple[jax.Array, jax.Array]:
    q, k, v = request.q, request.k, request.v
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    chunk_k = min(keys, LONGEST_KEY_CHUNK)
    chunk_q = max(1, min(queries, CHUNK_SCORES // (batch * heads * chunk_k)))
    length = request.kv_length
    if length is None and keys % chunk_k:
        length = jnp.full((batch,), keys, jnp.int32)
    k, v = _pad(k, 1, chunk_k), _pad(v, 1, chunk_k)
    steps = k.shape[1] // chunk_k

    def against_all_keys(q_chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
        def body(state, step):
            start = step * chunk_k
            k_chunk = jax.lax.dynamic_slice_in_dim(k, start, chunk_k, 1)
            v_chunk = jax.lax.dynamic_slice_in_dim(v, start, chunk_k, 1)
            scores = _scores(q_chunk, k_chunk, request.scale)
            if length is not None:
                valid = (start + jnp.arange(chunk_k))[None, :] < length[:, None]
                scores = jnp.where(valid[:, None, None, :], scores, -jnp.inf)
            return _combine(state, scores, v_chunk), None

        state = _initial(q_chunk, v.shape[-1])
        if steps == 1:
            state, _ = body(state, 0)
        else:
            state, _ = jax.lax.scan(jax.checkpoint(body), state, jnp.arange(steps))
        return _finish(state, q.dtype)

    if chunk_q >= queries:
        return against_all_keys(q)
    q = _pad(q, 1, chunk_q)
    chunks = q.reshape(batch, -1, chunk_q, heads, q.shape[-1]).swapaxes(0, 1)
    out, lse = jax.lax.map(jax.checkpoint(against_all_keys), chunks)
    out = out.swapaxes(0, 1).reshape(batch, -1, heads, v.shape[-1])[:, :queries]
    return out, lse.swapaxes(0, 1).reshape(batch, -1, heads)[:, :queries]


def _sparse(request: Request) -> tuple[jax.Array, jax.Array]:
    blocks = request.block_map
    q, k, v = request.q, request.k, request.v
    batch, queries, heads, width = q.shape
    keys = k.shape[1]
    q = _pad(q, 1, blocks.block_q)
    k, v = _pad(k, 1, blocks.block_k), _pad(v, 1, blocks.block_k)
    length = request.kv_length if request.kv_length is not None else jnp.full((batch,), keys, jnp.int32)
    patterns = jnp.concatenate([jnp.ones((1, blocks.block_q, blocks.block_k), bool), jnp.asarray(blocks.patterns)])

    def row(arguments):
        q_block, count, columns, pattern = arguments

        def body(step, state):
            start = columns[step] * blocks.block_k
            k_block = jax.lax.dynamic_slice_in_dim(k, start, blocks.block_k, 1)
            v_block = jax.lax.dynamic_slice_in_dim(v, start, blocks.block_k, 1)
            valid = (start + jnp.arange(blocks.block_k))[None, :] < length[:, None]
            mask = patterns[pattern[step]][None, :, :] & valid[:, None, :]
            scores = jnp.where(mask[:, None], _scores(q_block, k_block, request.scale), -jnp.inf)
            return _combine(state, scores, v_block)

        return _finish(jax.lax.fori_loop(0, count, body, _initial(q_block, v.shape[-1])), q.dtype)

    rows = q.reshape(batch, -1, blocks.block_q, heads, width).swapaxes(0, 1)
    visits = (rows, jnp.asarray(blocks.count), jnp.asarray(blocks.columns), jnp.asarray(blocks.pattern))
    out, lse = jax.lax.map(row, visits)
    out = out.swapaxes(0, 1).reshape(batch, -1, heads, v.shape[-1])[:, :queries]
    return out, lse.swapaxes(0, 1).reshape(batch, -1, heads)[:, :queries]


def run(request: Request) -> tuple[jax.Array, jax.Array]:
    return _dense(request) if request.block_map is None else _sparse(request)


KERNEL = Kernel("xla", supports, run)
