import numpy as np
import pytest

from sega_jax.nano import grammar
from sega_jax.nano.grammar import Scene


def test_every_wording_of_every_scene_is_read_back():
    for scene in grammar.scenes():
        for template in range(len(grammar.TEMPLATES)):
            text = grammar.caption(scene, template)
            assert grammar.parse(text) == scene, text
            assert grammar.unknown_words(text) == []


def test_wordings_are_english():
    scene = Scene("circle", "orange", "stripes", "left", "blue")
    assert grammar.caption(scene, 0) == "an orange circle with stripes on the left, blue background"
    assert grammar.caption(scene, 2) == "a striped orange circle on the left on a blue background"
    plain = Scene("cross", "red", "plain", "centre", "white")
    assert grammar.caption(plain, 0) == "a red cross in the centre, white background"


def test_order_decides_what_is_object_and_what_is_background():
    blue_on_green = grammar.parse("a blue circle on the left, green background")
    green_on_blue = grammar.parse("a green circle on the left, blue background")
    assert (blue_on_green.colour, blue_on_green.background) == ("blue", "green")
    assert (green_on_blue.colour, green_on_blue.background) == ("green", "blue")


def test_defaults_and_synonyms():
    assert grammar.parse("A red circle, gray background") == Scene("circle", "red", "plain", "centre", "grey")
    assert grammar.parse("a red circle in the middle, grey background").place == "centre"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle",
        "a red zebra, blue background",
        "a red circle and a blue square, white background",
        "a red blue circle, white background",
        "a blue circle, blue background",
        "a red circle, orange background",
        "a red circle on the left at the top, white background",
        "background",
    ],
)
def test_other_sentences_are_refused(text):
    assert grammar.parse(text) is None


def test_unknown_words_are_named_in_order():
    assert grammar.unknown_words("a shiny red zebra, blue background") == ["shiny", "zebra"]


def test_held_out_scenes_are_never_drawn_for_training():
    rng = np.random.default_rng(0)
    assert not any(grammar.held_out(grammar.sample(rng)) for _ in range(2000))
    assert all(grammar.held_out(grammar.sample(rng, unseen=True)) for _ in range(200))
    share = len(grammar.UNSEEN_SCENES) / len(list(grammar.scenes()))
    assert 0.03 < share < 0.07
    for words, field in ((grammar.SHAPES, "shape"), (grammar.TEXTURES, "texture"), (grammar.PLACES, "place")):
        assert {getattr(scene, field) for scene in grammar.UNSEEN_SCENES} == set(words)


def test_impossible_scenes_are_refused():
    with pytest.raises(ValueError, match="cannot be seen"):
        Scene("circle", "blue", "plain", "left", "blue")
    with pytest.raises(ValueError, match="'hexagon' is not one of circle"):
        Scene("hexagon", "blue", "plain", "left", "white")
