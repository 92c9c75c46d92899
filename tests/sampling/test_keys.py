"""A seed means the same numbers whatever JAX is set to, and all of its 64 bits count."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from sega_jax.sampling.denoise import initial_noise
from sega_jax.sampling.keys import chosen_seed, key_of, words

NUMBERS = """
import json, jax, numpy as np, jax.numpy as jnp
from sega_jax.geometry import RopeSpec
from sega_jax.layouts.scalediff import Neighborhood
from sega_jax.sampling.denoise import initial_noise
from sega_jax.sampling.keys import words
from sega_jax.sampling.ladder import drawn
noise = initial_noise(7, [0, 3], (2, 3, 4), 1)
layout, grid = Neighborhood(jitter=True), RopeSpec(trained=(8, 8)).grid(16, 16)
offsets = drawn(jnp.asarray(words(7)), 2, number=1, layout=layout, grid=grid)["offsets"]
print(json.dumps([np.asarray(noise).tolist(), np.asarray(offsets).tolist()]))
"""


@pytest.fixture(scope="module")
def numbers():
    def of(**settings):
        environment = {**os.environ, **settings}
        command = [sys.executable, "-c", NUMBERS]
        told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return json.loads(told.stdout)

    return of


def test_settings_of_jax_change_no_number(numbers):
    set_otherwise = numbers(JAX_DEFAULT_PRNG_IMPL="rbg", JAX_THREEFRY_PARTITIONABLE="0")
    assert set_otherwise == numbers()
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7, impl="threefry2x32"), 3), 1)
    np.testing.assert_array_equal(np.float32(set_otherwise[0][1]), jax.random.normal(key, (2, 3, 4)))


def test_settings_within_the_process_change_no_number():
    expected = np.asarray(initial_noise(7, [0], (2, 3, 4)))
    for setting in (jax.threefry_partitionable(False), jax.default_prng_impl("unsafe_rbg"), jax.enable_x64(True)):
        with setting:
            np.testing.assert_array_equal(initial_noise(7, [0], (2, 3, 4)), expected)


def test_all_64_bits_of_a_seed_count():
    small, wide, widest = (np.asarray(initial_noise(seed, [0], (8, 8, 2))) for seed in (5, 5 + 2**32, 2**64 - 1))
    assert not np.allclose(small, wide)
    assert not np.allclose(wide, widest)
    np.testing.assert_array_equal(jax.random.key_data(key_of(words(5))), jax.random.key_data(jax.random.key(5)))
    np.testing.assert_array_equal(words([5, 5 + 2**32]), [[0, 5], [1, 5]])


def test_every_row_may_have_a_seed_of_its_own():
    rows = np.asarray(initial_noise([4, 2**40], [1, 0], (2, 3, 4)))
    np.testing.assert_array_equal(rows[0], initial_noise(4, [1], (2, 3, 4))[0])
    np.testing.assert_array_equal(rows[1], initial_noise(2**40, [0], (2, 3, 4))[0])


def test_seeds_that_are_drawn():
    for asked in ("random", -1, np.int64(-1)):
        drawn = {chosen_seed(asked) for _ in range(8)}
        assert len(drawn) > 1
        assert all(type(seed) is int and 0 <= seed < 2**32 for seed in drawn)
    assert chosen_seed(np.uint8(3)) == 3
    assert type(chosen_seed(np.int64(3))) is int


@pytest.mark.parametrize("seed", [True, np.bool_(True), 1.0, "7", None, [1]])
def test_what_is_no_seed(seed):
    with pytest.raises(TypeError, match=r"seed=.*whole number"):
        chosen_seed(seed)


@pytest.mark.parametrize("seed", [-2, 2**64])
def test_seeds_out_of_range(seed):
    with pytest.raises(ValueError, match=f"seed={seed}.*18446744073709551615"):
        chosen_seed(seed)
