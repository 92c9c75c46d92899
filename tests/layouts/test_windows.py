"""Scale-DiT's block maps: published and derived counts, the token rule at small size, memory."""

import tracemalloc

import numpy as np
import pytest

from sega_jax.layouts.scale_dit import block_map, units

TEXT = 512


@pytest.mark.parametrize(
    ("height", "width", "visited"),
    [  # pixels, blocks of 128 x 64; those at 1024, 2048 and 8192 squared as the authors' code printed them
        (1024, 1024, 1_034),
        (2048, 2048, 4_336),
        (4096, 4096, 17_912),
        (6144, 6144, 40_768),
        (2048, 6144, 13_408),
        (4096, 6144, 27_088),
        (8192, 8192, 72_904),
    ],
)
def test_kernel_mask_counts(height, width, visited):
    assert units(height // 16, width // 16, TEXT, "kernel").sum() == visited
    assert block_map(height // 16, width // 16, TEXT, "kernel", 128, 64).visited == visited


@pytest.mark.parametrize(
    ("side", "mask", "block", "visited"),
    [
        (1024, "kernel", (128, 128), 532),
        (2048, "kernel", (128, 128), 2_230),
        (4096, "kernel", (128, 128), 9_256),
        (6144, "kernel", (128, 128), 21_098),
        (1024, "kernel", (512, 512), 66),
        (2048, "kernel", (512, 512), 323),
        (4096, "kernel", (512, 512), 1_433),
        (4096, "paper", (128, 64), 45_344),
        (4096, "paper", (128, 128), 22_672),
        (4096, "paper", (512, 512), 1_481),
        (6144, "paper", (128, 128), 99_952),
        (6144, "paper", (512, 512), 6_391),
    ],
)
def test_counts_at_other_blocks(side, mask, block, visited):
    """Blocks that hold any visited pair; the published counts at 512 expand the exact mask, as `units` does."""
    assert block_map(side // 16, side // 16, TEXT, mask, *block).visited == visited


def order(height, width, window):
    """Row and column of the tokens, window by window."""
    rows, columns = (x.reshape(-1) for x in np.indices((height, width)))
    slot = np.lexsort((columns, rows, columns // window, rows // window))
    return rows[slot], columns[slot]


@pytest.mark.parametrize(("height", "width"), [(32, 64), (64, 32), (64, 64)])
def test_units_are_the_expansion_of_the_token_rule(height, width):
    """Mask K pair by pair, then every 128 x 64 block with an allowed pair kept; mask P pair by pair."""
    across = width // 16
    (i, j), (a, b) = order(height, width, 16), order(height // 4, width // 4, 4)
    cell_q, cell_k = i // 16 * across + j // 16, a // 4 * across + b // 4
    local = (np.abs(i[:, None] - i) <= 8) & (np.abs(j[:, None] - j) <= 8)
    low = np.abs(cell_q[:, None] - cell_k) <= 1
    small = (np.abs(a[:, None] - a) <= 2) & (np.abs(b[:, None] - b) <= 2)
    n, m, t = len(i), len(a), 128
    ones, zeros = (lambda r, c: np.ones((r, c), bool)), (lambda r, c: np.zeros((r, c), bool))
    k = np.block([[ones(t, t + n), zeros(t, m)], [ones(n, t), local, low], [zeros(m, t + n), small]])
    same = cell_q[:, None] == cell_q
    p = np.block([[ones(t, t + n), zeros(t, m)], [ones(n, t), same, ones(n, m)], [ones(m, t), zeros(m, n), ones(m, m)]])
    for mask, pairs in (("kernel", k), ("paper", p)):
        size = len(pairs)
        kept = pairs.reshape(size // 128, 128, size // 64, 64).any((1, 3))
        np.testing.assert_array_equal(units(height, width, t, mask), kept)
        expanded = kept.repeat(128, 0).repeat(64, 1)
        for block in ((128, 64), (128, 128), (256, 128)):
            np.testing.assert_array_equal(block_map(height, width, t, mask, *block).dense(size, size), expanded)
    np.testing.assert_array_equal(expanded, p)  # mask P has no partial unit


def test_no_square_of_the_sequence():
    tracemalloc.start()
    block_map(384, 384, TEXT, "kernel")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 157_184**2 / 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((40, 64, 512, "kernel"), "40 x 64 tokens"),
        ((64, 64, 500, "kernel"), "text_tokens=500"),
        ((64, 64, 512, "K"), "mask='K'"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        units(*arguments)
