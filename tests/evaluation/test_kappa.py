"""Queries and keys as a running model shows them to the kernel, against those the model says it has."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sega_jax.evaluation import kappa
from sega_jax.layouts.dense import Dense
from sega_jax.layouts.streams import bind
from sega_jax.models.flux import PACKING
from sega_jax.pipeline.pipeline import Pipeline
from sega_jax.positional.rope import plain


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
    curves = kappa.curves(layers, pipe.parts.rope, 2, 3)
    assert curves.shape == (len(keys), pipe.parts.transformer_config.heads, 7)
