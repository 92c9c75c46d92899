import numpy as np
import pytest

from sega_jax.nano.next import accuracy, grammar, render


def test_truth_scores_one_and_a_wrong_colour_is_counted():
    def truth(prompts, first):
        return [render.render(grammar.parse(text), 128, 128) for text in prompts]

    right = accuracy.scores(truth, 24, batch=7)
    assert {len(values) for values in right.values()} == {24}
    assert all(all(values) for values in right.values())

    def always_red_circles(prompts, first):
        scene = grammar.parse("a red circle in the centre, lined white background")
        return [render.render(scene, 128, 128) for _ in prompts]

    cases = accuracy.unseen_prompts(24)
    found = {name: np.mean(values) for name, values in accuracy.scores(always_red_circles, 24).items()}
    assert found["colour"] == pytest.approx(sum(scene.colour == "red" for scene, _ in cases) / 24)
    assert found["ground"] == pytest.approx(sum(scene.ground == "lined" for scene, _ in cases) / 24)
    assert found["composition"] < 0.2


def test_prompts_are_held_out_and_fixed():
    cases = accuracy.unseen_prompts(30, seed=3)
    assert all(grammar.held_out(scene) and grammar.parse(text) == scene for scene, text in cases)
    assert cases == accuracy.unseen_prompts(30, seed=3)
