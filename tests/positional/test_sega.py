"""Analytic vectors and invariances of SEGA (arXiv 2605.22668) and of the spectrum it reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from sega_jax import positional as pe
from sega_jax.geometry import RopeSpec
from sega_jax.positional.sega import band_lookup, pair_correction
from sega_jax.positional.spectrum import axis_bins, axis_profiles, flatness, power_spectrum, radial_bins, radial_profile

RULE = pe.sega_magnitude()
NO_FLOOR = pe.sega_magnitude(floor=0.0)


def allocate(energy, reference=4**0.08, amplitude=1.0, rule=RULE):
    correction = pair_correction(jnp.asarray(energy, jnp.float32), 28, rule.beta)
    return np.asarray(rule.allocate(correction, jnp.float32(reference), jnp.float32(amplitude)))


def pink(height, width, power=1.0, batch=1, channels=3, seed=0):
    """Noise of amplitude ``1 / frequency ** power``, f32 [batch, height * width, channels]."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width) * width)
    frequency[0, 0] = 1
    shape = (batch, channels, height, width)
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal(shape)) / frequency**power).real
    return jnp.asarray(np.moveaxis(noise, 1, -1).reshape(batch, -1, channels) / noise.std(), jnp.float32)


def small(height, width, ids="corner"):
    return RopeSpec(trained=(16, 16), ids=ids).grid(height, width, 2)


def sega(tokens, grid, expression='ntk(strength=2, damping=0.1, scale="sega", trained=16)+sega_magnitude()'):
    def ropes(method, tokens):
        return method(grid, pe.Signals(sigma=0.5, spectrum=pe.statistic(method, tokens, grid)))["image"]

    return jax.tree.map(np.asarray, jax.jit(ropes)(pe.get(expression), tokens))


@functools.partial(jax.jit, static_argnames=("grid", "reduce"))
def measure(tokens, grid, probe=None, reduce="sample"):
    return pe.measure(tokens, grid, probe, reduce)


@pytest.mark.parametrize("bins", [64, 128, 192])
@pytest.mark.parametrize("slope", [0.02, 0.09])
def test_log_linear_profile(bins, slope):
    """1: the same magnitudes for every slope and number of bins."""
    energy = np.exp(5 - slope * np.arange(bins))
    assert_allclose(
        allocate(energy, rule=NO_FLOOR)[[0, 13, 14, 27]], [1.282460, 1.132525, 1.102049, 0.952115], atol=5e-6
    )
    z = (np.arange(28) - 13.5) / np.sqrt(28 * 29 / 12)
    assert_allclose(pair_correction(jnp.asarray(energy, jnp.float32), 28), np.tanh(1.5 * z), atol=2e-5)
    assert (allocate(energy) == 1).sum() == 9


def test_constant_profile_keeps_the_reference():
    """2, and no NaN gradient there."""
    assert_allclose(allocate(np.full(128, 7.0)), np.full(28, 4**0.08), rtol=1e-7)
    gradient = jax.grad(lambda e: RULE.allocate(pair_correction(e, 28), jnp.float32(1.1), jnp.float32(1)).sum())
    assert np.isfinite(gradient(jnp.full((64,), 3.0))).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 999), gain=st.floats(0.5, 100), exponent=st.floats(0.3, 2))
def test_scale_and_power_invariance(seed, gain, exponent):
    """3, while all values stay far above the floor of the logarithm."""
    energy = np.exp(np.random.default_rng(seed).normal(3, 1, 64))
    assert_allclose(allocate(gain * energy**exponent), allocate(energy), atol=2e-5)


def test_zero_map():
    """4: the flatness of nothing is a half, by the eps in its denominator."""
    grid = small(32, 48)
    tokens = jnp.zeros((1, grid.tokens, 2))
    spectrum = measure(tokens, grid)
    assert_allclose(spectrum.flatness, [0.5], rtol=1e-5)
    assert_allclose(RULE.amplitude(spectrum.flatness), [0.646447], rtol=1e-5)
    for axis in (1, 2):
        assert_allclose(sega(tokens, grid).magnitude[axis], np.full((1, 28), 3**0.08), rtol=1e-6)


@pytest.mark.parametrize(("side", "mean_sf", "mean_sigma"), [(64, 0.983, 0.026), (128, 0.988, 0.019)])
def test_white_noise(side, mean_sf, mean_sigma):
    """5: flat spectrum, hence hardly any redistribution."""
    grid = RopeSpec(trained=(side // 2, side // 2)).grid(side, side)
    tokens = jax.random.normal(jax.random.key(0), (10, grid.tokens, 1))
    spectrum = measure(tokens, grid)
    assert_allclose(spectrum.flatness.mean(), mean_sf, atol=0.006)
    assert_allclose(RULE.amplitude(spectrum.flatness).mean(), mean_sigma, atol=0.009)
    if side >= 128:
        magnitudes = sega(tokens, grid, "sega_magnitude()").magnitude
        assert np.abs(np.stack(magnitudes[1:]) / 2**0.08 - 1).max() <= 0.005


def test_single_tone_along_width():
    """6: energies, and which pairs are turned down."""
    height, width, cycles, amplitude = 32, 64, 12, 3.0
    tone = amplitude * np.cos(2 * np.pi * cycles * np.arange(width) / width)
    grid = small(height, width)
    tokens = jnp.asarray(np.tile(tone, height)[None, :, None], jnp.float32)
    spectrum = measure(tokens, grid)
    assert_allclose(spectrum.width[0, cycles], amplitude**2 * width**2 / 4, rtol=1e-5)
    assert_allclose(np.delete(spectrum.width[0], cycles), 0, atol=1e-4)
    assert_allclose(spectrum.height[0, 0], amplitude**2 * height**2 / 2, rtol=1e-5)
    assert_allclose(spectrum.height[0, 1:], 0, atol=1e-4)
    floor = 1e-2 * jax.random.normal(jax.random.key(1), tokens.shape)  # rounding noise is no energy to rank
    rope = sega(tokens + floor, grid, "ntk()+sega_magnitude(floor=0)")
    assert abs(np.argmin(rope.magnitude[2][0]) - 27 * (1 - cycles / (width // 2 - 1))) <= 1
    assert np.argmin(rope.magnitude[1][0]) == 27


def test_one_hot_radial_profile():
    """7."""
    radial = np.zeros(128, np.float32)
    radial[5] = 1e4
    assert_allclose(flatness(jnp.asarray(radial)), 1.6e-10, rtol=0.05)
    assert_allclose(RULE.amplitude(flatness(jnp.asarray(radial))), 1.0, rtol=1e-6)


class TestInvariancesOfMagnitude:
    """8."""

    grid = small(40, 24)
    tokens = pink(40, 24)

    def same(self, tokens, atol=1e-5):
        expected = sega(self.tokens, self.grid).magnitude
        for got, want in zip(sega(tokens, self.grid).magnitude[1:], expected[1:], strict=True):
            assert_allclose(got, np.broadcast_to(want, got.shape), atol=atol)

    def test_constants_per_channel(self):
        self.same(self.tokens + jnp.array([[[3.0, -1.0, 0.5]]]))

    def test_gain(self):
        self.same(5 * self.tokens)

    @pytest.mark.parametrize("shift", [(1, 0), (7, 11), (-3, 5)])
    def test_circular_shift(self, shift):
        plane = self.tokens.reshape(1, 40, 24, 3)
        self.same(jnp.roll(plane, shift, axis=(1, 2)).reshape(self.tokens.shape))

    def test_duplicated_batch(self):
        self.same(jnp.concatenate([self.tokens] * 3))

    def test_transpose_swaps_axes(self):
        turned = self.tokens.reshape(1, 40, 24, 3).swapaxes(1, 2).reshape(self.tokens.shape)
        straight, other = sega(self.tokens, self.grid), sega(turned, small(24, 40))
        assert_allclose(straight.magnitude[1], other.magnitude[2], atol=1e-6)
        assert_allclose(straight.magnitude[2], other.magnitude[1], atol=1e-6)


@pytest.mark.parametrize(
    ("height", "width"), [(32, 32), (17, 24), (24, 17), (33, 35), (50, 16), (3, 20), (2, 2), (9, 1)]
)
def test_power_and_profiles_equal_the_fft(run, height, width):
    """9: the DFT matmuls are the FFT; the 1-D route gives the same axis profiles; rings by a plain loop."""
    image = np.random.default_rng(height).normal(size=(height, width))
    image -= image.mean()
    shifted = np.abs(np.fft.fftshift(np.fft.fft2(image))) ** 2

    @jax.jit
    def analysed(image):
        power = power_spectrum(image)
        return power, axis_profiles(power), radial_profile(power)

    power, profiles, radial = run(True, analysed, image)
    single = run(False, analysed, image.astype(np.float32))[0]
    assert_allclose(power, shifted, rtol=1e-9, atol=1e-9)
    for axis, got in enumerate(profiles):
        length = image.shape[axis]
        energy = (np.abs(np.fft.rfft(image, axis=axis)) ** 2).mean(axis=1 - axis)
        bins, count = axis_bins(length)
        means = [energy[bins == b].sum() / ((bins == b).sum() + 1e-8) for b in range(count)]
        assert_allclose(got, means, rtol=1e-11, atol=1e-11)
    rings, count = radial_bins(height, width)
    means = [shifted[rings == b].sum() / ((rings == b).sum() + 1e-8) for b in range(count)]
    assert_allclose(radial, means, rtol=1e-9, atol=1e-9)
    assert_allclose(single, shifted, atol=2e-6 * shifted.max())


@pytest.mark.parametrize("side", [16, 64, 128, 250])
def test_radial_map(side):
    """10."""
    rings, count = radial_bins(side, side)
    sizes = np.bincount(rings.ravel(), minlength=count)
    assert sizes[0] == 5
    assert sizes.sum() == side * side
    assert sizes.min() > 0
    if side == 64:
        assert rings[33, 33] == 1
    for i, j in ((0, 0), (5, 3), (side // 2, 7), (side // 2 + 1, side // 2 + 1)):
        squared = (2 * i - side) ** 2 + (2 * j - side) ** 2  # ring b: its inner radius b / count of the corner's
        reached = [b for b in range(count) if b**2 * 2 * side**2 <= count**2 * squared]
        assert rings[i, j] == reached[-1]


@given(st.integers(16, 1000))
def test_axis_map(length):
    """11: identity, with the last two frequencies merged."""
    bins, count = axis_bins(length)
    assert count == length // 2
    assert_array_equal(bins, [*range(count), count - 1])


def test_band_lookup():
    lower, upper, weight = band_lookup(28, 128)
    assert (lower[0], weight[0], lower[-1], weight[-1]) == (127, 0, 0, 0)
    assert upper.max() == 127
    assert_allclose(lower + weight, 127 * (1 - np.arange(28) / 27), atol=1e-12)


def test_scaling_commutes_with_rotation():
    """12: tables, both operands or the squared query give the same logits."""
    grid = small(40, 24)
    with jax.enable_x64(True):
        rope = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), sega(pink(40, 24), grid))
        cos, sin = (t[0] for t in pe.tables(rope, grid.ids()["image"][::50]))
        plain_cos, plain_sin = pe.tables(pe.Rope(rope.frequencies, pe.plain(grid).magnitude), grid.ids()["image"][::50])
        m = jnp.repeat(pe.magnitudes(rope)[0], 2)[None]
        q, k = jax.random.normal(jax.random.key(0), (2, len(cos), 128), jnp.float64)
        logits = [
            pe.rotate(q, cos, sin) @ pe.rotate(k, cos, sin).T,
            pe.rotate(m * q, plain_cos, plain_sin) @ pe.rotate(m * k, plain_cos, plain_sin).T,
            pe.rotate(m**2 * q, plain_cos, plain_sin) @ pe.rotate(k, plain_cos, plain_sin).T,
        ]
        for other in logits[1:]:
            assert_allclose(other, logits[0], atol=1e-11)


def test_off_switch():
    """13: bit-identical to plain, even with a spectrum at hand."""
    grid = RopeSpec().grid(64, 64, 3)
    tokens = jax.random.normal(jax.random.key(0), (1, grid.tokens, 2))
    method = pe.get("sega")
    ropes = method(grid, pe.Signals(sigma=0.5, spectrum=pe.statistic(method, tokens, grid)))
    jax.tree.map(assert_array_equal, ropes, {"text": pe.plain(grid), "image": pe.plain(grid)})


def test_ids_of_the_release():
    """14, through the grid's own capped ids."""
    for side, first, last in ((257, 0, 256), (384, -127, 256), (513, -256, 256)):
        ids = RopeSpec().grid(side, 1, 1).ids(largest=256)
        assert (ids["image"][0, 1], ids["image"][-1, 1], ids["text"][0, 1]) == (first, last, first)
    rows = RopeSpec(ids="centered").grid(5, 1).ids()["image"][:, 1]
    assert rows.tolist() == [-3, -2, -1, 0, 1]


# --- switches and arguments ------------------------------------------------------------------------------------


def test_samples_do_not_see_each_other():
    grid = small(32, 40)
    tokens = jnp.concatenate([pink(32, 40), pink(32, 40, power=0.2, seed=1)])
    together = measure(tokens, grid)
    for sample in range(2):
        alone = measure(tokens[sample : sample + 1], grid)
        jax.tree.map(lambda a, b, s=sample: assert_allclose(a[s], b[0], rtol=1e-5), together, alone)
    shared = measure(tokens, grid, reduce="batch")
    mean = measure(tokens.mean(axis=0, keepdims=True), grid)
    jax.tree.map(lambda a, b: assert_allclose(a, np.repeat(b, 2, axis=0), rtol=1e-5), shared, mean)


def test_probe_is_the_embedders_output_mean():
    """The spectrum of embedded tokens' channel mean is that of the latent times the probe; the bias cancels."""
    grid = small(24, 32)
    latent = pink(24, 32, channels=8)
    kernel = jax.random.normal(jax.random.key(1), (8, 50)) / 3
    embedded = latent @ kernel + jax.random.normal(jax.random.key(2), (1, 1, 50))
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=2e-4),
        measure(latent, grid, probe=kernel.mean(axis=1)),
        measure(embedded, grid),
    )


def test_log_reference_and_spread():
    grid = small(64, 64)
    white = jax.random.normal(jax.random.key(0), (1, grid.tokens, 1))
    rope = sega(white, grid, 'ntk()+sega_magnitude(reference="log", spread=(0, 0))')
    assert_allclose(rope.magnitude[1], np.full((1, 28), 1 + 0.08 * np.log(4)), rtol=1e-6)
    varied = sega(white, grid, "ntk()+sega_magnitude(spread=(0.5, 0.5), floor=0)").magnitude[1]
    assert varied.max() > 1.05 * varied.min()  # a spread of its own ignores the flatness
    assert_allclose(varied.mean(), 4**0.08, rtol=1e-5)


def test_width_sharing_only_on_centred_grids():
    expression = "ntk()+sega_magnitude(share_width={})"
    for ids, shared in (("corner", False), ("centered", True)):
        grid = small(40, 64, ids)
        on, off = (sega(pink(40, 64), grid, expression.format(share)).magnitude for share in (True, False))
        assert_array_equal(on[2], off[2])
        assert_array_equal(on[1], on[2] if shared else off[1])
        assert (off[1] != off[2]).any()


def test_reads_bfloat16_tokens_in_float32():
    grid = small(32, 32)
    tokens = pink(32, 32).astype(jnp.bfloat16)
    jax.tree.map(assert_array_equal, measure(tokens, grid), measure(tokens.astype(jnp.float32), grid))


def test_bad_arguments():
    grid = small(32, 32)
    with pytest.raises(ValueError, match=r"expected \[batch, 1024, channels\]"):
        pe.measure(jnp.zeros((1, 1000, 3)), grid)
    with pytest.raises(ValueError, match="one weight per channel"):
        pe.measure(jnp.zeros((1, 1024, 3)), grid, probe=jnp.zeros(4))
    with pytest.raises((ValueError, TypeError), match=r"reduce='all'|Type-check error"):
        pe.measure(jnp.zeros((1, 1024, 3)), grid, reduce="all")
    with pytest.raises(ValueError, match=r"needs Signals\.spectrum to be a Spectrum, got NoneType"):
        pe.get("sega")(grid, pe.Signals(sigma=0.5))
