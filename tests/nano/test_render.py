import numpy as np
import pytest

from sega_jax.nano import grammar, render
from sega_jax.nano.grammar import Scene


def ink(image, background):
    return np.abs(image.astype(int) - np.asarray(render.BACKGROUND_RGB[background])).sum(-1) > 60


@pytest.mark.parametrize("shape", grammar.SHAPES)
def test_structure_scales_with_the_canvas(shape):
    scene = Scene(shape, "red", "plain", "left", "white")
    small = ink(render.render(scene, 256, 256), "white")
    large = ink(render.render(scene, 1024, 1024), "white")
    assert large.mean() == pytest.approx(small.mean(), rel=0.03)
    centres = [np.argwhere(mask).mean(0) / len(mask) for mask in (small, large)]
    np.testing.assert_allclose(*centres, atol=0.01)


@pytest.mark.parametrize("texture", ["stripes", "checks", "dots"])
def test_texture_keeps_its_pixel_size(texture):
    scene = Scene("square", "yellow", texture, "centre", "grey")
    for side in (256, 1024):
        image = render.render(scene, side, side)[..., 0].astype(float)
        middle, reach = side // 2, int(0.18 * side)
        window = image[middle - reach : middle + reach, middle - reach : middle + reach]
        period = int(render.PERIOD)
        np.testing.assert_array_equal(window[period:], window[:-period])
        if texture != "stripes":
            np.testing.assert_array_equal(window[:, period:], window[:, :-period])
        half = period // 2
        assert np.abs(window[half:] - window[:-half]).max() > 50


def test_edges_stay_one_pixel_wide():
    scene = Scene("square", "red", "plain", "centre", "white")
    for side in (64, 256, 1024):
        row = render.render(scene, side, side)[side // 2, :, 1].astype(int)
        assert np.isin(row, (50, 240), invert=True).sum() <= 4


@pytest.mark.parametrize("scene", list(grammar.scenes())[::131])
def test_objects_stay_inside_any_canvas(scene):
    rng = np.random.default_rng(3)
    for height, width in ((128, 128), (192, 320), (320, 192), (80, 160)):
        image = render.render(scene, height, width, rng)
        assert image.shape == (height, width, 3)
        assert image.dtype == np.uint8
        mask = ink(image, scene.background)
        border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert mask.any()
        assert not border.any()


def test_jitter_comes_from_the_generator_alone():
    scene = Scene("circle", "green", "dots", "top", "pink")
    same = [render.render(scene, 96, 96, np.random.default_rng(5)) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    assert (same[0] != render.render(scene, 96, 96, np.random.default_rng(6))).any()


def test_a_crop_is_a_window_of_the_canvas():
    scene = Scene("diamond", "purple", "checks", "right", "white")
    place = render.geometry(scene, 256, 256)
    whole = render.draw(scene, place, np.arange(256), np.arange(256))
    part = render.draw(scene, place, 40 + np.arange(64), 130 + np.arange(64))
    np.testing.assert_array_equal(part, whole[40:104, 130:194])
    assert render.crop(np.random.default_rng(0), scene, (1024, 512), 64).shape == (64, 64, 3)


def test_float_range_and_back():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    assert render.to_float(image).min() == -1
    assert render.to_float(image).max() == 1
    np.testing.assert_array_equal(render.to_uint8(render.to_float(image)), image)
    np.testing.assert_array_equal(render.to_uint8(np.array([-3.0, 2.0])), [0, 255])
