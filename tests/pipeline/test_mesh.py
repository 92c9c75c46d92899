"""The pipeline on a mesh: nano's pictures are those of one device."""

import jax
import numpy as np
import pytest

import sega_jax as sj
from sega_jax.sharding import make_mesh

FOUR = jax.devices()[:4]
PROMPT = "a red circle with stripes in the centre, blue background"


def test_pictures_on_a_mesh_are_those_of_one_device():
    options = {"width": 272, "height": 80, "steps": 2, "positional": "sega", "seed": 1, "num_images": 3}
    expected = sj.Pipeline.from_pretrained("nano", dtype="float32").generate(PROMPT, batch_size=3, **options)
    mesh = make_mesh(data=2, context=4, tensor=1)  # nano has one head
    pipe = sj.Pipeline.from_pretrained("nano", dtype="float32", mesh=mesh)
    result = pipe.generate(PROMPT, batch_size=3, **options)
    np.testing.assert_allclose(result.latents, expected.latents, atol=1e-4, rtol=0)
    for got, image in zip(result.images, expected.images, strict=True):
        assert np.abs(got.array.astype(int) - image.array.astype(int)).max() <= 1
        assert got.metadata["mesh"] == "data=2,context=4,tensor=1"
        assert {k: v for k, v in got.metadata.items() if k != "mesh"} == image.metadata
    kernel = pipe.params["single"]["mlp_in"]["kernel"][...]
    assert kernel.sharding.shard_shape(kernel.shape)[1:] == (kernel.shape[1] // 8, kernel.shape[2])


def test_a_mesh_the_model_cannot_use_is_refused_before_loading(monkeypatch):
    monkeypatch.setattr("sega_jax.pipeline.pipeline.load_parts", None)
    with pytest.raises(ValueError, match=r"tensor=8 does not divide this model's \d+ attention heads"):
        sj.Pipeline.from_pretrained("nano", mesh="tensor=8,context=1")
    with pytest.raises(ValueError, match="context='star'"):
        sj.Pipeline.from_pretrained("nano", context="star")


@pytest.mark.slow
def test_crpa_on_a_mesh():
    """A layout with traced content, several canvases and several calls goes by heads."""
    options = {"width": 256, "height": 192, "steps": 4, "layout": "crpa", "seed": 1, "decode": False}
    expected = sj.Pipeline.from_pretrained("nano", dtype="float32").generate(PROMPT, **options)
    pipe = sj.Pipeline.from_pretrained(
        "nano", dtype="float32", mesh=make_mesh(data=4, context=1, tensor=1, devices=FOUR)
    )
    np.testing.assert_allclose(pipe.generate(PROMPT, **options).latents, expected.latents, atol=1e-4, rtol=0)
    wide = sj.Pipeline.from_pretrained("nano", dtype="float32", mesh="context=4")
    with pytest.raises(ValueError, match=r"1 heads? per tensor shard cannot occupy 4 context devices; put the other"):
        wide.generate(PROMPT, **options)
