import dataclasses

import numpy as np
import pytest

from sega_jax.nano.next import check, grammar, render
from sega_jax.nano.next.grammar import Scene


@pytest.mark.parametrize(
    ("side", "count"), [((128, 128), 60), ((256, 256), 200), ((160, 384), 50), ((384, 160), 50), ((512, 512), 30)]
)
def test_rendered_truth_is_read_without_error(side, count):
    assert check.error_rate(*side, count=count, seed=1) <= 0.005


TRUTH = Scene("circle", "red", "stripes", "left", "white", "tiled")


def scene_and_picture(side=256, **changes):
    scene = dataclasses.replace(TRUTH, **changes)
    return scene, render.render(scene, side, side)


@pytest.mark.parametrize(
    ("name", "value", "group"),
    [
        ("shape", "diamond", "composition"),
        ("colour", "orange", "composition"),
        ("place", "row", "composition"),
        ("background", "pink", "composition"),
        ("texture", "checks", "detail"),
        ("ground", "speckled", "detail"),
    ],
)
def test_one_wrong_attribute_is_the_one_reported_and_counts_in_its_group(name, value, group):
    scene, _ = scene_and_picture()
    _, other = scene_and_picture(**{name: value})
    scores = check.read(other).scores(scene)
    wrong = {key for key, right in scores.items() if not right}
    assert wrong == {name, group, "all"}


@pytest.mark.parametrize(("place", "count"), [("centre", 1), ("row", 2), ("column", 2), ("group", 3)])
def test_objects_are_counted(place, count):
    scene, image = scene_and_picture(place=place)
    assert (check.read(image).objects, scene.count) == (count, count)


def test_survives_blur_and_noise():
    rng = np.random.default_rng(0)
    scene, image = scene_and_picture(texture="dots")
    soft = image.astype(float)
    soft = (4 * soft + sum(np.roll(soft, shift, axis) for shift in (1, -1) for axis in (0, 1))) / 8
    soft += rng.normal(0, 8, soft.shape)
    assert check.read(np.clip(soft, 0, 255).astype(np.uint8)).correct(scene)


def test_an_enlarged_picture_has_the_composition_but_not_the_detail():
    """At twice the side the picture must not simply be the small one enlarged."""
    scene, image = scene_and_picture()
    scores = check.read(image.repeat(2, 0).repeat(2, 1)).scores(scene)
    assert scores["composition"]
    assert not scores["texture"]
    assert not scores["ground"]


def test_a_tiled_picture_has_the_detail_but_not_the_composition():
    """The failure of plain rotary extrapolation: the small picture again and again."""
    scene, image = scene_and_picture()
    reading = check.read(np.tile(image, (2, 2, 1)))
    scores = reading.scores(scene)
    assert scores["detail"]
    assert reading.objects == 4
    assert (scores["shape"], scores["place"], scores["composition"]) == (True, False, False)


def test_a_soft_edge_is_no_detail():
    scene, image = scene_and_picture(texture="plain", ground="plain", side=512)
    soft = image.astype(float)
    for axis in (0, 1):
        soft = sum(np.roll(soft, shift, axis) for shift in range(-4, 5)) / 9
    reading = check.read(soft.astype(np.uint8))
    assert check.read(image).edge < 1.2
    assert reading.edge > 2.5
    assert {key for key, right in reading.scores(scene).items() if not right} == {"edges", "detail", "all"}


@pytest.mark.parametrize("defect", ["half the ground is bare", "stripes change phase"])
def test_a_texture_with_a_defect_is_wrong(defect):
    _, image = scene_and_picture(shape="square", place="centre")
    if defect.startswith("half"):
        _, bare = scene_and_picture(shape="square", place="centre", ground="plain")
        image[:128] = bare[:128]
        assert check.read(image).ground is None
    else:
        shifted = np.roll(image, 16, 0)
        image[:, :128] = shifted[:, :128]
        assert check.read(image).texture is None


def test_no_object_and_noise():
    reading = check.read(np.full((128, 128, 3), 240, np.uint8))
    assert reading == check.Reading(None, None, None, None, "white", "plain", 0, None)
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3)).astype(np.uint8)
    assert not any(check.read(noise).scores(scene)["composition"] for scene in list(grammar.scenes())[::97])


def test_an_object_of_the_dark_shade_alone_has_no_texture():
    _, image = scene_and_picture(texture="plain")
    red = (image == render.OBJECT_RGB["red"]).all(-1)
    image[red] = np.rint(np.asarray(render.OBJECT_RGB["red"]) * 0.4)
    assert check.read(image).texture is None
