"""Pictures to start from: every form means the same picture, and none is bent."""

import logging

import numpy as np
import pytest
from PIL import Image as pillow
from PIL import ImageDraw

from sega_jax.media.images import Image
from sega_jax.media.photos import check_shape, cut, own_size, photo, photo_size


@pytest.fixture(scope="module")
def disc():
    """A white disc of 97 pixels across on black, in a picture of 384x192."""
    image = pillow.new("RGB", (384, 192))
    ImageDraw.Draw(image).ellipse((143, 47, 239, 143), fill=(255, 255, 255))
    return image


def extent(picture):
    """(width, height) of what is bright."""
    bright = picture.mean(-1) > 0
    return int(bright.any(0).sum()), int(bright.any(1).sum())


def test_every_form_is_the_same_picture(disc, tmp_path):
    disc.save(tmp_path / "disc.png")
    array = np.asarray(disc)
    expected = array.astype(np.float32) / 127.5 - 1
    forms = (tmp_path / "disc.png", str(tmp_path / "disc.png"), disc, array, Image(array), expected)
    for form in forms:
        np.testing.assert_array_equal(photo(form), expected)
        assert photo_size(form) == (384, 192)
    np.testing.assert_allclose(photo(array.astype(np.float64) / 255), expected, atol=1e-6)


def test_floats_without_a_negative_value_are_told_about(caplog):
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(photo(np.full((2, 2, 3), 0.75, np.float32)), 0.5)
        assert "read as 0 to 1" in caplog.text
        caplog.clear()
        np.testing.assert_array_equal(photo(np.full((2, 2, 3), -0.75, np.float32)), -0.75)
        assert not caplog.text


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.full((2, 2, 3), np.nan), ValueError, "NaN or infinity"),
        (np.full((2, 2, 3), np.inf), ValueError, "NaN or infinity"),
        (np.full((2, 2, 3), 200.0), ValueError, r"floats from 200 to 200; expected \[-1, 1\] or \[0, 1\]"),
        (np.full((2, 2, 3), 200), TypeError, "dtype int64: expected uint8"),
        (np.zeros((2, 2), np.uint8), ValueError, r"shape \(2, 2\): expected \[height, width, 3\]"),
        (np.zeros((1, 2, 2, 3), np.uint8), ValueError, r"shape \(1, 2, 2, 3\)"),
        (np.zeros((2, 2, 3), bool), TypeError, "expected a file, a Pillow image"),
        (5, TypeError, "of type int|shape"),
        (object(), TypeError, "of type object"),
        (pillow.new("RGBA", (2, 2), (0, 0, 0, 3)), ValueError, "init_image: has transparent pixels"),
        (pillow.new("F", (2, 2)), ValueError, "8 bits per channel"),
    ],
)
def test_what_is_no_picture_is_refused(image, error, message):
    with pytest.raises((error, ValueError) if message == "of type int|shape" else error, match=message):
        photo(image)


def test_orientation_counts_for_the_size(tmp_path):
    exif = pillow.Exif()
    exif[0x0112] = 6
    pillow.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    assert photo_size(tmp_path / "turned.jpg") == (2, 4) == photo(tmp_path / "turned.jpg").shape[1::-1]


def test_another_shape_is_refused_without_a_word(disc):
    for size in ((192, 192), (384, 384), (192, 384)):
        with pytest.raises(ValueError, match=r"384x192, the run .*another shape; give fit='crop' \(cuts off"):
            photo(disc, size)
    photo(disc, (192, 96))  # the same shape
    check_shape((1000, 700), own_size((1000, 700), 16), None)  # up to whole tokens
    with pytest.raises(ValueError, match="fit='cover': expected crop, pad, stretch"):
        photo(disc, (192, 192), "cover")


@pytest.mark.parametrize("form", [lambda image: image, lambda image: np.asarray(image).astype(np.float32) / 127.5 - 1])
def test_a_disc_stays_a_disc(disc, form):
    cropped, padded, bent = (photo(form(disc), (192, 192), fit) for fit in ("crop", "pad", "stretch"))
    assert extent(cropped) == (97, 97)
    width, height = extent(padded)
    assert width == pytest.approx(height, abs=1)
    assert height == pytest.approx(48.5, abs=1)
    assert (padded[:48] == -1).all()
    assert (padded[-48:] == -1).all()
    width, height = extent(bent)
    assert width == pytest.approx(49, abs=1)
    assert height == 97


def test_sizes():
    assert own_size((384, 192), 16) == (384, 192)
    assert own_size((383, 177), 16) == (384, 192)
    picture = np.arange(5 * 7 * 3).reshape(5, 7, 3)
    np.testing.assert_array_equal(cut(picture, (5, 3)), picture[1:4, 1:6])
    with pytest.raises(ValueError, match="7x5 cannot be cut to 8x3"):
        cut(picture, (8, 3))
