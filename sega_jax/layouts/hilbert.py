"""Orders of the tokens of a grid: window by window, or along a Hilbert curve.

Scale-DiT (arXiv 2510.16325) draws its windows along the curve; its code takes them row by row (``window_permutation``).

An order is ``int32 [rows * columns]``, raster indices in the order of visiting.  Everything is NumPy and static.
"""

from __future__ import annotations

import numpy as np

ORDERS = ("raster", "windows", "hilbert-windows", "hilbert", "connected")


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


def connected_order(rows: int, columns: int) -> np.ndarray:
    """The cells of any grid along a curve like Hilbert's that goes from neighbour to neighbour.

    It begins top left and ends on the end of the longer side.  Where an odd longer side meets an even shorter one,
    parity allows no such curve and one step is diagonal.
    """
    wide, high = complex(columns), complex(0, rows)
    cells = _strips(0j, wide, high) if columns >= rows else _strips(0j, high, wide)
    return (cells.imag * columns + cells.real).round().astype(np.int32)


def _strips(start: complex, along: complex, across: complex) -> np.ndarray:
    """Cells (column + row j) of the rectangle that spans ``along`` and ``across``, ending at the end of ``along``."""
    length, width = round(abs(along)), round(abs(across))
    forward, sideways = along / length, across / width
    if width == 1:
        return start + forward * np.arange(length)
    if length == 1:
        return start + sideways * np.arange(width)
    middle, side = length // 2, width // 2  # a strip is entered and left at the same end: it is an even number wide
    if 2 * length > 3 * width:
        middle += middle % 2 if length > 2 else 0
        parts = (
            (start, middle * forward, across),
            (start + middle * forward, (length - middle) * forward, across),
        )
    else:
        side += side % 2 if width > 2 else 0
        corner = start + (length - 1) * forward + (side - 1) * sideways
        parts = (
            (start, side * sideways, middle * forward),
            (start + side * sideways, along, (width - side) * sideways),
            (corner, -side * sideways, -(length - middle) * forward),
        )
    return np.concatenate([_strips(*part) for part in parts])


def order(rows: int, columns: int, window: int, kind: str) -> np.ndarray:
    """Tokens of a grid in an order.

    Args:
        rows, columns: of the grid.
        window: side of a window; both sides of the grid are multiples of it.
        kind: ``"raster"``; ``"windows"``, windows in raster order and raster inside each; ``"hilbert-windows"``,
            windows along the curve and raster inside each; ``"hilbert"``, all tokens along the curve, which keeps
            windows whole where their side is a power of two; ``"connected"``, all tokens along a curve that never
            jumps, which keeps no windows whole.

    Raises:
        ValueError: another kind, or partial windows.
    """
    if kind not in ORDERS:
        raise ValueError(f"order={kind!r}: expected one of {', '.join(ORDERS)}")
    if kind == "raster":
        return np.arange(rows * columns, dtype=np.int32)
    if kind == "hilbert":
        return hilbert_order(rows, columns)
    if kind == "connected":
        return connected_order(rows, columns)
    if rows % window or columns % window:
        raise ValueError(f"{rows} x {columns} tokens are no whole number of windows of {window} x {window}")
    down, across = rows // window, columns // window
    inside = np.arange(rows * columns, dtype=np.int32).reshape(down, window, across, window).transpose(0, 2, 1, 3)
    inside = inside.reshape(down * across, window * window)
    if kind == "hilbert-windows":
        inside = inside[hilbert_order(down, across)]
    return inside.reshape(-1)
