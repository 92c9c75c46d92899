"""Meshes, rules and whole denoising steps on eight fake devices against one device."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from sega_jax import positional as pe
from sega_jax.layouts.dense import Dense
from sega_jax.models.abstract import build_abstract, initialize
from sega_jax.models.flux import Flux, FluxConfig
from sega_jax.models.quantized import quantized
from sega_jax.sampling.denoise import Velocity, predict
from sega_jax.sampling.sampler import Euler, Noise
from sega_jax.sharding import mesh as M
from sega_jax.sharding import rules
from tests.tiny import flux_conditioning

CONFIG = FluxConfig(
    in_channels=16,
    double_layers=1,
    single_layers=1,
    heads=4,
    head_dim=12,
    text_dim=8,
    pooled_dim=8,
    rope_dims=(4, 4, 4),
)
SHAPES = [(d, c, 8 // d // c) for d in (1, 2, 4, 8) for c in (1, 2, 4, 8) if d * c <= 8]
QUICK = [(1, 8, 1), (2, 2, 2)]  # the others are as slow to compile: all of them with -m slow


# -- meshes and rules --------------------------------------------------------------------------------------------------


def test_sizes_are_read_and_written():
    mesh = M.resolve_mesh("context=2, data=2,tensor=2")
    assert dict(mesh.shape) == {"data": 2, "context": 2, "tensor": 2}
    assert M.describe(mesh) == "data=2,context=2,tensor=2"
    assert M.resolve_mesh("context=4").devices.size == 4  # the first of the local devices
    assert M.resolve_mesh("tensor=2").shape["context"] == 4  # what is left
    assert M.resolve_mesh(None) is None
    assert dict(M.resolve_mesh("auto", batch=6).shape) == {"data": 2, "context": 4, "tensor": 1}


@pytest.mark.parametrize("text", ["model=8", "context=0", "context=two", "context=2,context=4", "context=16", "data=3"])
def test_meshes_that_cannot_be_are_refused(text):
    with pytest.raises(ValueError, match=r"mesh"):
        M.resolve_mesh(text)


def test_a_mesh_of_other_axes_is_refused():
    with pytest.raises(ValueError, match="expected"):
        M.resolve_mesh(jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)))


def test_rules():
    mesh = M.make_mesh(data=2, context=2, tensor=2)
    assert rules.spec(("layers", "embed", "mlp"), (3, 8, 6), mesh) == P(None, ("context", "data"), ("tensor",))
    assert rules.spec(("embed", "heads"), (6, 3), mesh) == P(("context",), None)  # what divides
    assert rules.spec((None, "embed"), (6, 8), mesh, rules.COMPUTED) == P(None, None)
    with pytest.raises(ValueError, match=r"'heads' and 'mlp' .* 'tensor'"):
        rules.spec(("heads", "mlp"), (8, 8), mesh)
    with pytest.raises(ValueError, match="'width' has no rule"):
        rules.spec(("width",), (8,), mesh)


def test_every_parameter_of_flux_dev_is_an_eighth_on_each_of_eight_devices():
    """No device holds the whole model, whatever the mesh."""
    params = nnx.state(build_abstract(lambda rngs: Flux(FluxConfig.dev(), rngs=rngs, dtype=jnp.bfloat16)))
    whole = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    for shape in SHAPES:
        mesh = M.make_mesh(data=shape[0], context=shape[1], tensor=shape[2])
        where = jax.tree.leaves(rules.shardings(params, mesh))
        own = sum(math.prod(s.shard_shape(p.shape)) for s, p in zip(where, jax.tree.leaves(params), strict=True))
        assert whole / 8 <= own < 1.02 * whole / 8


# -- denoising ---------------------------------------------------------------------------------------------------------


def make(config=CONFIG):
    graphdef, params = nnx.split(initialize(lambda rngs: Flux(config, rngs=rngs)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), params)
    spec = config.rope_spec((4, 4))
    velocity = Velocity(graphdef, pe.get("sega"), Dense(), spec, "float32")

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    batch = 3
    negative = normal(batch, 5, config.text_dim), normal(batch, config.pooled_dim)
    conditioning = flux_conditioning(
        normal(batch, 5, config.text_dim), normal(batch, config.pooled_dim), jnp.float32(3.5), negative, jnp.float32(2)
    )
    return velocity, params, conditioning


def denoise(velocity, params, conditioning):
    """Two steps at 9 x 7 tokens: 63 of them, 1008 x 752 in small; three pictures, guided, with spectra of their own."""
    sampler = Euler(velocity, np.asarray([0.9, 0.5, 0.0], np.float32), (18, 14, 4))
    state = sampler.start(Noise(0, (0, 1, 2)), conditioning)
    for index in range(sampler.steps):
        state = sampler.step(params, state, conditioning, index)
    return M.to_host(sampler.latents(state))


@pytest.fixture(scope="module")
def whole():
    velocity, params, conditioning = make()
    return velocity, params, conditioning, denoise(velocity, params, conditioning)


def on_mesh(whole, mesh, backend="auto"):
    velocity, params, conditioning, expected = whole
    sharded = dataclasses.replace(velocity, mesh=mesh, backend=backend)
    before = predict._cache_size()
    got = denoise(sharded, rules.place(params, mesh), conditioning)
    assert predict._cache_size() == before + 1  # steps share one program
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [pytest.param(s, marks=() if s in QUICK else pytest.mark.slow) for s in SHAPES])
def test_latents_do_not_depend_on_the_mesh(whole, shape):
    mesh = M.make_mesh(data=shape[0], context=shape[1], tensor=shape[2])
    if CONFIG.heads % shape[2]:
        with pytest.raises(ValueError, match="tensor=8 does not divide 4 attention heads"):
            on_mesh(whole, mesh)
    else:
        on_mesh(whole, mesh)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "context"), [("ring", 8), ("product+xla", 8), ("ulysses", 4)])
def test_schemes_by_name(whole, backend, context):
    on_mesh(whole, M.resolve_mesh(f"context={context}"), backend)


def test_int8_kernels_and_their_scales_are_shared_alike(whole):
    velocity, params, conditioning, _ = whole
    small = quantized(nnx.merge(velocity.graphdef, params))
    graphdef, params = nnx.split(small)
    velocity = dataclasses.replace(velocity, graphdef=graphdef)
    mesh = M.make_mesh(data=2, context=2, tensor=2)
    layer = rules.place(params, mesh)["single"]["mlp_in"]
    width, hidden = CONFIG.width, 4 * CONFIG.width
    assert layer["kernel"][...].dtype == jnp.int8
    assert layer["kernel"][...].addressable_shards[0].data.shape == (1, width // 4, hidden // 2)
    assert layer["kernel_scale"][...].addressable_shards[0].data.shape == (1, hidden // 2)
    on_mesh((velocity, params, conditioning, denoise(velocity, params, conditioning)), mesh)


def test_spectra_are_per_sample(whole):
    """The reference of these tests tells samples apart: with one spectrum for all, latents differ."""
    velocity, params, conditioning, expected = whole
    shared = dataclasses.replace(velocity, method=pe.get("sega-release"))
    assert np.abs(denoise(shared, params, conditioning) - expected).max() > 1e-3


def test_weights_are_gathered_one_block_at_a_time():
    """Four times the blocks: the compiler's temporary memory per device grows by less than one block's weights."""
    mesh = M.make_mesh(context=8)
    temporary = {}
    for layers in (2, 8):
        config = dataclasses.replace(CONFIG, double_layers=1, single_layers=layers, head_dim=32, rope_dims=(8, 12, 12))
        graphdef, params = nnx.split(build_abstract(lambda rngs, c=config: Flux(c, rngs=rngs)))
        block = sum(math.prod(p.shape[1:]) for p in jax.tree.leaves(params["single"])) * 4
        where = rules.shardings(params, mesh)
        params = jax.tree.map(lambda p, s: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=s), params, where)
        here = M.sharding(mesh)

        def array(*shape, dtype=jnp.float32, here=here):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

        conditioning = flux_conditioning(array(1, 4, config.text_dim), array(1, config.pooled_dim), array())
        compiled = predict.lower(
            params, pe.get("none"), array(1, 8, 8, 4), array(), conditioning, array(dtype=jnp.int32), None, None,
            graphdef=graphdef, layout=Dense(), grid=config.rope_spec((4, 4)).grid(4, 4, 4), dtype="float32", mesh=mesh,
        ).compile()  # fmt: skip
        temporary[layers] = compiled.memory_analysis().temp_size_in_bytes
    assert temporary[8] - temporary[2] < block
