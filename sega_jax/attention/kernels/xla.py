"""Chunked online-softmax attention in plain XLA: where no kernel serves, a CPU without a compiler among them.

Chunks of queries meet chunks of keys, so extra memory does not grow with the sequence except for what is returned.
The backward pass, which is that of every kernel here, recomputes the weights from the log-sum-exp, chunk by chunk, and
keeps no [N, N] residual; it is a reverse-mode rule (`jax.grad`, `jax.vjp`), forward mode is not defined.

What makes it fast on a CPU, each measured against PyTorch's kernel on the same cores:

* one (sample, head) at a time, so that every product is a plain matrix product, for which XLA has its fast (for
  bfloat16: AMX) routine, and the scores of a chunk stay near the cores; the arrays of a step have no axes of
  length one, over whose removal XLA would compute the weights twice;
* 16-bit arrays are sliced and updated as integers: XLA's CPU compiler otherwise widens the *whole* array to
  float32 around every slice of it;
* where Cauchy-Schwarz bounds the logits of a head, as normalised queries and keys do in practice, its weights need
  no running maximum: one pass over the scores less, and nothing to rescale;
* steps that have nothing to mask come first and build no mask, which would be worked out anew for every weight;
* a concrete block map becomes rectangles, for small products are slow: what neighbouring rows have in common is one
  tall one (`sega_jax.attention.kernels.rectangles`), and blocks are halved where that does away with every pattern;
* weights come from polynomials as accurate as their dtype holds, a quintic for float32 and a cubic for bfloat16, in
  place of XLA's exponential.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.attention.kernels.contract import Kernel, Refusal, Request, Tile, accumulator, platform
from sega_jax.attention.kernels.rectangles import Rectangles, rectangles, rows
from sega_jax.attention.kernels.tiles import tuned
from sega_jax.layouts.blocks import BlockMap, halved

ALIGN = 128
LOG2_E = 1 / math.log(2.0)
ROUNDING = 1.5 * 2.0**23  # a float32 plus this ends in its nearest integer
ROUNDING_BITS = int(np.float32(ROUNDING).view(np.int32))
LN_2_HIGH, LN_2_LOW = 0.693359375, -2.12194440e-4  # the first has so few bits that small multiples are exact
LOWEST = -87.0  # weights below e^-87 are zero: beside a weight of 1 they are nothing, and polynomials end there
NARROWEST = 64  # no block is cut into fewer keys
FEWEST = 512  # rows that differ join for so many common keys
LIMIT = 60.0  # largest logit whose weights need no maximum: sums of 1e6 of them stay below float32's e^88


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


def supports(request: Request) -> Refusal | None:
    del request
    return None


def _raw(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _float(raw: jax.Array, dtype) -> jax.Array:
    return raw if raw.dtype == dtype else jax.lax.bitcast_convert_type(raw, dtype)


def _chunk(raw: jax.Array, start, size: int, dtype) -> jax.Array:
    return _float(jax.lax.dynamic_slice_in_dim(raw, start, size), dtype)


def _nearest(x: jax.Array) -> jax.Array:
    """float32 x rounded, as i32."""
    # by the bits of a sum: as floats XLA would simplify (x + ROUNDING) - ROUNDING to x
    return jax.lax.bitcast_convert_type(x + ROUNDING, jnp.int32) - ROUNDING_BITS


def _scaled_bits(value: jax.Array, power: jax.Array) -> jax.Array:
    """The bits, i32, of the float32 ``value * 2^power``."""
    return jax.lax.bitcast_convert_type(value, jnp.int32) + (power << 23)


def _quintic_exponential(x: jax.Array) -> jax.Array:
    """``e^x`` in float32 for float32 x in (-87, 88), to 1.1e-6 there."""
    whole = _nearest(x * LOG2_E)
    steps = whole.astype(jnp.float32)
    part = (x - steps * LN_2_HIGH) - steps * LN_2_LOW
    value = (0.0082976551 * part + 0.0419153827) * part + 0.1666757473  # least relative error on |part| <= ln(2) / 2
    value = ((value * part + 0.4999889484) * part + 0.9999996920) * part + 1.0000000717
    return jax.lax.bitcast_convert_type(_scaled_bits(value, whole), jnp.float32)


def _cubic_power(x: jax.Array) -> jax.Array:
    """``2^x`` in bfloat16 for float32 x in (-126, 127), rounded from 8e-5."""
    whole = _nearest(x)
    part = x - whole.astype(jnp.float32)  # 2^part on [-1/2, 1/2], least relative error
    value = ((0.05517165765 * part + 0.2426111213) * part + 0.6932609876) * part + 0.9999280736
    bits = _scaled_bits(value, whole)
    return jax.lax.bitcast_convert_type(((bits + 0x8000) >> 16).astype(jnp.uint16), jnp.bfloat16)


def _exponential(x: jax.Array, dtype, plan: Plan) -> jax.Array:
    """``e^x`` in ``dtype`` for x from `LOWEST` to `LIMIT`."""
    if plan.polynomial and dtype == jnp.bfloat16:
        return _cubic_power(x * LOG2_E)
    if plan.polynomial and dtype == jnp.float32:
        return _quintic_exponential(x)
    return jnp.exp(x).astype(dtype)


def _weights(scores: jax.Array, shift: jax.Array, scale: float, dtype, plan: Plan) -> jax.Array:
    """``exp(scale * (scores - shift))`` in ``dtype``; scores [q, k], shift [q], not below the scores."""
    below = (scores - shift[:, None]) * scale
    return jnp.where(below < LOWEST, jnp.zeros((), dtype), _exponential(below, dtype, plan))  # a NaN stays one


def _bounded_weights(scores: jax.Array, mask: jax.Array | None, scale: float, dtype, plan: Plan) -> jax.Array:
    """``exp(scale * scores)`` in ``dtype``, zero outside the mask; no ``scale * score`` is above `LIMIT`."""
    weights = _exponential(scores * scale, dtype, plan)
    return weights if mask is None else jnp.where(mask, weights, jnp.zeros((), dtype))


def _bounded(q: jax.Array, k: jax.Array, scale: float) -> jax.Array | bool:
    """Whether no logit of queries [Nq, D] and keys [Nk, D] can exceed `LIMIT` (a NaN says no).

    Never in float16, which ends at e^11.
    """
    if jnp.finfo(q.dtype).maxexp < jnp.finfo(jnp.float32).maxexp:
        return False

    def longest(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.square(x.astype(accumulator(x.dtype))).sum(-1).max())

    return scale * longest(q) * longest(k) <= LIMIT


@dataclass(frozen=True)
class _Visits:
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


def _cut(total: int, longest: int) -> tuple[int, int]:
    """Length and number of equal chunks that cover ``total``; where there are several, lengths are aligned."""
    count = -(-total // longest)
    length = -(-total // count)
    length = length if count == 1 else min(total, -(-length // ALIGN) * ALIGN)
    return length, -(-total // length)


def _dense_visits(queries: int, keys: int, planes: int, plan: Plan) -> _Visits:
    chunk_k, steps = _cut(keys, plan.keys)
    chunk_q, chunks = _cut(queries, max(1, plan.scores // (planes * chunk_k)))

    def start_k(j):
        return jnp.minimum(j * chunk_k, keys - chunk_k)

    def take(x, i, j):
        del i
        return x if steps == 1 else _chunk(_raw(x), start_k(j), chunk_k, x.dtype)

    def add(x, i, j, update):
        if steps == 1:
            return x + update
        return jax.lax.dynamic_update_slice_in_dim(x, take(x, i, j) + update, start_k(j), 0)

    def mask(i, j, length):
        del i
        position = (start_k(j) + jnp.arange(chunk_k))[None, :]
        visible = position >= j * chunk_k
        return visible if length is None else visible & (position < length)

    def count(i, length):
        del i
        return steps if length is None else jnp.minimum(steps, -(-length // chunk_k))

    def whole(i, length):
        del i
        return (keys if length is None else jnp.minimum(keys, length)) // chunk_k

    def start_q(i):
        return jnp.minimum(i * chunk_q, queries - chunk_q)

    return _Visits(chunk_q, chunks, start_q, lambda i: i * chunk_q, count, whole, take, add, mask)


def _suited(blocks: BlockMap, keys: int, plan: Plan) -> tuple[Rectangles, ...]:
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


def _sparse_visits(part: Rectangles, keys: int, plan: Plan) -> _Visits:
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
        blocks = _raw(x).reshape(-1, side * x.shape[-1])  # copied as rows: joined slices would be copied by value
        return _float(blocks[met(i, j)].reshape(group * side, -1), x.dtype)

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

    return _Visits(height, len(part.start), lambda i: start[i], None, number, whole, take, add, mask)


def _product(x: jax.Array, y: jax.Array, contract: tuple[int, int], wide) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=wide)


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array | None, wide) -> jax.Array:
    scores = _product(q, k, (1, 1), wide)
    return scores if mask is None else jnp.where(mask, scores, -jnp.inf)


def _forward_plane(q, k, v, length, visits: list[_Visits], scale: float, plan: Plan):
    """One sample and head: q [Nq, D], k [Nk, D], v [Nk, Dv], length i32 or None -> (out, lse [Nq])."""
    sweep = partial(_sweep, q, k, v, length, visits, scale, plan)
    if not plan.separate:  # batched over planes a branch would compute both sides
        return sweep(bounded=False)
    return jax.lax.cond(_bounded(q, k, scale), partial(sweep, bounded=True), partial(sweep, bounded=False))


def _sweep(q, k, v, length, visits: list[_Visits], scale: float, plan: Plan, *, bounded: bool):
    """`_forward_plane` with weights relative to a running maximum, or, ``bounded``, as they are."""
    dtype, wide = q.dtype, accumulator(q.dtype)
    raw_q = _raw(q)

    def chunk(part: _Visits, i, results):
        at, size = part.start(i), part.chunk_q
        q_chunk = _chunk(raw_q, at, size, dtype)

        def attended(weights, j):
            weights = jax.lax.optimization_barrier(weights)  # else XLA computes them for the product and for the sum
            return _product(weights, part.take(v, i, j), (1, 0), wide), weights.astype(wide).sum(-1)

        def bounded_step(mask, j, state):
            acc, total = state
            scores = _product(q_chunk, part.take(k, i, j), (1, 1), wide)
            update, mass = attended(_bounded_weights(scores, mask(j), scale, dtype, plan), j)
            return acc + update, total + mass

        def step(mask, j, state):
            acc, total, maximum = state
            scores = _scores(q_chunk, part.take(k, i, j), mask(j), wide)
            highest = jnp.maximum(maximum, scores.max(-1))
            shift = jnp.where(jnp.isneginf(highest), 0.0, highest)
            keep = jnp.exp((maximum - shift) * scale)
            update, mass = attended(_weights(scores, shift, scale, dtype, plan), j)
            return acc * keep[:, None] + update, total * keep + mass, highest

        found = initial(size) if part.fresh else [jax.lax.dynamic_slice_in_dim(x, at, size) for x in results]
        one, whole = (bounded_step if bounded else step), part.whole(i, length)
        found = jax.lax.fori_loop(0, whole, partial(one, lambda j: None), tuple(found))
        edge = partial(one, lambda j: part.mask(i, j, length))
        found = jax.lax.fori_loop(whole, part.steps(i, length), edge, found)
        return tuple(jax.lax.dynamic_update_slice_in_dim(x, new, at, 0) for x, new in zip(results, found, strict=True))

    def initial(size: int):
        state = jnp.zeros((size, v.shape[-1]), wide), jnp.zeros((size,), wide)
        return state if bounded else (*state, jnp.full((size,), -jnp.inf, wide))

    results = initial(len(q))
    for part in visits:
        results = jax.lax.fori_loop(0, part.chunks, partial(chunk, part), results)
    acc, total, *maximum = results
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)
    lse = jnp.log(safe) + (maximum[0] * scale if maximum else 0.0)
    return (acc / safe[:, None]).astype(dtype), jnp.where(empty, -jnp.inf, lse)


def _backward_plane(q, k, v, out, lse, d_out, d_lse, length, visits: list[_Visits], scale: float):
    """Cotangents of q, k, v of one sample and head; ``d score = weight * (d_out . v - d_out . out + d_lse)``."""
    dtype, wide = q.dtype, accumulator(q.dtype)
    offset = d_lse - (d_out.astype(wide) * out.astype(wide)).sum(-1)
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)  # a query without keys: all its weights are zero
    raw_q, raw_d = _raw(q), _raw(d_out)

    def chunk(part: _Visits, i, state):
        dq, dk, dv = state
        start, size = part.start(i), part.chunk_q
        q_chunk, d_chunk = _chunk(raw_q, start, size, dtype), _chunk(raw_d, start, size, dtype)
        shift = jax.lax.dynamic_slice_in_dim(lse, start, size)
        if part.fresh:  # rows of an overlap count once
            shift = jnp.where(start + jnp.arange(size) >= part.fresh(i), shift, jnp.inf)
        bias = jax.lax.dynamic_slice_in_dim(offset, start, size)

        def step(j, state):
            dq_chunk, dk, dv = state
            k_chunk, v_chunk = part.take(k, i, j), part.take(v, i, j)
            scores = _scores(q_chunk, k_chunk, part.mask(i, j, length), wide)
            weights = jnp.exp(scores * scale - shift[:, None])
            slope = weights * (_product(d_chunk, v_chunk, (1, 1), wide) + bias[:, None]) * scale
            slope, weights = slope.astype(dtype), weights.astype(dtype)
            dk = part.add(dk, i, j, _product(slope, q_chunk, (0, 0), wide))
            dv = part.add(dv, i, j, _product(weights, d_chunk, (0, 0), wide))
            return dq_chunk + _product(slope, k_chunk, (1, 0), wide), dk, dv

        dq_chunk = jax.lax.dynamic_slice_in_dim(dq, start, size)
        dq_chunk, dk, dv = jax.lax.fori_loop(0, part.steps(i, length), step, (dq_chunk, dk, dv))
        return jax.lax.dynamic_update_slice_in_dim(dq, dq_chunk, start, 0), dk, dv

    state = tuple(jnp.zeros(x.shape, wide) for x in (q, k, v))
    for part in visits:
        state = jax.lax.fori_loop(0, part.chunks, partial(chunk, part), state)
    return tuple(x.astype(dtype) for x in state)


def _over_planes(plane: Callable, arrays: tuple[jax.Array, ...], length: jax.Array | None, plan: Plan):
    """``plane(*one sample's and head's arrays, length)`` for all samples and heads; arrays are [B, N, H, ...]."""
    batch, heads = arrays[0].shape[0], arrays[0].shape[2]
    if not plan.separate:
        flat = [x.swapaxes(1, 2).reshape(batch * heads, x.shape[1], *x.shape[3:]) for x in arrays]
        if length is None:
            results = jax.vmap(lambda *parts: plane(*parts, None))(*flat)
        else:
            results = jax.vmap(plane)(*flat, jnp.repeat(length, heads))
        return tuple(r.reshape(batch, heads, *r.shape[1:]).swapaxes(1, 2) for r in results)

    def one(p):
        # else 16-bit arrays would be turned to integers, and so copied, as a whole before the loop
        p, *whole = jax.lax.optimization_barrier((p, *arrays))
        b, h = p // heads, p % heads
        parts = [
            jax.lax.dynamic_slice(_raw(x), (b, 0, h, *(0,) * (x.ndim - 3)), (1, x.shape[1], 1, *x.shape[3:]))
            for x in whole
        ]
        # the barrier keeps the bound on the logits from slicing q and k a second time
        parts = jax.lax.optimization_barrier([x.reshape(x.shape[1], *x.shape[3:]) for x in parts])
        parts = [_float(x, a.dtype) for x, a in zip(parts, arrays, strict=True)]
        return plane(*parts, None if length is None else length[b])

    shapes = jax.eval_shape(one, 0)

    def body(p, results):
        b, h = p // heads, p % heads
        return tuple(
            jax.lax.dynamic_update_slice(r, _raw(x)[None, :, None], (b, 0, h, *(0,) * (r.ndim - 3)))
            for r, x in zip(results, one(p), strict=True)
        )

    empty = tuple(_raw(jnp.zeros((batch, s.shape[0], heads, *s.shape[1:]), s.dtype)) for s in shapes)
    results = jax.lax.fori_loop(0, batch * heads, body, empty)
    return tuple(_float(r, s.dtype) for r, s in zip(results, shapes, strict=True))


def _visits(q: jax.Array, k: jax.Array, parts: tuple[Rectangles, ...] | None, true_keys: int, plan: Plan):
    if parts is not None:
        return [_sparse_visits(part, true_keys, plan) for part in parts]
    return [_dense_visits(q.shape[1], k.shape[1], 1 if plan.separate else q.shape[0] * q.shape[2], plan)]


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q, k, v, lengths, parts, scale: float, true_keys: int, plan: Plan):
    visits = _visits(q, k, parts, true_keys, plan)
    plane = partial(_forward_plane, visits=visits, scale=scale, plan=plan)
    return _over_planes(plane, (q, k, v), lengths, plan)


def _attention_forward(q, k, v, lengths, parts, scale, true_keys, plan):
    out, lse = _attention(q, k, v, lengths, parts, scale, true_keys, plan)
    return (out, lse), (q, k, v, lengths, parts, out, lse)


def _attention_backward(scale, true_keys, plan, residuals, cotangents):
    q, k, v, lengths, parts, out, lse = residuals
    visits = _visits(q, k, parts, true_keys, plan)
    plane = partial(_backward_plane, visits=visits, scale=scale)
    return *_over_planes(plane, (q, k, v, out, lse, *cotangents), lengths, plan), None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _plan() -> Plan:
    return CPU if platform() == "cpu" else OTHER


def _padded(x: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), *((0, 0),) * (x.ndim - 2)))


def backward(request: Request, out, lse, d_out, d_lse) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of q, k, v from those of any kernel's ``(out, lse)``; positive scales only."""
    q, k, v, blocks = request.q, request.k, request.v, request.block_map
    queries, keys = q.shape[1], k.shape[1]
    asked, parts = [q, out, lse, d_out, d_lse], None
    if blocks is not None:
        parts = _suited(blocks, keys, _plan())
        asked = [_padded(x, blocks.block_q) for x in asked]
        k, v = _padded(k, blocks.block_k), _padded(v, blocks.block_k)
    q, out, lse, d_out, d_lse = asked
    residuals = (q, k, v, request.kv_length, parts, out, lse)
    dq, dk, dv, *_ = _attention_backward(request.scale, keys, _plan(), residuals, (d_out, d_lse))
    return dq[:, :queries], dk[:, :keys], dv[:, :keys]


def with_backward(forward: Callable) -> Callable:
    """``forward(request) -> (out, lse)`` of any kernel, made differentiable by `backward`.

    Unlike the backward passes that come with such kernels it honours the cotangent of lse, which `merge` needs.
    """

    def run(request: Request):
        blocks = request.block_map
        # as an argument even a constant map would be traced inside, and only a constant one is cut into rectangles
        known = None if blocks is None or isinstance(blocks.count, jax.core.Tracer) else blocks

        def asked(q, k, v, lengths, blocks) -> Request:
            return Request(q, k, v, request.scale, lengths, blocks if known is None else known)

        @jax.custom_vjp
        def attention(*arguments):
            return forward(asked(*arguments))

        def attention_forward(*arguments):
            results = attention(*arguments)
            return results, (arguments, results)

        def attention_backward(residuals, cotangents):
            arguments, results = residuals
            return *backward(asked(*arguments), *results, *cotangents), None, None

        attention.defvjp(attention_forward, attention_backward)
        return attention(request.q, request.k, request.v, request.kv_length, blocks if known is None else None)

    return run


def tilings(request: Request) -> tuple[Tile, ...]:
    """Chunks of a dense request where planes are treated separately; elsewhere there is one way."""
    plan = _plan()
    if not plan.separate:
        return ()
    sizes = [(scores, keys) for scores in (plan.scores, plan.scores // 4) for keys in (plan.keys, 4_096, 2_048)]
    return tuple((scores // keys, keys) for scores, keys in sizes)


def run(request: Request, plan: Plan | None = None, tile: Tile | None = None) -> tuple[jax.Array, jax.Array]:
    """Serve a request; the plan defaults to the one for the default device, with the measured chunks if there are."""
    if plan is None:
        plan = _plan()
        tile = tile or (tuned("xla", request) if plan.separate else None)
    if tile is not None:
        plan = replace(plan, scores=tile[0] * tile[1], keys=tile[1])
    q, k, v, scale = request.q, request.k, request.v, request.scale
    if not scale > 0:  # the running maximum is taken before scaling
        q, scale = (q.astype(accumulator(q.dtype)) * scale).astype(q.dtype), 1.0
    queries, keys = q.shape[1], k.shape[1]
    parts = None
    if (blocks := request.block_map) is not None:
        # cut here: inside a differentiable function even a constant map is traced
        parts = _suited(blocks, keys, plan)
        q = _padded(q, blocks.block_q)
        k, v = _padded(k, blocks.block_k), _padded(v, blocks.block_k)
    out, lse = _attention(q, k, v, request.kv_length, parts, scale, keys, plan)
    return out[:, :queries], lse[:, :queries]


KERNEL = Kernel("xla", supports, run, tilings)
