"""A block map cut into rectangles: where neighbouring rows visit the same blocks, one taller product serves them.

Rows of Scale-DiT's mask K share most of what they see (text, and the windows around them) without being equal, so
what all rows of a group visit becomes a tall rectangle, and the rest stays theirs.  A query's keys then lie in several
rectangles, whose weights add up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import numpy as np

from sega_jax.layouts.blocks import BlockMap, Leaf

LEVELS = 8  # how many lengths rectangles of one height come in; each is a loop of its own to compile


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rectangles:
    """Rectangles of one height and nearly one length.

    Attributes:
        height: queries of each.
        block_k: keys per block.
        whole: so many leading blocks of each are visited whole.
        uniform: all are as long as the longest.
        start: i32 [R], the first query of each.
        count: i32 [R], its number of blocks.
        columns: i32 [R, J], their indices; entries past ``count`` are valid ones.
        pattern: i32 [R, J], 0 for a whole block, ``p > 0`` for ``patterns[p - 1]``.
        patterns: bool [P, height, block_k], True where a query may see a key.
    """

    height: int = field(metadata={"static": True})
    block_k: int = field(metadata={"static": True})
    whole: int = field(metadata={"static": True})
    uniform: bool = field(metadata={"static": True})
    start: Leaf
    count: Leaf
    columns: Leaf
    pattern: Leaf
    patterns: Leaf


def rows(blocks: BlockMap) -> Rectangles:
    """The map's own rows; it may be traced."""
    start = np.arange(blocks.columns.shape[0], dtype=np.int32) * blocks.block_q
    arrays = start, blocks.count, blocks.columns, blocks.pattern, blocks.patterns
    return Rectangles(blocks.block_q, blocks.block_k, 0, False, *arrays)


def _alike(
    found: list[tuple[int, np.ndarray, np.ndarray]], blocks: BlockMap, times: int, keys: int
) -> list[Rectangles]:
    """Rectangles ``times`` rows high, given as (row, columns, kinds), by length."""
    lengths = np.array([len(columns) for _, columns, _ in found])
    levels = np.unique(lengths)
    if len(levels) > LEVELS:
        levels = np.unique(np.quantile(lengths, np.linspace(0, 1, LEVELS), method="higher"))
    groups = []
    for low, longest in zip([0, *levels[:-1]], levels, strict=True):
        members = [found[i] for i in np.flatnonzero((lengths > low) & (lengths <= longest))]
        columns, kinds = (np.zeros((len(members), longest), np.int32) for _ in range(2))
        leading = []
        for i, (_, seen, seen_kinds) in enumerate(members):
            partial = (seen_kinds > 0) | ((seen + 1) * blocks.block_k > keys)
            order = np.argsort(partial, kind="stable")
            columns[i] = seen[order[-1]]
            columns[i, : len(seen)], kinds[i, : len(seen)] = seen[order], seen_kinds[order]
            leading.append(int((~partial).sum()))
        start = np.array([row for row, *_ in members], np.int32) * blocks.block_q
        count = np.array([len(seen) for _, seen, _ in members], np.int32)
        used = np.unique(kinds[kinds > 0])
        numbers = np.where(kinds > 0, 1 + np.searchsorted(used, kinds), 0).astype(np.int32)
        patterns = np.tile(np.asarray(blocks.patterns)[used - 1], (1, times, 1))
        uniform = bool((count == longest).all())
        sides = times * blocks.block_q, blocks.block_k
        groups.append(Rectangles(*sides, min(leading), uniform, start, count, columns, numbers, patterns))
    return groups


def rectangles(blocks: BlockMap, keys: int, tallest: int, fewest: int) -> tuple[Rectangles, ...]:
    """A concrete map of ``keys`` keys as rectangles that together visit every visited pair once.

    Args:
        tallest: most queries per rectangle.
        fewest: rows that differ share what they have in common only where it is at least so many keys.
    """
    count, columns, pattern = (np.asarray(x) for x in (blocks.count, blocks.columns, blocks.pattern))
    left = np.full((len(count), int(columns.max(initial=0)) + 1), -1)  # what is not yet in a rectangle
    for row, visited in enumerate(count):
        left[row, columns[row, :visited]] = pattern[row, :visited]
    parts: list[Rectangles] = []
    most = max(1, min(tallest // blocks.block_q, len(count)))
    for times in (1 << n for n in reversed(range(most.bit_length()))):
        groups = left[: len(left) // times * times].reshape(-1, times, left.shape[1])
        shared = (groups == groups[:, :1]).all(1) & (groups[:, 0] >= 0)
        all_shared = times * shared.sum(1) == (groups >= 0).sum((1, 2))
        taken = shared.any(1) & (all_shared | (shared.sum(1) * blocks.block_k >= fewest))
        found = []
        for group in np.flatnonzero(taken):
            seen = np.flatnonzero(shared[group])
            found.append((int(group) * times, seen, groups[group, 0, seen]))
            groups[group][:, seen] = -1
        if found:
            parts += _alike(found, blocks, times, keys)
    return tuple(parts)
