"""Frequency bins as the released SEGA code rounds them: tables of PyTorch 2.13 (CPU), and what they change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sega_jax import positional as pe
from sega_jax.geometry import RopeSpec
from sega_jax.positional.spectrum import axis_bins, radial_bins

# Length of an axis in tokens -> bins no frequency falls into, of torch.linspace(0, 1, half) * bins truncated.
EMPTY = {
    48: [13, 16],
    64: [],
    96: [26, 29, 32],
    128: [],
    160: [43],
    192: [49, 52, 55, 58, 61, 64],
    240: [60, 66, 73, 80, 87, 95, 102],
    256: [],
    320: [81, 86, 91],
    384: [98, 101, 104, 107, 110, 113, 116, 119, 122, 125, 128],
}


@pytest.mark.parametrize("length", EMPTY)
def test_float32_leaves_the_released_bins_empty(length):
    index, bins = axis_bins(length, "float32")
    assert sorted(set(range(bins)) - set(index.tolist())) == EMPTY[length]
    exact, _ = axis_bins(length)
    assert set(exact.tolist()) == set(range(bins))
    assert_array_equal(index[np.isin(exact, EMPTY[length])], exact[np.isin(exact, EMPTY[length])] - 1)


def test_float32_rings():
    """Square grids of published sizes agree with the exact rule; at 224 tokens the first diagonal falls inwards."""
    for side in (64, 96, 128, 192, 256, 384):
        assert_array_equal(radial_bins(side, side, "float32")[0], radial_bins(side, side)[0])
    exact, rounded = radial_bins(224, 224)[0], radial_bins(224, 224, "float32")[0]
    assert (exact[113, 113], rounded[113, 113]) == (1, 0)
    assert 0 < (exact != rounded).mean() < 0.004


def test_an_empty_bin_moves_pairs():
    """At 96 tokens of a steep spectrum, pair 12 reads an empty bin nearly alone, and is turned up instead of down."""
    grid = RopeSpec(trained=(16, 16)).grid(96, 96, 1)
    frequency = np.hypot(np.fft.fftfreq(96)[:, None], np.fft.fftfreq(96)) * 96
    frequency[0, 0] = 1
    noise = np.fft.ifft2(np.fft.fft2(np.random.default_rng(0).standard_normal((96, 96))) / frequency).real
    tokens = jnp.asarray(100 * noise.reshape(1, -1, 1), jnp.float32)

    def magnitudes(method):
        made = jax.jit(lambda m, t: m(grid, pe.Signals(sigma=0.5, spectrum=pe.statistic(m, t, grid))))(method, tokens)
        return np.asarray(made["image"].magnitude[1]).ravel()

    exact, rounded = (magnitudes(pe.parse(f"ntk()+sega_magnitude(bins='{bins}')")) for bins in ("exact", "float32"))
    moved = np.abs(rounded - exact)
    assert np.argmax(moved) == 12
    assert moved.max() > 0.1
    assert_allclose(magnitudes(pe.get("sega-release")), rounded, atol=0.05)  # another frequency rule, the same bins


def test_other_bins_are_refused():
    for use in (lambda: pe.sega_magnitude(bins="float16"), lambda: axis_bins(64, "float16")):
        with pytest.raises((ValueError, TypeError), match=r"bins='float16'.*exact|Type-check error"):
            use()  # a type-checking hook is quicker
