"""Rectangles stand for the mask they were cut from, every visited pair in exactly one of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sega_jax.attention.kernels.rectangles import LEVELS, rectangles, rows
from sega_jax.layouts.blocks import from_blocks, from_mask, halved
from sega_jax.layouts.scale_dit import block_map


def visits(parts, queries, keys):
    """How often a pair is visited, int [queries, keys]."""
    seen = np.zeros((queries + 128, keys + 128), int)
    for part in parts:
        side = part.block_k
        kinds = np.concatenate([np.ones((1, part.height, side), bool), part.patterns])
        for start, count, columns, pattern in zip(part.start, part.count, part.columns, part.pattern, strict=True):
            for column, kind in zip(columns[:count], pattern[:count], strict=True):
                seen[start : start + part.height, column * side : (column + 1) * side] += kinds[kind]
    return seen[:queries, :keys]


def drawn(seed, queries, keys, alike):
    """A mask whose rows of blocks mostly repeat the one before: whole, empty and mixed blocks of 8 x 4."""
    rng = np.random.default_rng(seed)
    units = rng.integers(0, 3, (-(-queries // 8), -(-keys // 4)))
    for row in range(1, len(units)):
        units[row] = np.where(rng.random(units.shape[1]) < alike, units[row - 1], units[row])
    units = units.repeat(8, 0).repeat(4, 1)[:queries, :keys]
    mixed = np.tile(rng.integers(0, 2, (8, 4)), (-(-queries // 8), -(-keys // 4)))[:queries, :keys]
    return np.choose(units, [np.zeros_like(units), np.ones_like(units), mixed]) > 0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 99), st.integers(1, 90), st.integers(1, 60), st.floats(0, 1), st.sampled_from([8, 16, 24, 64, 999]),
    st.sampled_from([4, 12, 999]),
)  # fmt: skip
def test_every_pair_is_visited_once(seed, queries, keys, alike, tallest, fewest):
    mask = drawn(seed, queries, keys, alike)
    blocks = from_mask(mask, 8, 4)
    parts = rectangles(blocks, keys, tallest, fewest)
    np.testing.assert_array_equal(visits(parts, queries, keys), mask)
    for part in parts:
        assert part.height <= tallest
        assert len(part.start) == len(part.count) == len(part.columns) == len(part.pattern)
        assert part.uniform == (part.count == part.columns.shape[1]).all()
        # what is called whole is, and no block reaches past the last key
        assert not part.pattern[:, : part.whole].any()
        assert (part.columns[:, : part.whole] + 1).max(initial=0) * part.block_k <= keys
        assert part.columns.max() <= (keys - 1) // part.block_k
        assert part.pattern.max() == len(part.patterns)


def test_rows_that_agree_are_joined_whatever_they_share():
    blocks = from_mask(np.repeat([[True, False], [False, True]], 16, 0).repeat(4, 1), 4, 4)
    (tall,) = rectangles(blocks, 8, 16, 999)
    assert (tall.height, tall.start.tolist(), tall.columns.tolist()) == (16, [0, 16], [[0], [1]])
    assert tall.whole == 1
    assert tall.uniform


@pytest.mark.parametrize(("fewest", "heights"), [(8, [8, 4]), (12, [4, 4])])
def test_rows_that_differ_join_for_enough_keys_only(fewest, heights):
    mask = np.kron([[1, 1, 1, 0], [1, 1, 0, 0]], np.ones((4, 4))) > 0  # two blocks of four keys in common
    parts = rectangles(from_mask(mask, 4, 4), 16, 8, fewest)
    assert [part.height for part in parts] == heights
    np.testing.assert_array_equal(visits(parts, 8, 16), mask)


def test_lengths_are_few():
    """Each length is a loop of its own to compile."""
    kinds = np.where(np.tri(40, dtype=bool), 0, -1)
    parts = rectangles(from_blocks(kinds, np.zeros((0, 4, 4), bool), 4, 4), 160, 4, 0)
    assert len(parts) <= LEVELS
    np.testing.assert_array_equal(visits(parts, 160, 160), kinds.repeat(4, 0).repeat(4, 1) == 0)


def test_the_rows_of_a_map():
    blocks = from_mask(np.tri(16, dtype=bool), 4, 4)
    part = rows(blocks)
    np.testing.assert_array_equal(visits([part], 16, 16), np.tri(16))
    assert not part.uniform
    assert part.whole == 0


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        # worked by hand, 1024 pixels and 512 text tokens: text rows see text and image; two neighbouring windows share
        # the text and most of what is around them
        ("kernel", [(512, 17, 8), (512, 72, 1), (128, 1, 2), (128, 3, 2), (128, 4, 6), (128, 5, 10), (128, 10, 12)]),
        # two windows share text and small stream (12 blocks of 64), each has itself; the small stream's own
        ("paper", [(512, 6, 8), (512, 36, 1), (256, 2, 16), (256, 6, 1)]),
    ],
)
def test_scale_dits_masks(mask, expected):
    keys = 512 + 64 * 64 * 17 // 16
    blocks = block_map(64, 64, 512, mask)
    parts = rectangles(halved(blocks, keys) if mask == "kernel" else blocks, keys, 512, 512)
    assert [(part.height, part.columns.shape[1], len(part.start)) for part in parts] == expected
    assert all(part.uniform and part.whole == part.columns.shape[1] for part in parts)
    area = sum(part.height * part.block_k * part.count.sum() for part in parts)
    patterns = blocks.patterns[blocks.pattern[blocks.pattern > 0] - 1]
    assert area == blocks.visited * 128 * 128 - (~patterns).sum()
