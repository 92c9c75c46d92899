"""Forty runs killed at a moment drawn from a fixed seed: nothing half-written, the same bytes afterwards, no leftovers.

python -m pytest -m slow -s tests/cli/test_kills.py
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
from PIL import Image
from safetensors.numpy import load_file

from converters.convert import convert
from sega_jax.weights.hub import resolve
from tests.cli.helpers import PROMPT, QUICK

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROOT = Path(__file__).parents[2]
# What is slow to import comes before the word; the run itself after it.
RUN = """
import sys
from sega_jax import cli
import sega_jax.cli.generation.engine, sega_jax.pipeline.pipeline, converters.convert
print("go", flush=True)
sys.exit(cli.main(sys.argv[1:]))
"""
TRAIN = """
import sys
from pathlib import Path
import jax.numpy as jnp, optax
from sega_jax.training import loop
optimizer = optax.adam(0.1)
step = loop.make_step(lambda p, b, k: (jnp.square(p["w"] - b).mean(), {}), optimizer, seed=1, ema_decay=0.9)
state = loop.create({"w": jnp.zeros((300, 300))}, optimizer)
print("go", flush=True)
loop.fit(state, step, lambda n: jnp.full((300, 300), n / 10), 90, checkpoint=Path("state.safetensors"), every=3,
         report=lambda line: None)
"""
GENERATE = ("generate", PROMPT, *QUICK, "--steps", "5", "--num-images", "2")
KINDS = {
    "generate between states": (14, (*GENERATE, "--checkpoint-every", "1"), ("--resume",)),
    "generate with regions": (4, (*GENERATE, "--layout", "crpa", "--regions", "center:0.3"), ()),
    "convert to orbax": (5, ("convert", "{source}", "made", "--to", "orbax"), ()),
    "convert to one file": (4, ("convert", "{source}", "made.safetensors", "--to", "bfl"), ()),
    "decode": (4, ("decode", "{latents}", "--out", "made.png"), ()),
    "training": (5, None, ()),
    "two processes at once": (4, GENERATE, ()),
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return {**os.environ, "PYTHONPATH": str(ROOT), "SEGA_JAX_CACHE": str(tmp_path_factory.mktemp("kept"))}


def start(words, folder, environment):
    """A run that has imported what it needs."""
    command = [sys.executable, "-c", TRAIN if words is None else RUN, *(words or ())]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder, "env": environment}
    process = subprocess.Popen(command, **options)
    assert process.stdout.readline() == "go\n", process.communicate()[1]
    return process


def finish(words, folder, environment, *, may_fail=False):
    """The run to its end; its seconds."""
    process = start(words, folder, environment)
    begun = time.perf_counter()
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0 or may_fail, err
    return time.perf_counter() - begun


def content(folder):
    """All files below a folder; a report's times and the archive's order do not count."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            found[name] = b"" if name.endswith("conversion.json") else path.read_bytes()
    return found


def whole(folder):
    """Every file that has its final name can be read to its end."""
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        elif path.suffix == ".safetensors" and path.is_file():
            load_file(path)


@pytest.mark.parametrize("kind", KINDS)
def test_killed(kind, tmp_path, environment, model):
    count, words, again = KINDS[kind]
    random, reference = Random(kind), tmp_path / "reference"
    (reference / "in").mkdir(parents=True)
    convert(Path(resolve("nano")) / "transformer", tmp_path / "source", to="diffusers", progress=False)
    save = (*GENERATE[:-2], "--save-latents", "z.safetensors", "--model", model)
    if kind == "decode":
        finish(save, reference / "in", environment)
    places = {"source": tmp_path / "source", "latents": reference / "in" / "z.safetensors"}
    words = words and tuple(word.format(**places) for word in words)
    if words and words[0] == "generate":
        words = (*words, "--model", model)
    (reference / "out").mkdir()
    finish(words, reference / "out", environment)
    (tmp_path / "timed").mkdir()
    seconds = finish(words, tmp_path / "timed", environment)  # compiled by now
    expected = content(reference / "out")
    assert content(tmp_path / "timed") == expected
    for number in range(count):
        folder = tmp_path / f"kill-{number}"
        folder.mkdir()
        at = random.uniform(0, 0.95) * seconds
        process = start(words, folder, environment)
        other = start(words, folder, environment) if kind == "two processes at once" else None
        time.sleep(at)
        process.kill()
        process.communicate()
        if other is not None:
            other.communicate(timeout=600)
        ended = "killed" if process.returncode == -signal.SIGKILL else "over"
        left = sorted(path.name for path in folder.iterdir())
        whole(folder)
        # The same command again; what does not replace its destination may find it complete.
        made = any((folder / name).exists() for name in ("made", "made.safetensors", "made.png"))
        finish(words and (*words, *again), folder, environment, may_fail=made)
        assert content(folder) == expected
        told = f"{ended} after {at:.2f} of {seconds:.2f} s, left {left}"
        print(f"\n{kind} {number + 1}/{count}: {told}; bytes right, nothing left over")
