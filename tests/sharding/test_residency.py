"""Weights that wait on the host: the same pictures, and one component at a time on the device."""

import jax
import numpy as np
import pytest

import sega_jax as sj
from sega_jax.sharding import make_mesh

PROMPT = "a red circle"
SMALL = {"width": 64, "height": 64, "steps": 1}


def sizes(component):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(component.params))


def on_device(known=()):
    live = (x for x in jax.live_arrays() if x.sharding.memory_kind == "device" and id(x) not in known)
    return sum(x.nbytes for x in live if not x.is_deleted())


@pytest.mark.parametrize("mesh", [None, {"data": 2, "context": 2}])
def test_offload(mesh):
    options = {"dtype": "float32", "mesh": mesh and make_mesh(jax.devices()[:4], **mesh)}
    pipe = sj.Pipeline.from_pretrained("nano", residency="offload", **options)
    transformer = sizes(pipe.parts.transformer)
    for component in (pipe.parts.transformer, *pipe.parts.encoders.values(), pipe.parts.vae):
        assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(component.params)} == {"pinned_host"}
    known = {id(x): x for x in jax.live_arrays()}  # held, or a new array may take the id of one that is freed
    held = []
    result = pipe.generate(PROMPT, on_step=lambda _: held.append(on_device(known)), **SMALL)
    assert transformer <= held[0] < 1.05 * transformer + 2**20  # no encoders, no autoencoder beside it
    del result
    assert on_device(known) < 2**20
    whole = sj.Pipeline.from_pretrained("nano", **options)
    np.testing.assert_array_equal(
        pipe.generate(PROMPT, **SMALL).images[0].array, whole.generate(PROMPT, **SMALL).images[0].array
    )


def test_other_residencies_are_refused():
    with pytest.raises(ValueError, match="residency='disk'"):
        sj.Pipeline.from_pretrained("nano", residency="disk")
