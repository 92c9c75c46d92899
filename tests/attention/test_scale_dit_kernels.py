"""Kernels under Scale-DiT's masks, against masked dense attention in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.attention.kernels import Request, chunks, tpu, xla
from sega_jax.layouts.scale_dit import block_map, units

SCALE = 0.125


def operands(total):
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((1, total, 1, 64)).astype(np.float32) for _ in range(3))


def dense(q, k, v, mask):
    """Output [N, D], log-sum-exp [N] and weights [N, N] of one head in float64."""
    q, k, v = (x[0, :, 0].astype(np.float64) for x in (q, k, v))
    scores = np.where(mask, q @ k.T * SCALE, -np.inf)
    top = scores.max(1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(1, keepdims=True)
    return weights / total @ v, np.log(total[:, 0]) + top[:, 0], weights / total


@pytest.mark.parametrize("mask", ["kernel", "paper"])
def test_the_tpu_kernel_equals_masked_dense_attention(mask):
    text, side = 128, 32
    total = text + side * side + side * side // 16
    q, k, v = operands(total)
    blocks = block_map(side, side, text, mask)
    request = Request(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), SCALE, None, blocks)
    out, lse = tpu.run(request, interpret=True)
    seen = units(side, side, text, mask).repeat(128, 0).repeat(64, 1)[:total, :total]
    expected, expected_lse, _ = dense(q, k, v, seen)
    np.testing.assert_allclose(out[0, :, 0], expected, atol=1e-5)
    np.testing.assert_allclose(lse[0, :, 0], expected_lse, atol=1e-5)


@pytest.mark.parametrize(("mask", "heights"), [("kernel", {128, 256, 512, 1024}), ("paper", {256, 512})])
def test_the_xla_path_equals_masked_dense_attention_in_rectangles(mask, heights):
    text, side = 256, 48
    total = text + side * side + side * side // 16
    q, k, v = operands(total)
    blocks = block_map(side, side, text, mask)
    assert {part.height for part in chunks.suited(blocks, total, chunks.CPU)} == heights

    def run(q, k, v):
        return xla.run(Request(q, k, v, SCALE, None, blocks))

    (out, lse), pull = jax.vjp(run, *map(jnp.asarray, (q, k, v)))
    seen = units(side, side, text, mask).repeat(128, 0).repeat(64, 1)[:total, :total]
    expected, expected_lse, weights = dense(q, k, v, seen)
    np.testing.assert_allclose(out[0, :, 0], expected, atol=1e-5)
    np.testing.assert_allclose(lse[0, :, 0], expected_lse, atol=1e-5)

    slope = np.random.default_rng(1).standard_normal(out.shape).astype(np.float32)
    dq, dk, dv = (np.asarray(x[0, :, 0]) for x in pull((jnp.asarray(slope), jnp.zeros_like(lse))))
    towards = slope[0, :, 0].astype(np.float64)
    change = weights * (towards @ v[0, :, 0].T - (towards * expected).sum(1, keepdims=True)) * SCALE
    np.testing.assert_allclose(dv, weights.T @ towards, atol=2e-5)
    np.testing.assert_allclose(dq, change @ k[0, :, 0], atol=2e-5)
    np.testing.assert_allclose(dk, change.T @ q[0, :, 0], atol=2e-5)
