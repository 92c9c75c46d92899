"""Pictures and their records survive the trip to disk; bad input is refused in words."""

import json
import struct
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as pillow

from sega_jax.media import images
from sega_jax.media.images import Image, load_image, read_metadata, to_uint8

RECORD = {
    "prompt": 'a "red" circle,\nσ ≈ 0.5 \u0000 🙂',
    "seed": 7,
    "guidance": 3.5,
    "positional": "sega",
    "size": [64, 48],
    "nothing": None,
}


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def chunks(path):
    """(type, data) of every PNG chunk, read by hand."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position, found = 8, []
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        body = data[position + 4 : position + 8 + length]
        assert zlib.crc32(body) == struct.unpack(">I", data[position + 8 + length : position + 12 + length])[0]
        found.append((body[:4].decode(), body[4:]))
        position += 12 + length
    return found


# -- conversion ------------------------------------------------------------------------------------


def test_to_uint8_rounding():
    levels = np.arange(256, dtype=np.float32) / 127.5 - 1.0
    image = np.stack([levels] * 3, -1)[None]
    np.testing.assert_array_equal(to_uint8(image)[0, :, 0], np.arange(256))
    # a quarter of a level either way rounds back
    np.testing.assert_array_equal(to_uint8(image + 0.25 / 127.5)[0, :, 0], np.arange(256))
    np.testing.assert_array_equal(to_uint8(image - 0.25 / 127.5)[0, :, 0], np.arange(256))
    clipped = np.array([[[-5.0, 0.0, np.inf]]])
    assert to_uint8(clipped).tolist() == [[[0, 128, 255]]]  # 127.5 is a tie and goes to the even number


def test_to_uint8_chunks_and_dtypes():
    image = np.random.default_rng(1).uniform(-1.2, 1.2, (600, 2, 3))
    expected = np.rint(np.clip((image.astype(np.float32) + 1) * 127.5, 0, 255))
    np.testing.assert_array_equal(to_uint8(image), expected)
    half = jnp.full((2, 2, 3), 1.0, jnp.bfloat16)
    assert (to_uint8(half) == 255).all()
    same = np.zeros((1, 1, 3), np.uint8)
    assert to_uint8(same) is same


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        (np.zeros((4, 4)), ValueError, r"\[height, width, 3\]"),
        (np.zeros((1, 4, 4, 3)), ValueError, r"\(1, 4, 4, 3\)"),
        (np.zeros((3, 4, 4)), ValueError, r"\(3, 4, 4\)"),
        (np.zeros((0, 4, 3)), ValueError, "shape"),
        (np.full((4, 4, 3), np.nan), ValueError, "NaN"),
        (np.zeros((4, 4, 3), np.int32), TypeError, "int32"),
    ],
)
def test_to_uint8_refuses(image, error, words):
    with pytest.raises(error, match=words):
        to_uint8(image)


# -- saving -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".webp", ".jpg", ".jpeg"])
def test_round_trip(tmp_path, picture, suffix):
    path = tmp_path / f"out{suffix}"
    assert Image(picture, RECORD).save(path) == path
    assert read_metadata(path) == RECORD
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    with pillow.open(path) as back:
        stored = np.asarray(back.convert("RGB"))
    if suffix.startswith(".jp"):
        assert stored.shape == picture.shape
        assert np.abs(stored.astype(int) - picture).mean() < 6  # noise is the hardest case for JPEG
    else:
        np.testing.assert_array_equal(stored, picture)


def test_png_chunks(tmp_path, picture):
    Image(picture, RECORD).save(tmp_path / "out.png")
    found = chunks(tmp_path / "out.png")
    texts = [data for kind, data in found if kind == "iTXt"]
    assert json.loads(texts[0].removeprefix(b"sega_jax\0\0\0\0\0").decode()) == RECORD
    people = texts[1].removeprefix(b"parameters\0\0\0\0\0").decode()
    assert people.startswith('a "red" circle,\nσ ≈ 0.5')
    assert "seed: 7, guidance: 3.5" in people
    assert "\0" not in people
    assert [kind for kind, _ in found].index("iTXt") < [kind for kind, _ in found].index("IDAT")


def test_big_pictures_are_compressed_quickly(tmp_path, picture, monkeypatch):
    monkeypatch.setattr(images, "_QUICK_PNG_PIXELS", 10)
    Image(picture).save(tmp_path / "quick.png")
    first = next(data for kind, data in chunks(tmp_path / "quick.png") if kind == "IDAT")
    assert first[1] >> 6 == 0  # zlib's header: "fastest algorithm"


@settings(max_examples=30, deadline=None)
@given(
    record=st.dictionaries(
        st.text(max_size=8),
        st.text(max_size=30) | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans(),
        max_size=4,
    ),
    suffix=st.sampled_from([".png", ".webp", ".jpg"]),
)
def test_any_record_round_trips(tmp_path_factory, record, suffix):
    path = tmp_path_factory.getbasetemp() / f"record{suffix}"
    Image(np.zeros((2, 2, 3), np.uint8), record).save(path)
    assert read_metadata(path) == record


def test_numpy_values_in_the_record(tmp_path):
    record = {"seed": np.int64(3), "sigmas": np.array([1.0, 0.5], np.float32), "path": tmp_path}
    Image(np.zeros((2, 2, 3), np.uint8), record).save(tmp_path / "a.png")
    assert read_metadata(tmp_path / "a.png") == {"seed": 3, "sigmas": [1.0, 0.5], "path": str(tmp_path)}


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [(float("nan"), ValueError, "JSON"), (object(), TypeError, "cannot be stored as JSON")],
)
def test_records_json_cannot_hold(tmp_path, value, error, words):
    with pytest.raises(error, match=words):
        Image(np.zeros((2, 2, 3), np.uint8), {"x": value}).save(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_long_records(tmp_path):
    record = {"prompt": "long " * 100_000}
    image = Image(np.zeros((2, 2, 3), np.uint8), record)
    image.save(tmp_path / "a.png")
    assert read_metadata(tmp_path / "a.png") == record
    with pytest.raises(ValueError, match=r"JPEG holds .*save as \.png"):
        image.save(tmp_path / "a.jpg")
    almost = {"prompt": "x" * (images._EXIF_LIMIT - 100)}
    Image(np.zeros((2, 2, 3), np.uint8), almost).save(tmp_path / "b.jpg")
    assert read_metadata(tmp_path / "b.jpg") == almost


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match=r"unknown image suffix '.gif'; use .png"):
        Image(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "a.gif")
    with pytest.raises(ValueError, match=r"WEBP sides are at most 16383 px, got 16384x1; use \.png"):
        Image(np.zeros((1, 16384, 3), np.uint8)).save(tmp_path / "a.webp")
    with pytest.raises(FileNotFoundError, match="folder does not exist"):
        Image(np.zeros((2, 2, 3), np.uint8)).save(tmp_path / "no" / "a.png")


def test_image_object(picture):
    image = Image(np.full((4, 6, 3), 1.0, np.float32))
    assert image.array.dtype == np.uint8
    assert repr(image) == "Image(6x4)"
    assert image.pil().size == (6, 4)
    assert Image(picture)._repr_png_().startswith(b"\x89PNG")


# -- reading ------------------------------------------------------------------------------------------


def test_metadata_of_foreign_files(tmp_path):
    pillow.new("RGB", (2, 2)).save(tmp_path / "plain.png")
    pillow.new("RGB", (2, 2)).save(tmp_path / "plain.jpg")
    (tmp_path / "text.png").write_text("hello")
    for name, words in (("plain.png", "no sega_jax"), ("plain.jpg", "no sega_jax"), ("text.png", "not an image")):
        with pytest.raises(ValueError, match=words):
            read_metadata(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such image"):
        read_metadata(tmp_path / "missing.png")


@pytest.mark.parametrize("text", ["{", "[1]", "NaN", ""])
def test_damaged_record(tmp_path, text):
    info = images.PngImagePlugin.PngInfo()
    info.add_itxt("sega_jax", text)
    pillow.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match="sega_jax metadata"):
        read_metadata(tmp_path / "a.png")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_raise_value_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    suffix = data.draw(st.sampled_from([".png", ".webp", ".jpg"]))
    source = path.with_suffix(suffix)
    Image(np.zeros((4, 4, 3), np.uint8), {"seed": 1}).save(source)
    content = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    source.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    for read in (read_metadata, load_image):
        try:
            read(source)
        except ValueError as exc:
            assert str(source) in str(exc)  # noqa: PT017  any outcome but a foreign exception is fine


def test_load_image_values(tmp_path, picture):
    Image(picture).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png")
    assert loaded.dtype == np.float32
    assert loaded.shape == (48, 64, 3)
    assert -1.0 <= loaded.min() <= loaded.max() <= 1.0
    np.testing.assert_array_equal(to_uint8(loaded), picture)


def test_exif_orientation(tmp_path):
    picture = np.zeros((2, 4, 3), np.uint8)
    picture[0, 0] = 255
    exif = pillow.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    pillow.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    loaded = load_image(tmp_path / "a.png")
    np.testing.assert_array_equal(loaded, np.rot90(picture, -1).astype(np.float32) / 127.5 - 1)


def test_resize_is_lanczos_and_only_when_asked(tmp_path, picture):
    Image(picture).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", size=(32, 24))
    expected = pillow.fromarray(picture).resize((32, 24), pillow.Resampling.LANCZOS)
    np.testing.assert_array_equal(to_uint8(loaded), np.asarray(expected))
    with pytest.raises(ValueError, match="width, height"):
        load_image(tmp_path / "a.png", size=(0, 4))


def test_grey_palette_and_opaque_alpha(tmp_path):
    pillow.new("L", (2, 2), 255).save(tmp_path / "grey.png")
    pillow.new("RGBA", (2, 2), (255, 0, 255, 255)).save(tmp_path / "opaque.png")
    pillow.new("RGB", (2, 2), (255, 0, 255)).quantize(4).save(tmp_path / "palette.png")
    assert load_image(tmp_path / "grey.png")[0, 0].tolist() == [1, 1, 1]
    assert load_image(tmp_path / "opaque.png")[0, 0].tolist() == [1, -1, 1]
    assert load_image(tmp_path / "palette.png")[0, 0].tolist() == [1, -1, 1]


def test_transparent_and_deep_pictures_are_refused(tmp_path):
    pillow.new("RGBA", (2, 2), (255, 0, 0, 254)).save(tmp_path / "glass.png")
    pillow.fromarray(np.zeros((2, 2), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="transparent"):
        load_image(tmp_path / "glass.png")
    with pytest.raises(ValueError, match="8 bits per channel"):
        load_image(tmp_path / "deep.png")
