"""Pictures, latents and rows of prompts are data: they name no code, no place to write, and no host to ask."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from safetensors.numpy import load_file, save_file

from sega_jax.media.images import Image, read_metadata
from sega_jax.media.latents import load_latents, save_latents
from sega_jax.sampling.regions import Drawn
from sega_jax.weights.hub import resolve
from tests.cli.helpers import PROMPT, QUICK, files, nothing_is_loaded, pixels

ROOT = Path(__file__).parents[2]
CODE = "import pathlib\npathlib.Path('ran').write_text('')\n\n\ndef method(grid, signals):\n    return None\n"


def picture(path="out.png", **changes):
    """A picture whose record says what an attacker likes."""
    record = {
        "prompt": PROMPT, "negative_prompt": None, "width": 64, "height": 64, "steps": 2, "guidance": None,
        "true_guidance": None, "seed": 0, "image_index": 0, "positional": "none()", "layout": "dense", "mu": "clamp",
        "strength": None, "dtype": "float32", "backend": "auto", "model": "nano", "revision": None, "transformer": None,
        "init_image": None, "init_latents": None, "embeddings": None, "vae": "auto", "batch_size": 1,
    } | changes  # fmt: skip
    return Image(np.zeros((64, 64, 3), np.uint8), record).save(path)


NAMES = [
    {"positional": "evil:method"},
    {"positional": "os:abort"},
    {"layout": "crpa", "regions": "auto:0.3:evil:method"},
    {"layout": "scalediff", "ladder": "64, 128 positional=evil:method"},
    {"positional": "none()", "layout": "scalediff", "ladder": "64 positional=os:abort, 128"},
]


@pytest.mark.parametrize("names", NAMES, ids=range(len(NAMES)))
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_record_does_not_name_code(run, monkeypatch, names, dry):
    nothing_is_loaded(monkeypatch)
    Path("evil.py").write_text(CODE)
    picture(**names)
    code, _, err = run("generate", "--from-image", "out.png", *dry)
    assert (code, "names code, and a file may not" in err) == (2, True), err
    assert "out.png" in err
    assert files() == ["evil.py", "out.png"]


@pytest.mark.parametrize("names", NAMES, ids=range(len(NAMES)))
def test_a_row_of_prompts_does_not_name_code(run, monkeypatch, names):
    nothing_is_loaded(monkeypatch)
    Path("evil.py").write_text(CODE)
    Path("rows.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": "b", **names}) + "\n")
    code, _, err = run("generate", "--prompts", "rows.jsonl", "--dry-run")
    assert (code, "rows.jsonl line 2: " in err, "names code" in err) == (2, True, True), err
    assert not Path("ran").exists()


METHOD = (
    "from sega_jax import positional as pe\nfrom pathlib import Path\nPath('ran').write_text('')\nplain = pe.ntk()\n"
)


def test_what_is_typed_or_allowed_is_imported(run, monkeypatch):
    Path("typed_method.py").write_text(METHOD)
    monkeypatch.delitem(sys.modules, "typed_method", raising=False)
    before = list(sys.path)
    code, _, err = run("generate", PROMPT, *QUICK, "--positional", "typed_method:plain", "--dry-run")
    assert (code, sys.path) == (0, before), err
    assert Path("ran").exists()
    picture(positional="typed_method:plain")
    assert run("generate", "--from-image", "out.png", "--dry-run")[0] == 2
    assert run("generate", "--from-image", "out.png", "--dry-run", "--positional", "pi")[0] == 0
    assert run("generate", "--from-image", "out.png", "--dry-run", "--trust-code")[0] == 0
    del sys.modules["typed_method"]


def test_the_current_folder_is_not_importable_during_the_run(tmp_path):
    """An entry point of JAX's plugins in the current folder would be run when the first device is asked for."""
    info = tmp_path / "evil-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[jax_plugins]\nevil = evil_plugin\n")
    (tmp_path / "evil_plugin.py").write_text(CODE + "def initialize():\n    pass\n")
    for module in ("tyro", "numpy", "safetensors"):
        (tmp_path / f"{module}.py").write_text(CODE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SEGA_JAX_CACHE": "off"}
    command = [sys.executable, "-m", "sega_jax.cli", "generate", PROMPT, *QUICK, "--steps", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "out.png").exists()


def test_nothing_of_the_current_folder_runs_in_the_converters(tmp_path):
    for module in ("argparse", "numpy", "safetensors"):
        (tmp_path / f"{module}.py").write_text(CODE)
    command = [sys.executable, "-m", "converters", "inspect", str(resolve("nano"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_record_does_not_say_where_files_go(run, tmp_path):
    picture("in.png", out=str(tmp_path / "owned.png"), save_latents=str(tmp_path / "owned.safetensors"))
    code, out, err = run("generate", "--from-image", "in.png", "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["plans"][0]["out"] == "in-repeat.png"
    assert run("generate", "--from-image", "in.png", "--steps", "1")[0] == 0
    assert files() == ["in-repeat.png", "in.png"]
    assert not list(tmp_path.glob("owned*"))


@pytest.fixture
def no_network(monkeypatch):
    from huggingface_hub import constants

    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_a_record_does_not_reach_the_hub(run, no_network, tmp_path):
    picture(model="somebody/tracker", revision="abc")
    for dry in (["--dry-run"], []):
        code, _, err = run("generate", "--from-image", "out.png", *dry, "--cache-dir", tmp_path)
        assert (code, "to fetch it, give --model somebody/tracker" in err) == (1, True), err
    save_latents("z.safetensors", np.zeros((1, 8, 8, 16), np.float32), {"model": "somebody/tracker", "width": 64})
    code, _, err = run("decode", "z.safetensors", "--cache-dir", tmp_path)
    assert (code, "to fetch it, give --model somebody/tracker" in err) == (1, True), err
    picture("up.png", model="somebody/tracker", revision="../../../etc")
    code, _, err = run("generate", "--from-image", "up.png", "--dry-run", "--cache-dir", tmp_path)
    assert (code, "is no branch, tag or commit" in err) == (2, True), err


@pytest.mark.parametrize(
    "changes",
    [
        {"width": "64"}, {"steps": 2.5}, {"prompt": ["a"]}, {"seed": {}}, {"mu": []}, {"backend": 3},
        {"dtype": "object"}, {"vae": "evil"}, {"weights": 4}, {"loras": {"file": "x"}}, {"loras": [3]},
        {"loras": [{"file": "x", "weight": "1", "sha256": "0"}]}, {"loras": [{"file": "x"}]},
        {"init_image": "out.png"}, {"init_image": {"file": 3}}, {"embeddings": {"file": "x", "row": -1}},
        {"init_latents": {"file": "x", "mode": "w"}}, {"image_index": True}, {"batch_size": 0}, {"model": 7},
        {"indices": [1, 2], "width": 1e9}, {"positional": "x" * 3_000_000},
    ],
    ids=range(22),
)  # fmt: skip
def test_records_of_other_types_are_refused(run, monkeypatch, changes):
    nothing_is_loaded(monkeypatch)
    picture(**changes)
    code, _, err = run("generate", "--from-image", "out.png", "--dry-run")
    assert code == 2, err
    assert len(err) < 2_000
    assert "Error" not in err


def test_devices_and_pipes_named_by_a_record_are_not_read(run, monkeypatch):
    nothing_is_loaded(monkeypatch)
    os.mkfifo("pipe")
    digest = "0" * 64
    for changes in (
        {"init_image": {"file": "/dev/zero", "row": None, "sha256": digest}, "strength": 0.5},
        {"init_latents": {"file": "pipe", "row": 0, "sha256": digest}},
        {"loras": [{"file": "/dev/zero", "weight": 1.0, "sha256": digest}]},
        {"layout": "crpa", "regions": "mask:pipe"},
        {"layout": "crpa", "regions": "mask:/dev/zero"},
    ):
        picture(**changes)
        code, _, err = run("generate", "--from-image", "out.png", "--dry-run")
        assert code == 2, err


def test_a_name_that_latents_give_is_not_overwritten(run, make):
    make("--save-latents", "z.safetensors")
    tensors = load_file("z.safetensors")
    _, record = load_latents("z.safetensors")
    Path("holiday.png").write_bytes(b"mine")
    record["output"] = "holiday.png"
    save_file(tensors, "z.safetensors", metadata={"sega_jax": json.dumps(record)})
    code, _, err = run("decode", "z.safetensors", "--overwrite")
    assert (code, "holiday.png exists; give --out" in err) == (1, True), err
    assert Path("holiday.png").read_bytes() == b"mine"


# -- bounds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "2147483648"], "steps=2147483648: expected at most 10000"),
        (["--steps", "2147483648", "--layout", "scalediff", "--ladder", "64,128"], "expected at most 10000"),
        (["--layout", "scalediff", "--ladder", "64 steps=2147483648,128"], "expected a number from 1 to 10000"),
        (["--num-images", "2000000"], "num_images=2000000: expected at most 10000"),
        (["--out", "{seed:>9999999999}.png"], "cannot be read as a pattern"),
        (["--out", "{prompt_slug:{width}}.png"], "cannot be read as a pattern"),
        (["--out", "{seed:9999}.png"], "cannot be read as a pattern"),
        (["--out", "{seed!r}.png"], "cannot be read as a pattern"),
        (["--size", "1048576"], "expected at most 65536 pixels"),
        (["--size", "9" * 5000], "expected a side in pixels"),
        (["--mu", "1000"], "mu=1000: expected a number from -10 to 10"),
        (["--mu", "-1000"], "mu=-1000: expected a number from -10 to 10"),
        (["--positional", "(" * 3000], "expected at most 2000"),
    ],
    ids=range(13),
)  # fmt: skip
def test_amounts_have_bounds(run, monkeypatch, words, message):
    nothing_is_loaded(monkeypatch)
    code, _, err = run("generate", PROMPT, "--dry-run", *words)
    assert (code, message in err) == (2, True), err


def test_the_pictures_of_a_run_are_counted(run, monkeypatch):
    nothing_is_loaded(monkeypatch)
    Path("rows.jsonl").write_text('{"prompt": "a", "num_images": 10000}\n' * 11)
    code, _, err = run("generate", "--prompts", "rows.jsonl", "--dry-run")
    assert (code, "110000 pictures: expected at most 100000 in one run" in err) == (2, True), err


def test_only_pictures_that_are_meant_are_decoded(tmp_path):
    from sega_jax.media.images import load_image, load_mask

    Pillow.new("RGB", (8, 8)).save(tmp_path / "a.tiff")
    (tmp_path / "a.tiff").rename(tmp_path / "a.png")
    Pillow.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    for load in (load_image, load_mask, Drawn.read):
        with pytest.raises(ValueError, match="expected PNG, JPEG or WebP"):
            load(str(tmp_path / "a.png"))
        with pytest.raises(ValueError, match=r"at most 100 million|too large to open"):
            load(str(tmp_path / "bomb.png"))


def test_cells_of_a_mask_by_hand():
    """Against every pixel looked at one by one."""
    random = np.random.default_rng(0)
    for height, width, rows, columns in ((7, 5, 3, 4), (3, 2, 8, 8), (16, 16, 4, 4), (1, 9, 5, 2)):
        mask = random.random((height, width)) < 0.2
        expected = np.zeros((rows, columns), bool)
        for row in range(rows):
            for column in range(columns):
                for y in range(height):
                    for x in range(width):
                        touches = y < (row + 1) * height / rows and y + 1 > row * height / rows
                        touches &= x < (column + 1) * width / columns and x + 1 > column * width / columns
                        expected[row, column] |= mask[y, x] and touches
        np.testing.assert_array_equal(Drawn.of(mask).cells(rows, columns, 16), expected)


def test_the_header_of_a_lora_does_not_name_code(run, monkeypatch, tmp_path):
    nothing_is_loaded(monkeypatch)
    Path("evil.py").write_text(CODE)
    settings = json.dumps({"layout": "scale-dit", "positional": "evil:method", "adapt": "flux1"})
    save_file({"x.lora_A.weight": np.zeros((1, 1), np.float32)}, "l.safetensors", metadata={"scale-dit": settings})
    code, _, err = run(
        "generate", PROMPT, "--size", "128", "--layout", "scale-dit", "--lora", "l.safetensors", "--dry-run"
    )
    assert (code, "names code, and a file may not" in err) == (2, True), err
    assert not Path("ran").exists()


def test_pictures_that_records_repeat_are_unchanged(run, make):
    """What is refused above does not stand in the way of the real thing."""
    make("--seed", "3", "--layout", "crpa", "--regions", "center:0.3")
    assert run("generate", "--from-image", "out.png", "--out", "again.png")[0] == 0
    np.testing.assert_array_equal(pixels("again.png"), pixels("out.png"))
    assert read_metadata("again.png")["regions"] == "center:0.3"
