import dataclasses

import numpy as np
import pytest

from sega_jax.nano import check, grammar, render
from sega_jax.nano.grammar import Scene


@pytest.mark.parametrize(("side", "count"), [((128, 128), 150), ((256, 256), 150), ((192, 320), 60), ((512, 512), 50)])
def test_rendered_truth_is_read_without_error(side, count):
    assert check.error_rate(*side, count=count, seed=1) <= 0.01


def test_four_times_the_side():
    assert check.error_rate(1024, 1024, count=12, seed=2) == 0


TRUTH = Scene("circle", "red", "stripes", "left", "white")


def scene_and_picture(**changes):
    scene = dataclasses.replace(TRUTH, **changes)
    return scene, render.render(scene, 256, 256)


@pytest.mark.parametrize(
    ("name", "value"),
    [("shape", "diamond"), ("colour", "orange"), ("texture", "checks"), ("place", "top"), ("background", "pink")],
)
def test_one_wrong_attribute_is_the_one_reported(name, value):
    scene, _ = scene_and_picture()
    _, other = scene_and_picture(**{name: value})
    wrong = [key for key, right in check.read(other).matches(scene).items() if not right]
    assert wrong == [name]


def test_survives_blur_and_noise():
    rng = np.random.default_rng(0)
    scene, image = scene_and_picture(texture="dots")
    soft = image.astype(float)
    soft = (soft + np.roll(soft, 1, 0) + np.roll(soft, 1, 1) + np.roll(soft, -1, 0) + np.roll(soft, -1, 1)) / 5
    soft += rng.normal(0, 8, soft.shape)
    assert check.read(np.clip(soft, 0, 255).astype(np.uint8)).correct(scene)


def test_stretched_texture_is_wrong_even_if_it_looks_right():
    """At twice the side the picture must not simply be the small one enlarged."""
    scene, image = scene_and_picture()
    enlarged = image.repeat(2, 0).repeat(2, 1)
    matches = check.read(enlarged).matches(scene)
    assert not matches.pop("texture")
    assert all(matches.values())


def test_repeated_object_is_not_a_shape():
    """The failure of plain rotary extrapolation: the small picture again and again."""
    scene, image = scene_and_picture(place="centre")
    assert not check.read(np.tile(image, (2, 2, 1))).matches(scene)["shape"]


def test_no_object():
    reading = check.read(np.full((128, 128, 3), 240, np.uint8))
    assert reading == check.Reading(None, None, None, None, "white")


def test_noise_is_nothing():
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    scene = next(grammar.scenes())
    assert not check.read(noise).correct(scene)


def test_an_object_of_the_dark_shade_alone_has_no_texture():
    image = render.render(Scene("square", "red", "plain", "centre", "white"), 128, 128)
    red = (image == render.OBJECT_RGB["red"]).all(-1)
    image[red] = np.rint(np.asarray(render.OBJECT_RGB["red"]) * 0.35)
    assert check.read(image).texture is None
