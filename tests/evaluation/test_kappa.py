"""Queries and keys as a running model shows them to the kernel, against those the model says it has."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sega_jax.attention import registered
from sega_jax.evaluation import kappa
from sega_jax.layouts.dense import Dense
from sega_jax.layouts.streams import bind
from sega_jax.models.flux import PACKING
from sega_jax.pipeline.pipeline import Pipeline
from sega_jax.positional.rope import plain, rotate


def test_recorded_keys_are_the_models_before_rotation():
    pipe = Pipeline.from_pretrained("nano", dtype="float32", backend="xla")
    asked, noisy = pipe.encode(["a red circle"]), pipe.noise(0, 64, 96)
    layers = kappa.record(pipe.velocity(), pipe.params, noisy, 0.7, asked)

    grid, layout = pipe.grid(64, 96), Dense()
    model = nnx.merge(pipe.parts.transformer.graphdef, pipe.params)
    made = model.keys_values(
        asked.inputs({"text": asked.arrays["text"], "image": PACKING.pack(noisy)}, jnp.float32(0.7), asked.arrays),
        bind(layout.calls(grid), {"image": dict.fromkeys(("text", "image"), plain(grid))}),
        streams=layout.streams(), backend="xla",
    )["image"]  # fmt: skip
    keys = np.concatenate([made.double[0], made.single[0]])
    assert len(layers) == len(keys)
    for (_, recorded), expected in zip(layers, keys, strict=True):
        np.testing.assert_allclose(recorded, expected, atol=1e-4)
    assert not any(name.startswith("record") for name in registered())  # nothing is left behind
    curves = kappa.curves(layers, pipe.parts.rope, 2, 3)
    assert curves.shape == (len(keys), pipe.parts.transformer_config.heads, 7)


def test_equals_the_mean_over_all_pairs():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((2, 7, 3, 12)) + 0.4, jnp.float32) for _ in range(2))
    frequencies = [jnp.asarray(rng.uniform(0.1, 1, n), jnp.float32) for n in (1, 2, 3)]
    got = np.asarray(kappa.kappa(q, k, frequencies, 1, 4))
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
            kappa.kappa(q, q, [jnp.ones(n) for n in pairs], axis, 2)
