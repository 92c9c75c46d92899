import pytest

from sega_jax.nano import accuracy, grammar, render


def test_truth_scores_one_and_a_wrong_colour_is_counted():
    def truth(prompts, first):
        return [render.render(grammar.parse(text), 128, 128) for text in prompts]

    assert set(accuracy.accuracy(truth, 24, batch=7).values()) == {1.0}

    def always_red_circles(prompts, first):
        scene = grammar.parse("a red circle in the centre, white background")
        return [render.render(scene, 128, 128) for _ in prompts]

    cases = accuracy.unseen_prompts(24)
    scores = accuracy.accuracy(always_red_circles, 24)
    assert scores["colour"] == pytest.approx(sum(scene.colour == "red" for scene, _ in cases) / 24)
    assert scores["shape"] == pytest.approx(sum(scene.shape == "circle" for scene, _ in cases) / 24)
    assert scores["all"] < 0.2


def test_prompts_are_held_out_and_fixed():
    cases = accuracy.unseen_prompts(30, seed=3)
    assert all(grammar.held_out(scene) and grammar.parse(text) == scene for scene, text in cases)
    assert cases == accuracy.unseen_prompts(30, seed=3)
