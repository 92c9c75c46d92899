"""Arguments in the forms people have them, and errors that name the field."""

import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.geometry import RopeSpec
from sega_jax.pipeline.arguments import dtype_name, per_prompt, quoted, real, several, text, whole
from sega_jax.pipeline.sizes import Size, size_of

ROPE = RopeSpec(trained=(12, 12))


def test_numbers_of_numpy_are_numbers():
    for value in (3, np.int64(3), np.uint8(3), np.asarray(3), jnp.int32(3)):
        assert (whole("steps", value), type(whole("steps", value))) == (3, int)
    for value in (3, 3.0, np.float32(3), np.int64(3), np.asarray(3.0)):
        assert (real("guidance", value), type(real("guidance", value))) == (3.0, float)


@pytest.mark.parametrize("value", [True, np.bool_(True), 1.0, "1", None, [1]])
def test_what_is_no_whole_number(value):
    with pytest.raises(TypeError, match=r"steps=.*expected a positive whole number, got"):
        whole("steps", value)


@pytest.mark.parametrize("value", [True, "1", None, [1.0]])
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match=r"guidance=.*expected a number, got"):
        real("guidance", value)


def test_bounds():
    with pytest.raises(ValueError, match="steps=0: expected a positive whole number"):
        whole("steps", 0)
    with pytest.raises(ValueError, match="image_indices=-1: expected a whole number from 0 to 9"):
        whole("image_indices", -1, 0, 9)
    for value in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"guidance=.*finite number of at least 0"):
            real("guidance", value)


def test_texts_and_lists():
    assert text("prompt", np.str_("x")) == "x"
    with pytest.raises(TypeError, match="prompt=5: expected a string, got int"):
        text("prompt", 5)
    assert several("prompt", ("a", "b")) == ["a", "b"] == several("prompt", np.asarray(["a", "b"]))
    for value in (5, b"x", {"a": 1}, "x"):
        with pytest.raises(TypeError, match=r"prompt=.*expected a list"):
            several("prompt", value)
    assert per_prompt("seed", 3, 2) == [3, 3]
    assert per_prompt("seed", [3, 4], 2) == [3, 4]
    assert per_prompt("negative_prompt", "ab", 2) == ["ab", "ab"]
    with pytest.raises(ValueError, match="seed: 3 values for 2 prompt"):
        per_prompt("seed", [1, 2, 3], 2)


def test_dtypes():
    for value in ("bfloat16", jnp.bfloat16, jnp.dtype("bfloat16")):
        assert dtype_name(value) == "bfloat16"
    for value in (np.float32, np.dtype(np.float32), "float32"):
        assert dtype_name(value) == "float32"
    for value in ("float16", "half precision", np.float64, None, 5):
        with pytest.raises((ValueError, TypeError), match=r"dtype=.*'float32' or 'bfloat16'"):
            dtype_name(value)


def test_quotes_are_a_line():
    assert quoted("a\nb") == "a b"
    assert len(quoted("word " * 4000)) < 120
    with pytest.raises(TypeError) as refused:
        text("prompt", ["word"] * 4000)
    assert len(str(refused.value)) < 160


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, Size(192, 192)),
        ({"width": 384}, Size(384, 192)),
        ({"width": np.int64(64), "height": 32}, Size(64, 32)),
        ({"photo": (384, 192)}, Size(384, 192, fit="crop")),
        ({"photo": (383, 190)}, Size(384, 192, fit="crop")),
        ({"photo": (384, 192), "fit": "pad"}, Size(384, 192, fit="pad")),
        ({"photo": (384, 192), "width": 192}, Size(192, 96, fit="crop")),
        ({"photo": (384, 192), "height": 384}, Size(768, 384, fit="crop")),
        ({"photo": (384, 192), "width": 64, "height": 64, "fit": "stretch"}, Size(64, 64, fit="stretch")),
        ({"width": 1920, "height": 1080, "fit": "crop"}, Size(1920, 1088, (1920, 1080))),
        ({"photo": (1920, 1080), "width": 1920, "height": 1080, "fit": "crop"},
         Size(1920, 1088, (1920, 1080), "crop")),
    ],
)  # fmt: skip
def test_sizes_of_runs(arguments, expected):
    assert size_of(ROPE, **{"width": None, "height": None, **arguments}) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"width": 100},
            ValueError,
            "width=100: must be .* multiple of 16 pixels; try 96, or fit='crop'",
        ),
        ({"width": 3}, ValueError, "width=3: must be a positive multiple of 16 pixels; try 16"),
        ({"width": "512"}, TypeError, "width='512': expected a positive whole number, got str"),
        ({"height": True}, TypeError, "height=True"),
        ({"height": 0}, ValueError, "height=0: expected a positive whole number"),
        ({"photo": (384, 192), "width": 64, "height": 64}, ValueError, "another shape"),
        ({"fit": "crop"}, ValueError, "fit='crop': only with an init_image, or with a size"),
        ({"fit": "cover", "photo": (64, 64)}, ValueError, "fit='cover': expected crop, pad, stretch"),
        ({"width": 100, "fit": "pad"}, ValueError, "width=100: must be"),
    ],
)
def test_sizes_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        size_of(ROPE, **{"width": None, "height": None, **arguments})
