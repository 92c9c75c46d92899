"""Orders of the tokens of a grid: window by window, or along a Hilbert curve (scale_dit.md §7).

An order is ``int32 [rows * columns]``, raster indices in the order of visiting.  Everything is NumPy and static.
"""

from __future__ import annotations

import numpy as np

ORDERS = ("raster", "windows", "hilbert-windows", "hilbert")


def hilbert_rank(side: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Place along the curve of the cells (column ``x``, row ``y``) of a ``side`` x ``side`` grid, int64.

    The curve begins top left and ends top right, whatever its depth; ``side`` is a power of two.
    """
    if side < 1 or side & (side - 1):
        raise ValueError(f"side={side}: a Hilbert curve fills squares whose side is a power of two")
    x, y = np.asarray(x, np.int64), np.asarray(y, np.int64)
    rank = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.int64)
    half = side // 2
    while half:
        right, below = x >= half, y >= half
        rank = rank + half * half * ((3 * right) ^ below)
        x, y = x % half, y % half
        turned = right & ~below
        x, y = np.where(turned, half - 1 - x, x), np.where(turned, half - 1 - y, y)
        x, y = np.where(below, x, y), np.where(below, y, x)
        half //= 2
    return rank


def hilbert_order(rows: int, columns: int) -> np.ndarray:
    """The cells of any grid along the curve of the smallest enclosing square; the rest of the square is skipped."""
    side = 1 << (max(rows, columns) - 1).bit_length()
    y, x = np.divmod(np.arange(rows * columns), columns)
    return np.argsort(hilbert_rank(side, x, y)).astype(np.int32)


def order(rows: int, columns: int, window: int, kind: str) -> np.ndarray:
    """Tokens of a grid in an order.

    Args:
        rows, columns: of the grid.
        window: side of a window; both sides of the grid are multiples of it.
        kind: ``"raster"``; ``"windows"``, windows in raster order and raster inside each; ``"hilbert-windows"``,
            windows along the curve and raster inside each; ``"hilbert"``, all tokens along the curve, which keeps
            windows whole where their side is a power of two.

    Raises:
        ValueError: another kind, or partial windows.
    """
    if kind not in ORDERS:
        raise ValueError(f"order={kind!r}: expected one of {', '.join(ORDERS)}")
    if kind == "raster":
        return np.arange(rows * columns, dtype=np.int32)
    if kind == "hilbert":
        return hilbert_order(rows, columns)
    if rows % window or columns % window:
        raise ValueError(f"{rows} x {columns} tokens are no whole number of windows of {window} x {window}")
    down, across = rows // window, columns // window
    inside = np.arange(rows * columns, dtype=np.int32).reshape(down, window, across, window).transpose(0, 2, 1, 3)
    inside = inside.reshape(down * across, window * window)
    if kind == "hilbert-windows":
        inside = inside[hilbert_order(down, across)]
    return inside.reshape(-1)
