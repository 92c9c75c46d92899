"""Folders that are made, quiet runs, previews on the way, and pictures of which a part stays."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as pillow

from sega_jax.decoding.preview import LinearPreview, chart
from tests.cli.helpers import PROMPT, QUICK, files, pixels

SMALL = {"width": 64, "height": 64}


def test_folders_are_made_when_something_is_written(run, make, model):
    assert run("generate", PROMPT, *QUICK, "--model", model, "--out", "new/deep/a.png", "--dry-run")[0] == 0
    assert files() == []
    make("--out", "new/deep/a.png", "--save-latents", "kept/a.safetensors")
    assert Path("new/deep/a.png").is_file()
    assert run("decode", "kept/a.safetensors", "--out", "third/b.png")[0] == 0
    np.testing.assert_array_equal(pixels("third/b.png"), pixels("new/deep/a.png"))


def test_a_quiet_run_says_nothing_but_warnings(run, model):
    code, out, err = run("generate", PROMPT, *QUICK, "--model", model, "--quiet", "--out", "a.png")
    assert (code, out.strip()) == (0, "a.png")
    assert all(line.startswith("sega-jax: warning: ") for line in err.splitlines())
    _, _, err = run("generate", PROMPT, *QUICK, "--model", model, "--out", "b.png")
    assert "positional none() (auto)" in err


def test_a_bar_in_python(pipe, capsys):
    pipe.generate(PROMPT, steps=2, decode=False, progress=True, **SMALL)
    assert "2/2" in capsys.readouterr().err
    pipe.generate(PROMPT, steps=2, decode=False, **SMALL)
    assert capsys.readouterr().err == ""


WAYS = {
    "dense": {"steps": 4},
    "crpa": {"layout": "crpa", "regions": "center:0.3", "steps": 6},
    "ladder": {"ladder": "32,64", "width": None, "height": None, "steps": 4},
    "scale-dit": {"layout": "scale-dit(start='latents')", "steps": 4},
}


@pytest.mark.parametrize("way", WAYS)
def test_steps_tell_what_they_do(pipe, way):
    """Noisy latents lie on the line from the clean estimate, and the last step ends at the picture."""
    told = []
    result = pipe.generate(PROMPT, decode=False, on_step=told.append, seed=3, **{**SMALL, **WAYS[way]})
    assert [(step.index, step.total) for step in told] == [(i + 1, len(told)) for i in range(len(told))]
    for step in told:
        assert step.latents.shape == step.clean.shape
        assert 0 <= step.sigma < 1
        assert np.isfinite(step.clean).all()
    last = told[-1]
    assert last.sigma == 0
    np.testing.assert_array_equal(last.latents, result.latents)
    np.testing.assert_allclose(last.clean, result.latents, atol=1e-4)
    first = told[0]
    if way == "dense":  # one Euler step from the noise towards the clean estimate
        begun = np.asarray(pipe.noise(3, 64, 64))
        np.testing.assert_allclose(first.latents, first.clean + first.sigma * (begun - first.clean), atol=1e-4)


def test_a_preview_is_the_picture_made_small(pipe):
    told = []
    made = pipe.generate(PROMPT, steps=4, on_step=told.append, **SMALL).images[0]
    (shown,) = told[-1].preview()
    assert shown.array.shape == (8, 8, 3)
    small = np.asarray(pillow.fromarray(made.array).resize((8, 8), pillow.Resampling.BOX), float)
    assert np.abs(small - shown.array).mean() < 0.5 * np.abs(small - small.mean()).mean()


def test_a_preview_of_a_linear_autoencoder_is_exact():
    """Latents that are a linear mix of the colours give these colours back."""
    mix = np.random.default_rng(0).standard_normal((3, 5))

    def encode(images):
        batch, height, width, _ = images.shape
        return images.reshape(batch, height // 4, 4, width // 4, 4, 3).mean((2, 4)) @ mix + 0.3

    look = LinearPreview.fit(encode, 4)
    colours = np.random.default_rng(1).uniform(-0.9, 0.9, (1, 8, 8, 3))
    shown = look(colours @ mix + 0.3)
    np.testing.assert_allclose(shown, (colours + 1) * 127.5, atol=2)
    assert chart(4).shape == (1, 256, 256, 3)


def test_previews_of_the_command_line(run, make, model):
    make("--preview", "now.png", "--preview-every", "1", "--out", "a.png")
    assert pixels("now.png").shape == (8, 8, 3)
    make("--preview", "now.png", "--out", "b.png", "--seed", "4")  # its own preview is replaced
    pillow.new("RGB", (4, 4)).save("mine.png")
    code, _, err = run("generate", PROMPT, *QUICK, "--model", model, "--preview", "mine.png", "--out", "c.png")
    assert (code, "mine.png exists and is no preview" in err) == (1, True)
    code, _, err = run("generate", PROMPT, *QUICK, "--model", model, "--preview-every", "2")
    assert (code, "preview_every=2: only with --preview" in err) == (2, True)


@pytest.fixture
def photo():
    """A picture of noise, and a mask of its middle."""
    array = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    pillow.fromarray(array).save("photo.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[20:44, 20:40] = 255
    pillow.fromarray(mask).save("mask.png")
    return array, mask


def test_a_mask_keeps_what_is_outside(run, make, pipe, photo):
    array, mask = photo
    make("--init-image", "photo.png", "--mask", "mask.png", "--strength", "1", "--size", "64", "--steps", "3")
    made = pixels("out.png")
    np.testing.assert_array_equal(made[mask == 0], array[mask == 0])
    assert np.abs(made[mask > 0].astype(int) - array[mask > 0]).mean() > 5
    assert run("generate", "--from-image", "out.png")[0] == 0
    np.testing.assert_array_equal(pixels("out-repeat.png"), made)
    options = {"steps": 3, "strength": 1.0, **SMALL}
    for form in (mask, mask > 0, mask.astype(np.float32) / 255, pillow.open("mask.png"), "mask.png"):
        again = pipe.generate(PROMPT, init_image=array, mask=form, **options).images[0].array
        np.testing.assert_array_equal(again, made)
    everywhere = pipe.generate(PROMPT, init_image=array, mask=np.ones((64, 64), bool), decode=False, **options)
    free = pipe.generate(PROMPT, init_image=array, decode=False, **options)
    np.testing.assert_array_equal(everywhere.latents, free.latents)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": np.zeros((64, 64), bool)}, "nothing in it is white"),
        ({"mask": np.ones((32, 64), bool)}, "mask is 64x32, the picture 64x64; they must agree"),
        ({"mask": np.ones((64, 64), bool), "layout": "crpa"}, "mask with layout='crpa"),
        ({"mask": np.ones((64, 64), bool), "ladder": "64,128", "width": None, "height": None}, "mask with a ladder"),
        ({"mask": np.ones((64, 64), bool), "init_image": None}, "mask.*only with init_image"),
    ],
)
def test_masks_that_are_refused(pipe, photo, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe.generate(PROMPT, **{"init_image": photo[0], **SMALL, "steps": 2, **arguments})


def test_a_mask_is_checked_before_anything_loads(run, photo):
    code, _, err = run("generate", PROMPT, "--mask", "mask.png", "--dry-run")
    assert (code, "mask='mask.png': only with an init_image" in err) == (2, True)
    pillow.new("L", (32, 32), 255).save("small.png")
    code, _, err = run("generate", PROMPT, "--init-image", "photo.png", "--mask", "small.png", "--dry-run")
    assert (code, "mask is 32x32, the picture 64x64" in err) == (2, True)
