"""Orders of tokens against tables worked by hand; four by four is the figure of Scale-DiT (arXiv 2510.16325)."""

import numpy as np
import pytest

from sega_jax.layouts.hilbert import connected_order, hilbert_order, hilbert_rank, order


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.replace("/", " ").split()]


EIGHT = """0 8 9 1 2 3 11 10 18 19 27 26 25 17 16 24 32 33 41 40 48 56 57 49 50 58 59 51 43 42 34 35 36 37 45 44 52 60
61 53 54 62 63 55 47 46 38 39 31 23 22 30 29 28 20 21 13 12 4 5 6 14 15 7"""
EIGHT_RANKS = """0 3 4 5 58 59 60 63 / 1 2 7 6 57 56 61 62 / 14 13 8 9 54 55 50 49 / 15 12 11 10 53 52 51 48 /
16 17 30 31 32 33 46 47 / 19 18 29 28 35 34 45 44 / 20 23 24 27 36 39 40 43 / 21 22 25 26 37 38 41 42"""
SIX_BY_TEN = """0 1 11 10 20 30 31 21 22 32 33 23 13 12 2 3 4 14 15 5 6 7 17 16 26 27 37 36 35 25 24 34 44 54 55 45 46
47 57 56 53 43 42 52 51 41 40 50 59 58 48 49 39 38 28 29 19 18 8 9"""
SIX_BY_TEN_RANKS = """0 1 14 15 16 19 20 21 58 59 / 3 2 13 12 17 18 23 22 57 56 / 4 7 8 11 30 29 24 25 54 55 /
5 6 9 10 31 28 27 26 53 52 / 46 45 42 41 32 35 36 37 50 51 / 47 44 43 40 33 34 39 38 49 48"""

SIX_BY_TEN_CONNECTED = """0 10 11 1 2 12 22 32 31 21 20 30 40 50 51 41 42 52 53 43 44 54 55 45 35 25 24 34 33 23 13 3
4 14 15 5 6 7 17 16 26 27 37 36 46 56 57 47 48 58 59 49 39 38 28 29 19 18 8 9"""


def test_tables():
    assert hilbert_order(2, 2).tolist() == [0, 2, 3, 1]
    assert np.argsort(hilbert_order(2, 2)).tolist() == [0, 3, 1, 2]
    assert hilbert_order(4, 4).tolist() == numbers("0 1 5 4 8 12 13 9 10 14 15 11 7 6 2 3")
    assert np.argsort(hilbert_order(4, 4)).tolist() == numbers("0 1 14 15 / 3 2 13 12 / 4 7 8 11 / 5 6 9 10")
    assert hilbert_order(8, 8).tolist() == numbers(EIGHT)
    assert np.argsort(hilbert_order(8, 8)).tolist() == numbers(EIGHT_RANKS)
    assert hilbert_order(6, 10).tolist() == numbers(SIX_BY_TEN)
    assert np.argsort(hilbert_order(6, 10)).tolist() == numbers(SIX_BY_TEN_RANKS)


def steps(visits: np.ndarray, columns: int) -> np.ndarray:
    row, column = np.divmod(visits, columns)
    return np.abs(np.diff(row)) + np.abs(np.diff(column))


@pytest.mark.parametrize("side", [1, 2, 8, 64])
def test_curve(side):
    visits = hilbert_order(side, side)
    assert sorted(visits.tolist()) == list(range(side * side))
    assert visits[0] == 0
    assert visits[-1] == side - 1
    assert (steps(visits, side) == 1).all()
    np.testing.assert_array_equal(visits[np.argsort(visits)], np.arange(side * side))


def test_a_window_and_its_cell_have_equal_ranks():
    row, column = np.divmod(np.arange(64 * 64), 64)
    whole = hilbert_rank(64, column, row)
    np.testing.assert_array_equal(whole // 256, hilbert_rank(4, column // 16, row // 16))


@pytest.mark.parametrize(("rows", "columns", "jumps", "longest"), [(6, 10, 2, 9), (24, 24, 2, None)])
def test_other_grids_jump_where_the_square_is_left(rows, columns, jumps, longest):
    jumped = steps(hilbert_order(rows, columns), columns)
    assert (jumped > 1).sum() == jumps
    assert longest in (None, jumped.max())


@pytest.mark.parametrize(("rows", "columns"), [(6, 10), (24, 24), (9, 16), (5, 7), (7, 5), (1, 5), (90, 160)])
def test_a_connected_order_never_jumps(rows, columns):
    visits = connected_order(rows, columns)
    assert sorted(visits.tolist()) == list(range(rows * columns))
    assert (steps(visits, columns) == 1).all()
    assert visits[0] == 0
    assert order(rows, columns, 16, "connected").tolist() == visits.tolist()
    if (rows, columns) == (6, 10):
        assert visits.tolist() == numbers(SIX_BY_TEN_CONNECTED)


def test_a_connected_order_that_parity_forbids_has_one_diagonal_step():
    far = steps(connected_order(15, 12), 12)
    assert sorted(far)[-2:] == [1, 2]


@pytest.mark.parametrize("side", [48, 384])
def test_windows_stay_whole(side):
    row, column = np.divmod(hilbert_order(side, side), side)
    window = (row // 16 * (side // 16) + column // 16).reshape(-1, 256)
    assert (window == window[:, :1]).all()


def test_window_orders():
    assert order(4, 4, 2, "windows").tolist() == numbers("0 1 4 5 2 3 6 7 8 9 12 13 10 11 14 15")
    assert order(4, 4, 2, "hilbert-windows").tolist() == numbers("0 1 4 5 8 9 12 13 10 11 14 15 2 3 6 7")
    eight = """0 1 8 9 2 3 10 11 18 19 26 27 16 17 24 25 32 33 40 41 48 49 56 57 50 51 58 59 34 35 42 43 36 37 44 45
    52 53 60 61 54 55 62 63 38 39 46 47 22 23 30 31 20 21 28 29 4 5 12 13 6 7 14 15"""
    assert order(8, 8, 2, "hilbert-windows").tolist() == numbers(eight)
    assert order(3, 5, 2, "raster").tolist() == list(range(15))


def test_refusals():
    with pytest.raises(ValueError, match="order='spiral'"):
        order(4, 4, 2, "spiral")
    with pytest.raises(ValueError, match="6 x 10 tokens"):
        order(6, 10, 4, "windows")
    with pytest.raises(ValueError, match="side=6"):
        hilbert_rank(6, np.zeros(1, np.int64), np.zeros(1, np.int64))
