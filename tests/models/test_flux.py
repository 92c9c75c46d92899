"""FLUX.1 transformer: names, key maps, streams with a noise level of their own, rematerialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from converters.keymap import expand
from converters.keymaps import flux as keymap
from sega_jax.layouts.dense import Dense
from sega_jax.layouts.streams import Stream, bind
from sega_jax.models.abstract import axes, build_abstract, count, initialize, parameters
from sega_jax.models.flux import PACKING, Flux, FluxConfig
from sega_jax.positional.rope import plain
from tests.tiny import step_inputs

TINY = FluxConfig(8, 2, 2, 2, 16, 12, 10, True, (4, 6, 6))


@pytest.fixture(scope="module")
def model() -> Flux:
    flux = initialize(lambda rngs: Flux(TINY, rngs=rngs))
    for param in parameters(flux).values():  # adaLN-Zero starts as the identity; wake everything up
        noise = jax.random.normal(jax.random.key(param.size), param.shape)
        param.set_value(param[...] + 0.1 * noise)
    return flux


def inputs(batch=2, height=3, width=4, text=5):
    rng = np.random.default_rng(0)
    grid = TINY.rope_spec().grid(height, width, text)
    rope = plain(grid)
    streams = {
        "text": jnp.asarray(rng.standard_normal((batch, text, 12)), jnp.float32),
        "image": jnp.asarray(rng.standard_normal((batch, grid.tokens, 8)), jnp.float32),
    }
    pooled = jnp.asarray(rng.standard_normal((batch, 10)), jnp.float32)
    calls = bind(Dense().calls(grid), {"image": {"text": rope, "image": rope}})
    return streams, jnp.full((batch,), 0.7), pooled, jnp.full((batch,), 3.5), calls


@pytest.mark.parametrize("config", [FluxConfig.dev(), FluxConfig.schnell(), TINY])
def test_every_parameter_names_its_dimensions(config):
    for path, param in parameters(build_abstract(lambda rngs: Flux(config, rngs=rngs))).items():
        assert len(axes(param)) == len(param.shape), path
        assert (axes(param)[0] == "layers") == path.startswith(("double.", "single.")), path


def test_published_sizes():
    sizes = {
        c: count(build_abstract(lambda rngs, c=c: Flux(c, rngs=rngs))) for c in (FluxConfig.dev(), FluxConfig.schnell())
    }
    assert list(sizes.values()) == [11_901_408_320, 11_891_178_560]


@pytest.mark.parametrize("rows", [keymap.DIFFUSERS, keymap.BFL], ids=["diffusers", "bfl"])
@pytest.mark.parametrize("config", [FluxConfig.dev(), FluxConfig.schnell()], ids=["dev", "schnell"])
def test_key_maps_fill_the_abstract_tree_exactly(rows, config):
    params = parameters(build_abstract(lambda rngs: Flux(config, rngs=rngs)))
    expected = {
        (path, i): param.shape[1:] if axes(param)[0] == "layers" else param.shape
        for path, param in params.items()
        for i in (range(param.shape[0]) if axes(param)[0] == "layers" else [None])
    }
    tensors = list(expand(rows, keymap.dims(config.to_dict())))
    filled = {
        (slot.path, slot.index): shape
        for tensor in tensors
        for slot, shape in zip(tensor.slots, tensor.piece_shapes(), strict=True)
    }
    assert filled == expected
    assert len({tensor.source for tensor in tensors}) == len(tensors)


def test_bfl_configuration_is_read_off_the_shapes():
    for config in (FluxConfig.dev(), FluxConfig.schnell()):
        shapes = {t.source: t.shape for t in expand(keymap.BFL, keymap.dims(config.to_dict()))}
        assert FluxConfig.from_dict(keymap.config_from_bfl(shapes)) == config


def test_a_stream_with_its_own_noise_level(model):
    """A clean stream at t = 0 beside the sampler's: same as a batch whose conditioning is swapped by hand."""
    streams, sigma, pooled, guidance, calls = inputs()
    own = (Stream("text", "text"), Stream("image", "image", sigma=0.2))
    got = model(step_inputs(streams, sigma, pooled, guidance), calls, streams=own)["image"]
    everything = model(step_inputs(streams, jnp.full((2,), 0.2), pooled, guidance), calls)["image"]
    plain_run = model(step_inputs(streams, sigma, pooled, guidance), calls)["image"]
    assert float(jnp.abs(got - plain_run).max()) > 1e-3
    assert float(jnp.abs(got - everything).max()) > 1e-5  # the text still follows the sampler
    all_own = tuple(Stream(s.name, s.kind, 0.2) for s in own)
    np.testing.assert_allclose(
        np.asarray(model(step_inputs(streams, sigma, pooled, guidance), calls, streams=all_own)["image"]),
        np.asarray(everything),
        atol=1e-6,
    )


def test_remat_changes_memory_not_gradients(model):
    streams, sigma, pooled, guidance, calls = inputs()
    graphdef, params = nnx.split(model)

    def loss(params, remat):
        out = nnx.merge(graphdef, params)(step_inputs(streams, sigma, pooled, guidance), calls, remat=remat)["image"]
        return jnp.square(out).sum()

    ours, theirs = (jax.jit(jax.grad(loss), static_argnums=1)(params, remat) for remat in (False, True))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-4)


def test_bfloat16_activations_stay_close(model):
    streams, sigma, pooled, guidance, calls = inputs()
    exact = np.asarray(model(step_inputs(streams, sigma, pooled, guidance), calls)["image"])
    half = {name: x.astype(jnp.bfloat16) for name, x in streams.items()}
    out = model(step_inputs(half, sigma, pooled, guidance), calls)["image"]
    assert out.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(out, np.float32) - exact) < 0.03 * np.linalg.norm(exact)


def test_missing_guidance_is_named(model):
    streams, sigma, pooled, _, calls = inputs()
    with pytest.raises(ValueError, match="guidance=None"):
        model(step_inputs(streams, sigma, pooled, None), calls)


def test_pack_is_inverted_and_refuses_odd_sides():
    latents = jnp.arange(2 * 4 * 6 * 3, dtype=jnp.float32).reshape(2, 4, 6, 3)
    np.testing.assert_array_equal(np.asarray(PACKING.unpack(PACKING.pack(latents), 2, 3)), np.asarray(latents))
    with pytest.raises(ValueError, match="both sides must be multiples of 2"):
        PACKING.pack(latents[:, :3])


def test_unknown_configuration_keys_are_refused():
    with pytest.raises(ValueError, match="surprise"):
        FluxConfig.from_dict({"surprise": 1})
    with pytest.raises(ValueError, match="head_dim"):
        FluxConfig.from_dict({"attention_head_dim": 64})
