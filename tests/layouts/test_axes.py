"""Layouts ask for rows and columns by role: axes in another order, with channels to match, change nothing."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax import positional as pe
from sega_jax.attention import attend
from sega_jax.geometry import RopeSpec
from sega_jax.layouts.crpa import Mixed, arrange
from sega_jax.layouts.dense import Dense
from sega_jax.layouts.scale_dit import ScaleDiT
from sega_jax.layouts.scalediff import Neighborhood
from sega_jax.layouts.streams import bind, ordered

SPEC = RopeSpec(dims=(4, 8, 6, 2), trained=(4, 4), roles=("frame", "row", "column", "sequence"), text="sequence")
ORDER = (2, 3, 1, 0)  # column, sequence, row, frame
TEXT, HEADS = 3, 2


def crpa():
    mask = np.zeros((4, 4), bool)
    mask[:2, 2:] = True
    masks = (jnp.asarray(mask)[None],)
    layout = Mixed.fitting(masks, (8, 8))
    return layout, arrange(masks, layout), {"image": layout.tokens}


LAYOUTS = {
    "dense": lambda: (Dense(), None, {"image": 64}),
    "crpa": crpa,
    "scalediff, windows": lambda: (Neighborhood(window=(4, 4), path="windows"), None, {"image": 64}),
    "scalediff, blocks": lambda: (Neighborhood(window=(4, 4), path="blocks"), None, {"image": 64}),
    "scale-dit": lambda: (ScaleDiT(mask="paper", block=(8, 8)), None, {"image": 64, "low": 4}),
}


def turned(x: jax.Array) -> jax.Array:
    """Channels of every axis moved to where `ORDER` has it."""
    parts = np.split(np.arange(x.shape[-1]), np.cumsum(SPEC.dims)[:-1])
    return x[..., np.concatenate([parts[axis] for axis in ORDER])]


def run(layout, content, spec, q, k, v):
    grid = spec.grid(8, 8, TEXT)
    method = pe.get("dype-yarn")
    ropes = {name: method(g, pe.Signals(sigma=0.9)) for name, g in layout.grids(grid).items()}
    q, k, v = (ordered(layout, grid, x) for x in (q, k, v))
    return attend(q, k, v, bind(layout.calls(grid, content), ropes))


@pytest.mark.parametrize("name", LAYOUTS)
def test_axes_in_another_order(name):
    layout, content, sizes = LAYOUTS[name]()
    rng = np.random.default_rng(0)
    q, k, v = (
        {n: jnp.asarray(rng.standard_normal((1, size, HEADS, sum(SPEC.dims))), jnp.float32)
         for n, size in {"text": TEXT, **sizes}.items()}
        for _ in range(3)
    )  # fmt: skip
    other = replace(SPEC, dims=tuple(SPEC.dims[a] for a in ORDER), roles=tuple(SPEC.roles[a] for a in ORDER))
    expected = jax.jit(partial(run, layout, content, SPEC))(q, k, v)
    got = jax.jit(partial(run, layout, content, other))(
        *({n: turned(x) for n, x in part.items()} for part in (q, k)), v
    )
    for stream, value in expected.items():
        np.testing.assert_allclose(got[stream], value, atol=1e-5)
    plain = jax.jit(partial(run, layout, content, replace(SPEC, text="origin")))(q, k, v)
    assert np.abs(plain["text"] - expected["text"]).max() > 1e-3  # where text stands is seen
