"""Block maps of Scale-DiT's two masks, from closed forms: nothing of size N x N is ever built (scale_dit.md §6).

The sequence is ``[text, image, low]``.  The image is ordered window by window (16 x 16 tokens, raster inside), the
four times smaller stream cell by cell (4 x 4 tokens, one cell under each window), so that 128 image queries are a
tile of 8 x 16 tokens and 64 image keys one of 4 x 16.
"""

from __future__ import annotations

import numpy as np

from sega_jax.layouts.blocks import BlockMap, from_units

WINDOW = 16  # side of a window in image tokens; a cell of the small stream has a quarter of it
UNIT = (128, 64)  # queries and keys of the smallest block, the one the published masks are made of
QUERY_CELLS, KEY_CELLS = 8, 4  # cells of 16 small tokens per unit


def _any(cells: np.ndarray, *sides: int) -> np.ndarray:
    rows, columns = cells.shape
    return cells.reshape(rows // sides[0], sides[0], columns // sides[1], sides[1]).any((1, 3))


def units(height: int, width: int, text_tokens: int, mask: str) -> np.ndarray:
    """Which units of 128 queries x 64 keys are visited, bool [N / 128, N / 64].

    Args:
        height, width: image tokens, multiples of 16 with a multiple of 8 windows.
        text_tokens: a multiple of 128.
        mask: ``"kernel"``, what the released sampling runs (mask K expanded to whole units, the function its
            weights were used with), or ``"paper"`` (mask P, exact: windows, all text, all of the small stream).

    Raises:
        ValueError: where a unit would straddle two streams.
    """
    if height % WINDOW or width % WINDOW or (height // WINDOW) * (width // WINDOW) % QUERY_CELLS:
        raise ValueError(
            f"{height} x {width} tokens: expected multiples of {WINDOW} with a multiple of {QUERY_CELLS} windows"
        )
    if text_tokens % UNIT[0]:
        raise ValueError(f"text_tokens={text_tokens}: expected a multiple of {UNIT[0]}")
    if mask not in ("kernel", "paper"):
        raise ValueError(f"mask={mask!r}: expected 'kernel' or 'paper'")
    across = width // WINDOW
    count = (height // WINDOW) * across
    window = np.arange(count)
    row, column = window // across, window % across

    query_window, key_window = np.repeat(window, 2), np.repeat(window, 4)
    if mask == "paper":
        local = query_window[:, None] == key_window[None, :]
        image_low = np.ones((2 * count, count // KEY_CELLS), bool)
        low_low = np.ones((count // QUERY_CELLS, count // KEY_CELLS), bool)
    else:
        query_tile = 2 * row[query_window] + np.arange(2 * count) % 2
        key_tile = 2 * row[key_window] + np.arange(4 * count) % 4 // 2
        local = np.abs(query_tile[:, None] - key_tile[None, :]) <= 1
        local &= np.abs(column[query_window][:, None] - column[key_window][None, :]) <= 1
        group = np.arange(count // KEY_CELLS)[None, :]
        lowest = np.maximum(query_window - 1, 0)[:, None] // KEY_CELLS
        highest = np.minimum(query_window + 1, count - 1)[:, None] // KEY_CELLS
        image_low = (lowest <= group) & (group <= highest)
        # small tokens up to two apart share a cell or touch across its border
        touching = np.abs(row[:, None] - row[None, :]) <= 1
        touching &= np.abs(column[:, None] - column[None, :]) <= 1
        low_low = _any(touching, QUERY_CELLS, KEY_CELLS)

    text_q, text_k = text_tokens // UNIT[0], text_tokens // UNIT[1]
    sees_text = mask == "paper"
    return np.block(
        [
            [np.ones((text_q, text_k + 4 * count), bool), np.zeros((text_q, count // KEY_CELLS), bool)],
            [np.ones((2 * count, text_k), bool), local, image_low],
            [
                np.full((len(low_low), text_k), sees_text),
                np.zeros((len(low_low), 4 * count), bool),
                low_low,
            ],
        ]
    )


def block_map(height: int, width: int, text_tokens: int, mask: str, block_q: int = 128, block_k: int = 128) -> BlockMap:
    """The mask of `units` for a kernel with blocks of ``block_q`` x ``block_k`` tokens, over ``[text, image, low]``."""
    return from_units(units(height, width, text_tokens, mask), *UNIT, block_q, block_k)
