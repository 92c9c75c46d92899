"""The mean attention score against RoPE distance, by brute force over all pairs."""

import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.positional.kappa import kappa
from sega_jax.positional.rope import rotate


def test_equals_the_mean_over_all_pairs():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((2, 7, 3, 12)) + 0.4, jnp.float32) for _ in range(2))
    frequencies = [jnp.asarray(rng.uniform(0.1, 1, n), jnp.float32) for n in (1, 2, 3)]
    got = np.asarray(kappa(q, k, frequencies, 1, 4))
    assert got.shape == (3, 9)
    unit_q, unit_k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (np.asarray(q), np.asarray(k)))
    for place, delta in enumerate(range(-4, 5)):
        angle = np.concatenate([np.zeros(1), np.asarray(frequencies[1]) * delta, np.zeros(3)]).astype(np.float32)
        turned = np.asarray(rotate(jnp.asarray(unit_k), jnp.cos(angle), jnp.sin(angle)))
        scores = np.einsum("bnhd,cmhd->hbncm", unit_q, turned)
        np.testing.assert_allclose(got[:, place], scores.reshape(3, -1).mean(1), atol=1e-6)


def test_wrong_axes_are_refused():
    q = jnp.ones((4, 2, 8))
    for axis, pairs in ((3, (2, 1, 1)), (0, (2, 1))):
        with pytest.raises(ValueError, match="expected heads and channels"):
            kappa(q, q, [jnp.ones(n) for n in pairs], axis, 2)
