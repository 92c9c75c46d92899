"""Latent operators of ScaleDiff (arXiv 2510.25818) against fractions worked by hand and jax.image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.sampling import latent_ops as ops
from sega_jax.sampling.schedule import Schedule

RHO = 0.25


def noise(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def constant(value, side=8):
    return jnp.full((1, side, side, 1), value, jnp.float32)


def test_reduction_and_enlargement_tables():
    one = np.array([9, 11, 13, 15, 15, 13, 11, 9])
    np.testing.assert_allclose(ops.triangle_matrix(8, 1), one[None] / 96, atol=1e-12)
    two = np.array([5, 7, 7, 5, 3, 1, 0, 0]) / 28
    np.testing.assert_allclose(ops.triangle_matrix(8, 2), [two, two[::-1]], atol=1e-12)
    long = np.array([9, 11, 13, 15, 15, 13, 11, 9, 7, 5, 3, 1, 0, 0, 0, 0]) / 112
    np.testing.assert_allclose(ops.triangle_matrix(16, 2), [long, long[::-1]], atol=1e-12)
    up = np.array([8, 8, 7, 5, 3, 1, 0, 0]) / 8
    np.testing.assert_allclose(ops.linear_matrix(2, 8), np.stack([up, 1 - up], 1), atol=1e-12)


def test_lowpass_table():
    low = ops.lowpass_matrix(8, RHO)
    row = [0.111607, 0.156250, 0.169643, 0.151786, 0.133929, 0.116071, 0.093750, 0.066964]
    np.testing.assert_allclose(low[3], row, atol=1e-6)
    np.testing.assert_allclose(low.sum(1), 1, atol=1e-12)
    values = np.sort(np.abs(np.linalg.eigvals(low)))
    np.testing.assert_allclose(values, [0] * 6 + [17 / 28, 1], atol=1e-7)
    ramp = [53 / 28, 53 / 28, 2.294643, 3.098214, 3.901786, 4.705357, 143 / 28, 143 / 28]
    np.testing.assert_allclose(low @ np.arange(8.0), ramp, atol=1e-6)


@pytest.mark.parametrize(("height", "width", "ratio"), [(16, 24, 0.25), (20, 12, 0.125), (18, 10, 0.3)])
def test_lowpass_is_two_resizes(height, width, ratio):
    x = noise(2, height, width, 3)
    small = (2, max(1, int(height * ratio)), max(1, int(width * ratio)), 3)
    expected = jax.image.resize(jax.image.resize(x, small, "linear", antialias=True), x.shape, "linear")
    np.testing.assert_allclose(np.asarray(ops.lowpass(x, ratio)), np.asarray(expected), atol=3e-6)


def test_bands_are_a_partition():
    x = noise(1, 8, 8, 2)
    low = ops.lowpass(x, RHO)
    np.testing.assert_allclose(np.asarray(low + (x - low)), np.asarray(x), atol=1e-6)
    np.testing.assert_allclose(np.asarray(ops.lowpass(constant(3.0), RHO)), 3.0, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(ops.lowpass(x, 1.0)), np.asarray(x), atol=1e-6)


def test_mixing_identities():
    x, y = noise(1, 8, 8, 2), noise(1, 8, 8, 2, seed=1)
    np.testing.assert_allclose(np.asarray(ops.mix(x, x, RHO)), np.asarray(x), atol=1e-6)
    np.testing.assert_allclose(
        np.asarray(ops.mix(x, jnp.full_like(x, 2.0), RHO)), np.asarray(x - ops.lowpass(x, RHO) + 2.0), atol=1e-6
    )
    np.testing.assert_allclose(np.asarray(ops.mix(constant(1.0), constant(5.0), RHO)), 5.0, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(ops.mix(2 * x, 2 * y, RHO)), np.asarray(2 * ops.mix(x, y, RHO)), atol=2e-6)
    np.testing.assert_allclose(
        np.asarray(ops.mix(jnp.zeros_like(y), y, RHO)), np.asarray(ops.lowpass(y, RHO)), atol=1e-6
    )


def test_bicubic_table():
    rows = np.array([[283, -27, 0, 0], [198, 67, -9, 0], [58, 225, -27, 0], [-27, 225, 67, -9]]) / 256
    table = np.concatenate([rows, rows[::-1, ::-1]])
    np.testing.assert_allclose(ops.bicubic_matrix(4, 8), table, atol=1e-12)
    np.testing.assert_allclose(ops.bicubic_matrix(4, 8, -0.5)[3], np.array([-18, 222, 58, -6]) / 256, atol=1e-12)
    x = noise(2, 4, 4, 3)
    expected = np.einsum("yh,bhwc,xw->byxc", table, np.asarray(x, np.float64), table)
    np.testing.assert_allclose(np.asarray(ops.bicubic(x, 8, 8)), expected, atol=1e-6)
    np.testing.assert_allclose(np.asarray(ops.bicubic(constant(0.3), 20, 13)), 0.3, rtol=1e-6)


def test_structure_guidance():
    clean, reference = noise(1, 8, 8, 2), noise(1, 8, 8, 2, seed=1)
    low = ops.lowpass(reference, RHO)
    np.testing.assert_array_equal(np.asarray(ops.guide(clean, low, 0.0, RHO)), np.asarray(clean))
    np.testing.assert_allclose(np.asarray(ops.guide(reference, low, 0.7, RHO)), np.asarray(reference), atol=1e-6)
    flat = ops.guide(constant(2.0), ops.lowpass(constant(1.0), RHO), 0.3, RHO)
    np.testing.assert_allclose(np.asarray(flat), 1.7, rtol=1e-6)
    moved = np.asarray(ops.guide(clean, low, 0.4, RHO) - clean, np.float64)
    matrix = ops.lowpass_matrix(8, RHO)
    expected = 0.4 * np.einsum("yh,bhwc,xw->byxc", matrix, np.asarray(reference - clean, np.float64), matrix)
    np.testing.assert_allclose(moved, expected, atol=2e-6)


def step(x, output, sigma, sigma_next, gamma, reference):
    clean = ops.clean_of(constant(x), constant(output), np.float32(sigma))
    clean = ops.guide(clean, ops.lowpass(constant(reference), RHO), np.float32(gamma), RHO)
    after = ops.euler_to(constant(x), clean, np.float32(sigma), np.float32(sigma_next))
    return float(clean[0, 0, 0, 0]), float(after[0, 0, 0, 0])


def test_one_euler_step_for_both_families():
    assert step(1, 0.4, 0.8, 0.6, 0, 0) == pytest.approx((0.68, 0.92), abs=1e-6)
    assert step(1, 0.4, 0.8, 0.6, 0.8, 0.5) == pytest.approx((0.536, 0.884), abs=1e-6)
    assert step(1, 0.4, 1.0939147, 1.0239253, 0, 0) == pytest.approx((0.5624341, 0.9720042), abs=1e-6)
    assert step(1, 0.4, 1.0939147, 1.0239253, 1, 0.5)[1] == pytest.approx(0.9680097, abs=1e-6)


SDXL = """1.09391 1.02393 0.95781 0.89517 0.83565 0.77892 0.72468 0.67263 0.62251 0.57405 0.52698 0.48100 0.43582
0.39104 0.34619 0.30058 0.25313 0.20179 0.14146 0.04131 0"""
SDXL_GAMMA = """1 0.93953 0.87829 0.81661 0.75479 0.69317 0.63208 0.57181 0.51268 0.45498 0.39897 0.34491 0.29301
0.24346 0.19645 0.15211 0.11054 0.07182 0.03601 0.00313"""
FLUX = """0.82570 0.80507 0.78305 0.75951 0.73428 0.70718 0.67799 0.64645 0.61227 0.57510 0.53454 0.49011 0.44120
0.38712 0.32700 0.25976 0.18406 0.09821 0"""


def numbers(text):
    return np.array(text.split(), float)


def test_gamma_schedules():
    np.testing.assert_allclose(ops.gamma_of_diffusion(numbers(SDXL)), numbers(SDXL_GAMMA), atol=3e-5)
    sigmas = Schedule().sigmas(30, 4096)[12:]
    np.testing.assert_allclose(sigmas, numbers(FLUX), atol=1e-5)
    np.testing.assert_allclose(ops.gamma_of_flow(sigmas), numbers(FLUX)[:-1], atol=1e-5)
