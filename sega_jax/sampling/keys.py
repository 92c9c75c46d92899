"""Random numbers that a seed alone decides: one named generator, whatever JAX's settings of the day are.

``JAX_DEFAULT_PRNG_IMPL`` would change the generator and ``JAX_THREEFRY_PARTITIONABLE`` the order of its numbers, so the
one is named with every key and the other is pinned wherever numbers are drawn.
"""

from __future__ import annotations

import contextlib
import operator
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

GENERATOR = "threefry2x32"
LARGEST_SEED = 2**64 - 1
DRAWN = ("random", -1)  # what asks for a seed nobody chose


def as_integer(value: Any) -> int | None:
    """A whole number of Python, NumPy or JAX as a Python integer; None for anything else, bools among it."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def chosen_seed(seed: Any, name: str = "seed") -> int:
    """A seed as a Python integer; ``"random"`` and -1 draw one of 32 bits, which a record can repeat.

    Raises:
        TypeError: no whole number (a bool is none).
        ValueError: outside 0 .. 2**64 - 1.
    """
    number = as_integer(seed)
    if number == DRAWN[1] or (isinstance(seed, str) and seed == DRAWN[0]):
        return secrets.randbits(32)
    if number is None:
        raise TypeError(f"{name}={seed!r}: expected a whole number, or 'random'; got {type(seed).__name__}")
    if not 0 <= number <= LARGEST_SEED:
        raise ValueError(f"{name}={seed}: expected a whole number from 0 to {LARGEST_SEED}, or -1 to draw one")
    return number


def words(seeds: int | Sequence[int]) -> np.ndarray:
    """Seeds of up to 64 bits as what a key is made of: u32 [2], or [B, 2] of several; high word first."""
    wide = np.asarray(seeds, np.uint64)
    return np.stack([wide >> np.uint64(32), wide & np.uint64(2**32 - 1)], -1).astype(np.uint32)


def key_of(seed_words: ArrayLike) -> jax.Array:
    """The key of a seed given as `words` u32 [2]; below 2**32 the one of ``jax.random.key`` by default."""
    return jax.random.wrap_key_data(seed_words, impl=GENERATOR)


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """Within the block every device and process layout draws the same numbers; needed around compiled calls too."""
    with jax.threefry_partitionable(True):
        yield
