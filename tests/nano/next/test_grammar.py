import numpy as np
import pytest

from sega_jax.nano.next import grammar
from sega_jax.nano.next.grammar import Scene


def test_every_wording_of_every_scene_is_read_back():
    for scene in list(grammar.scenes())[::3]:
        for template in range(len(grammar.TEMPLATES)):
            text = grammar.caption(scene, template)
            assert grammar.parse(text) == scene, text
            assert grammar.unknown_words(text) == []


def test_wordings_are_english():
    scene = Scene("cross", "orange", "stripes", "left", "blue", "lined")
    assert grammar.caption(scene, 0) == "an orange cross with stripes on the left, lined blue background"
    assert grammar.caption(scene, 2) == "a striped orange cross on the left on a lined blue background"
    pair = Scene("cross", "red", "plain", "row", "white", "plain")
    assert grammar.caption(pair, 0) == "two red crosses side by side, white background"
    assert grammar.caption(pair, 5) == "two red crosses, plain, side by side, white background"
    group = Scene("square", "green", "dots", "group", "grey", "speckled")
    assert grammar.caption(group, 0) == "three green squares with dots, speckled grey background"
    assert grammar.caption(group, 4) == "on a speckled grey background, three dotted green squares"


def test_what_the_shipped_grammar_says_means_the_same_here():
    scene = Scene("circle", "red", "stripes", "left", "blue")
    assert grammar.parse("a red circle with stripes on the left, blue background") == scene
    assert (scene.ground, scene.count) == ("plain", 1)


def test_order_decides_what_is_object_and_what_is_ground():
    text = "on a tiled green background, three checked blue triangles"
    assert grammar.parse(text) == Scene("triangle", "blue", "checks", "group", "green", "tiled")
    swapped = grammar.parse("a green circle on the left, blue background")
    assert (swapped.colour, swapped.background) == ("green", "blue")


def test_defaults_and_synonyms():
    assert grammar.parse("A red circle, gray background") == Scene("circle", "red", "plain", "centre", "grey")
    assert grammar.parse("two red circles one above the other, grey background").place == "column"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a red zebra, blue background",
        "a red circle and a blue square, white background",
        "a blue circle, blue background",
        "a red circles, white background",
        "two red circle side by side, white background",
        "two red circles, white background",
        "two red circles on the left, white background",
        "three red circles side by side, white background",
        "a red circle side by side, white background",
        "two red circles side by side one above the other, white background",
        "a lined red circle, white background",
        "a red circle on the left at the top, white background",
        "background",
    ],
)
def test_other_sentences_are_refused(text):
    assert grammar.parse(text) is None


def test_held_out_scenes_are_never_drawn_for_training():
    rng = np.random.default_rng(0)
    assert not any(grammar.held_out(grammar.sample(rng)) for _ in range(2000))
    assert all(grammar.held_out(grammar.sample(rng, unseen=True)) for _ in range(200))
    assert 0.03 < len(grammar.UNSEEN_SCENES) / len(list(grammar.scenes())) < 0.07
    for words, field in ((grammar.SHAPES, "shape"), (grammar.GROUNDS, "ground"), (grammar.PLACES, "place")):
        assert {getattr(scene, field) for scene in grammar.UNSEEN_SCENES} == set(words)


def test_impossible_scenes_are_refused():
    with pytest.raises(ValueError, match="cannot be seen"):
        Scene("circle", "blue", "plain", "left", "blue", "tiled")
    with pytest.raises(ValueError, match="'mossy' is not one of plain"):
        Scene("circle", "blue", "plain", "left", "white", "mossy")
