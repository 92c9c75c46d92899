"""The comparison on pictures whose content is known, with a pipeline that renders instead of denoising."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from sega_jax.evaluation import compare
from sega_jax.nano import grammar, render
from sega_jax.nano.grammar import Scene

CALLS = []


class Renderer:
    """Draws what the prompt says; under ``none`` it draws a second object on the left."""

    dtype = "float32"

    def noise(self, seed, height, width):
        return np.full((1, height // 8, width // 8, 16), seed, np.float32)

    def generate(self, prompts, *, width, height, steps, positional, batch_size, init_latents):
        CALLS.append((positional, width, [int(z[0, 0, 0]) for z in init_latents]))
        images = []
        for text, noise in zip(prompts, init_latents, strict=True):
            scene = grammar.parse(text)
            rng = np.random.default_rng(int(noise[0, 0, 0]))
            picture = render.render(scene, height, width, rng)
            if positional == "none":
                other = render.render(
                    Scene(scene.shape, scene.colour, "plain", "left", scene.background), height, width
                )
                picture = np.where(np.arange(width)[None, :, None] < width // 2, other, picture)
            images.append(SimpleNamespace(array=picture))
        return SimpleNamespace(images=images)


def test_rows_are_kept_and_truth_is_found(tmp_path):
    CALLS.clear()
    path, lines = tmp_path / "table.json", []
    options = {"methods": ("none", "pi"), "sides": (128,), "count": 10, "steps": 4, "batch": 4, "report": lines.append}
    table = compare.run(Renderer(), path, **options)
    assert [call[2] for call in CALLS[:3]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    good, bad = table["rows"]["128/pi"], table["rows"]["128/none"]
    assert np.mean(good["values"]["all"]) >= 0.9
    assert sum(good["values"]["repetitions"]) == 0
    assert np.mean(bad["values"]["all"]) < 0.5
    assert np.mean(bad["values"]["repetitions"]) >= 0.2
    assert good["distance"]["ratio"] < bad["distance"]["ratio"]
    assert good["distance"]["ratio"] == pytest.approx(1, abs=0.35)
    count = len(CALLS)
    assert compare.run(Renderer(), path, **options) == json.loads(path.read_text()) == table
    assert len(CALLS) == count
    with pytest.raises(ValueError, match="4 steps, not 5"):
        compare.run(Renderer(), path, **{**options, "steps": 5})
    text = compare.summarize(table)
    assert text.count("\n") == 3
    assert "| 128 | `pi` |" in text


def test_repetitions_of_one_and_of_two_objects():
    for texture in grammar.TEXTURES:
        one = render.render(Scene("cross", "red", texture, "left", "white"), 192, 192)
        assert compare.repetitions(one) == 0, texture
        assert compare.repetitions(np.concatenate([one, one], 1)) == 1, texture
