"""The one entry to attention: streams are joined, rotated and scaled here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sega_jax.attention.context.route import attend_split, split_backend
from sega_jax.attention.kernels import Request, choose
from sega_jax.attention.merge import merge
from sega_jax.layouts.blocks import BlockMap
from sega_jax.layouts.streams import Call, KeySet, Tokens
from sega_jax.positional.rope import rotate
from sega_jax.sharding.split import Split

Streams = Mapping[str, jax.Array]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float | None = None,
    kv_length: jax.Array | None = None,
    block_map=None,
    causal: bool = False,
    backend: str = "auto",
) -> jax.Array:
    """Plain attention of q [B, Nq, H, D] over k [B, Nk, Hk, D] and v [B, Nk, Hk, Dv] -> [B, Nq, H, Dv].

    ``scale`` defaults to ``D ** -0.5``.  See `sega_jax.attention.kernels.Request` for the other arguments.
    """
    request = Request(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, kv_length, block_map, causal)
    kernel, _ = choose(request, backend)
    return kernel.run(request)[0]


def _copies(index: ArrayLike, length: int) -> int | None:
    """How often an index repeats all tokens in order; None for any other."""
    if not isinstance(index, np.ndarray) or index.ndim != 1 or len(index) % length:
        return None
    copies = len(index) // length
    return copies if np.array_equal(index, np.tile(np.arange(length, dtype=index.dtype), copies)) else None


def _take(x: jax.Array, index: ArrayLike | None) -> jax.Array:
    """[B, N, H, D] -> [B, groups, n, H, D]; padding indices give zeros."""
    if index is None:
        return x[:, None]
    copies = _copies(index, x.shape[1])
    if copies is not None:
        return jnp.tile(x, (1, copies, 1, 1))[:, None]
    index = jnp.asarray(index)
    if index.ndim == 1:
        return x.at[:, index].get(mode="fill", fill_value=0)[:, None]
    index = index.reshape(index.shape[0], -1, index.shape[-1])
    index = jnp.broadcast_to(index, (x.shape[0], *index.shape[1:]))
    return jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=0))(x, index)


def _put(out: jax.Array, index: ArrayLike, length: int) -> jax.Array:
    """Inverse of `_take`: [B, groups, n, H, D] -> [B, length, H, D], zeros where no row was written."""
    batch, groups, count, heads, width = out.shape
    index = jnp.asarray(index)
    index = jnp.broadcast_to(index.reshape(-1, groups * count), (batch, groups * count))
    rows = out.reshape(batch, groups * count, heads, width)
    empty = jnp.zeros((length, heads, width), out.dtype)
    return jax.vmap(lambda row, i: empty.at[i].set(row, mode="drop"))(rows, index)


def _gather(streams: Streams, tokens: tuple[Tokens, ...], turn: bool) -> jax.Array:
    """The streams of a call, rotated and concatenated: [B, groups, n, H, D]."""
    parts = []
    for t in tokens:
        x = _take(streams[t.stream], t.index)
        if turn and t.table is not None:
            if t.table.cos.shape[3] not in (1, x.shape[3]) or t.table.magnitude.shape[3] not in (1, x.shape[3]):
                raise ValueError(
                    f"stream {t.stream!r} has {x.shape[3]} heads, its rope {t.table.cos.shape[3]} and its magnitudes "
                    f"{t.table.magnitude.shape[3]}: expected one for all heads, or one per head, of both q and k"
                )
            x = rotate(x, t.table.cos * t.table.magnitude, t.table.sin * t.table.magnitude)
        parts.append(x)
    groups = max(part.shape[1] for part in parts)
    parts = [jnp.broadcast_to(p, (p.shape[0], groups, *p.shape[2:])) for p in parts]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)


def _attend_set(q: Streams, k: Streams, v: Streams, keys: KeySet, backend: str) -> tuple[jax.Array, jax.Array]:
    """One softmax: (out [B, groups, n, H, D], lse [B, groups, n, H]).

    A kernel takes one length, of the keys that come first.  So whole streams go before one that has a length, and what
    further ones with lengths answer is merged in.
    """
    if (keys.block_map is not None or keys.causal) and any(t.length is not None for t in keys.keys[:-1]):
        raise ValueError(
            f"keys {', '.join(t.stream for t in keys.keys)}: a block map or causal attention counts them in order, "
            "so only the last stream may have a length; put it last, or ask for it in a set of its own"
        )
    ragged = [t for t in keys.keys if t.length is not None]
    whole = [t for t in keys.keys if t.length is None]
    asked = _gather(q, keys.queries, True)
    found = _attend_keys(asked, k, v, replace(keys, keys=(*whole, *ragged[:1])), backend)
    for tokens in ragged[1:]:
        found = merge(found, _attend_keys(asked, k, v, replace(keys, keys=(tokens,)), backend))
    return found


def _attend_keys(q: jax.Array, k: Streams, v: Streams, keys: KeySet, backend: str) -> tuple[jax.Array, jax.Array]:
    """Gathered queries [B, groups, n, H, D] against keys of which the last stream may have a length."""
    joined = [q, _gather(k, keys.keys, True), _gather(v, keys.keys, False)]
    batch, groups = q.shape[0], max(x.shape[1] for x in joined)
    flat = [jnp.broadcast_to(x, (batch, groups, *x.shape[2:])).reshape(batch * groups, *x.shape[2:]) for x in joined]
    last = keys.keys[-1]
    length = last.length
    if length is not None:
        count = k[last.stream].shape[1] if last.index is None else last.index.shape[-1]
        length = jnp.minimum(length, count) + (flat[1].shape[1] - count)
        length = jnp.broadcast_to(length.reshape(length.shape[0], -1), (batch, groups)).reshape(-1)
    request = Request(*flat, flat[0].shape[-1] ** -0.5, length, keys.block_map, keys.causal)
    kernel, _ = choose(request, backend)
    out, lse = kernel.run(request)
    return out.reshape(batch, groups, *out.shape[1:]), lse.reshape(batch, groups, *lse.shape[1:])


def _average(out: jax.Array, index: ArrayLike, length: int) -> jax.Array:
    """[B, groups, n, H, D] -> [B, length, H, D], the mean of the rows of each token; float32 sums."""
    batch, groups, count, heads, width = out.shape
    copies = _copies(index, length)
    if copies is not None:
        return out.reshape(batch, groups * copies, length, heads, width).astype(jnp.float32).mean(1).astype(out.dtype)
    index = jnp.asarray(index)
    index = jnp.broadcast_to(index.reshape(-1, groups * count), (batch, groups * count))
    rows = out.reshape(batch, groups * count, heads, width).astype(jnp.float32)

    def one(row: jax.Array, i: jax.Array) -> jax.Array:
        total = jnp.zeros((length, heads, width), jnp.float32).at[i].add(row, mode="drop")
        times = jnp.zeros((length,), jnp.float32).at[i].add(1.0, mode="drop")
        return total / jnp.maximum(times, 1.0)[:, None, None]

    return jax.vmap(one)(rows, index).astype(out.dtype)


def _groups(tokens: Tokens) -> int:
    """Groups that these tokens tell apart."""
    by_index = 1 if tokens.index is None or tokens.index.ndim < 3 else tokens.index.shape[1]
    return max(by_index, 1 if tokens.table is None else tokens.table.cos.shape[1])


def _attend_all(q: Streams, k: Streams, v: Streams, call: Call, backend: str) -> jax.Array:
    """All sets of a call, merged: [B, groups, n, H, D]."""
    out, lse = _attend_set(q, k, v, call.sets[0], backend)
    for keys in call.sets[1:]:
        out, lse = merge((out, lse), _attend_set(q, k, v, keys, backend))
    return out


def _attend_by_parts(q: Streams, k: Streams, v: Streams, call: Call, backend: str) -> jax.Array:
    """`_attend_all`, ``call.groups_at_once`` groups at a time."""
    size = call.groups_at_once
    groups = max(_groups(t) for keys in call.sets for t in (*keys.queries, *keys.keys))
    if groups % size:
        raise ValueError(f"groups_at_once={size}: does not divide {groups} groups")
    leaves, structure = jax.tree.flatten(call, is_leaf=lambda x: isinstance(x, BlockMap))
    # indices and tables [b, groups, n, ...] and key counts [b, groups]; what all groups share stays as it is
    cut = [not isinstance(x, BlockMap) and x.ndim > 1 and x.shape[1] == groups for x in leaves]

    def split(x: ArrayLike) -> jax.Array:
        x = jnp.asarray(x)
        return jnp.moveaxis(x.reshape(x.shape[0], groups // size, size, *x.shape[2:]), 1, 0)

    def part(some: list[jax.Array]) -> jax.Array:
        given = iter(some)
        chosen = [next(given) if c else x for x, c in zip(leaves, cut, strict=True)]
        return _attend_all(q, k, v, jax.tree.unflatten(structure, chosen), backend)

    parts = [split(x) for x, c in zip(leaves, cut, strict=True) if c]
    out = jnp.moveaxis(jax.lax.map(part, parts), 0, 1)  # [B, parts, size, n, H, D]
    return out.reshape(out.shape[0], groups, *out.shape[3:])


def attend(
    q: Streams,
    k: Streams,
    v: Streams,
    calls: tuple[Call, ...],
    *,
    backend: str = "auto",
    split: Split | None = None,
) -> dict[str, jax.Array]:
    """Attention over streams.

    Args:
        q, k, v: un-rotated streams, each [B, N, H, D]; keys and values may have fewer heads (`kernels.Request`).
        calls: bound calls of a layout (`layouts.streams.bind`).
        backend: name of a registered kernel, or ``"auto"``; with a split, ``"scheme+kernel"`` names the context
            scheme too (`context.route`).
        split: how the streams lie on a mesh; sharded ones are padded then, and so is their output.

    Returns:
        For every queried stream its output [B, N, H, D], in the dtype of ``q``; tokens that no call asks for
        are zero.

    Raises:
        ValueError: a kernel or scheme that is unknown or cannot serve the calls.
    """
    scheme, kernel = split_backend(backend)
    if split is not None:
        return attend_split(q, k, v, calls, split, scheme, kernel, _attend_here)
    if scheme != "auto":
        raise ValueError(f"attention backend {backend!r}: {scheme!r} needs a mesh with a context axis")
    return _attend_here(q, k, v, calls, kernel)


def _attend_here(q: Streams, k: Streams, v: Streams, calls: tuple[Call, ...], backend: str) -> dict[str, jax.Array]:
    """Attention over whole streams on one device."""
    results: dict[str, jax.Array] = {}
    for call in calls:
        everything = _attend_all if call.groups_at_once is None else _attend_by_parts
        out = everything(q, k, v, call, backend)
        start = 0
        for tokens, reduction in zip(call.sets[0].queries, call.reduce, strict=True):
            length = q[tokens.stream].shape[1]
            count = length if tokens.index is None else tokens.index.shape[-1]
            rows = out[:, :, start : start + count]
            start += count
            if reduction == "mean" and tokens.index is not None:
                result = _average(rows, tokens.index, length)
            elif reduction == "mean":
                result = rows.astype(jnp.float32).mean(1).astype(rows.dtype)
            elif tokens.index is None:
                result = rows[:, 0]
            else:
                result = _put(rows, tokens.index, length)
            previous = results.get(tokens.stream)
            results[tokens.stream] = result if previous is None else previous + result
    return results
