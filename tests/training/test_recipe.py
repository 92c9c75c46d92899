"""A toy nano through every stage, and a killed generator run that goes on with the same bits."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from sega_jax.nano import model as nano
from sega_jax.training import recipe
from sega_jax.training.data import Bucket, Family, Phase

ROOT = Path(__file__).parents[2]
TINY = recipe.Recipe(buckets=(Bucket(2, 2, 8),), phases=(Phase(6, 2, (Family(1.0, (("2x2", 1.0),)),)),), warmup=2)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A work folder with latents made by hand, and networks of one narrow block."""
    narrow = {"single_layers": 1, "heads": 1, "head_dim": 16, "rope_dims": (4, 6, 6), "text_dim": 16, "pooled_dim": 16}
    monkeypatch.setattr(nano, "TRANSFORMER", dataclasses.replace(nano.TRANSFORMER, **narrow))
    monkeypatch.setattr(nano, "T5", dataclasses.replace(nano.T5, d_model=16, d_kv=8, d_ff=16, num_layers=1))
    monkeypatch.setattr(nano, "CLIP", dataclasses.replace(nano.CLIP, hidden_size=16, intermediate_size=16))
    (tmp_path / "latents").mkdir()
    np.save(tmp_path / "latents" / "2x2.npy", np.random.default_rng(0).normal(size=(8, 4, 64)).astype(np.float16))
    np.save(tmp_path / "latents" / "2x2.scenes.npy", np.arange(8, dtype=np.int32))
    return tmp_path


def states(modules):
    return {name: jax.tree.map(np.asarray, jax.tree.leaves(nnx.state(m))) for name, m in modules.items()}


def test_killed_and_resumed_training_of_the_generator_gives_the_same_bits(tiny):
    whole = recipe.train_generator(TINY, tiny, lambda line: None, every=2)
    (tiny / "generator.safetensors").unlink()

    class Killed(Exception):
        pass

    def dies(line):
        if "step 4/" in line:
            raise Killed

    with pytest.raises(Killed):
        recipe.train_generator(TINY, tiny, dies, every=2)
    lines = []
    resumed = recipe.train_generator(TINY, tiny, lines.append, every=2)
    assert [line.split()[1] for line in lines] == ["4/6", "6/6"]  # the report comes before the file: from step 2 on
    jax.tree.map(np.testing.assert_array_equal, states(whole), states(resumed))


def test_a_run_goes_on_elsewhere_from_the_state_it_leaves(tiny, tmp_path_factory):
    """Autoencoder, statistics and generator are all of it; what is exported is the state's moving average."""
    trained = recipe.train_generator(TINY, tiny, lambda line: None, every=2)
    jax.tree.map(np.testing.assert_array_equal, states(trained), states(recipe.averaged_generator(tiny)))

    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with pytest.raises(FileNotFoundError, match=r"no autoencoder\.safetensors, vae\.json; give a folder"):
        recipe.begin_from(tiny, elsewhere)
    for name in recipe.STATE[:2]:
        (tiny / name).write_bytes(b"made by hand")
    (elsewhere / "vae.json").write_text("of its own")
    assert recipe.begin_from(tiny, elsewhere) == ["autoencoder.safetensors", "generator.safetensors"]
    assert (elsewhere / "vae.json").read_text() == "of its own"
    assert (elsewhere / "generator.safetensors").read_bytes() == (tiny / "generator.safetensors").read_bytes()
    with pytest.raises(FileNotFoundError, match="no state of the generator"):
        recipe.averaged_generator(tmp_path_factory.mktemp("empty"))


@pytest.mark.slow
def test_smoke_run_makes_a_pipeline(tmp_path):
    command = [sys.executable, str(ROOT / "scripts/train_nano.py"), str(tmp_path / "work"), "--smoke"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "toy")], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "toy" / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size > 1_000_000
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == 0
    assert "step" not in again.stdout  # every stage was found finished
