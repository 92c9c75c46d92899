"""Flash attention for TPU (Pallas Mosaic): long sequences, dense, causal, or under a block map.

A block map becomes a list of visits, one word each, which the scalar core reads ahead of the pipeline: blocks that
are not visited cost nothing, neither loads nor arithmetic, and a long row (text that sees everything) costs its own
visits only.  Lengths and patterns touch only the blocks on their edge.

At head size 128 the newer chips are bound by the softmax, not by the products.  Where the Cauchy-Schwarz bound
``scale * max |q| * max |k|`` of a few heads is at most `LIMIT`, their exponentials cannot leave float32, so the running
maximum, its rescaling and a subtraction per score are left out; the result is the same softmax.  Heads beyond the
bound, which a magnitude rule may push there, take the exact online softmax.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from sega_jax.attention.kernels import xla
from sega_jax.attention.kernels.contract import Kernel, Refusal, Request, Tile, cost, platform
from sega_jax.attention.kernels.tiles import tuned
from sega_jax.layouts.blocks import BlockMap

HEAD_SIZES = (64, 128)
# queries and keys of a dense visit, the heuristic first; v5e has VMEM for no more than 1,024 x 2,048
DENSE_TILES = ((1_024, 1_024), (512, 1_024), (1_024, 512), (512, 2_048), (2_048, 512), (1_024, 2_048), (2_048, 1_024))
COMPUTE = 512  # keys whose scores are alive at once
SCORES = 2**18  # of one visit of small blocks, by treating several heads in it
UNROLL = 4
MOST_VISITS = 192 * 1024  # one word each in the scalar memory of 1 MiB
MOST_BLOCKS = 2**12
NOTHING = 255  # pattern number of a row that visits no block
LIMIT = 60.0  # exp(60) times the keys of a 36 MP sequence times values of 1e5 is still a float32; so is exp(-60)
HIDDEN = -0.7 * float(np.finfo(np.float32).max)
LANES = 128


def _shape_refusal(request: Request) -> Refusal | None:
    q, v, blocks = request.q, request.v, request.block_map
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return Refusal(f"it takes bfloat16 and float32, got {q.dtype}")
    for name, size in (("q", q.shape[-1]), ("v", v.shape[-1])):
        if size not in HEAD_SIZES:
            return Refusal(f"it takes head sizes {HEAD_SIZES}, got {size} for {name}")
    if not request.scale > 0:
        return Refusal(f"it takes positive scales, got {request.scale}")
    if blocks is None:
        return None
    rows, width = blocks.columns.shape
    if max(rows, -(-request.k.shape[1] // blocks.block_k)) > MOST_BLOCKS:
        return Refusal(f"it counts at most {MOST_BLOCKS} blocks per side, got a map of {blocks.columns.shape}")
    if len(blocks.patterns) >= NOTHING:
        return Refusal(f"it holds fewer than {NOTHING} patterns, got {len(blocks.patterns)}")
    if isinstance(blocks.count, jax.core.Tracer):
        if rows * width > MOST_VISITS:
            return Refusal(
                f"a traced block map needs room for every slot, {rows} x {width} are more than {MOST_VISITS}; "
                "ask with long rows (text) in a call of their own, or pass the map as a constant"
            )
    elif (visits := int(np.maximum(np.asarray(blocks.count), 1).sum())) > MOST_VISITS:
        return Refusal(f"it lists at most {MOST_VISITS} visited blocks, got {visits}; take larger blocks")
    return None


def supports(request: Request) -> Refusal | None:
    if platform() != "tpu":
        return Refusal(f"it runs on TPU, the default device is {platform()}")
    blocks = request.block_map
    if blocks is not None and (blocks.block_q % LANES or blocks.block_k % 64):
        return Refusal(
            f"query blocks are multiples of {LANES} and key blocks of 64, got {blocks.block_q} and {blocks.block_k}"
        )
    return _shape_refusal(request)


def _visit_list(blocks: BlockMap) -> tuple[jax.Array | np.ndarray, jax.Array | int]:
    """One word per visit, ``row << 20 | column << 8 | pattern``, rows in order; and how many there are.

    A row without blocks gets one visit that does nothing but write its zeros.
    """
    known = not isinstance(blocks.count, jax.core.Tracer)
    np_or_jnp = np if known else jnp
    count, columns, pattern = (np_or_jnp.asarray(x) for x in (blocks.count, blocks.columns, blocks.pattern))
    rows, width = columns.shape
    row, slot = np.arange(rows, dtype=np.uint32)[:, None], np.arange(width)[None, :]
    pattern = np_or_jnp.where(slot < count[:, None], pattern, NOTHING).astype(np.uint32)
    words = row << np.uint32(20) | columns.astype(np.uint32) << np.uint32(8) | pattern
    real = slot < np_or_jnp.maximum(count, 1)[:, None]
    if known:
        words = words[real].view(np.int32)
        return words, len(words)
    order = jnp.argsort(~real.reshape(-1), stable=True)
    return jax.lax.bitcast_convert_type(words.reshape(-1)[order], jnp.int32), real.sum().astype(jnp.int32)


def _row(word):
    return jax.lax.shift_right_logical(word, 20)


def _column(word):
    return jax.lax.shift_right_logical(word, 8) & 0xFFF


def _part(index, size: int):
    """``index // size`` of what is not negative; Python's own would ask for signs, which need the chip's name."""
    return index if size == 1 else index // size if isinstance(index, int) else jax.lax.div(index, jnp.int32(size))


def _for_heads(heads: int, treat: Callable) -> None:
    """A few heads side by side, so that their products and exponentials overlap; many would only compile longer."""
    together = max(n for n in range(1, UNROLL + 1) if heads % n == 0)

    def some(n, carry):
        for h in range(together):
            treat(n * together + h)
        return carry

    if together == heads:
        some(0, None)
    else:
        jax.lax.fori_loop(0, heads // together, some, None)


def _lane_sums(weights: jax.Array) -> jax.Array:
    """[rows, columns] to [rows, LANES] whose sum over lanes is the sum over columns, without crossing lanes."""
    rows, columns = weights.shape
    if columns % LANES:
        return jnp.broadcast_to(weights.sum(1, keepdims=True) * (1 / LANES), (rows, LANES))
    return sum(weights[:, c : c + LANES] for c in range(0, columns, LANES))


def _body(
    locate, has_length, causal, scale, heads, compute, words_ref, length_ref, bounded_ref, q_ref, k_ref, v_ref, *rest
):
    """One visit: ``heads`` query blocks against their key blocks, of which each may serve several heads."""
    pattern_ref, (out_ref, lse_ref, acc_ref, max_ref, sum_ref) = (None, rest) if len(rest) == 5 else (rest[0], rest[1:])
    block_q, block_k = q_ref.shape[2], k_ref.shape[2]
    shared = heads // k_ref.shape[1]
    column, pattern, first, last = locate(words_ref, length_ref)
    length = length_ref[pl.program_id(0)]
    start = column * block_k
    asked = pl.program_id(2) * block_q if causal else None  # the first query
    bounded = bounded_ref[pl.program_id(0), pl.program_id(1)] != 0

    @pl.when(first)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        max_ref[...] = jnp.broadcast_to(jnp.where(bounded, 0.0, HIDDEN), max_ref.shape)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def visit(edge: bool, partial_block: bool, fixed: bool):
        precision = jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
        base_two = scale / math.log(2.0)

        def head(h):
            key_head = _part(h, shared)
            for c in range(0, block_k, compute):
                part = pl.ds(c, compute)
                v = v_ref[0, key_head, part, :]
                scores = jax.lax.dot_general(
                    q_ref[0, h],
                    k_ref[0, key_head, part, :],
                    (((1,), (1,)), ((), ())),
                    precision=precision,
                    preferred_element_type=jnp.float32,
                )
                seen = None
                if edge:
                    position = start + c + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
                    seen = position < length
                    if causal:
                        seen &= position <= asked + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
                    # what lies behind the last key may be anything, also NaN
                    v = jnp.where(start + c + jax.lax.broadcasted_iota(jnp.int32, v.shape, 0) < length, v, 0)
                if partial_block:
                    drawn = pattern_ref[0, :, part].astype(jnp.int32) != 0
                    seen = drawn if seen is None else seen & drawn
                if fixed:
                    weights = jnp.exp2(scores * base_two)
                else:
                    if seen is not None:
                        scores = jnp.where(seen, scores, HIDDEN)
                    old = max_ref[h]
                    new = jnp.maximum(old, scores.max(1, keepdims=True))
                    weights = jnp.exp2((scores - new[:, :1]) * base_two)
                    keep = jnp.exp2((old - new) * base_two)
                    max_ref[h] = new
                    sum_ref[h] *= keep
                    acc_ref[h] *= keep[:, :1]
                if seen is not None:
                    weights = jnp.where(seen, weights, 0.0)
                sum_ref[h] += _lane_sums(weights)
                acc_ref[h] += jax.lax.dot_general(
                    weights.astype(v.dtype),
                    v,
                    (((1,), (0,)), ((), ())),
                    precision=precision,
                    preferred_element_type=jnp.float32,
                )

        _for_heads(heads, head)

    useful = (start < length) & (pattern != NOTHING)
    ragged = start + block_k > length
    if causal:
        useful &= start < asked + block_q
        ragged |= start + block_k > asked + 1
    kinds = [(False, False), (True, False)] if has_length or causal else [(False, False)]
    if pattern_ref is not None:
        kinds += [(has_length, True)]
    for (edge, partial_block), fixed in itertools.product(kinds, (True, False)):
        condition = useful & (bounded if fixed else ~bounded)
        if (has_length or causal) and not partial_block:
            condition &= ragged if edge else ~ragged
        if pattern_ref is not None:
            condition &= (pattern != 0) if partial_block else (pattern == 0)
        pl.when(condition)(partial(visit, edge, partial_block, fixed))

    @pl.when(last)
    def _():
        def head(h):
            total = sum_ref[h].sum(1, keepdims=True)
            safe = jnp.where(total == 0, 1.0, total)
            out_ref[0, h] = (acc_ref[h] / safe).astype(out_ref.dtype)
            lse = jnp.where(total == 0, -jnp.inf, max_ref[h] * scale + jnp.log(safe))
            lse_ref[0, h] = lse.T[:1]

        _for_heads(heads, head)


def _bounded(q: jax.Array, k: jax.Array, scale: float, together: int) -> jax.Array:
    """i32 [B, H / together]: 1 where no logit of these query heads can exceed `LIMIT` (a NaN says 0)."""

    def longest(x: jax.Array) -> jax.Array:  # [B, N, H, D] -> [B, H]
        return jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(-1).max(1))

    of_keys = jnp.repeat(longest(k), q.shape[2] // k.shape[2], axis=1)
    highest = (longest(q) * of_keys).reshape(q.shape[0], -1, together).max(-1)
    return (scale * highest <= LIMIT).astype(jnp.int32)


def _heads_together(heads: int, scores: int, group: int = 1) -> int:
    """Query heads of one visit: a part of those that share a key head, or all of several such groups."""
    fitting = (n for n in range(1, heads + 1) if heads % n == 0 and (n % group == 0 or group % n == 0))
    return max(n for n in fitting if n == 1 or n * scores <= SCORES)


def _forward(request: Request, interpret, tile: Tile):
    q, k, v, lengths, blocks = request.q, request.k, request.v, request.kv_length, request.block_map
    scale, causal, group = request.scale, request.causal, request.group
    batch, queries, heads, depth = q.shape
    keys, width = k.shape[1], v.shape[-1]
    block_q, block_k = tile if blocks is None else (blocks.block_q, blocks.block_k)
    has_length = lengths is not None or keys % block_k != 0
    lengths = jnp.full((batch,), keys, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
    together = _heads_together(heads, block_q * block_k, group)
    key_heads, visits_per_key = max(1, together // group), max(1, group // together)
    rows, columns = -(-queries // block_q), -(-keys // block_k)

    if blocks is None:
        words = np.zeros((1,), np.int32)
        grid = (batch, heads // together, rows, columns)

        def row_of(b, h, i, j, words, lengths, bounded):
            del j, words, lengths, bounded
            return b, h, i, 0

        def column_of(b, h, i, j, words, lengths, bounded):
            del words, bounded
            seen = jnp.minimum(lengths[b], (i + 1) * block_q) if causal else lengths[b]
            return b, _part(h, visits_per_key), jnp.minimum(j, jnp.maximum(pl.cdiv(seen, block_k) - 1, 0)), 0

        def lse_of(b, h, i, j, words, lengths, bounded):
            del j, words, lengths, bounded
            return b, h, 0, i

        def locate(words_ref, length_ref):
            del words_ref, length_ref
            j = pl.program_id(3)
            return j, 0, j == 0, j == columns - 1
    else:
        words, total = _visit_list(blocks)
        grid = (batch, heads // together, total)

        def row_of(b, h, t, words, lengths, bounded):
            del lengths, bounded
            return b, h, _row(words[t]), 0

        def column_of(b, h, t, words, lengths, bounded):
            del lengths, bounded
            return b, _part(h, visits_per_key), _column(words[t]), 0

        def lse_of(b, h, t, words, lengths, bounded):
            del lengths, bounded
            return b, h, 0, _row(words[t])

        def locate(words_ref, length_ref):
            del length_ref
            t, end = pl.program_id(2), pl.num_programs(2) - 1
            word = words_ref[t]
            first = (t == 0) | (_row(words_ref[jnp.maximum(t - 1, 0)]) != _row(word))
            last = (t == end) | (_row(words_ref[jnp.minimum(t + 1, end)]) != _row(word))
            return _column(word), word & 0xFF, first, last

    operands = [x.swapaxes(1, 2) for x in (q, k, v)]
    in_specs = [
        pl.BlockSpec((1, together, block_q, depth), row_of),
        pl.BlockSpec((1, key_heads, block_k, depth), column_of),
        pl.BlockSpec((1, key_heads, block_k, width), column_of),
    ]
    if blocks is not None and len(blocks.patterns):

        def pattern_of(b, h, t, words, lengths, bounded):
            del b, h, lengths, bounded
            kind = words[t] & 0xFF
            return jnp.where((kind == 0) | (kind == NOTHING), 0, kind - 1), 0, 0

        operands.append(jnp.asarray(blocks.patterns).astype(jnp.int8))
        in_specs.append(pl.BlockSpec((1, block_q, block_k), pattern_of))

    known = cost(request)
    compute = COMPUTE if block_k % COMPUTE == 0 else block_k
    out, lse = pl.pallas_call(
        partial(_body, locate, has_length, causal, scale, together, compute),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=grid,
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((1, together, block_q, width), row_of),
                pl.BlockSpec((1, together, 1, block_q), lse_of),
            ],
            scratch_shapes=[
                pltpu.VMEM((together, block_q, width), jnp.float32),
                pltpu.VMEM((together, block_q, LANES), jnp.float32),
                pltpu.VMEM((together, block_q, LANES), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, queries, width), q.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, queries), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", *("arbitrary",) * (len(grid) - 2))
        ),
        cost_estimate=pl.CostEstimate(
            flops=known.flops, transcendentals=known.flops // (2 * (depth + width)), bytes_accessed=known.bytes
        ),
        interpret=interpret,
        name="attention_sparse" if blocks is not None else "attention_dense",
    )(jnp.asarray(words), lengths, _bounded(q, k, scale, together), *operands)
    return out.swapaxes(1, 2), lse[:, :, 0].swapaxes(1, 2)


def tilings(request: Request) -> tuple[Tile, ...]:
    """Tiles of a dense request."""
    del request
    return DENSE_TILES


def run(request: Request, interpret=False, tile: Tile | None = None) -> tuple[jax.Array, jax.Array]:
    """Serve a request; the backward pass is the chunked one of `xla`.

    Args:
        interpret: as of ``pallas_call``, to run on a CPU.
        tile: queries and keys of a dense visit; default the measured one, else the heuristic's.
    """
    tile = tile or tuned("tpu", request) or DENSE_TILES[0]
    refusal = _shape_refusal(request)
    if refusal is not None:
        raise ValueError(f"attention kernel for TPU: {refusal.reason}")

    def forward(r: Request):
        return _forward(r, interpret, tile)

    return xla.with_backward(forward)(request)


KERNEL = Kernel("tpu", supports, run, tilings)
