"""How attention in plain XLA is cut: chunks of queries, and the steps of keys that each of them meets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sega_jax.attention.kernels.rectangles import Rectangles, rectangles, rows
from sega_jax.layouts.blocks import BlockMap, halved

ALIGN = 128
NARROWEST = 64  # no block is cut into fewer keys
FEWEST = 512  # rows that differ join for so many common keys


@dataclass(frozen=True)
class Plan:
    """How the work is cut.

    Attributes:
        separate: one (sample, head) at a time instead of all of them in one batched product.
        scores: number of scores in flight.
        keys: longest key chunk of a dense call.
        fetch: most keys that 512 queries fetch together under a block map; more queries fetch fewer.
        tallest: most queries that rows of a block map join to.
        polynomial: weights by `_quintic_exponential` and `_cubic_power` instead of XLA's exponential.
    """

    separate: bool
    scores: int
    keys: int
    fetch: int
    tallest: int
    polynomial: bool


CPU = Plan(separate=True, scores=1_024 * 4_096, keys=8_192, fetch=2_048, tallest=1_024, polynomial=True)
OTHER = Plan(separate=False, scores=16 * 1024 * 1024, keys=4_096, fetch=1_024, tallest=0, polynomial=False)


def raw(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def as_float(bits: jax.Array, dtype) -> jax.Array:
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)


def chunk_of(bits: jax.Array, start, size: int, dtype) -> jax.Array:
    return as_float(jax.lax.dynamic_slice_in_dim(bits, start, size), dtype)


@dataclass(frozen=True)
class Visits:
    """Which keys a chunk of queries meets, in how many steps.

    Attributes:
        chunk_q: queries per chunk.
        chunks: number of query chunks.
        start: chunk -> its first query.
        fresh: chunk -> the first of its queries that no earlier chunk had; None where other visits add to the same
            queries.
        steps: ``(i, length) -> number of steps`` of chunk i (may be traced).
        whole: ``(i, length) -> number of leading steps`` in which every query sees every key (may be traced).
        take: ``(x [Nk, D], i, j) -> [chunk_k, D]``, the keys of step j.
        add: ``(x, i, j, update) -> x`` with the update added where `take` reads.
        mask: ``(i, j, length) -> bool`` broadcastable to [chunk_q, chunk_k]; length i32 or None.
    """

    chunk_q: int
    chunks: int
    start: Callable
    fresh: Callable | None
    steps: Callable
    whole: Callable
    take: Callable
    add: Callable
    mask: Callable


def cut(total: int, longest: int) -> tuple[int, int]:
    """Length and number of equal chunks that cover ``total``; where there are several, lengths are aligned."""
    count = -(-total // longest)
    length = -(-total // count)
    length = length if count == 1 else min(total, -(-length // ALIGN) * ALIGN)
    return length, -(-total // length)


def dense_visits(queries: int, keys: int, planes: int, plan: Plan, *, causal: bool = False) -> Visits:
    """Every query meets every key, or, causal, those not behind it."""
    longest = plan.keys
    if causal:  # squares, small ones: on the diagonal half of each is computed in vain
        longest = min(longest, max(ALIGN, math.isqrt(plan.scores // planes) // 4))
    chunk_k, steps = cut(keys, longest)
    chunk_q, chunks = cut(queries, longest if causal else max(1, plan.scores // (planes * chunk_k)))

    def start_k(j):
        return jnp.minimum(j * chunk_k, keys - chunk_k)

    def take(x, i, j):
        del i
        return x if steps == 1 else chunk_of(raw(x), start_k(j), chunk_k, x.dtype)

    def add(x, i, j, update):
        if steps == 1:
            return x + update
        return jax.lax.dynamic_update_slice_in_dim(x, take(x, i, j) + update, start_k(j), 0)

    def start_q(i):
        return jnp.minimum(i * chunk_q, queries - chunk_q)

    def mask(i, j, length):
        position = (start_k(j) + jnp.arange(chunk_k))[None, :]
        visible = position >= j * chunk_k
        if causal:
            visible = visible & (position <= (start_q(i) + jnp.arange(chunk_q))[:, None])
        return visible if length is None else visible & (position < length)

    def seen(i, length, ahead: int):
        """Leading keys not hidden by a length, nor from the query ``ahead`` in the chunk by causality."""
        last = keys if length is None else jnp.minimum(keys, length)
        return jnp.minimum(last, start_q(i) + ahead + 1) if causal else last

    def count(i, length):
        return -(-seen(i, length, chunk_q - 1) // chunk_k)

    def whole(i, length):
        return seen(i, length, 0) // chunk_k

    return Visits(chunk_q, chunks, start_q, lambda i: i * chunk_q, count, whole, take, add, mask)


def suited(blocks: BlockMap, keys: int, plan: Plan) -> tuple[Rectangles, ...]:
    """The map in the blocks and rectangles that are quickest here; a traced one as it is."""
    if isinstance(blocks.count, jax.core.Tracer):
        return (rows(blocks),)
    if plan.separate and len(blocks.patterns) and blocks.block_k >= 2 * NARROWEST:
        blocks = halved(blocks, keys) or blocks
    return rectangles(blocks, keys, plan.tallest, FEWEST)


def _together(part: Rectangles, plan: Plan) -> int:
    """Blocks fetched together: as many as make the visits cheapest.

    A step costs two blocks by itself, and a last one that is not full, for it has a mask, half as much again.
    """
    longest = part.columns.shape[1]
    most = max(1, min(longest, plan.fetch // max(1, part.height // 512) // part.block_k))
    return min(range(most, 0, -1), key=lambda n: -(-longest // n) * (n + 2) + (n / 2 if longest % n else 0))


def sparse_visits(part: Rectangles, keys: int, plan: Plan) -> Visits:
    """Of ``keys`` keys, those that pad the last block are never seen."""
    height, side = part.height, part.block_k
    longest = part.columns.shape[1]
    group = _together(part, plan)
    steps = -(-longest // group)
    start, count, columns, pattern = (jnp.asarray(x) for x in (part.start, part.count, part.columns, part.pattern))
    # one group more than is visited: were a step's slice the whole row, XLA would compute it before each of two loops
    extra = ((0, 0), (0, (steps + 1) * group - longest))
    columns, pattern = jnp.pad(columns, extra), jnp.pad(pattern, extra)
    patterns = jnp.concatenate([jnp.ones((1, height, side), bool), jnp.asarray(part.patterns)])

    def met(i, j):
        return jax.lax.dynamic_slice(columns, (i, j * group), (1, group))[0]

    def take(x, i, j):
        blocks = raw(x).reshape(-1, side * x.shape[-1])  # copied as rows: joined slices would be copied by value
        return as_float(blocks[met(i, j)].reshape(group * side, -1), x.dtype)

    def add(x, i, j, update):
        blocks = x.reshape(-1, side * x.shape[-1])
        return blocks.at[met(i, j)].add(update.reshape(group, -1)).reshape(x.shape)

    def mask(i, j, length):
        slot = j * group + jnp.arange(group)
        position = met(i, j)[:, None] * side + jnp.arange(side)[None, :]
        visible = (slot < count[i])[:, None] & (position < (keys if length is None else length))
        visible = visible.reshape(1, group * side)
        if len(part.patterns):
            kinds = jax.lax.dynamic_slice(pattern, (i, j * group), (1, group))[0]
            visible = visible & patterns[kinds].swapaxes(0, 1).reshape(height, group * side)
        return visible

    def number(i, length):
        del length
        return steps if part.uniform else -(-count[i] // group)

    def whole(i, length):
        del i
        return part.whole // group if length is None else 0

    return Visits(height, len(part.start), lambda i: start[i], None, number, whole, take, add, mask)
