"""int8 weights through the pipeline: pictures, places, plans, and the program that is compiled ahead."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sega_jax as sj
from sega_jax.costs import closed_form
from sega_jax.costs import report as P
from sega_jax.families.registry import skeleton
from sega_jax.models.flux import FluxConfig
from sega_jax.pipeline import warmup
from sega_jax.sharding import make_mesh

PROMPT = "a green cross with dots in the centre, pink background"
SMALL = {"width": 64, "height": 64, "steps": 1, "decode": False}


@pytest.fixture(scope="module")
def pipe():
    return sj.Pipeline.from_pretrained("nano", dtype="float32", weights="int8")


def test_a_picture_of_nano(pipe):
    """At the trained size it is the picture of the full weights, up to what an eye does not see."""
    options = {"width": 192, "height": 192, "steps": 12, "seed": 4}
    full = sj.Pipeline.from_pretrained("nano", dtype="float32").generate(PROMPT, **options)
    small = pipe.generate(PROMPT, **options)
    one, other = (result.images[0].array.astype(float) for result in (full, small))
    psnr = 10 * math.log10(255**2 / np.mean((one - other) ** 2))
    print(f"int8 against float32: {psnr:.1f} dB")
    assert 40 < psnr < 70
    assert small.images[0].metadata["weights"] == "int8"
    assert "weights" not in full.images[0].metadata
    assert small.images[0].metadata == {**full.images[0].metadata, "weights": "int8"}


def test_offloaded(pipe):
    waiting = sj.Pipeline.from_pretrained("nano", dtype="float32", weights="int8", residency="offload")
    leaves = jax.tree.leaves(waiting.parts.transformer.params)
    assert {leaf.sharding.memory_kind for leaf in leaves} == {"pinned_host"}
    assert any(leaf.dtype == jnp.int8 for leaf in leaves)
    np.testing.assert_array_equal(waiting.generate(PROMPT, **SMALL).latents, pipe.generate(PROMPT, **SMALL).latents)


def test_on_a_mesh(pipe):
    options = {**SMALL, "width": 96, "steps": 2, "positional": "sega"}
    sharded = sj.Pipeline.from_pretrained(
        "nano", dtype="float32", weights="int8", mesh=make_mesh(data=1, context=8, tensor=1)
    )
    layer = sharded.params["single"]["mlp_in"]
    for name, dtype in (("kernel", jnp.int8), ("kernel_scale", jnp.float32)):
        assert layer[name][...].dtype == dtype
        assert len(layer[name][...].sharding.device_set) == 8
    got, expected = sharded.generate(PROMPT, **options).latents, pipe.generate(PROMPT, **options).latents
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


def test_what_is_compiled_ahead_is_what_runs(pipe):
    outline = warmup.outline("nano", dtype="float32", weights="int8", hub={})
    assert outline.parts.transformer.graphdef == pipe.parts.transformer.graphdef
    shapes, loaded = outline.parts.transformer.params, pipe.parts.transformer.params
    assert jax.tree.structure(shapes) == jax.tree.structure(loaded)
    assert all(
        (a.shape, a.dtype) == (b.shape, b.dtype)
        for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(loaded), strict=True)
    )


def test_parameter_bytes_of_flux_dev():
    """Two sets of 18 W^2 weights with 15 W outputs per double block, 15 W^2 with 11 W per single one; W = 3072."""
    config = FluxConfig.dev()
    kernels = (36 * config.double_layers + 15 * config.single_layers) * config.width**2
    outputs = (2 * 15 * config.double_layers + 11 * config.single_layers) * config.width
    expected = kernels + 4 * outputs + 2 * (11_901_408_320 - kernels)
    small = skeleton("flux-dev", weights="int8")
    assert closed_form.parameter_bytes(small.transformer) == expected == 11_980_728_448
    assert closed_form.parameter_bytes(small.encoders["t5"]) == closed_form.parameter_bytes(
        skeleton("flux-dev").encoders["t5"]
    )


def test_plans(monkeypatch):
    full, small = (
        P.plan("flux-dev", size=(1024, 1024), target="v5e:1x1", residency="offload", compile=False, weights=weights)
        for weights in ("full", "int8")
    )
    assert (full["weights"], small["weights"]) == ("full", "int8")
    assert (full["fits"], small["fits"]) == (False, True)
    assert "--weights int8" in full["try"]
    report = P.plan("nano", size=(64, 64), steps=1, weights="int8", mesh="context=8,tensor=1")
    step = report["programs"][1]
    assert step["compiled"]
    assert step["parameters"] == closed_form.parameter_bytes(
        skeleton("nano", weights="int8").transformer, {"data": 1, "context": 8, "tensor": 1}
    )


def test_without_qwix_nothing_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    monkeypatch.setattr("sega_jax.pipeline.pipeline.load_parts", None)
    for attempt in (sj.Pipeline.from_pretrained, P.plan):
        with pytest.raises(ValueError, match=r"weights='int8' needs the package qwix .*'sega-jax\[quant\]'"):
            attempt("nano", weights="int8")
    with pytest.raises(ValueError, match="weights='int4': expected 'full' or 'int8'"):
        sj.Pipeline.from_pretrained("nano", weights="int4")
