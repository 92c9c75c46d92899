import numpy as np
import pytest
from scipy import ndimage

from sega_jax.nano.next import grammar, render
from sega_jax.nano.next.grammar import Scene


def ink(image, background):
    light = np.asarray(render.BACKGROUND_RGB[background], float)
    along = np.clip(image @ light / (light @ light), render.GROUND_DARK, 1)[..., None]
    return np.linalg.norm(image - along * light, axis=-1) > 50


@pytest.mark.parametrize("place", grammar.PLACES)
def test_structure_scales_with_the_canvas(place):
    scene = Scene("diamond", "red", "plain", place, "white", "tiled")
    small, large = (ink(render.render(scene, side, side), "white") for side in (256, 1024))
    assert large.mean() == pytest.approx(small.mean(), rel=0.03)
    for axis in (0, 1):
        profiles = small.mean(axis), large.mean(axis).reshape(256, 4).mean(1)
        np.testing.assert_allclose(*profiles, atol=0.03)


@pytest.mark.parametrize(
    ("texture", "period"), [("dots", 16), ("stripes", 32), ("checks", 32), ("lined", 16), ("tiled", 16)]
)
def test_textures_keep_their_period_in_pixels(texture, period):
    ground = texture in grammar.GROUNDS
    words = ("plain", texture) if ground else (texture, "plain")
    scene = Scene("square", "yellow", words[0], "left", "grey", words[1])
    for side in (256, 768):
        image = render.render(scene, side, side)[..., 0].astype(float)
        middle, reach = side // 2, int(0.18 * side)
        across = slice(int(0.8 * side), side) if ground else slice(int(0.28 * side) - reach, int(0.28 * side) + reach)
        window = image[middle - reach : middle + reach, across]
        np.testing.assert_array_equal(window[period:], window[:-period])
        if texture != "stripes":
            np.testing.assert_array_equal(window[:, period:], window[:, :-period])
        half = period // 2
        changed = max(np.abs(window[half:] - window[:-half]).max(), np.abs(window[:, half:] - window[:, :-half]).max())
        assert changed > 30


def test_fine_textures_are_the_same_in_every_token_and_coarse_ones_in_every_other():
    t = np.arange(64, dtype=np.float32) + np.float32(0.5)
    for texture in (*grammar.TEXTURES, *grammar.GROUNDS):
        tokens = render.darkness(texture, t[None, :], t[:, None]).reshape(4, 16, 4, 16).transpose(0, 2, 1, 3)
        kinds = {tokens[i, j].tobytes() for i in range(4) for j in range(4)}
        assert len(kinds) == (2 if texture in ("stripes", "checks") else 1)
        if texture in ("stripes", "checks"):
            assert {tokens[i, j].mean() > 0.5 for i in range(4) for j in range(4)} == {True, False}


def test_shift_is_drawn_by_lot():
    scene = Scene("square", "yellow", "stripes", "centre", "grey")
    shifts = {render.geometry(scene, 256, 256, np.random.default_rng(seed)).shift for seed in range(20)}
    assert shifts == {(0, 0), (0, 1), (1, 0), (1, 1)}
    t = np.arange(64, dtype=np.float32)
    first, second = (render.darkness("stripes", t[None], t[:, None], (lot, 0)) for lot in (0, 1))
    np.testing.assert_array_equal(first[16:], second[:-16])


def test_edges_stay_one_pixel_wide():
    scene = Scene("square", "red", "plain", "centre", "white", "plain")
    for side in (64, 256, 1024):
        row = render.render(scene, side, side)[side // 2, :, 1].astype(int)
        assert np.isin(row, (50, 240), invert=True).sum() <= 4


@pytest.mark.parametrize("scene", list(grammar.scenes())[::701])
def test_objects_stay_apart_and_inside_any_canvas(scene):
    rng = np.random.default_rng(3)
    for height, width in ((128, 128), (160, 384), (384, 160)):
        image = render.render(scene, height, width, rng).astype(float)
        mask = ink(image, scene.background)
        border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert not border.any()
        place = render.geometry(scene, height, width)
        drawn = np.zeros((height, width), bool)
        for x, y in place.centres:
            u, v = np.arange(width)[None] + 0.5 - x, np.arange(height)[:, None] + 0.5 - y
            drawn |= render.signed_distance(scene.shape, u, v, place.radius) < 0
        assert ndimage.label(drawn)[1] == scene.count


def test_jitter_comes_from_the_generator_alone():
    scene = Scene("circle", "green", "dots", "row", "pink", "lined")
    same = [render.render(scene, 96, 96, np.random.default_rng(5)) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    assert (same[0] != render.render(scene, 96, 96, np.random.default_rng(6))).any()


def test_a_crop_is_a_window_of_the_canvas_on_the_latent_grid():
    scene = Scene("diamond", "purple", "checks", "group", "white", "tiled")
    place = render.geometry(scene, 256, 256)
    whole = render.draw(scene, place, np.arange(256), np.arange(256))
    part = render.draw(scene, place, 40 + np.arange(64), 130 + np.arange(64))
    np.testing.assert_array_equal(part, whole[40:104, 130:194])
    crop = render.crop(np.random.default_rng(0), scene, (512, 512), 64)
    whole = render.render(scene, 512, 512, np.random.default_rng(0))
    corners = [(i, j) for i in range(0, 449, 8) for j in range(0, 449, 8)]
    assert sum(np.array_equal(crop, whole[i : i + 64, j : j + 64]) for i, j in corners) == 1


def test_unknown_words_are_refused():
    t = np.zeros((1, 1), np.float32)
    with pytest.raises(ValueError, match="unknown texture 'fur'"):
        render.darkness("fur", t, t)
    with pytest.raises(ValueError, match="unknown shape 'star'"):
        render.signed_distance("star", t, t, 1.0)
