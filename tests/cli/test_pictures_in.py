"""What a picture starts from, its size, its seed and its name; and that a picture made in Python can be repeated."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as pillow

from sega_jax.media.images import Image, read_metadata
from tests.cli.helpers import PROMPT, files, nothing_is_loaded, pixels

SMALL = {"width": 64, "height": 64, "steps": 2}


def planned(run, *words):
    """Records of a dry run."""
    code, out, err = run("generate", *words, "--dry-run", "--json")
    assert code == 0, err
    return json.loads(out)["plans"]


def sizes(plans):
    return [(plan["record"]["width"], plan["record"]["height"]) for plan in plans]


@pytest.fixture
def photo():
    """A picture of two to one, bright on the left."""
    array = np.zeros((96, 192, 3), np.uint8)
    array[:, :96] = 220
    pillow.fromarray(array).save("photo.png")
    return Path("photo.png")


def test_the_size_is_the_photo_s_own(run, photo, monkeypatch):
    nothing_is_loaded(monkeypatch)
    assert sizes(planned(run, PROMPT, "--init-image", photo)) == [(192, 96)]
    pillow.open(photo).resize((187, 90)).save("odd.png")
    assert sizes(planned(run, PROMPT, "--init-image", "odd.png")) == [(192, 96)]
    code, _, err = run("generate", PROMPT, "--init-image", photo, "--size", "64", "--dry-run")
    assert (code, "init_image is 192x96, the run 64x64: another shape; give fit='crop'" in err) == (2, True)
    (plan,) = planned(run, PROMPT, "--init-image", photo, "--size", "64", "--fit", "pad")
    assert plan["record"]["fit"] == "pad"
    code, _, err = run("generate", PROMPT, "--fit", "crop", "--dry-run")
    assert (code, "fit='crop': only with an init_image" in err) == (2, True)


def test_rows_of_a_file_have_shapes_too(run, photo, monkeypatch):
    nothing_is_loaded(monkeypatch)
    rows = [{"prompt": "a", "init_image": "photo.png"}, {"prompt": "b", "init_image": "photo.png", "size": 64}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = run("generate", "--prompts", "rows.jsonl", "--dry-run")
    assert code == 2
    assert "rows.jsonl line 2: init_image is 192x96" in err
    rows[1]["fit"] = "stretch"
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert sizes(planned(run, "--prompts", "rows.jsonl")) == [(192, 96), (64, 64)]


def test_sizes_of_no_whole_tokens_are_cut(run, make):
    made = make("--size", "70x60", "--fit", "crop", "--save-latents", "kept.safetensors")
    record = made["images"][0]["record"]
    assert (record["width"], record["height"], record["fit"]) == (70, 60, "crop")
    whole = make("--size", "80x64", "--out", "whole.png")
    np.testing.assert_array_equal(pixels("out.png"), pixels("whole.png")[2:62, 5:75])
    assert whole["images"][0]["record"].get("fit") is None
    assert run("generate", "--from-image", "out.png")[0] == 0
    np.testing.assert_array_equal(pixels("out-repeat.png"), pixels("out.png"))
    assert run("decode", "kept.safetensors", "--out", "decoded.png")[0] == 0
    np.testing.assert_array_equal(pixels("decoded.png"), pixels("out.png"))


def test_a_picture_made_in_python_is_repeated(run, pipe, make, photo):
    """The records agree field by field, whichever way a picture was made."""
    made = pipe.generate(PROMPT, init_image=photo, width=64, height=32, steps=4, strength=0.5, seed=2**40, num_images=2)
    made.images[1].save("python.png")
    code, _, err = run("generate", "--from-image", "python.png")
    assert code == 0, err
    np.testing.assert_array_equal(pixels("python-repeat.png"), pixels("python.png"))
    ours, theirs = read_metadata("python.png"), read_metadata("python-repeat.png")
    assert ours == theirs
    assert ours["init_image"]["file"] == "photo.png"
    assert (ours["seed"], ours["image_index"], ours["fit"]) == (2**40, 1, "crop")
    make("--init-image", photo, "--size", "64x32", "--steps", "4", "--strength", "0.5", "--seed", 2**40,
         "--out", "typed.png")  # fmt: skip
    typed = read_metadata("typed.png")
    assert typed == {**ours, "image_index": 0}


def test_what_was_in_memory_only_is_asked_for(run, pipe, photo):
    picture = pillow.open(photo)
    pipe.generate(PROMPT, init_image=picture, strength=0.5, **{**SMALL, "height": 32}).images[0].save("python.png")
    code, _, err = run("generate", "--from-image", "python.png")
    assert code == 2
    assert "python.png was made in Python with init_image in memory, which no file holds" in err
    assert "give --init-image" in err
    code, _, err = run("generate", "--from-image", "python.png", "--init-image", photo)
    assert code == 0, err
    np.testing.assert_array_equal(pixels("python-repeat.png"), pixels("python.png"))


def test_regions_drawn_in_memory_are_asked_for(run, pipe):
    drawn = np.zeros((64, 64), bool)
    drawn[16:48, 16:48] = True
    pipe.generate(PROMPT, layout="crpa", regions=drawn, **{**SMALL, "steps": 4}).images[0].save("python.png")
    code, _, err = run("generate", "--from-image", "python.png", "--dry-run")
    assert (code, "made in Python with regions drawn as an array" in err) == (2, True)
    (plan,) = planned(run, "--from-image", "python.png", "--regions", "center:0.3")
    assert plan["record"]["regions"] == "center:0.3"


def test_records_from_before_say_nothing_of_shapes(run, make, photo):
    """They were stretched, and are again."""
    make("--init-image", photo, "--size", "64", "--fit", "stretch", "--out", "now.png")
    record = read_metadata("now.png")
    assert record.pop("fit") == "stretch"
    Image(pixels("now.png"), record).save("before.png")
    (plan,) = planned(run, "--from-image", "before.png")
    assert plan["record"]["fit"] == "stretch"
    code, _, err = run("generate", "--from-image", "before.png", "--size", "96", "--dry-run")
    assert (code, "another shape" in err) == (2, True)


def test_noise_and_embeddings_in_memory_are_recorded(pipe):
    noise = np.asarray(pipe.noise(3, 64, 64, [0, 1]))
    first = pipe.generate(PROMPT, init_latents=noise, num_images=2, decode=False, **SMALL).records
    assert [record["init_latents"]["row"] for record in first] == [0, 1]
    assert first[0]["init_latents"]["file"] is None
    other = pipe.generate(PROMPT, init_latents=noise + 1, num_images=2, decode=False, **SMALL).records
    assert first[0]["init_latents"]["sha256"] != other[0]["init_latents"]["sha256"]


def test_seeds(run, pipe, monkeypatch):
    for asked in ("random", "-1"):
        seeds = {planned(run, PROMPT, "--seed", asked)[0]["record"]["seed"] for _ in range(3)}
        assert len(seeds) == 3
    for bad, message in (("-2", "seed=-2: expected a whole number from 0 to"), (str(2**64), f"seed={2**64}")):
        code, _, err = run("generate", PROMPT, "--seed", bad)
        assert (code, message in err) == (2, True)
    drawn = pipe.generate(PROMPT, seed="random", decode=False, **SMALL)
    again = pipe.generate(PROMPT, seed=drawn.records[0]["seed"], decode=False, **SMALL)
    np.testing.assert_array_equal(drawn.latents, again.latents)


def test_seeds_and_negatives_of_each_prompt(pipe):
    """As if every prompt were asked for alone, up to the rounding of a batch."""
    prompts, seeds, avoided = ["a red circle", "a blue cross"], [7, 2**35], ["dots", ""]
    options = {"true_guidance": 2.0, "decode": False, **SMALL}
    together = pipe.generate(prompts, seed=seeds, negative_prompt=avoided, batch_size=2, **options)
    for row, (prompt, seed, negative) in enumerate(zip(prompts, seeds, avoided, strict=True)):
        alone = pipe.generate(prompt, seed=seed, negative_prompt=negative, **options)
        np.testing.assert_allclose(together.latents[row], alone.latents[0], atol=2e-4)
        said = together.records[row]
        assert (said["prompt"], said["seed"], said["negative_prompt"]) == (prompt, seed, negative)


def test_runs_that_draw_more_than_noise_keep_seeds_apart(pipe, photo):
    options = {"init_image": photo, "strength": 0.5, "decode": False, **SMALL, "height": 32}
    together = pipe.generate([PROMPT, PROMPT], seed=[1, 2], batch_size=2, **options)
    alone = pipe.generate(PROMPT, seed=2, **options)
    np.testing.assert_allclose(together.latents[1], alone.latents[0], atol=2e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": 5}, TypeError, "prompt=5: expected a string, or a list of them"),
        ({"prompt": None}, TypeError, "prompt=None"),
        ({"prompt": b"x"}, TypeError, "prompt=b'x'"),
        ({"prompt": {"a": 1}}, TypeError, "prompt="),
        ({"layout": 5}, TypeError, "layout=5: expected a name, an expression or a layout"),
        ({"vae": "best"}, ValueError, "vae='best': expected auto, plain, exact, tiled"),
        ({"embeddings": 5}, TypeError, "embeddings=5: expected a dictionary"),
        ({"embeddings": {"text": 5}}, ValueError, "embeddings: text of shape"),
        ({"embeddings": {"text": np.full((1, 4, 128), np.nan)}}, ValueError, "embeddings: text hold NaN"),
        ({"on_step": 5}, TypeError, "on_step=5: expected a function"),
        ({"on_latents": "x"}, TypeError, "on_latents='x': expected a function"),
        ({"checkpoint": 5}, TypeError, "checkpoint=5: expected a .*Checkpoint"),
        ({"decode": "no"}, TypeError, "decode='no': expected True or False"),
        ({"ladder": [64, 128], "width": None, "height": None}, TypeError, "ladder=.*expected text such as"),
        ({"init_latents": np.zeros((1, 8, 8, 16), complex)}, TypeError, "init_latents of dtype complex128"),
        ({"prompt": ["a", 5]}, TypeError, "prompt=5: expected a string"),
        ({"prompt": []}, ValueError, "expected at least one prompt"),
        ({"negative_prompt": 5}, TypeError, "negative_prompt=5: expected a string"),
        ({"negative_prompt": ["a", "b"]}, ValueError, "negative_prompt: 2 values for 1 prompt"),
        ({"prompt": ["a", "b"], "negative_prompt": ["a", None]}, ValueError, "negative_prompt: given for some"),
        ({"width": "512"}, TypeError, "width='512'"),
        ({"height": 64.0}, TypeError, "height=64.0"),
        ({"steps": True}, TypeError, "steps=True"),
        ({"steps": "3"}, TypeError, "steps='3'"),
        ({"seed": True}, TypeError, "seed=True"),
        ({"seed": 1.5}, TypeError, "seed=1.5"),
        ({"seed": [1, True]}, ValueError, "seed: 2 values for 1 prompt"),
        ({"num_images": "2"}, TypeError, "num_images='2'"),
        ({"image_indices": 3}, TypeError, "image_indices=3: expected a list of them"),
        ({"image_indices": [True]}, TypeError, "image_indices=True"),
        ({"image_indices": [-1]}, ValueError, "image_indices=-1"),
        ({"image_indices": ["0"]}, TypeError, "image_indices='0'"),
        ({"image_indices": []}, ValueError, "image_indices=\\[\\]"),
        ({"batch_size": True}, TypeError, "batch_size=True"),
        ({"strength": "0.5", "init_image": "x.png"}, (TypeError, OSError), "strength='0.5'|x.png: no such"),
        ({"strength": 0.5}, ValueError, "strength=0.5: only with init_image"),
        ({"true_guidance": "3", "negative_prompt": ""}, TypeError, "true_guidance='3'"),
        ({"init_latents": np.full((1, 8, 8, 16), np.nan, np.float32)}, ValueError, "init_latents hold NaN"),
        ({"init_image": np.full((64, 64, 3), np.nan)}, ValueError, "init_image holds NaN"),
    ],
)
def test_arguments_of_python_are_named(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        pipe.generate(**{"prompt": PROMPT, **SMALL, **arguments})


def test_numpy_arguments_are_the_same_request(pipe):
    typed = {"width": np.int64(64), "height": np.uint16(64), "steps": np.int32(2), "num_images": np.int64(1),
             "seed": np.uint64(3), "batch_size": np.int64(1)}  # fmt: skip
    got = pipe.generate(PROMPT, decode=False, **typed)
    expected = pipe.generate(PROMPT, decode=False, seed=3, **SMALL)
    np.testing.assert_array_equal(got.latents, expected.latents)
    assert json.dumps(got.records) == json.dumps(expected.records)


def test_a_row_s_own_name_is_kept(run, monkeypatch):
    nothing_is_loaded(monkeypatch)
    rows = [{"prompt": "a"}, {"prompt": "b", "out": "r1.png"}, {"prompt": "c", "out": "r2.png", "num_images": 2},
            {"prompt": "d", "out": "r3.png", "save_latents": "r3.safetensors"}]  # fmt: skip
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plans = planned(run, "--prompts", "rows.jsonl")
    assert [plan["out"] for plan in plans] == ["out-000.png", "r1.png", "r2-000.png", "r2-001.png", "r3.png"]
    rows[3]["out"] = "r1.png"
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, err = run("generate", "--prompts", "rows.jsonl", "--dry-run")
    assert (code, "--out gives r1.png to more than one picture" in err) == (2, True)


def test_a_cut_prompt_is_quoted_by_a_line_at_most(pipe, caplog):
    pipe.encode(["a red circle\n" * 300 + " ".join(f"word{i}" for i in range(300))])
    lines = [record.getMessage() for record in caplog.records]
    assert any("the prompt is cut" in line for line in lines)
    assert any("has never seen" in line for line in lines)
    assert all(len(line) < 160 and "\n" not in line for line in lines)


def test_nothing_is_written_by_a_dry_run(run, photo):
    planned(run, PROMPT, "--init-image", photo)
    assert files() == ["photo.png"]
