"""`sega-jax generate` killed and signalled between denoising and decoding."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sega_jax as sj
from sega_jax.pipeline.pipeline import Pipeline
from tests.cli.helpers import PROMPT, QUICK, files


def test_killed_while_decoding(run, make, model):
    """SIGKILL as soon as latents are on the disk; `decode` and a second `generate` both finish the picture."""
    command = [
        sys.executable,
        "-m",
        "sega_jax.cli",
        "generate",
        PROMPT,
        *QUICK,
        "--model",
        model,
        "--out",
        "killed.png",
    ]
    root = str(Path(sj.__file__).parents[1])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}, stderr=subprocess.DEVNULL)
    latents = Path("killed.latents.safetensors")
    try:
        deadline = time.monotonic() + 300
        while not latents.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert not Path("killed.png").exists()

    make("--out", "whole.png")
    assert run("decode", latents, "--out", "decoded.png")[0] == 0
    assert Path("decoded.png").read_bytes() == Path("whole.png").read_bytes()
    resumed = make("--out", "killed.png")
    assert resumed["images"][0]["done"] == "decoded"
    assert resumed["timings"]["denoise"] == 0
    assert Path("killed.png").read_bytes() == Path("whole.png").read_bytes()
    assert not latents.exists()


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals(run, model, monkeypatch, number, code, word):
    def decode(*_args, **_kwargs):
        os.kill(os.getpid(), number)
        time.sleep(5)

    if number == signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler)  # a shell that runs the suite behind itself ignores it
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "decode", decode)
        got, out, err = run("generate", PROMPT, *QUICK, "--model", model)
    assert (got, out) == (code, "")
    assert err.splitlines()[-1] == f"sega-jax: error: {word}"
    assert "finish this picture with: sega-jax decode out.latents.safetensors" in err
    assert "Traceback" not in err
    assert files() == ["out.latents.safetensors"]
    assert signal.getsignal(number) is before
    assert run("decode", "out.latents.safetensors")[0] == 0
    assert files() == ["out.latents.safetensors", "out.png"]


def test_latents_of_another_run_are_not_lost(run, make, model):
    make("--out", "b.png", "--save-latents", "out.latents.safetensors", "--seed", "8")
    before = Path("out.latents.safetensors").read_bytes()
    code, _, err = run("generate", PROMPT, *QUICK, "--model", model)
    assert code == 1
    assert "holds the latents of another run (seed); finish it with `sega-jax decode out.latents.safetensors`" in err
    assert Path("out.latents.safetensors").read_bytes() == before
