"""Runs that are killed, stopped, or meet a full disk: what is left, and that they go on bit for bit."""

import errno
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters.errors import CheckpointError
from sega_jax.sampling import resume, states
from sega_jax.sampling.resume import Checkpoint, Stopped

STEPS = 12


@dataclass(frozen=True)
class Chaotic:
    """A sampler whose every bit matters: a random walk, its key, a count, and memory that is None at times."""

    size: int = 64
    steps: int = STEPS

    def start(self, noise, conditioning):
        return {
            "walk": jnp.ones((self.size,)),
            "key": jax.random.key(3),
            "done": np.int64(0),
            "memory": {"image": None},
        }

    def step(self, params, state, conditioning, index):
        key, now = jax.random.split(state["key"])
        walk = jnp.sin(3 * state["walk"]) + 0.1 * jax.random.normal(now, state["walk"].shape)
        return {**state, "walk": walk, "key": key, "done": state["done"] + 1}

    def latents(self, state):
        return state["walk"]


class Pair(NamedTuple):
    left: object
    right: object


def run(checkpoint=None, sampler=Chaotic(), request=None, on_step=lambda done: None):
    """What `Pipeline.generate` does with a sampler."""
    request = request or {"prompt": "a"}
    state, done = sampler.start(None, None), 0
    if checkpoint is not None:
        done, state = checkpoint.start(request, state)
    for index in range(done, sampler.steps):
        state = sampler.step(None, state, None, index)
        on_step(index + 1)
        if checkpoint is not None:
            checkpoint.after(index + 1, sampler.steps, request, state)
    assert state["done"] == sampler.steps
    return np.asarray(sampler.latents(state))


class Broken(Exception):
    pass


def break_at(step):
    def on_step(done):
        if done == step:
            raise Broken

    return on_step


def test_a_run_goes_on_bit_for_bit(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Broken):
        run(Checkpoint(folder, 3), on_step=break_at(8))
    assert Checkpoint(folder, 3).saved() == [6]  # only the latest
    steps = []
    again = run(Checkpoint(folder, 3, resume=True), on_step=steps.append)
    assert steps == [7, 8, 9, 10, 11, 12]
    np.testing.assert_array_equal(again, run())
    np.testing.assert_array_equal(run(Checkpoint(folder, 3, resume=True), on_step=break_at(1)), again)  # nothing to do
    Checkpoint(folder, 3).clear()
    assert not folder.exists()


def test_states_may_change_their_structure(tmp_path):
    """Stages hold different things: canvases that come and go, keys, a node type of the sampler's own."""
    start = {"a": jnp.zeros(2), "own": Pair(jnp.ones(1), None)}
    later = {"a": (jnp.arange(3.0), None, [np.float32(2)]), "key": jax.random.key(1), "own": Pair(jnp.ones(3), None)}
    Checkpoint(tmp_path, 1).after(1, 2, {}, later)
    step, found = Checkpoint(tmp_path, 1, resume=True).start({}, start)
    assert step == 1
    assert jax.tree.structure(found) == jax.tree.structure(later)
    np.testing.assert_array_equal(found["own"].left, np.ones(3))
    assert jax.random.key_impl(found["key"]) == jax.random.key_impl(later["key"])
    np.testing.assert_array_equal(jax.random.bits(found["key"], (4,)), jax.random.bits(later["key"], (4,)))


def test_what_is_not_to_be_continued_is_refused(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Broken):
        run(Checkpoint(folder, 2), on_step=break_at(3))
    with pytest.raises(CheckpointError, match=r"interrupted after step 2; go on with it by --resume"):
        run(Checkpoint(folder, 2))
    with pytest.raises(CheckpointError, match=r"another run \(prompt, seed differ\)"):
        run(Checkpoint(folder, 2, resume=True), request={"prompt": "b", "seed": 1})
    (folder / "step-000002" / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match="unreadable"):
        run(Checkpoint(folder, 2, resume=True))
    with pytest.raises(ValueError, match="every 0 steps"):
        Checkpoint(folder, 0)


def test_stopping_saves_at_the_next_step(tmp_path):
    asked = []
    checkpoint = Checkpoint(tmp_path / "run", 100, stop=lambda: bool(asked))
    with pytest.raises(Stopped) as stopped:
        run(checkpoint, on_step=lambda done: asked.append(1) if done == 5 else None)
    assert stopped.value.step == 5
    assert checkpoint.saved() == [5]
    np.testing.assert_array_equal(run(Checkpoint(tmp_path / "run", 100, resume=True)), run())


def test_sigterm_asks_instead_of_ending_the_process():
    with resume.stop_on_sigterm() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


CHILD = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from test_resume import *
def on_step(done):
    if done == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
run(Checkpoint(Path({folder!r}), 2), on_step=on_step)
"""


def test_kill_9_at_a_random_step(tmp_path):
    step = int(np.random.default_rng().integers(1, STEPS + 1))
    code = CHILD.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "run"), step=step)
    died = subprocess.run([sys.executable, "-c", code], timeout=300, cwd=Path(__file__).parents[2])
    assert died.returncode == -signal.SIGKILL
    checkpoint = Checkpoint(tmp_path / "run", 2, resume=True)
    assert checkpoint.saved() == ([] if step <= 2 else [(step - 1) // 2 * 2])
    np.testing.assert_array_equal(run(checkpoint), run())


def test_killed_while_saving(tmp_path, monkeypatch):
    """What a save that never ended leaves behind is neither taken for a state nor kept."""
    folder = tmp_path / "run"
    with pytest.raises(Broken):
        run(Checkpoint(folder, 2), on_step=break_at(3))
    (folder / ".step-000004.partial-0123456789abcdef" / "step-000004").mkdir(parents=True)
    np.testing.assert_array_equal(run(Checkpoint(folder, 2, resume=True)), run())
    assert [entry.name for entry in folder.iterdir()] == ["step-000012"]


def test_a_full_disk_leaves_the_last_good_state(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    write = states.write

    def full(path, step, request, state):
        if step == 6:
            (path / "half").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, step, request, state)

    monkeypatch.setattr(states, "write", full)
    with pytest.raises(CheckpointError, match=rf"{folder}: .*step 6 .*disk is full.*step 4 is left"):
        run(Checkpoint(folder, 2))
    monkeypatch.undo()
    assert [entry.name for entry in folder.iterdir()] == ["step-000004"]
    np.testing.assert_array_equal(run(Checkpoint(folder, 2, resume=True)), run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves its other writes behind
def test_a_limit_of_the_system_met_by_orbax_itself(tmp_path):
    """A real refusal by the kernel, deep inside the storage layer: files may not grow over 8 kB."""
    sampler, folder = Chaotic(size=2**14), tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limit(done):
        if done == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8_192, hard))

    try:
        with pytest.raises(CheckpointError, match=r"step 4 cannot be saved.*step 2 is left"):
            run(Checkpoint(folder, 2), sampler=sampler, on_step=limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert [entry.name for entry in folder.iterdir()] == ["step-000002"]
    np.testing.assert_array_equal(run(Checkpoint(folder, 2, resume=True), sampler=sampler), run(sampler=sampler))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves its other writes behind
def test_a_full_file_system(tmp_path):
    """A tmpfs of 64 kB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        with pytest.raises(CheckpointError, match=r"step 2 cannot be saved.*disk is full.*no earlier state"):
            run(Checkpoint(folder / "run", 2), sampler=Chaotic(size=2**16))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_cannot_be_written_is_named_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"file/run: states of this run cannot be saved here \(Not a directory\)"):
        run(Checkpoint(tmp_path / "file" / "run", 2), on_step=break_at(1))


def test_files_of_the_user_stay(tmp_path):
    """Whatever else lies in a run's folder, and in the folder of a state, is there when the states are removed."""
    folder = tmp_path / "out.state"
    (folder / "step-000099").mkdir(parents=True)
    mine = [folder / "notes.txt", folder / "step-000099" / "thesis.tex", folder / "photos" / "a.png"]
    (folder / "photos").mkdir()
    for path in mine:
        path.write_text("mine")
    checkpoint = Checkpoint(folder, 5)
    with pytest.raises(Broken):
        run(checkpoint, on_step=break_at(6))
    beside = folder / "step-000005" / "state" / "mine.txt"
    beside.write_text("mine")
    assert Checkpoint(folder, 5).saved() == [5]
    checkpoint.clear()
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted([*mine, beside])
    (tmp_path / "link").symlink_to(folder)
    Checkpoint(tmp_path / "link", 5).clear()
    assert all(path.exists() for path in mine)


def test_a_folder_with_nothing_of_the_user_goes(tmp_path):
    folder = tmp_path / "out.state"
    with pytest.raises(Broken):
        run(Checkpoint(folder, 5).part("batch-0000"), on_step=break_at(6))
    (folder / "batch-0000" / ".step-000006.partial-0123456789abcdef").mkdir()  # of a process that was killed
    assert resume.request_of(folder) == {"prompt": "a"}
    Checkpoint(folder, 5).clear()
    assert list(tmp_path.iterdir()) == []


def test_every_byte_of_a_state_counts(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Broken):
        run(Checkpoint(folder, 5), on_step=break_at(6))
    files = sorted(path for path in (folder / "step-000005" / "state").rglob("*") if path.stat().st_size)
    files = [path for path in files if path.is_file()]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CheckpointError, match="damaged, or changed since"):
            run(Checkpoint(folder, 5, resume=True))
        path.write_bytes(content)
    assert run(Checkpoint(folder, 5, resume=True)).size


CLAIM = """
import sys
from pathlib import Path
from sega_jax.sampling.resume import Checkpoint
checkpoint = Checkpoint(Path(sys.argv[1]), 1)
checkpoint.start({"prompt": "a"}, {"x": 1})
print("claimed", flush=True)
input()
"""


def test_two_runs_do_not_share_a_folder(tmp_path):
    command = [sys.executable, "-c", CLAIM, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(CheckpointError, match="another run is at work on it"):
            run(Checkpoint(tmp_path / "run", 5))
        other.kill()
    assert run(Checkpoint(tmp_path / "run", 5)).size
