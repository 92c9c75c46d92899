"""The autoencoder without torch: shapes, configuration, memory, key map cover."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from converters.cover import check_cover
from converters.errors import CheckpointError
from converters.keymap import expand
from converters.keymaps import vae as keymap
from converters.reading.sources import ArraySource
from sega_jax.models.abstract import axes, build_abstract, count, parameters
from sega_jax.models.vae import (
    SpatialAttention,
    Vae,
    VaeConfig,
    sample_posterior,
)
from sega_jax.weights.load import load

TINY = VaeConfig(
    latent_channels=4,
    block_out_channels=(4, 8, 8),
    layers_per_block=1,
    norm_num_groups=2,
    use_quant_conv=True,
    use_post_quant_conv=True,
)
# The vae/config.json of FLUX.1-dev, apart from bookkeeping that differs between releases.
FLUX_JSON = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.30.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}


@pytest.fixture(scope="module")
def vae():
    with nnx.use_eager_sharding(False):
        return Vae(TINY, rngs=nnx.Rngs(0))


def exported(module, config, layout):
    """The parameters of ``module`` under the source names of a layout."""
    arrays = {path: np.asarray(param[...]) for path, param in parameters(module).items()}
    tensors = expand(keymap.rows(dataclasses.asdict(config), layout), keymap.dims(dataclasses.asdict(config)))
    return {t.source: t.assemble([arrays[slot.path] for slot in t.slots]) for t in tensors}


@pytest.mark.parametrize(("height", "width", "dtype"), [(12, 20, "float32"), (20, 12, "bfloat16"), (4, 4, "float32")])
def test_shapes_follow_the_factor_and_dtypes_the_input(vae, height, width, dtype):
    images = jax.random.uniform(jax.random.key(0), (2, height, width, 3), jnp.dtype(dtype), -1.0, 1.0)
    mean, logvar = nnx.jit(Vae.encode)(vae, images)
    assert mean.shape == logvar.shape == (2, height // 4, width // 4, 4)
    decoded = nnx.jit(Vae.decode)(vae, mean)
    assert decoded.shape == images.shape
    assert {mean.dtype, logvar.dtype, decoded.dtype} == {jnp.dtype(dtype)}


def test_samples_of_a_batch_do_not_influence_each_other_and_runs_repeat(vae):
    images = jax.random.uniform(jax.random.key(1), (2, 12, 20, 3), minval=-1.0)
    encode, decode = nnx.jit(Vae.encode), nnx.jit(Vae.decode)
    mean, logvar = encode(vae, images)
    decoded = decode(vae, mean)
    np.testing.assert_array_equal(encode(vae, images)[0], mean)
    np.testing.assert_array_equal(decode(vae, mean), decoded)
    for i in range(2):
        alone = encode(vae, images[i : i + 1])
        np.testing.assert_allclose(alone[0][0], mean[i], atol=1e-5)
        np.testing.assert_allclose(alone[1][0], logvar[i], atol=1e-5)
        np.testing.assert_allclose(decode(vae, mean[i : i + 1])[0], decoded[i], atol=1e-5)


def test_log_variance_is_clipped(vae):
    extreme = jax.tree.map(lambda x: x, vae)
    extreme.quant_conv.bias[...] = jnp.concatenate([jnp.zeros(4), jnp.array([-100.0, -100.0, 100.0, 100.0])])
    _, logvar = extreme.encode(jnp.zeros((1, 8, 8, 3)))
    np.testing.assert_array_equal(logvar[..., :2], -30.0)
    np.testing.assert_array_equal(logvar[..., 2:], 20.0)


def test_without_attention_there_are_no_attention_parameters(vae):
    config = dataclasses.replace(TINY, mid_block_add_attention=False)
    plain = build_abstract(lambda rngs: Vae(config, rngs=rngs))
    missing = set(parameters(vae)) - set(parameters(plain))
    assert missing
    assert all(".middle.attention." in path for path in missing)
    decoded = nnx.eval_shape(Vae.decode, plain, jnp.zeros((1, 3, 2, 4)))
    assert decoded.shape == (1, 12, 8, 3)


def test_posterior_samples_have_the_moments():
    mean = jnp.full((64, 16, 16, 2), 3.0)
    logvar = jnp.broadcast_to(jnp.array([-30.0, 2 * np.log(0.5)])[None, None, None], mean.shape)
    sample = sample_posterior(mean, logvar, jax.random.key(0))
    np.testing.assert_allclose(sample[..., 0], 3.0, atol=1e-5)
    np.testing.assert_allclose([sample[..., 1].mean(), sample[..., 1].std()], [3.0, 0.5], atol=0.02)
    assert sample_posterior(mean.astype(jnp.bfloat16), logvar.astype(jnp.bfloat16), jax.random.key(0)).dtype == (
        jnp.float32
    )


def test_normalisation_of_flux():
    config = VaeConfig.flux()
    latents = jnp.array([0.1159, 1.1159, -2.0])
    np.testing.assert_allclose(config.normalize(latents), [0.0, 0.3611, -2.1159 * 0.3611], atol=1e-6)
    np.testing.assert_allclose(config.denormalize(config.normalize(latents)), latents, atol=1e-6)


def test_configuration_of_flux_is_read():
    assert VaeConfig.from_dict(FLUX_JSON) == VaeConfig.flux()
    assert VaeConfig.flux().factor == 8


def test_absent_keys_take_the_defaults_of_diffusers():
    config = VaeConfig.from_dict({"block_out_channels": [64], "shift_factor": None})
    assert (config.latent_channels, config.layers_per_block, config.norm_num_groups) == (4, 1, 32)
    assert (config.scaling_factor, config.shift_factor) == (0.18215, 0.0)
    assert config.use_quant_conv
    assert config.use_post_quant_conv


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]}, "AttnDownEncoderBlock2D"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "3 up_block_types for 4"),
        ({"act_fn": "gelu"}, "gelu"),
        ({"latents_mean": [0.0] * 16}, "latents_mean"),
        ({"flavour": 3}, "flavour"),
        ({"norm_num_groups": 48}, r"\[128, 256, 512, 512\]"),
        ({"layers_per_block": 0}, "layers_per_block"),
    ],
)
def test_configurations_not_implemented_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        VaeConfig.from_dict(FLUX_JSON | change)


def test_misfitting_inputs_are_refused(vae):
    with pytest.raises(ValueError, match="multiples of 4"):
        vae.encode(jnp.zeros((1, 8, 10, 3)))
    with pytest.raises(ValueError, match="expected"):
        vae.encode(jnp.zeros((1, 8, 8, 4)))
    with pytest.raises(ValueError, match=r"expected \[B, h, w, 4\]"):
        vae.decode(jnp.zeros((1, 8, 8, 3)))


def test_flux_size_and_axis_names():
    module = build_abstract(lambda rngs: Vae(VaeConfig.flux(), rngs=rngs))
    assert count(module) == 83_819_683  # as published
    for path, param in parameters(module).items():
        assert len(axes(param)) == len(param.shape), path
        assert any(axes(param)), path


@pytest.mark.parametrize("layout", sorted(keymap.LAYOUTS))
@pytest.mark.parametrize("quant", [False, True])
def test_key_map_covers_flux_exactly(layout, quant):
    config = dataclasses.replace(VaeConfig.flux(), use_quant_conv=quant, use_post_quant_conv=quant)
    module = build_abstract(lambda rngs: Vae(config, rngs=rngs))
    tensors = list(expand(keymap.rows(dataclasses.asdict(config), layout), keymap.dims(dataclasses.asdict(config))))
    source = ArraySource({t.source: np.broadcast_to(np.float32(0), t.shape) for t in tensors})
    check_cover(tensors, source, {path: tuple(p.shape) for path, p in parameters(module).items()})
    assert len(tensors) == len(parameters(module))


@pytest.mark.parametrize("layout", sorted(keymap.LAYOUTS))
def test_every_layout_is_detected_and_loads_the_same_parameters(vae, layout):
    source = exported(vae, TINY, layout)
    assert keymap.detect({name: array.shape for name, array in source.items()}) == layout
    config = dataclasses.asdict(TINY)
    loaded = load(
        lambda rngs: Vae(TINY, rngs=rngs),
        keymap.rows(config, layout),
        keymap.dims(config),
        ArraySource(source),
    )
    for path, param in parameters(vae).items():
        np.testing.assert_array_equal(parameters(loaded)[path][...], param[...], err_msg=path)


def test_key_map_refusals():
    config = dataclasses.asdict(TINY)
    with pytest.raises(ValueError, match="'parquet'"):
        keymap.rows(config, "parquet")
    with pytest.raises(ValueError, match="use_quant_conv"):
        keymap.dims({key: value for key, value in config.items() if key != "use_quant_conv"})
    with pytest.raises(CheckpointError, match="unet"):
        keymap.detect({"unet.conv.weight": (1,)})


def test_attention_of_many_tokens_holds_no_square_of_scores():
    module = build_abstract(lambda rngs: SpatialAttention(8, groups=2, dtype=jnp.float32, rngs=rngs))
    graph, state = nnx.split(module)
    side = 192
    x = jax.ShapeDtypeStruct((1, side, side, 8), jnp.float32)
    compiled = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x).compile()
    square = 4 * side**4
    assert compiled.memory_analysis().temp_size_in_bytes < square / 16
