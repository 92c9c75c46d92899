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
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.attention.kernels.chunks import (
    CPU,
    OTHER,
    Plan,
    Visits,
    as_float,
    chunk_of,
    dense_visits,
    raw,
    sparse_visits,
    suited,
)
from sega_jax.attention.kernels.contract import Kernel, Refusal, Request, Tile, accumulator, platform
from sega_jax.attention.kernels.rectangles import Rectangles
from sega_jax.attention.kernels.tiles import tuned

LOG2_E = 1 / math.log(2.0)
ROUNDING = 1.5 * 2.0**23  # a float32 plus this ends in its nearest integer
ROUNDING_BITS = int(np.float32(ROUNDING).view(np.int32))
LN_2_HIGH, LN_2_LOW = 0.693359375, -2.12194440e-4  # the first has so few bits that small multiples are exact
LOWEST = -87.0  # weights below e^-87 are zero: beside a weight of 1 they are nothing, and polynomials end there
LIMIT = 60.0  # largest logit whose weights need no maximum: sums of 1e6 of them stay below float32's e^88


def supports(request: Request) -> Refusal | None:
    del request
    return None


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


def _product(x: jax.Array, y: jax.Array, contract: tuple[int, int], wide) -> jax.Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, preferred_element_type=wide)


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array | None, wide) -> jax.Array:
    scores = _product(q, k, (1, 1), wide)
    return scores if mask is None else jnp.where(mask, scores, -jnp.inf)


def _forward_plane(q, k, v, length, visits: list[Visits], scale: float, plan: Plan):
    """One sample and head: q [Nq, D], k [Nk, D], v [Nk, Dv], length i32 or None -> (out, lse [Nq]), no sums."""
    sweep = partial(_sweep, q, k, v, length, visits, scale, plan)
    if not plan.separate:  # batched over planes a branch would compute both sides
        return sweep(bounded=False), ()
    return jax.lax.cond(_bounded(q, k, scale), partial(sweep, bounded=True), partial(sweep, bounded=False)), ()


def _sweep(q, k, v, length, visits: list[Visits], scale: float, plan: Plan, *, bounded: bool):
    """`_forward_plane` with weights relative to a running maximum, or, ``bounded``, as they are."""
    dtype, wide = q.dtype, accumulator(q.dtype)
    bits_q = raw(q)

    def chunk(part: Visits, i, results):
        at, size = part.start(i), part.chunk_q
        q_chunk = chunk_of(bits_q, at, size, dtype)

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


def _backward_plane(q, out, lse, d_out, d_lse, k, v, length, visits: list[Visits], scale: float):
    """Cotangents of q, and of k and v in the accumulator's dtype, of one sample and head.

    ``d score = weight * (d_out . v - d_out . out + d_lse)``.
    """
    dtype, wide = q.dtype, accumulator(q.dtype)
    offset = d_lse - (d_out.astype(wide) * out.astype(wide)).sum(-1)
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)  # a query without keys: all its weights are zero
    bits_q, bits_d = raw(q), raw(d_out)

    def chunk(part: Visits, i, state):
        dq, dk, dv = state
        start, size = part.start(i), part.chunk_q
        q_chunk, d_chunk = chunk_of(bits_q, start, size, dtype), chunk_of(bits_d, start, size, dtype)
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
    dq, dk, dv = state
    return (dq.astype(dtype),), (dk, dv)


def _over_planes(plane: Callable, asked: tuple, keys: tuple, length: jax.Array | None, plan: Plan):
    """``plane(*asked, *keys, length)`` for all samples and heads.

    Args:
        plane: gives results of the head, and sums of its keys, which are added over heads that share them; both tuples.
        asked: arrays [B, Nq, H, ...]; keys: arrays [B, Nk, Hk, ...].
        length: i32 [B] or None.

    Returns:
        The results [B, Nq, H, ...], then the sums [B, Nk, Hk, ...] in the dtype of the keys.
    """
    results, sums = (_one_by_one if plan.separate else _together)(plane, asked, keys, length)
    return *results, *(x.astype(keys[0].dtype) for x in sums)


def _together(plane: Callable, asked: tuple, keys: tuple, length: jax.Array | None):
    """All samples and key heads in one batch; of query heads that share one, one after the other."""
    batch, heads, kv_heads = asked[0].shape[0], asked[0].shape[2], keys[0].shape[2]
    group = heads // kv_heads
    flat = [x.swapaxes(1, 2).reshape(batch * kv_heads, group, x.shape[1], *x.shape[3:]) for x in asked]
    flat_keys = [x.swapaxes(1, 2).reshape(batch * kv_heads, x.shape[1], *x.shape[3:]) for x in keys]

    def shared(asked, keys, length):
        if group == 1:
            results, sums = plane(*(x[0] for x in asked), *keys, length)
            return tuple(x[None] for x in results), sums

        def head(total, parts):
            results, sums = plane(*parts, *keys, length)
            return jax.tree.map(jnp.add, total, sums), results

        shapes = jax.eval_shape(lambda *parts: plane(*parts, *keys, length)[1], *(x[0] for x in asked))
        return jax.lax.scan(head, tuple(jnp.zeros(s.shape, s.dtype) for s in shapes), asked)[::-1]

    if length is None:
        results, sums = jax.vmap(lambda *parts: shared(*parts, None))(flat, flat_keys)
    else:
        results, sums = jax.vmap(shared)(flat, flat_keys, jnp.repeat(length, kv_heads))
    results = tuple(x.reshape(batch, heads, *x.shape[2:]).swapaxes(1, 2) for x in results)
    return results, tuple(x.reshape(batch, kv_heads, *x.shape[1:]).swapaxes(1, 2) for x in sums)


def _one_by_one(plane: Callable, asked: tuple, keys: tuple, length: jax.Array | None):
    """One sample and head after the other."""
    batch, heads = asked[0].shape[0], asked[0].shape[2]
    group, arrays = heads // keys[0].shape[2], (*asked, *keys)

    def place(p, x, grouped: bool):
        b, h = p // heads, p % heads
        return b, 0, h // group if grouped and group > 1 else h, *(0,) * (x.ndim - 3)

    def one(p):
        # else 16-bit arrays would be turned to integers, and so copied, as a whole before the loop
        p, *whole = jax.lax.optimization_barrier((p, *arrays))
        parts = [
            jax.lax.dynamic_slice(raw(x), place(p, x, n >= len(asked)), (1, x.shape[1], 1, *x.shape[3:]))
            for n, x in enumerate(whole)
        ]
        # the barrier keeps the bound on the logits from slicing q and k a second time
        parts = jax.lax.optimization_barrier([x.reshape(x.shape[1], *x.shape[3:]) for x in parts])
        parts = [as_float(x, a.dtype) for x, a in zip(parts, arrays, strict=True)]
        results, sums = plane(*parts, None if length is None else length[p // heads])
        # heads with keys of their own have nothing to add to
        return results, sums if group > 1 else tuple(x.astype(keys[0].dtype) for x in sums)

    def put(p, total, x, grouped: bool):
        x, where = raw(x)[None, :, None], place(p, total, grouped)
        if grouped and group > 1:
            x = x + jax.lax.dynamic_slice(total, where, x.shape)
        return jax.lax.dynamic_update_slice(total, x, where)

    def body(p, state):
        return tuple(
            tuple(put(p, total, x, grouped) for total, x in zip(totals, found, strict=True))
            for totals, found, grouped in zip(state, one(p), (False, True), strict=True)
        )

    shapes = jax.eval_shape(one, 0)
    counts = heads, heads // group
    state = tuple(
        tuple(raw(jnp.zeros((batch, s.shape[0], count, *s.shape[1:]), s.dtype)) for s in part)
        for part, count in zip(shapes, counts, strict=True)
    )
    state = jax.lax.fori_loop(0, batch * heads, body, state)
    return jax.tree.map(lambda x, s: as_float(x, s.dtype), state, shapes)


def _visits(q: jax.Array, k: jax.Array, parts: tuple[Rectangles, ...] | None, keys: int, plan: Plan, causal: bool):
    if parts is not None:
        return [sparse_visits(part, keys, plan) for part in parts]
    planes = 1 if plan.separate else k.shape[0] * k.shape[2]
    return [dense_visits(q.shape[1], k.shape[1], planes, plan, causal=causal)]


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _attention(q, k, v, lengths, parts, scale: float, true_keys: int, plan: Plan, causal: bool):
    visits = _visits(q, k, parts, true_keys, plan, causal)
    plane = partial(_forward_plane, visits=visits, scale=scale, plan=plan)
    return _over_planes(plane, (q,), (k, v), lengths, plan)


def _attention_forward(q, k, v, lengths, parts, scale, true_keys, plan, causal):
    out, lse = _attention(q, k, v, lengths, parts, scale, true_keys, plan, causal)
    return (out, lse), (q, k, v, lengths, parts, out, lse)


def _attention_backward(scale, true_keys, plan, causal, residuals, cotangents):
    q, k, v, lengths, parts, out, lse = residuals
    visits = _visits(q, k, parts, true_keys, plan, causal)
    plane = partial(_backward_plane, visits=visits, scale=scale)
    return *_over_planes(plane, (q, out, lse, *cotangents), (k, v), lengths, plan), None, None


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
        parts = suited(blocks, keys, _plan())
        asked = [_padded(x, blocks.block_q) for x in asked]
        k, v = _padded(k, blocks.block_k), _padded(v, blocks.block_k)
    q, out, lse, d_out, d_lse = asked
    residuals = (q, k, v, request.kv_length, parts, out, lse)
    dq, dk, dv, *_ = _attention_backward(request.scale, keys, _plan(), request.causal, residuals, (d_out, d_lse))
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
            return Request(q, k, v, request.scale, lengths, blocks if known is None else known, request.causal)

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
        parts = suited(blocks, keys, plan)
        q = _padded(q, blocks.block_q)
        k, v = _padded(k, blocks.block_k), _padded(v, blocks.block_k)
    out, lse = _attention(q, k, v, request.kv_length, parts, scale, keys, plan, request.causal)
    return out[:, :queries], lse[:, :queries]


KERNEL = Kernel("xla", supports, run, tilings)
