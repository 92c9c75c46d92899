"""Rows of prompts, names of files, and what a second run leaves alone."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from sega_jax.cli import outputs
from sega_jax.media.images import read_metadata
from sega_jax.sampling.denoise import predict
from tests.cli.helpers import PROMPT, QUICK, nothing_is_loaded, pixels

ROWS = [
    {"prompt": "a red circle", "seed": 1},
    {"prompt": "a blue square", "size": "96x64"},
    {"prompt": "a green circle", "num_images": 2},
    {"prompt": "a red square", "size": "96x64", "seed": 2},
]


def write_rows(rows):
    Path("rows.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))


def test_rows_compile_once_per_class_and_keep_their_order(run, make):
    write_rows(ROWS)
    predict.clear_cache()
    result = make("--prompts", "rows.jsonl", prompt=())
    assert predict._cache_size() == result["classes"] == 2
    assert [image["path"] for image in result["images"]] == [f"out-00{i}.png" for i in range(5)]
    prompts = [read_metadata(image["path"])["prompt"] for image in result["images"]]
    assert prompts == ["a red circle", "a blue square", "a green circle", "a green circle", "a red square"]
    shapes = [pixels(image["path"]).shape[:2] for image in result["images"]]
    assert shapes == [(64, 64), (64, 96), (64, 64), (64, 64), (64, 96)]
    make("--out", "alone.png", "--seed", "2", "--size", "96x64", prompt=["a red square"])
    np.testing.assert_array_equal(pixels("out-004.png"), pixels("alone.png"))
    assert predict._cache_size() == 2


def test_batches_are_filled_not_recompiled(make):
    write_rows([{"prompt": PROMPT, "seed": seed} for seed in range(3)])
    predict.clear_cache()
    make("--prompts", "rows.jsonl", "--batch-size", "2", "--out", "{row}.png", prompt=())
    assert predict._cache_size() == 1
    make("--seed", "2", "--out", "alone.png")
    assert np.abs(pixels("2.png").astype(int) - pixels("alone.png")).max() <= 1
    assert read_metadata("2.png")["batch_size"] == 2


def test_a_second_run_makes_what_is_missing(run, model, monkeypatch):
    write_rows(ROWS)
    words = ("generate", "--prompts", "rows.jsonl", *QUICK, "--model", model, "--json")
    words += ("--out", "{row}-{index}-{prompt_slug}.png")
    first = json.loads(run(*words)[1])
    missing = "2-1-a-green-circle.png"
    before = Path(missing).read_bytes()
    Path(missing).unlink()
    stamps = {
        image["path"]: os.stat(image["path"]).st_mtime_ns for image in first["images"] if image["path"] != missing
    }
    code, out, err = run(*words)
    assert code == 0
    assert [image["done"] for image in json.loads(out)["images"]] == ["skipped"] * 3 + ["made", "skipped"]
    assert err.count("exists with this very record, skipped") == 4
    assert {path: os.stat(path).st_mtime_ns for path in stamps} == stamps
    assert Path(missing).read_bytes() == before
    nothing_is_loaded(monkeypatch)  # there is nothing left to do
    assert run(*words)[0] == 0


def test_another_picture_is_not_overwritten(run, make, model):
    make("--seed", "1")
    before = Path("out.png").read_bytes()
    code, _, err = run("generate", PROMPT, *QUICK, "--model", model, "--seed", "2")
    assert code == 1
    assert "out.png exists and was made differently (seed)" in err
    assert Path("out.png").read_bytes() == before
    make("--seed", "2", "--overwrite")
    assert read_metadata("out.png")["seed"] == 2
    Path("out.png").write_bytes(b"holiday")
    code, _, err = run("generate", PROMPT, *QUICK, "--model", model)
    assert code == 1
    assert "out.png exists and is not this picture" in err
    assert Path("out.png").read_bytes() == b"holiday"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "sise": 3}', "rows.jsonl line 3: unknown keys sise; known: prompt, negative_prompt, size"),
        ('{"prompt": "a", "steps": "3"}', "rows.jsonl line 3: steps='3': expected int"),
        ('{"prompt": "a", "steps": true}', "rows.jsonl line 3: steps=True: expected int"),
        ('{"prompt": "a", "steps": 0}', "rows.jsonl line 3: steps=0: expected a positive whole number"),
        ('{"prompt": "a", "size": 65}', "rows.jsonl line 3: height=65: must be a positive multiple of 16"),
        ('{"prompt": "a"', "rows.jsonl line 3: not valid JSON"),
        ("[1]", "rows.jsonl line 3: expected an object"),
        ("{}", "rows.jsonl line 3: no prompt"),
    ],
)
def test_bad_rows(run, monkeypatch, line, words):
    nothing_is_loaded(monkeypatch)
    Path("rows.jsonl").write_text(f'{{"prompt": "fine"}}\n\n{line}\n')
    code, _, err = run("generate", "--prompts", "rows.jsonl")
    assert code == 2
    assert words in err


def test_names():
    values = {
        "seed": 3,
        "index": 1,
        "row": 12,
        "width": 64,
        "height": 32,
        "prompt_slug": outputs.slug("Ein Ü, ein 'X'!"),
    }
    assert str(outputs.expand("{row:04d}-{prompt_slug}.png", 5, values)) == "0012-ein-u-ein-x.png"
    assert str(outputs.expand("a/b.png", 5, values)) == "a/b-005.png"
    assert str(outputs.expand("a/b.png", None, values)) == "a/b.png"
    assert outputs.slug("☃") == "untitled"
    assert len(outputs.slug("word " * 99)) <= 48
