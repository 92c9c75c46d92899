"""Invariants of the frequency rules and the temperature, over drawn geometries."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from sega_jax import positional as pe
from sega_jax.geometry import RopeSpec

SPECS = {
    "flux": RopeSpec(),
    "qwen": RopeSpec(trained=(83, 83), ids="centered"),
    "nano": RopeSpec(dims=(8, 12, 12), trained=(16, 16)),
}
FAMILY = st.sampled_from(sorted(SPECS))
SIDE = st.integers(1, 400)
SIGMA = st.floats(0.0, 1.0, width=32)
ALL = sorted(pe.presets())


def image(expression, grid, sigma=1.0, spectrum=None):
    return pe.get(expression)(grid, pe.Signals(sigma=sigma, spectrum=spectrum))["image"]


def same(first, second):
    jax.tree.map(assert_array_equal, first, second)


@settings(max_examples=20, deadline=None)
@given(family=FAMILY, fraction=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), sigma=SIGMA)
@pytest.mark.parametrize("preset", ALL)
def test_trained_sizes_are_bit_identical_to_plain(preset, family, fraction, sigma):
    """Every method, at or below the trained grid, whatever the latent (no spectrum is even read)."""
    spec = SPECS[family]
    trained = (64, 64) if family == "qwen" and "sega" in preset else spec.trained  # SEGA's is 1024 px
    grid = spec.grid(*(max(1, int(f * t)) for f, t in zip(fraction, trained, strict=True)), text_tokens=3)
    ropes = pe.get(preset)(grid, pe.Signals(sigma=sigma))
    same(ropes, {"text": pe.plain(grid), "image": pe.plain(grid)})


@settings(max_examples=30, deadline=None)
@given(family=FAMILY, height=SIDE, width=SIDE)
def test_an_axis_within_its_trained_length_stays_plain(family, height, width):
    grid = SPECS[family].grid(height, width)
    for preset in ("pi", "ntk", "yarn", "yarn-original", "dype-pi", "dype-ntk", "dype-yarn"):
        rope, plain = image(preset, grid, 0.7), pe.plain(grid)
        for axis, tokens in enumerate((0, height, width)):
            if tokens <= SPECS[family].trained[0]:
                assert_array_equal(rope.frequencies[axis], plain.frequencies[axis])
                assert_array_equal(rope.magnitude[axis], plain.magnitude[axis])
            else:
                assert rope.frequencies[axis][-1] < plain.frequencies[axis][-1]


@settings(max_examples=30, deadline=None)
@given(family=FAMILY, height=SIDE, width=SIDE, sigma=SIGMA)
def test_dynamic_limits(family, height, width, sigma):
    """Dy-YaRN at 1 is YaRN; Dy-NTK at sqrt(1/2) is NTK; all dynamic frequencies at 0 are plain."""
    grid = SPECS[family].grid(height, width)
    for rule in ("yarn", "yarn-original"):
        same(image(f"dype-{rule}", grid, 1.0), image(rule, grid, sigma))
    for dynamic, static in (("dype-ntk", "ntk"), ("dype-pi", "pi")):
        halfway, rule = image(dynamic, grid, 0.5**0.5), image(static, grid, sigma)
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-6), halfway, rule)
    for preset in ("dype-pi", "dype-ntk", "dype-yarn", "dype-yarn-original"):
        same(image(preset, grid, 0.0).frequencies, pe.plain(grid).frequencies)
    same(image("dype-yarn", grid, 0.0).magnitude, image("yarn", grid, sigma).magnitude)


@settings(max_examples=20, deadline=None)
@given(family=FAMILY, height=SIDE, width=SIDE)
def test_monotone_in_sigma_and_fastest_pair_untouched(family, height, width):
    """Pair 0 is as trained for NTK and YaRN; no frequency falls as sigma falls."""
    grid = SPECS[family].grid(height, width)
    sigma = jnp.linspace(1.0, 0.0, 60)
    for preset in ("dype-pi", "dype-ntk", "dype-yarn", "dype-yarn-original"):
        rope = image(preset, grid, sigma)
        for axis in (1, 2):
            frequencies = np.atleast_2d(rope.frequencies[axis])
            assert (np.diff(frequencies, axis=0) >= -1e-7 * frequencies[1:]).all()
            if preset in ("dype-ntk", "dype-yarn"):
                assert_allclose(frequencies[:, 0], 1.0, rtol=1e-7)


@settings(max_examples=20, deadline=None)
@given(family=FAMILY, height=SIDE, width=SIDE, sigma=SIGMA, preset=st.sampled_from(["pi", "dype-ntk", "dype-yarn"]))
def test_axes_swap_with_the_sides(family, height, width, sigma, preset):
    """As rows and columns have equal widths and trained lengths here."""
    rope = image(preset, SPECS[family].grid(height, width), sigma)
    turned = image(preset, SPECS[family].grid(width, height), sigma)
    assert_array_equal(rope.frequencies[1], turned.frequencies[2])
    assert_array_equal(rope.magnitude[2], turned.magnitude[1])


def test_logits_depend_on_displacement_only():
    """Within an axis, magnitudes included."""
    grid = SPECS["nano"].grid(40, 24)
    rope = image("dype-yarn", grid, 0.6)
    q, k = jax.random.normal(jax.random.key(0), (2, 32))
    start = jnp.array([[0.0, 3.0, 5.0], [0.0, 9.0, 1.0]])
    logits = []
    for shift in (0.0, 7.0, 15.0):
        cos, sin = pe.tables(rope, start + jnp.array([[0.0, shift, shift]]))
        logits.append(pe.rotate(q, cos[0], sin[0]) @ pe.rotate(k, cos[1], sin[1]))
    assert_allclose(logits[1:], [logits[0]] * 2, atol=1e-5)


@pytest.mark.parametrize("s", [1.1875, 1.5, 2, 3, 4])
def test_check_values(s):
    """Temperatures 1 + 0.1 ln s and bases theta s^(kappa d / (d - 2)), worked by hand and read back from the rope."""
    printed = {
        1.1875: (1.017185, 11950.82, 14282.22, 11369.11),
        1.5: (1.040547, 15226.96, 23186.03, 13535.72),
        2: (1.069315, 20520.09, 42107.41, 16779.12),
        3: (1.109861, 31245.85, 97630.35, 22711.75),
        4: (1.138629, 42107.41, 177303.38, 28153.87),
    }[s]
    grid = RopeSpec().grid(round(64 * s), 64)

    def base(expression, sigma):
        return float(image(expression, grid, sigma).frequencies[1][-1]) ** (-56 / 54)

    got = (image("yarn", grid).magnitude[1][0], base("ntk", 1.0), base("dype-ntk", 1.0), base("dype-ntk", 0.6))
    assert_allclose(got, printed, rtol=2e-6)


def test_pi_is_division_of_positions():
    grid = RopeSpec().grid(160, 64)
    rope, plain = image("pi", grid), pe.plain(grid)
    assert_allclose(rope.frequencies[1], plain.frequencies[1] / 2.5, rtol=1e-6)
    assert_allclose(image("pi(strength=2)", grid).frequencies[1], plain.frequencies[1] / 6.25, rtol=1e-6)


def by_parts(channels, theta, length, s, fast, slow):
    """Equations 11 to 13 of the YaRN paper, pair by pair in float64."""
    result = []
    for i in range(channels // 2):
        frequency = theta ** (-2 * i / channels)
        turns = length / (2 * math.pi / frequency)
        kept = 0.0 if turns < slow else 1.0 if turns > fast else (turns - slow) / (fast - slow)
        result.append((1 - kept) * frequency / s + kept * frequency)
    return np.array(result)


@pytest.mark.parametrize("family", sorted(SPECS))
@pytest.mark.parametrize("kappa", [1.0, 0.37, 0.04])
def test_two_threshold_yarn_is_the_paper_s_equation(family, kappa):
    """In float64; the strength multiplies both thresholds."""
    spec = SPECS[family]
    length = spec.trained[0]
    grid = spec.grid(2 * length, 3 * length)
    with jax.enable_x64(True):
        rope = image(f"ntk_by_parts(strength={kappa})+temperature()", grid)
        for axis, s in ((1, 2.0), (2, 3.0)):
            expected = by_parts(spec.dims[axis], spec.theta, length, s, 32 * kappa, kappa)
            assert rope.frequencies[axis].dtype == np.float64
            assert_allclose(rope.frequencies[axis], expected, rtol=1e-12)
            assert_allclose(rope.magnitude[axis], 1 + 0.1 * math.log(s), rtol=1e-12)  # its eq. 15, on q and k
    wide = image("ntk_by_parts(turns=(4, 0.5))", grid).frequencies[2]
    assert_allclose(wide, by_parts(spec.dims[2], spec.theta, length, 3.0, 4.0, 0.5), rtol=1e-6)


def test_two_threshold_yarn_nears_pi_where_few_tokens_were_trained():
    spec = RopeSpec(trained=(16, 16))
    grid = spec.grid(32, 32)
    ratio = image("yarn-original", grid).frequencies[1] / pe.plain(grid).frequencies[1]
    turning = 16 * np.asarray(pe.plain(grid).frequencies[1]) / (2 * math.pi) > 1
    assert 0 < turning.sum() < 4
    assert_allclose(ratio[~turning], 0.5, rtol=1e-6)
    assert (ratio[turning] < 0.53).all()
    three_bands = image("yarn", grid).frequencies[1] / pe.plain(grid).frequencies[1]
    assert three_bands[0] == 1


def test_isotropic_scale_uses_the_longer_side():
    grid, square = RopeSpec().grid(64, 160), RopeSpec().grid(160, 160)
    for rule in ("pi", "ntk", "yarn", "ntk_by_parts"):
        isotropic = image(f'{rule}(scale="isotropic")+temperature()', grid)
        same(isotropic, image(f"{rule}()+temperature()", square))  # the temperature follows the frequency rule
    mixed = image('ntk(scale="isotropic")+temperature(scale="per_axis")', grid)
    assert_array_equal(mixed.magnitude[1], np.ones(28))
    assert mixed.magnitude[2][0] > 1


@pytest.mark.parametrize(
    ("activation", "sides", "active"),
    [
        ("per_axis", (52, 76), (False, True)),
        ("area", (52, 76), (False, False)),
        ("area", (64, 65), (False, True)),
        ("max_side", (52, 96), (False, False)),
        ("max_side", (52, 97), (False, True)),
    ],
)
def test_activation(activation, sides, active):
    grid = RopeSpec().grid(*sides)
    for rule in ("pi", "ntk", "yarn", "ntk_by_parts"):
        rope = image(f'{rule}(activation="{activation}")+temperature()', grid)
        got = [bool((rope.frequencies[a] != pe.plain(grid).frequencies[a]).any()) for a in (1, 2)]
        assert tuple(got) == active
        assert tuple(bool(rope.magnitude[a][0] > 1) for a in (1, 2)) == active


def test_trained_size_override():
    rope = image("ntk(trained=32)+temperature()", RopeSpec().grid(64, 48))
    expected = image("ntk()+temperature()", RopeSpec(trained=(32, 32)).grid(64, 48))
    same(rope, expected)


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_text(family):
    """Text shares the image's rope on FLUX, and stays as trained on Qwen-Image unless asked."""
    grid = SPECS[family].grid(100, 200, 4)
    for preset in ("pi", "ntk", "yarn", "dype-yarn"):
        ropes = pe.get(preset)(grid, pe.Signals(sigma=0.8))
        same(ropes["text"], ropes["image"] if family == "flux" else pe.plain(grid))
    ropes = pe.get('ntk(text="image")')(grid, pe.Signals(sigma=0.8))
    same(ropes["text"], ropes["image"])


def test_temperature_strength():
    grid = RopeSpec().grid(128, 256)
    sigma = jnp.array([1.0, 0.5, 0.25, 0.0])
    decaying = image("temperature(strength=dype(start=0.5))", grid, sigma)  # falls below start only
    expected = 1 + 0.1 * np.log([2, 4]) * np.array([1, 1, 0.25, 0])[:, None]
    assert_allclose(decaying.magnitude[1][:, 3], expected[:, 0], rtol=1e-6)
    assert_allclose(decaying.magnitude[2][:, 3], expected[:, 1], rtol=1e-6)
    same(image("temperature(strength=0)", grid).magnitude, pe.plain(grid).magnitude)


def test_sigma_per_sample_equals_scalars():
    grid = RopeSpec().grid(100, 200)
    sigma = jnp.array([1.0, 0.61, 0.03, 0.0])
    for preset in ("dype-pi", "dype-ntk", "dype-yarn", "dype-yarn-original", "vision-yarn"):
        batch = image(preset, grid, sigma)
        mapped = jax.vmap(lambda s, preset=preset: image(preset, grid, s))(sigma)
        for axis in (1, 2):
            assert batch.frequencies[axis].shape == (4, 28)
            assert_array_equal(batch.frequencies[axis], mapped.frequencies[axis])
            single = np.stack([image(preset, grid, s).frequencies[axis] for s in sigma])
            assert_allclose(batch.frequencies[axis], single, rtol=1e-6)


def test_out_of_range_sigma_is_clipped():
    grid = RopeSpec().grid(100, 200)
    same(image("dype-yarn", grid, 1.5), image("dype-yarn", grid, 1.0))
    same(image("dype-ntk", grid, -0.5), image("dype-ntk", grid, 0.0))


def test_schedule_without_sigma_is_refused():
    with pytest.raises(ValueError, match=r"follows the noise level, but Signals\.sigma is None"):
        pe.get("dype-ntk")(RopeSpec().grid(100, 100), pe.Signals(sigma=None))


def test_single_pair_axes():
    """One pair per axis: NTK has no exponent for it and says so; PI works."""
    grid = RopeSpec(dims=(2, 2, 2), trained=(4, 4)).grid(8, 8)
    with pytest.raises(ValueError, match="use pi"):
        image("ntk", grid)
    assert_allclose(image("pi", grid).frequencies[1], [0.5], rtol=1e-6)
