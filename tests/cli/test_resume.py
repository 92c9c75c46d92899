"""`sega-jax generate` killed, terminated and resumed, on a mesh and off it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sega_jax import cli
from sega_jax.sampling.sampler import Euler

ROOT = Path(__file__).parents[2]
COMMON = ["generate", "a red circle", "--size", "64", "--steps", "6", "--save-latents", "z.safetensors"]
KILLED = """
import os, signal, sys
from sega_jax import cli
from sega_jax.sampling.sampler import Euler
step = Euler.step
def dying(self, params, state, conditioning, index):
    if index == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, params, state, conditioning, index)
Euler.step = dying
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert cli.main([*COMMON, "--checkpoint-every", "2"]) == 0
    finally:
        os.chdir(before)
    assert sorted(entry.name for entry in folder.iterdir()) == ["out.png", "z.safetensors"]  # no state is left
    return load_file(folder / "z.safetensors")["latents"]


def test_kill_9_and_resume(expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    step = int(np.random.default_rng().integers(2, 6))
    code = KILLED.format(step=step)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *COMMON, "--checkpoint-every", "1"]
    assert subprocess.run(command, env=environment, timeout=500, cwd=tmp_path).returncode == -signal.SIGKILL
    assert cli.main([*COMMON, "--checkpoint-every", "1"]) == 1
    assert f"interrupted after step {step}; go on with it by --resume" in capsys.readouterr().err
    assert cli.main([*COMMON, "--resume"]) == 0
    np.testing.assert_array_equal(load_file("z.safetensors")["latents"], expected)


def test_sigterm_ends_after_the_step(expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    step = Euler.step

    def terminated(self, params, state, conditioning, index):
        if index == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, params, state, conditioning, index)

    with monkeypatch.context() as patch:
        patch.setattr(Euler, "step", terminated)
        assert cli.main([*COMMON, "--checkpoint-every", "100"]) == 143
    assert "stopped after step 4; go on with the same command and --resume" in capsys.readouterr().err
    assert cli.main([*COMMON, "--resume"]) == 0
    np.testing.assert_array_equal(load_file("z.safetensors")["latents"], expected)


def test_a_mesh_is_recorded_and_incidental(expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*COMMON, "--mesh", "context=2"]) == 0
    np.testing.assert_allclose(load_file("z.safetensors")["latents"], expected, atol=1e-4, rtol=0)
    assert cli.main(COMMON) == 0
    assert "skipped" in capsys.readouterr().err  # the same picture
    assert cli.main([*COMMON[:-1], "y.safetensors", "--out", "b.png", "--mesh", "context=99"]) == 2
    assert "needs 99 devices" in capsys.readouterr().err


def test_bad_options(capsys):
    assert cli.main([*COMMON, "--checkpoint-every", "0"]) == 2
    assert "checkpoint_every=0" in capsys.readouterr().err
