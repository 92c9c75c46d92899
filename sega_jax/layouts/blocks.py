"""Block maps: which key blocks a query block visits, as compressed rows.

Built on the host from geometry, passed to kernels as small traced arrays.  A block is skipped, visited whole, or
visited under one of a few boolean patterns, so no [N, N] mask ever exists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Leaf = Any  # an array, NumPy or JAX; anything while JAX rebuilds a pytree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockMap:
    """Compressed rows of visited key blocks.

    Attributes:
        block_q, block_k: block sides in tokens.
        count: i32 [Q], visited key blocks per query block.
        columns: i32 [Q, J], their indices in ascending order; entries past ``count`` repeat a valid one.
        pattern: i32 [Q, J], 0 for a whole block, ``p > 0`` for ``patterns[p - 1]``.
        patterns: bool [P, block_q, block_k], True where a query may see a key.
    """

    block_q: int = field(metadata={"static": True})
    block_k: int = field(metadata={"static": True})
    count: Leaf
    columns: Leaf
    pattern: Leaf
    patterns: Leaf

    @property
    def visited(self) -> int:
        """Number of visited blocks; needs concrete arrays."""
        return int(np.sum(np.asarray(self.count)))

    def dense(self, queries: int, keys: int) -> jax.Array:
        """The boolean mask [queries, keys]; for oracles and small grids only."""
        rows, width = self.columns.shape
        patterns = jnp.concatenate([jnp.ones((1, self.block_q, self.block_k), bool), self.patterns])
        blocks = patterns[self.pattern] & (jnp.arange(width)[None, :] < self.count[:, None])[:, :, None, None]
        total = -(-keys // self.block_k)
        mask = jnp.zeros((rows, total, self.block_q, self.block_k), bool)
        mask = mask.at[jnp.arange(rows)[:, None], self.columns].max(blocks)
        mask = mask.transpose(0, 2, 1, 3).reshape(rows * self.block_q, total * self.block_k)
        return mask[:queries, :keys]


def from_blocks(pattern: np.ndarray, patterns: np.ndarray, block_q: int, block_k: int) -> BlockMap:
    """A block map from a pattern number per block.

    Args:
        pattern: int [Q, K], -1 to skip, 0 for whole, ``p > 0`` for ``patterns[p - 1]``.
        patterns: bool [P, block_q, block_k].
    """
    kept = pattern >= 0
    count = kept.sum(1).astype(np.int32)
    width = max(1, int(count.max(initial=0)))
    columns = np.zeros((len(pattern), width), np.int32)
    kinds = np.zeros((len(pattern), width), np.int32)
    for row in range(len(pattern)):
        visited = np.flatnonzero(kept[row])
        if len(visited):
            columns[row] = visited[-1]
            columns[row, : len(visited)] = visited
            kinds[row, : len(visited)] = pattern[row, visited]
    return BlockMap(block_q, block_k, count, columns, kinds, np.asarray(patterns, bool).reshape(-1, block_q, block_k))


def from_mask(mask: np.ndarray, block_q: int, block_k: int) -> BlockMap:
    """A block map equal to a boolean mask [queries, keys]; partial blocks share patterns.  Host, small grids."""
    queries, keys = mask.shape
    rows, columns = -(-queries // block_q), -(-keys // block_k)
    padded = np.zeros((rows * block_q, columns * block_k), bool)
    padded[:queries, :keys] = mask
    blocks = padded.reshape(rows, block_q, columns, block_k).transpose(0, 2, 1, 3)
    pattern = np.full((rows, columns), -1)
    known: dict[bytes, int] = {}
    distinct: list[np.ndarray] = []
    for r in range(rows):
        for c in range(columns):
            block = blocks[r, c]
            if block.all():
                pattern[r, c] = 0
            elif block.any():
                key = block.tobytes()
                if key not in known:
                    distinct.append(block)
                    known[key] = len(distinct)
                pattern[r, c] = known[key]
    patterns = np.stack(distinct) if distinct else np.zeros((0, block_q, block_k), bool)
    return from_blocks(pattern, patterns, block_q, block_k)


def from_units(units: np.ndarray, unit_q: int, unit_k: int, block_q: int, block_k: int) -> BlockMap:
    """A block map equal to a mask made of whole units, bool [Nq / unit_q, Nk / unit_k]; blocks are whole units.

    Raises:
        ValueError: ``block_q`` or ``block_k`` is no multiple of the unit.
    """
    if block_q % unit_q or block_k % unit_k:
        raise ValueError(f"blocks of {block_q} x {block_k}: expected multiples of the unit {unit_q} x {unit_k}")
    tall, wide = block_q // unit_q, block_k // unit_k
    rows, columns = -(-units.shape[0] // tall), -(-units.shape[1] // wide)
    padded = np.pad(units, ((0, rows * tall - units.shape[0]), (0, columns * wide - units.shape[1])))
    blocks = padded.reshape(rows, tall, columns, wide).transpose(0, 2, 1, 3).reshape(rows, columns, tall * wide)
    filled = blocks.sum(-1)
    pattern = np.where(filled == 0, -1, 0)
    edge = (filled > 0) & (filled < tall * wide)
    distinct, number = np.unique(blocks[edge], axis=0, return_inverse=True)
    pattern[edge] = 1 + number.reshape(-1)
    patterns = distinct.reshape(-1, tall, wide).repeat(unit_q, 1).repeat(unit_k, 2)
    return from_blocks(pattern, patterns, block_q, block_k)


def halved(blocks: BlockMap, keys: int) -> BlockMap | None:
    """The same visits of ``keys`` keys in blocks half as wide; None where those would need patterns.  Concrete maps."""
    side = blocks.block_k // 2
    if blocks.block_k % 2:
        return None
    kinds = np.concatenate([np.ones((1, blocks.block_q, blocks.block_k), bool), blocks.patterns])
    halves = kinds.reshape(len(kinds), blocks.block_q, 2, side)
    seen, whole = halves.any((1, 3)), halves.all((1, 3))
    if (seen != whole).any():
        return None
    count, columns, pattern = (np.asarray(x) for x in (blocks.count, blocks.columns, blocks.pattern))
    visited = np.arange(columns.shape[1])[None, :] < count[:, None]
    kept = (seen[pattern] & visited[:, :, None]).reshape(len(count), -1)
    columns = (2 * columns[:, :, None] + np.arange(2, dtype=columns.dtype)).reshape(len(count), -1)
    kept &= columns * side < keys
    count = kept.sum(1).astype(np.int32)
    width = max(1, int(count.max(initial=0)))
    columns = np.take_along_axis(columns, np.argsort(~kept, axis=1, kind="stable"), 1)[:, :width]
    last = np.take_along_axis(columns, np.maximum(count - 1, 0)[:, None], 1) * (count > 0)[:, None]
    columns = np.where(np.arange(width)[None, :] < count[:, None], columns, last)
    return BlockMap(
        blocks.block_q, side, count, columns, np.zeros_like(columns), np.zeros((0, blocks.block_q, side), bool)
    )
