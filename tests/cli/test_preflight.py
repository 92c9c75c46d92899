"""What can be known is refused before the first step, and nothing the user had is lost."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from safetensors.numpy import load_file, save_file

from sega_jax.cli.generation import engine
from sega_jax.media.images import read_metadata
from sega_jax.media.latents import load_latents
from tests.cli.helpers import PROMPT, QUICK, files, nothing_is_loaded

ROOT = Path(__file__).parents[2]


def rows(*values):
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    return ("--prompts", "rows.jsonl")


@pytest.fixture
def early(run, monkeypatch):
    """Runs a command twice, planned and for real, neither of which may load anything; gives the last line."""
    nothing_is_loaded(monkeypatch)

    def early(*words):
        before = files()
        lines = []
        for dry in (("--dry-run",), ()):
            code, out, err = run("generate", *QUICK, *words, *dry)
            assert (code in (1, 2), out) == (True, ""), err
            assert "Traceback" not in err
            lines.append(err.splitlines()[-1])
        assert files() == before
        assert lines[0] == lines[1]
        return lines[0]

    return early


# -- targets -------------------------------------------------------------------------------------------------------


def test_targets_that_cannot_be_written(early):
    Path("folder.png").mkdir()
    assert "folder.png: is a folder; give a file name" in early(PROMPT, "--out", "folder.png")
    assert "folder.png: is a folder" in early(PROMPT, "--out", "folder.png", "--overwrite")
    Path("old.png").write_bytes(b"x")
    Path("old.png").chmod(0o444)
    assert "old.png: is read-only" in early(PROMPT, "--out", "old.png", "--overwrite")
    Path("closed").mkdir(mode=0o555)
    assert "closed: no file can be written here" in early(PROMPT, "--out", "closed/a.png")
    assert "/proc: no file can be written here" in early(PROMPT, "--out", "/proc/a.png")
    assert "no file can be written here" in early(PROMPT, "--save-latents", "/proc/a.safetensors")
    os.mkfifo("pipe.png")
    assert "is no file but a device, pipe or socket" in early(PROMPT, "--out", "pipe.png", "--overwrite")
    assert "cannot be a file's name" in early(PROMPT, "--out", "x" * 300 + ".png")
    assert "is not UTF-8" in early(PROMPT, "--out", os.fsdecode(b"caf\xe9.png"))
    assert "control characters" in early(PROMPT, "--out", "a\nb.png")
    Path("out.state").write_text("mine")
    assert "out.state is in the way" in early(PROMPT, "--checkpoint-every", "1")


def test_a_file_has_one_owner(early):
    shared = rows({"prompt": "a", "out": "{index}.png"}, {"prompt": "b", "out": "../place/{index}.png"})
    assert "is a file of another picture too" in early(*shared)
    regions = ("--layout", "crpa", "--regions", "center:0.3")
    both = rows({"prompt": "a", "out": "{index}.png"}, {"prompt": "b", "out": "{index}.regions.png"})
    assert "a file of another picture too" in early(*both, *regions)
    kept = {"prompt": "a", "out": "{index}.png", "save_latents": "{index}b.latents.safetensors"}
    assert "to more than one picture" in early(*rows(kept, {"prompt": "b", "out": "{index}b.png"}))


def test_pictures_that_a_format_cannot_hold(early):
    assert "WEBP sides are at most 16383 px" in early(PROMPT, "--size", "16384x64", "--out", "a.webp")
    long = "a red circle " * 6_000
    assert "JPEG holds 65000" in early(long, "--out", "a.jpg")
    assert "rows.jsonl line 2: " in early(*rows({"prompt": "a"}, {"prompt": long}), "--out", "{row}.jpg")


# -- rows ----------------------------------------------------------------------------------------------------------


def test_a_bad_row_is_found_before_the_others_are_made(early):
    Pillow.new("RGBA", (64, 64), (9, 9, 9, 100)).save("glass.png")
    Path("text.png").write_text("no picture")
    Pillow.effect_noise((64, 64), 90).convert("RGB").save("cut.png")
    Path("cut.png").write_bytes(Path("cut.png").read_bytes()[:2000])
    latents = np.zeros((1, 16, 8, 8), np.float32)
    latents[0, 3, 2, 1] = np.nan
    save_file({"latents": latents}, "nan.safetensors")
    bad = [
        ({"init_image": "glass.png"}, "has transparent pixels"),
        ({"init_image": "text.png"}, "not an image that can be read"),
        ({"init_image": "cut.png"}, "cannot be read as an image"),
        ({"init_image": "nowhere.png"}, "no such file"),
        ({"init_latents": "nan.safetensors"}, "NaN or infinity"),
        ({"prompt": "half \ud83d"}, "half of a character"),
        ({"negative_prompt": "\udc00"}, "half of a character"),
        ({"mu": 1000}, "mu=1000"),
        ({"mu": -1000.0}, "mu=-1000"),
        ({"guidance": 10**400}, "rows.jsonl line 2"),
        ({"steps": 2**31}, "steps=2147483648"),
        ({"seed": 2**80}, "seed="),
        ({"out": "/proc/nowhere/a.png"}, "no file can be written here"),
        ({"layout": "crpa", "regions": "mask:text.png"}, "cannot be read as a picture"),
    ]
    for change, message in bad:
        line = early(*rows({"prompt": "a", "seed": 1}, {"prompt": "b", **change}))
        assert message in line, line
    Path("rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}\n')
    assert "'prompt' is given twice" in early("--prompts", "rows.jsonl")


def test_embeddings_without_a_number(early):
    from sega_jax.weights.hub import resolve

    config = json.loads((resolve("nano") / "transformer" / "config.json").read_text())
    text = np.zeros((1, 4, config["joint_attention_dim"]), np.float32)
    pooled = np.full((1, config["pooled_projection_dim"]), np.inf, np.float32)
    save_file({"text": text, "pooled": pooled}, "e.safetensors")
    assert "pooled of row 0 is empty, or holds NaN or infinity" in early("--embeddings", "e.safetensors")
    save_file({"text": text[:, :0], "pooled": np.zeros_like(pooled)}, "e.safetensors")
    assert "text of row 0 is empty" in early("--embeddings", "e.safetensors")


# -- what the user had ---------------------------------------------------------------------------------------------


def test_files_beside_the_state_stay(make):
    Path("out.state").mkdir()
    Path("out.state/thesis.tex").write_text("years of work")
    make("--checkpoint-every", "1")
    assert Path("out.state/thesis.tex").read_text() == "years of work"
    assert [entry.name for entry in Path("out.state").iterdir()] == ["thesis.tex"]


def test_a_picture_of_regions_is_not_replaced_unseen(run, make, model, monkeypatch):
    words = ("--layout", "crpa", "--regions", "center:0.3")
    Path("out.regions.png").write_bytes(b"mine")
    with monkeypatch.context() as patched:
        nothing_is_loaded(patched)
        code, _, err = run("generate", PROMPT, *QUICK, "--model", model, *words)
    assert (code, "out.regions.png exists and is not of this picture" in err) == (1, True), err
    assert Path("out.regions.png").read_bytes() == b"mine"
    make(*words, "--overwrite")
    assert read_metadata("out.regions.png")["regions"] == "center:0.3"
    Path("out.png").unlink()
    make(*words)  # its own is no obstacle
    Path("out.png").unlink()
    code, _, err = run("generate", PROMPT, *QUICK, "--model", model, *words, "--seed", "4")
    assert (code, "shows the regions of another picture (seed)" in err) == (1, True), err


def test_latents_that_were_asked_for_are_kept_by_a_run_that_does_not_ask(make):
    make("--save-latents", "out.latents.safetensors")
    before = Path("out.latents.safetensors").read_bytes()
    assert make()["images"][0]["done"] == "skipped"
    assert Path("out.latents.safetensors").read_bytes() == before
    Path("out.png").unlink()
    assert make()["images"][0]["done"] == "decoded"
    assert Path("out.latents.safetensors").read_bytes() == before


# -- what killed runs leave ----------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from sega_jax.cli.generation import engine
from sega_jax.media.images import Image
from sega_jax.sampling.resume import Checkpoint
from sega_jax import cli
count = 0
def dying(function, at):
    def call(*arguments, **options):
        global count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
where, at = sys.argv[1], int(sys.argv[2])
if where == "latents":
    engine.save_latents = dying(engine.save_latents, at)
elif where == "clear":
    Checkpoint.clear = dying(Checkpoint.clear, at)
elif where == "unlink":
    real = os.unlink
    def unlink(path, **options):
        if str(path).endswith("latents.safetensors"):
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, **options)
    os.unlink = unlink
cli.main(sys.argv[3:])
"""


def killed(*words):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SEGA_JAX_CACHE": os.environ["KEPT_CACHE"]}
    command = [sys.executable, "-c", KILLED, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture(scope="module")
def kept_cache(tmp_path_factory):
    """Compiled programs, shared by the processes that are killed."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("KEPT_CACHE", str(tmp_path_factory.mktemp("kept")))
        yield


@pytest.mark.usefixtures("kept_cache")
@pytest.mark.parametrize(
    ("where", "at", "left"),
    [
        ("latents", 2, ["out-000.latents.safetensors", "out-000.state"]),  # of two pictures one has its latents
        pytest.param(
            *("clear", 1, ["out-000.latents.safetensors", "out-000.state", "out-001.latents.safetensors"]),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("unlink", 1, ["out-000.latents.safetensors", "out-000.png", "out-001.latents.safetensors"]),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_kill_leaves_nothing_for_ever(run, make, model, where, at, left):
    words = ("generate", PROMPT, *QUICK, "--model", model, "--num-images", "2", "--batch-size", "2")
    words += ("--checkpoint-every", "1")
    killed(where, at, *words)
    assert files() == left
    assert run(*words, "--resume")[0] == 0
    assert files() == ["out-000.png", "out-001.png"]
    make("--num-images", "2", "--batch-size", "2", "--out", "whole.png")
    for index in range(2):
        assert Path(f"out-00{index}.png").read_bytes() == Path(f"whole-00{index}.png").read_bytes()


def test_a_finished_picture_needs_neither_state_nor_temporary_latents(run, make, model):
    make("--checkpoint-every", "1", "--save-latents", "z.safetensors")
    tensors = load_file("z.safetensors")
    record = load_latents("z.safetensors")[1] | {"until_decoded": True}
    Path("z.safetensors").unlink()
    save_file(tensors, "out.latents.safetensors", metadata={"sega_jax": json.dumps(record)})
    assert run("generate", PROMPT, *QUICK, "--model", model, "--dry-run")[0] == 0
    assert files() == ["out.latents.safetensors", "out.png"]
    assert run("generate", PROMPT, *QUICK, "--model", model)[0] == 0
    assert files() == ["out.png"]


def test_a_state_that_is_in_the_way_is_met_before_other_rows_are_made(run, make, model, monkeypatch):
    class Dead(BaseException):
        pass

    def die(*_args, **_kwargs):
        raise Dead

    words = ("--seed", "7", "--out", "{seed}.png", "--checkpoint-every", "1")
    with monkeypatch.context() as patched:
        patched.setattr(engine, "save_latents", die)
        with pytest.raises(Dead):
            run("generate", "b", *QUICK, "--model", model, *words)
    assert files() == ["7.state"]
    nothing_is_loaded(monkeypatch)
    words = (*rows({"prompt": "a"}, {"prompt": "b", "seed": 7}), "--out", "{seed}.png", "--checkpoint-every", "1")
    code, _, err = run("generate", *words, *QUICK, "--model", model)
    assert (code, "interrupted after step 2; go on with it by --resume" in err) == (1, True), err


INTERRUPTED = """
import signal, sys, time
from sega_jax import cli
from sega_jax.pipeline.pipeline import Pipeline
def slow(*_args, **_kwargs):
    print("decoding", flush=True)
    try:
        time.sleep(60)
    finally:
        print("tidying up", flush=True)
        time.sleep(2)
Pipeline.decode = slow
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the suite behind itself ignores it
sys.exit(cli.main())
"""


@pytest.mark.usefixtures("kept_cache")
def test_a_second_interruption_prints_no_traceback(model):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SEGA_JAX_CACHE": os.environ["KEPT_CACHE"]}
    command = [sys.executable, "-c", INTERRUPTED, "generate", PROMPT, *QUICK, "--model", model]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, **options) as process:
        assert process.stdout.readline() == "decoding\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "tidying up\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert err.splitlines()[-1] == "sega-jax: error: interrupted"
    assert "finish this picture with: sega-jax decode out.latents.safetensors" in err
