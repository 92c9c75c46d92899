"""The exact decode, in strips and over a mesh, against the plain one."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from sega_jax.decoding.rows import decode_sharded
from sega_jax.decoding.strips import decode_strips, iterate_strips, plan_strips
from sega_jax.models.abstract import build_abstract
from sega_jax.models.vae import Vae, VaeConfig

SMALL = VaeConfig(block_out_channels=(16, 32, 64, 64), norm_num_groups=4)  # FLUX.1 at 1/8 width
TINY = VaeConfig(
    latent_channels=4,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    use_post_quant_conv=True,
)
NO_ATTENTION = dataclasses.replace(TINY, mid_block_add_attention=False, use_post_quant_conv=False)


def make(config):
    """Random parameters, none at zero or one: biases and scales of norms differ from channel to channel."""
    draw = np.random.default_rng(0)

    def fill(x):
        fan_in = np.prod(x.shape[:-1])
        values = draw.normal(size=x.shape) / np.sqrt(fan_in) if len(x.shape) > 1 else draw.normal(0.5, 0.3, x.shape)
        return jnp.asarray(values.astype(np.float32))

    return jax.tree.map(fill, build_abstract(lambda rngs: Vae(config, rngs=rngs)))


@pytest.fixture(scope="module")
def small():
    return make(SMALL)


@pytest.fixture(scope="module")
def tiny():
    return make(TINY)


def latents(config, height, width, batch=1):
    """Latents whose mean and scale drift from top to bottom: statistics of a strip are not those of the picture."""
    z = jax.random.normal(jax.random.key(3), (batch, height, width, config.latent_channels))
    drift = jnp.linspace(-2.0, 2.0, height)[None, :, None, None]
    return np.asarray(z * (1.5 + 0.5 * drift) + drift)


def plain(vae, z):
    return np.asarray(nnx.jit(Vae.decode)(vae, jnp.asarray(z)))


def mesh(*shape):
    names = ("data", "context", "tensor")[-len(shape) :]
    return Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), names)


# -- strips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "rows"), [(13, 9, 16), (7, 5, None)])
def test_strips_equal_the_plain_decode(small, height, width, rows):
    z = latents(SMALL, height, width)
    np.testing.assert_allclose(decode_strips(small, z, rows=rows), plain(small, z), atol=1e-4)


@pytest.mark.parametrize(
    ("config", "height", "rows"), [(TINY, 1, 1), (TINY, 10, 3), (NO_ATTENTION, 9, 1), (NO_ATTENTION, 11, 64)]
)
def test_any_strip_height_and_batch(config, height, rows):
    vae = make(config)
    z = latents(config, height, 5, batch=2)
    np.testing.assert_allclose(decode_strips(vae, z, rows=rows), plain(vae, z), atol=1e-4)


def test_statistics_of_the_whole_picture_matter(tiny):
    """The comparison can fail: decoding the halves apart is far off even away from the seam."""
    z = latents(TINY, 16, 6)
    halves = np.concatenate([decode_strips(tiny, half) for half in np.split(z, 2, axis=1)], axis=1)
    assert np.abs(halves - plain(tiny, z))[:, :8].max() > 0.05


def test_strips_come_in_order_and_cover_the_picture(tiny):
    z = latents(TINY, 11, 5)
    expected, end = plain(tiny, z), 0
    for first, strip in iterate_strips(tiny, z, rows=4):
        assert first == end
        assert strip.shape[1] <= 4
        end += strip.shape[1]
        np.testing.assert_allclose(strip, expected[:, first:end], atol=1e-4)
    assert end == 22


def test_latents_are_left_alone_and_bfloat16_stays(tiny):
    z = latents(TINY, 6, 5).astype(jnp.bfloat16)
    before = z.copy()
    result = decode_strips(tiny, z, rows=3)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(z, before)
    exact = plain(tiny, np.asarray(z, np.float32))
    assert np.abs(result.astype(np.float32) - exact).max() < 0.05 * np.abs(exact).max()


def test_more_strips_do_not_compile_more(tiny):
    """Once per stage and strip shape; then nothing, however many strips there are."""
    compiled = []

    def count(event, duration, **_):
        del duration
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    z = latents(TINY, 12, 7)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        decode_strips(tiny, z, rows=3)
        first = len(compiled)
        decode_strips(tiny, z + 1.0, rows=3)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert 0 < first <= len(plan_strips(tiny, 2 * 12, 2 * 7, rows=3))
    assert len(compiled) == first


def test_bad_arguments_are_refused(tiny):
    with pytest.raises(ValueError, match=r"\[B, h, w, 4\]"):
        decode_strips(tiny, np.zeros((1, 4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="rows=0"):
        decode_strips(tiny, np.zeros((1, 4, 4, 4), np.float32), rows=0)
    with pytest.raises(ValueError, match="multiples of 2"):
        plan_strips(tiny, 7, 8)
    with pytest.raises(ValueError, match=r"\[B, h, w, 4\]"):
        decode_sharded(tiny, np.zeros((1, 4, 4, 3), np.float32), mesh=mesh(8))
    with pytest.raises(ValueError, match=r"\['rows'\] are not in the mesh"):
        decode_sharded(tiny, np.zeros((1, 4, 4, 4), np.float32), mesh=mesh(8), axes="rows")


# -- over a mesh -------------------------------------------------------------------------------------------------------


def test_rows_over_eight_devices_equal_the_plain_decode(small):
    z = latents(SMALL, 13, 9)
    np.testing.assert_allclose(decode_sharded(small, z, mesh=mesh(8)), plain(small, z), atol=1e-4)


@pytest.mark.parametrize("height", [1, 9, 16])
def test_devices_without_rows_of_the_picture_change_nothing(tiny, height):
    """1: seven devices hold filling only; 9: the fifth is partly filled, three are empty; 16: all are full."""
    z = latents(TINY, height, 6, batch=2)
    np.testing.assert_allclose(decode_sharded(tiny, z, mesh=mesh(8)), plain(tiny, z), atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "axes"), [((2, 4), "context"), ((2, 2, 2), None), ((2, 2, 2), ("context", "tensor"))]
)
def test_any_axes_of_a_mesh(tiny, shape, axes):
    z = latents(TINY, 7, 5)
    np.testing.assert_allclose(decode_sharded(tiny, z, mesh=mesh(*shape), axes=axes), plain(tiny, z), atol=1e-4)


def test_without_attention_over_a_mesh():
    vae, z = make(NO_ATTENTION), latents(NO_ATTENTION, 11, 4)
    np.testing.assert_allclose(decode_sharded(vae, z, mesh=mesh(4)), plain(vae, z), atol=1e-4)


# -- memory ------------------------------------------------------------------------------------------------------------


def peak(vae, side, rows):
    return max(stage.peak for stage in plan_strips(vae, side, side, rows=rows))


def test_device_peak_grows_with_the_strip_and_not_with_the_picture(tiny):
    low, tall = (max(s.peak for s in plan_strips(tiny, h, 256, rows=16)) for h in (256, 2048))
    assert tall <= 1.05 * low
    assert peak(tiny, 512, 16) <= 2.1 * peak(tiny, 256, 16)


@pytest.mark.slow
def test_device_peak_at_flux_widths_is_linear_in_width_times_strip():
    vae = build_abstract(lambda rngs: Vae(VaeConfig.flux(), rngs=rngs, dtype=jnp.float32))
    share = {}
    for side, rows in [(2048, 64), (4096, 64), (6144, 64), (6144, 32)]:
        share[side, rows] = peak(vae, side, rows) / (side * rows)
        print(f"{side}² in strips of {rows}: {share[side, rows] * side * rows / 1e9:.2f} GB")
    for (side, rows), bytes_per_pixel in share.items():
        # 512 channels of float32 are 2,048 bytes; two strips with residuals are in flight.
        assert bytes_per_pixel < 8 * 2048, (side, rows)
    assert share[6144, 64] <= 1.05 * share[4096, 64] <= 1.05**2 * share[2048, 64]


@pytest.mark.slow
def test_full_flux_widths_at_1024():
    """About 10 GB of host memory; the plain decode sets the peak."""
    vae, z = make(VaeConfig.flux()), latents(VaeConfig.flux(), 128, 128)
    expected = plain(vae, z)
    for result in (decode_strips(vae, z, rows=192), decode_sharded(vae, z, mesh=mesh(os.cpu_count() or 1))):
        print(f"max |Δ| {np.abs(result - expected).max():.2e} of values up to {np.abs(expected).max():.1f}")
        np.testing.assert_allclose(result, expected, atol=1e-4)
