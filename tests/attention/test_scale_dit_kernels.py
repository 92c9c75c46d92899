"""The TPU kernel in its interpreter under Scale-DiT's masks, against masked dense attention in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.attention.local import Request, tpu
from sega_jax.layouts.windows import block_map, units


@pytest.mark.parametrize("mask", ["kernel", "paper"])
def test_sparse_kernel_equals_masked_dense_attention(mask):
    text, side = 128, 32
    total = text + side * side + side * side // 16
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, total, 1, 64)).astype(np.float32) for _ in range(3))
    blocks = block_map(side, side, text, mask)
    out, lse = tpu.run(Request(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), 0.125, None, blocks), interpret=True)

    seen = units(side, side, text, mask).repeat(128, 0).repeat(64, 1)[:total, :total]
    scores = np.where(seen, q[0, :, 0].astype(np.float64) @ k[0, :, 0].T * 0.125, -np.inf)
    top = scores.max(1, keepdims=True)
    weights = np.exp(scores - top)
    np.testing.assert_allclose(out[0, :, 0], weights / weights.sum(1, keepdims=True) @ v[0, :, 0], atol=1e-5)
    np.testing.assert_allclose(lse[0, :, 0], np.log(weights.sum(1)) + top[:, 0], atol=1e-5)
