"""Block maps in other blocks stand for the same mask."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sega_jax.layouts.blocks import from_mask, halved
from sega_jax.layouts.scale_dit import block_map


def drawn(rng, queries, keys, unit_q, unit_k, kinds=2):
    """A mask made of whole, empty and (with ``kinds=3``) mixed units."""
    coarse = rng.integers(0, kinds, (-(-queries // unit_q), -(-keys // unit_k)))
    coarse = coarse.repeat(unit_q, 0).repeat(unit_k, 1)[:queries, :keys]
    return np.choose(coarse, [np.zeros_like(coarse), np.ones_like(coarse), rng.integers(0, 2, coarse.shape)]) > 0


def same(cut, mask, *sides):
    """``cut`` is what one would make of the mask directly, up to the order of its patterns."""
    assert (cut.block_q, cut.block_k) == sides
    np.testing.assert_array_equal(cut.dense(*mask.shape), mask)
    direct = from_mask(mask, *sides)
    np.testing.assert_array_equal(cut.count, direct.count)
    np.testing.assert_array_equal(cut.columns, direct.columns)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 10))
def test_halves(seed, queries, units):
    mask = drawn(np.random.default_rng(seed), queries, 8 * units, 8, 8)
    mask = np.pad(mask, ((0, -queries % 8), (0, 0)), mode="edge")
    # a last block half past the keys stays one that is whole in each of its halves
    same(halved(from_mask(mask, 8, 16), 8 * units), mask, 8, 8)


def test_halves_that_need_patterns_are_not_cut():
    mask = drawn(np.random.default_rng(0), 32, 64, 8, 4, kinds=3)
    assert halved(from_mask(mask, 8, 16), 64) is None
    assert halved(from_mask(mask, 8, 5), 64) is None


def test_scale_dits_mask_k():
    """The released kernel's mask is made of blocks of 128 x 64, so its 30 half-empty ones at 1024 pixels vanish."""
    whole = block_map(64, 64, 0, "kernel")
    assert (whole.visited, (whole.pattern > 0).sum()) == (260, 30)
    cut = halved(whole, 64 * 64 * 17 // 16)
    assert (cut.visited, len(cut.patterns)) == (490, 0)
