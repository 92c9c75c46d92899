"""Flash attention for Hopper GPUs (Pallas Mosaic GPU, sm_90a), made for block maps; not yet run on hardware.

Each block of threads owns one multiprocessor and walks through tiles of 128 queries of one head.  One warpgroup
fetches (TMA): the queries of the tile after this one, and keys and values of the visited blocks only, a few blocks
ahead, across the border between tiles.  Two warpgroups of 64 queries each compute (wgmma): while one has the tensor
cores the other has its softmax.  Blocks that nobody visits cost nothing.  Of the visits, those in which every query
sees every key come first and are free of masks; what remains (patterns, and the block that holds the last key) is
masked from one bit per query and key.  Long rows start first, so that the multiprocessors finish together.

Rotation stays outside: XLA fuses it into the pass that writes q and k, and a tile of keys would otherwise be rotated
once per tile of queries.  Dense attention is served too, for comparison; cuDNN is asked before.
Keys and values behind ``kv_length`` are not seen but are multiplied by zero: they must be finite.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sega_jax.attention.kernels import xla
from sega_jax.attention.kernels.contract import Kernel, Refusal, Request, device, platform
from sega_jax.layouts.blocks import BlockMap

OLDEST_JAX = (0, 11)  # warpgroup lowering by default, and the interpreter that the tests need
HEAD_SIZES = (64, 128)
ROWS = 64  # queries of a warpgroup, the height of a wgmma
TILE_Q = 2 * ROWS
TILE_K = 128
STAGES = {64: 4, 128: 2}  # blocks of keys and values in flight, by head size
PROGRAMS = 132  # multiprocessors of an H100 or H200 (SXM)
REGISTERS = {"compute": 240, "fetch": 24}  # per thread; 2 x 128 x 240 + 128 x 24 is what a multiprocessor has
CODE = 12  # bits of a visit that number its pattern; the others number its block of keys
WORD = 32


def _shape_refusal(request: Request) -> Refusal | None:
    q, v, blocks = request.q, request.v, request.block_map
    if jax.__version_info__ < OLDEST_JAX:
        return Refusal(f"it needs jax {'.'.join(map(str, OLDEST_JAX))} or newer, this is {jax.__version__}")
    if q.dtype != jnp.bfloat16:
        return Refusal(f"it takes bfloat16, got {q.dtype}")
    if q.shape[-1] != v.shape[-1] or q.shape[-1] not in HEAD_SIZES:
        return Refusal(f"it takes one head size of {HEAD_SIZES}, got {q.shape[-1]} and {v.shape[-1]}")
    if not request.scale > 0:
        return Refusal(f"it takes positive scales, got {request.scale}")
    if request.causal:
        return Refusal("it has no causal attention; draw the diagonal in a block map")
    if blocks is None:
        return None
    if blocks.block_q % TILE_Q or blocks.block_k % 64:
        return Refusal(
            f"query blocks are multiples of {TILE_Q} and key blocks of 64, got {blocks.block_q} and {blocks.block_k}"
        )
    codes = 1 + len(blocks.patterns) * (blocks.block_k // _tile_k(blocks))
    if codes > 2**CODE:
        return Refusal(f"it numbers {2**CODE - 1} tiles of patterns, got {codes - 1}")
    return None


def supports(request: Request) -> Refusal | None:
    if platform() != "gpu":
        return Refusal(f"it runs on Hopper GPUs, the default device is {platform()}")
    capability = getattr(device(), "compute_capability", None)
    if capability != "9.0":
        return Refusal(f"it runs on compute capability 9.0 (H100, H200), this device has {capability}")
    return _shape_refusal(request)


def _tile_k(blocks: BlockMap | None) -> int:
    return TILE_K if blocks is None or blocks.block_k % TILE_K == 0 else 64


def shared_memory_bytes(depth: int, tile_k: int = TILE_K) -> int:
    """Shared memory of the tiles of one program; the barriers take less than 1 KiB more."""
    return 2 * TILE_Q * depth * 2 + STAGES[depth] * 2 * tile_k * depth * 2 + TILE_Q * 4


def _numbers(*arrays):
    """NumPy where every array is known, so that the tables become constants, else jax.numpy."""
    return jnp if any(isinstance(x, jax.core.Tracer) for x in arrays) else np


def _order(x, xp):
    return np.argsort(x, kind="stable") if xp is np else jnp.argsort(x, stable=True)


def _plan(whole, total, ends, batch: int, heads: int, programs: int, longest: int):
    """Which program treats which tile of queries, and when.

    Long rows go first.  Each later tile goes to the program that is ready first, if all later tiles took the mean
    time: near enough, since they are many and their order deals them out evenly.

    Args:
        whole, total: i32 [S, T], visits without mask and all visits of a tile; S is 1 where samples are alike.
        ends: i32 [S], valid keys.
        longest: no tile has more visits.

    Returns:
        plan i32 [programs, J, 5]: sample and head in one number, tile, whole, total, valid keys; and i32 [programs],
        how many of the J are real.
    """
    xp = _numbers(whole, total)
    samples, tiles = total.shape
    pairs = tiles * batch
    place = np.broadcast_to(np.arange(tiles, dtype=np.int32)[:, None], (tiles, batch)).reshape(-1)
    sample = np.broadcast_to(np.arange(batch, dtype=np.int32)[None, :], (tiles, batch)).reshape(-1)
    table = sample if samples > 1 else np.zeros_like(sample)
    order = _order(-total[table, place], xp)
    columns = (sample, place, whole[table, place], total[table, place], ends[table])
    rows = xp.stack([xp.asarray(x)[order] for x in columns], -1)

    items = pairs * heads
    cost = (rows[:, 3] + 1).repeat(heads).astype(np.float32)  # a tile costs about one visit by itself
    first, rest = cost[:programs], cost[programs:]
    mean = rest.mean() if len(rest) else np.float32(1)
    spread = longest if xp is jnp else math.ceil((first.max() - first.min()) / mean)
    slots = spread + -(-len(rest) // programs) + 1
    ready = first[:, None] + np.arange(slots, dtype=np.float32)[None, :] * mean
    rank = _order(_order(ready.reshape(-1), xp), xp).reshape(programs, slots) + programs
    item = xp.concatenate([np.arange(programs, dtype=np.int32)[:, None], rank], 1)
    real = item < items
    item = xp.where(real, item, 0)
    row = rows[item // heads]
    plane = row[..., 0] * heads + item % heads
    return xp.concatenate([plane[..., None], row[..., 1:]], -1).astype(np.int32), real.sum(1).astype(np.int32)


def _visits(blocks: BlockMap, ends, queries: int):
    """What each tile of queries visits.

    Args:
        ends: i32 [S], valid keys; S is 1 where all samples are alike.

    Returns:
        whole and total as of `_plan`; visits i32 [S, R, J], ``block << CODE | code`` per visited tile of keys of a
        query block, those without mask first; bits i32 [codes, keys / 32, block_q] of the masks, code 0 hiding nothing.
    """
    xp = _numbers(blocks.count, ends)
    count, columns, pattern = (xp.asarray(x).astype(np.int32) for x in (blocks.count, blocks.columns, blocks.pattern))
    tile_k = _tile_k(blocks)
    parts = blocks.block_k // tile_k
    part = np.tile(np.arange(parts, dtype=np.int32), columns.shape[1])
    column = columns.repeat(parts, 1) * parts + part[None, :]
    pattern = pattern.repeat(parts, 1)
    code = xp.where(pattern > 0, 1 + (pattern - 1) * parts + part[None, :], 0)
    slot = np.arange(column.shape[1], dtype=np.int32)

    end = ends[:, None, None]
    hidden = (slot[None, :] >= count[:, None] * parts)[None] | (column[None] * tile_k >= end)
    masked = (code > 0)[None] | ((column[None] + 1) * tile_k > end)
    kind = xp.where(hidden, 2, xp.where(masked, 1, 0)).astype(np.int32)
    words = xp.broadcast_to((column << CODE | code)[None], kind.shape)
    words = xp.take_along_axis(words, _order(kind, xp), -1).astype(np.int32)

    per_row = blocks.block_q // TILE_Q
    tiles = -(-queries // TILE_Q)
    whole, total = ((kind <= n).sum(-1).astype(np.int32).repeat(per_row, 1)[:, :tiles] for n in (0, 1))
    return whole, total, words, _bits(blocks.patterns, tile_k)


def _bits(patterns, tile_k: int):
    """i32 [1 + P * block_k / tile_k, tile_k / 32, block_q] from bool [P, block_q, block_k]; the first hides nothing."""
    xp = _numbers(patterns)
    count, block_q, block_k = patterns.shape
    seen = xp.asarray(patterns).astype(np.uint32)
    seen = seen.reshape(count, block_q, block_k // tile_k, tile_k // WORD, WORD).transpose(0, 2, 3, 1, 4)
    packed = (seen << np.arange(WORD, dtype=np.uint32)[None, None, None, None, :]).sum(-1, dtype=np.uint32)
    packed = packed.reshape(-1, tile_k // WORD, block_q)
    packed = xp.concatenate([np.full((1, *packed.shape[1:]), 2**WORD - 1, np.uint32), packed])
    return packed.view(np.int32)


def _rem(x, n: int):
    return lax.rem(x, jnp.int32(n))


def _div(x, n: int):
    return lax.div(x, jnp.int32(n))


def _arrive_and_wait(barrier) -> None:
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def _hidden(scores, first_key, length, bits_ref, code, row):
    """Scores [ROWS, keys] with -inf where the pattern or the length hides a key."""
    keys = scores.shape[1]
    position = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
    seen = position < length - first_key
    if bits_ref is not None:
        word = None
        for n in reversed(range(keys // WORD)):
            part = plgpu.load(
                bits_ref.at[code, n, pl.ds(row, ROWS)], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
            )
            part = lax.broadcast_in_dim(part, scores.shape, [0])
            word = part if word is None else jnp.where(position < (n + 1) * WORD, part, word)
        seen = seen & ((lax.shift_right_logical(word, position & (WORD - 1)) & 1) != 0)
    return jnp.where(seen, scores, -jnp.inf)


def _body(scale, heads, heads_per_key, tile_k, per_row, simulated, *refs):
    q_ref, k_ref, v_ref, plan_ref, own_ref, *more, out_ref, lse_ref, scratch, barriers = refs
    visits_ref, bits_ref = more or (None, None)
    qo_smem, k_smem, v_smem, lse_smem = scratch
    q_ready, k_ready, v_ready, q_free, k_free, v_free, turn = barriers
    depth, stages = q_ref.shape[-1], k_smem.shape[0]
    program, group = lax.axis_index("program"), lax.axis_index("group")

    def planned(n):
        return tuple(plan_ref[program, jnp.minimum(n, plan_ref.shape[1] - 1), i] for i in range(5))

    def each_tile(treat):
        """``treat(n, planned(n), visits before it)``, the next row on its way meanwhile; gives all tiles and visits."""

        def tile(n, state):
            row, done = state
            following = planned(n + 1)
            treat(n, row, done)
            return following, done + row[3]

        own = own_ref[program]
        return own, lax.fori_loop(0, own, tile, (planned(0), jnp.int32(0)))[1]

    def visit(plane, tile, step):
        if visits_ref is None:
            return None
        table = _div(plane, heads) if visits_ref.shape[0] > 1 else 0
        return visits_ref[table, _div(tile, per_row), step]

    def column(word, step):
        return step if word is None else lax.shift_right_logical(word, CODE)

    def fetch(n, row, done):
        plane, tile, _, total, _ = row
        sample, head, buffer = _div(plane, heads), _rem(plane, heads), _rem(n, 2)
        kv_head = head if heads_per_key == 1 else _div(head, heads_per_key)

        @pl.when(n > 0)
        def _():
            plgpu.barrier_wait(q_free.at[buffer])

        for g in range(2):
            rows = pl.ds(tile * TILE_Q + g * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(q_ref.at[sample, rows, head], qo_smem.at[buffer, g], q_ready.at[buffer])

        def step(j, _):
            at = pl.ds(column(visit(plane, tile, j), j) * tile_k, tile_k)
            slot = _rem(done + j, stages)
            for ref, smem, ready, free in ((k_ref, k_smem, k_ready, k_free), (v_ref, v_smem, v_ready, v_free)):

                @pl.when(done + j >= stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])  # noqa: B023 traced at once

                plgpu.copy_gmem_to_smem(ref.at[sample, at, kv_head], smem.at[slot], ready.at[slot])
            return _

        lax.fori_loop(0, total, step, None)

    factor = scale / math.log(2.0)
    by_row = plgpu.Layout.WGMMA.reduce(1)

    def spread(x, shape):
        return lax.broadcast_in_dim(x, shape, [0])

    def compute(n, row, done):
        plane, tile, whole, total, length = row
        sample, head, buffer = _div(plane, heads), _rem(plane, heads), _rem(n, 2)
        qo = qo_smem.at[buffer, group]
        # what this warpgroup wrote for the tile before has left its buffer, which takes the queries of the next
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(q_free.at[1 - buffer])
        plgpu.barrier_wait(q_ready.at[buffer])

        @pl.when(total > 0)
        def _():
            # the turns of a tile begin and end within it: across an empty tile each group would wait for the other
            pl.when((group == 0) & (done > 0))(lambda: plgpu.barrier_wait(turn))
            plgpu.barrier_wait(k_ready.at[_rem(done, stages)])
            pl.when(group == 1)(lambda: _arrive_and_wait(turn))

        def step(j, state, masked: bool):
            acc, highest, sums = state
            slot = _rem(done + j, stages)

            def scores_of(ref):
                plgpu.wgmma(ref, qo, k_smem.at[slot].transpose((1, 0)))
                _arrive_and_wait(turn)
                return ref[...]

            scores = pl.run_scoped(scores_of, plgpu.ACC((ROWS, tile_k), jnp.float32))
            plgpu.barrier_arrive(k_free.at[slot])
            if masked:
                word = visit(plane, tile, j)
                first = column(word, j) * tile_k
                code = None if word is None else word & (2**CODE - 1)
                inside = _rem(tile, per_row) * TILE_Q + group * ROWS
                scores = _hidden(scores, first, length, bits_ref, code, inside)
            # the maximum is kept times the factor, so that a weight costs one multiply-add and one exponential
            new = jnp.maximum(highest, scores.max(axis=1) * factor)
            shift = jnp.where(new == -jnp.inf, 0.0, new) if masked else new
            keep = jnp.exp2(highest - shift)
            weights = jnp.exp2(scores * factor - spread(shift, scores.shape))
            acc = acc * spread(keep, acc.shape)
            sums = sums * keep + weights.sum(axis=1)
            weights = weights.astype(v_smem.dtype)
            acc, new, sums, weights = lax.optimization_barrier((acc, new, sums, weights))
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_ready.at[slot])
            plgpu.barrier_wait(turn)

            def await_keys():
                pl.when(j + 1 < total)(lambda: plgpu.barrier_wait(k_ready.at[_rem(done + j + 1, stages)]))

            def add_values(ref):
                plgpu.wgmma(ref, weights, v_smem.at[slot])
                await_keys()

            if simulated:  # the interpreter takes weights from shared memory only
                acc = acc + lax.dot(weights, v_smem[slot], preferred_element_type=jnp.float32)
                plgpu.commit_smem()
                await_keys()
            else:
                acc = pl.run_state(add_values)(plgpu.ACC.init(acc))
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, new, sums

        state = (
            plgpu.layout_cast(jnp.zeros((ROWS, depth), jnp.float32), plgpu.Layout.WGMMA),
            plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), by_row),
            plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row),
        )
        state = lax.fori_loop(0, whole, partial(step, masked=False), state)
        acc, highest, sums = lax.fori_loop(whole, total, partial(step, masked=True), state)

        pl.when((group == 0) & (total > 0))(lambda: plgpu.barrier_arrive(turn))  # awaited in the next tile

        empty = sums == 0.0
        safe = jnp.where(empty, 1.0, sums)
        qo[...] = (acc * spread(1.0 / safe, acc.shape)).astype(qo_smem.dtype)
        lse_smem.at[group][...] = jnp.where(empty, -jnp.inf, highest * math.log(2.0) + jnp.log(safe))
        plgpu.commit_smem()
        at = pl.ds(tile * TILE_Q + group * ROWS, ROWS)
        plgpu.copy_smem_to_gmem(qo, out_ref.at[sample, at, head])
        plgpu.copy_smem_to_gmem(lse_smem.at[group], lse_ref.at[sample, head, at])

    @pl.when(group < 2)
    def _():
        plgpu.set_max_registers(REGISTERS["compute"], action="increase")
        _, done = each_tile(compute)
        pl.when((group == 0) & (done > 0))(lambda: plgpu.barrier_wait(turn))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == 2)
    def _():
        plgpu.set_max_registers(REGISTERS["fetch"], action="decrease")
        own, done = each_tile(fetch)
        # no barrier is left with an arrival that nobody awaited; the simulator of jax 0.11 insists
        plgpu.barrier_wait(q_free.at[_rem(own, 2)])
        for slot in range(stages):

            @pl.when(done > slot)
            def _():
                plgpu.barrier_wait(k_free.at[slot])  # noqa: B023 traced at once
                plgpu.barrier_wait(v_free.at[slot])  # noqa: B023


def _forward(q, k, v, tables, tile_k: int, per_row: int, scale: float, interpret):
    queries = q.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) for x in (q, k, v))  # whole tiles of TMA
    batch, _, heads, depth = q.shape
    stages = STAGES[depth]
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def smem(*shape):
        return plgpu.SMEM(shape, q.dtype, transforms=transforms)

    body = partial(_body, scale, heads, heads // k.shape[2], tile_k, per_row, interpret is not None)

    def attention(*refs):
        pl.run_scoped(
            lambda *scratch: body(*refs, *scratch),
            (
                smem(2, 2, ROWS, depth),
                smem(stages, tile_k, depth),
                smem(stages, tile_k, depth),
                plgpu.SMEM((2, ROWS), jnp.float32),
            ),
            (
                plgpu.Barrier(num_arrivals=2, num_barriers=2),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_barriers=stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=2),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(num_arrivals=2),
            ),
            collective_axes="group",
        )

    out, lse = plgpu.kernel(
        attention,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(
                (batch, heads, -(-queries // TILE_Q) * TILE_Q), jnp.float32
            ),  # rows of whole 16-byte words, for TMA
        ),
        grid=(tables[0].shape[0],),
        grid_names=("program",),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )(q, k, v, *(jnp.asarray(x) for x in tables))
    return out[:, :queries], lse[:, :, :queries].swapaxes(1, 2)


def _programs() -> int:
    return getattr(device(), "core_count", PROGRAMS) if platform() == "gpu" else PROGRAMS


def _tables(request: Request, programs: int):
    """Operands of the kernel besides q, k and v; constants where map and lengths are known."""
    batch, queries, heads, _ = request.q.shape
    keys, blocks, lengths = request.k.shape[1], request.block_map, request.kv_length
    ends = np.array([keys], np.int32) if lengths is None else jnp.minimum(lengths.astype(jnp.int32), keys)
    tiles = -(-queries // TILE_Q)
    if blocks is None:
        xp, more, longest = _numbers(ends), (), -(-keys // TILE_K)
        whole, total = (xp.broadcast_to(n[:, None], (len(ends), tiles)) for n in (ends // TILE_K, -(-ends // TILE_K)))
    else:
        whole, total, *more = _visits(blocks, ends, queries)
        longest = more[0].shape[-1]
    return *_plan(whole, total, ends, batch, heads, min(programs, tiles * batch * heads), longest), *more


def run(request: Request, interpret=None, programs: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Serve a request; the backward pass is the chunked one of `xla`.

    Args:
        interpret: ``plgpu.InterpretGPUParams``, to run on a CPU.
        programs: blocks of threads that share the work; by default one per multiprocessor.
    """
    refusal = _shape_refusal(request)
    if refusal is not None:
        raise ValueError(f"attention kernel for Hopper: {refusal.reason}")
    blocks, programs = request.block_map, programs or _programs()
    per_row = 1 if blocks is None else blocks.block_q // TILE_Q

    def forward(r: Request):
        return _forward(r.q, r.k, r.v, _tables(r, programs), _tile_k(blocks), per_row, r.scale, interpret)

    return xla.with_backward(forward)(request)


KERNEL = Kernel("hopper", supports, run)
