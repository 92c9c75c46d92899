"""Tiled autoencoding: geometry of the tiles, exactness where it can be exact, quality and compilations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sega_jax.decoding.tiles import decode_tiled, encode_tiled, fade_weights, tile_positions
from sega_jax.models.vae import Vae, VaeConfig

TINY = VaeConfig(latent_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)


@pytest.fixture(scope="module")
def vae():
    with nnx.use_eager_sharding(False):
        return Vae(TINY, rngs=nnx.Rngs(0))


def smooth(shape, seed):
    """Noise without its finest detail, unit variance."""
    coarse = jax.random.normal(jax.random.key(seed), (shape[0], shape[1] // 4, shape[2] // 4, shape[3]))
    x = jax.image.resize(coarse, shape, "cubic")
    return x / x.std()


def psnr(a, b):
    """Peak signal-to-noise ratio in dB, the peak being the range of ``a``."""
    return 20 * np.log10((a.max() - a.min()) / np.sqrt(np.mean(np.square(a - b))))


@pytest.mark.parametrize("length", [1, 7, 16, 17, 28, 29, 41, 100])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_tiles_cover_the_axis_overlap_as_stated_and_weigh_one(length, overlap):
    tile = min(16, length)
    positions = tile_positions(length, tile, overlap)
    assert positions[0] == 0
    assert positions[-1] == length - tile
    for first, second in itertools.pairwise(positions):
        assert first < second <= first + tile - int(overlap * tile)
    total = np.zeros(3 * length)
    for first, weight in zip(positions, fade_weights(positions, tile, 3), strict=True):
        assert weight.min() >= 0
        total[3 * first : 3 * (first + tile)] += weight
    np.testing.assert_allclose(total, 1.0, atol=1e-6)


def test_no_more_tiles_than_the_overlap_asks_for():
    assert tile_positions(112, 64, 0.25) == [0, 48]
    assert tile_positions(113, 64, 0.25) == [0, 24, 49]
    assert tile_positions(512, 64, 0.25) == [round(i * 448 / 10) for i in range(11)]


def test_fade_is_linear_over_the_overlap():
    weights = fade_weights([0, 12], 16, 1)
    np.testing.assert_allclose(weights[0][12:], [0.875, 0.625, 0.375, 0.125])
    np.testing.assert_allclose(weights[1][:4], [0.125, 0.375, 0.625, 0.875])
    np.testing.assert_array_equal(weights[0][:12], 1.0)
    np.testing.assert_array_equal(weights[1][4:], 1.0)


def test_a_local_function_is_tiled_exactly():
    """Where no pixel depends on its neighbours, every tile agrees and the blend must be the plain result."""
    latents = np.asarray(jax.random.normal(jax.random.key(0), (2, 23, 37, 4)))
    shapes = []

    def nearest(x):
        shapes.append(x.shape)
        return jnp.repeat(jnp.repeat(x, 3, 1), 3, 2)

    tiled = decode_tiled(nearest, latents, tile=8, overlap=0.3)
    np.testing.assert_allclose(tiled, latents.repeat(3, 1).repeat(3, 2), atol=1e-6)
    assert set(shapes) == {(2, 8, 8, 4)}

    def pooled(x):
        y = x.reshape(2, 8, 3, 8, 3, 4).mean((2, 4))
        return y, -2.0 * y

    mean, logvar = encode_tiled(pooled, tiled, factor=3, tile=8, overlap=0.3)
    np.testing.assert_allclose(mean, latents, atol=1e-6)
    np.testing.assert_allclose(logvar, -2.0 * latents, atol=2e-6)


def test_one_tile_equals_the_plain_result(vae):
    decode = nnx.jit(lambda x: vae.decode(x))
    latents = smooth((1, 20, 12, 4), 0)
    plain = decode(latents)
    np.testing.assert_array_equal(decode_tiled(decode, latents, tile=20), plain)
    encode = nnx.jit(lambda x: vae.encode(x))
    mean, logvar = encode_tiled(encode, plain, factor=2, tile=64)
    np.testing.assert_array_equal(mean, encode(plain)[0])
    np.testing.assert_array_equal(logvar, encode(plain)[1])


def test_tiles_come_close_compile_once_and_more_so_when_larger(vae):
    decode = jax.jit(lambda x: vae.decode(x))
    latents = smooth((1, 56, 44, 4), 1)
    plain = np.asarray(vae.decode(latents))
    qualities = {}
    for tile in (16, 32):
        before = decode._cache_size()
        qualities[tile] = psnr(plain, decode_tiled(decode, latents, tile=tile, overlap=0.25))
        assert decode._cache_size() == before + 1
    print("decode PSNR by tile:", {tile: f"{quality:.1f} dB" for tile, quality in qualities.items()})
    assert qualities[32] > qualities[16] > 25.0


def test_tiled_encoding_comes_close_and_compiles_once(vae):
    encode = jax.jit(lambda x: vae.encode(x))
    images = smooth((1, 72, 104, 3), 2)
    tiled = encode_tiled(encode, images, factor=2, tile=24, overlap=0.25)
    assert encode._cache_size() == 1
    for name, whole, blended in zip(("mean", "logvar"), vae.encode(images), tiled, strict=True):
        quality = psnr(np.asarray(whole), blended)
        print(f"encode PSNR of the {name}: {quality:.1f} dB")
        assert quality > 25.0


def test_low_precision_latents_give_float32_images(vae):
    latents = smooth((1, 12, 12, 4), 3).astype(jnp.bfloat16)
    image = decode_tiled(jax.jit(lambda x: vae.decode(x)), latents, tile=8)
    assert image.dtype == np.float32
    assert image.shape == (1, 24, 24, 3)


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0.25), (8, 1.0), (8, -0.1)])
def test_unusable_tiles_are_refused(tile, overlap):
    with pytest.raises(ValueError, match="expected tile >= 1"):
        decode_tiled(jnp.asarray, np.zeros((1, 8, 8, 4)), tile=tile, overlap=overlap)


def test_images_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="multiples of 8"):
        encode_tiled(lambda x: (x, x), np.zeros((1, 16, 20, 3)))
