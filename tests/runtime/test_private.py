"""What is read back from a cache is the user's own and as it was written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sega_jax.runtime.private import is_kept, keep, private_folder, read_own, remove_unsealed, seal

ROOT = Path(__file__).parents[2]


def mode(path):
    return path.stat().st_mode & 0o777


def test_folders_are_closed_to_others(tmp_path):
    assert mode(private_folder(tmp_path / "deep" / "new")) == 0o700
    (tmp_path / "listed").mkdir(mode=0o755)
    (tmp_path / "listed" / "a").write_text("kept")
    assert mode(private_folder(tmp_path / "listed")) == 0o700
    assert (tmp_path / "listed" / "a").read_text() == "kept"


def test_what_lies_in_a_folder_that_others_could_write_to_is_not_trusted(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    keep(folder / "a.so", b"code")
    folder.chmod(0o777)
    assert mode(private_folder(folder)) == 0o700
    assert list(folder.iterdir()) == []


def test_folders_of_other_users_are_refused(tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(PermissionError, match="belongs to another user"):
        private_folder(tmp_path / "theirs")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is no folder"):
        private_folder(tmp_path / "file")


def test_only_what_was_written_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "a.so"
    keep(path, b"code" * 1000)
    assert is_kept(path)
    assert mode(path) == 0o600
    damages = {
        "cut in half": lambda: path.write_bytes(path.read_bytes()[:2000]),
        "another content": lambda: path.write_bytes(b"evil" * 1000),
        "open to others": lambda: path.chmod(0o666),
        "open to the group": lambda: path.chmod(0o620),
        "without a digest": lambda: (tmp_path / "a.so.sha256").unlink(),
        "a digest open to others": lambda: (tmp_path / "a.so.sha256").chmod(0o622),
        "a link": lambda: (path.rename(tmp_path / "b"), path.symlink_to(tmp_path / "b")),
        "a pipe": lambda: (path.unlink(), os.mkfifo(path)),
        "gone": lambda: path.unlink(),
    }
    for name, damage in damages.items():
        path.unlink(missing_ok=True)
        keep(path, b"code" * 1000)
        damage()
        assert not is_kept(path), name
    path.unlink(missing_ok=True)
    keep(path, b"code" * 1000)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert read_own(path) is None


def test_files_of_another_library_are_used_as_they_were_sealed(tmp_path):
    for name in ("a-cache", "b-cache", "c-cache", "d-cache", "other"):
        (tmp_path / name).write_bytes(name.encode())
    seal(tmp_path, ".-cache")
    (tmp_path / "e-cache").write_text("half of it, by a process that was killed")
    (tmp_path / "b-cache").write_text("changed")
    (tmp_path / "c-cache").chmod(0o666)
    os.utime(tmp_path / "d-cache", (1, 1))  # touched, but the same
    assert sorted(remove_unsealed(tmp_path, ".-cache")) == ["b-cache", "c-cache", "e-cache"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a-cache", "d-cache", "other", "seals.json"]
    (tmp_path / "seals.json").write_text('{"a-cache": 3, "d-cache": []}')
    assert sorted(remove_unsealed(tmp_path, ".-cache")) == ["a-cache", "d-cache"]
    assert remove_unsealed(tmp_path, ".-cache") == []


COMPILE = """
import jax, sega_jax
folder = sega_jax.use_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
jax.jit(lambda x: x * 2 + 1)(3.0).block_until_ready()
print(len(hits))
"""


def test_compiled_programs_are_compiled_anew_where_they_are_not_ours(tmp_path):
    def hits():
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "SEGA_JAX_CACHE": str(tmp_path / "cache")}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        command = [sys.executable, "-c", COMPILE]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
        assert "cache entry" not in done.stderr
        return int(done.stdout)

    programs = tmp_path / "cache" / "programs"
    assert hits() == 0
    assert mode(programs) == 0o700
    assert hits() > 0
    for entry in programs.glob("*-cache"):
        entry.write_bytes(entry.read_bytes()[:100])
    assert hits() == 0
    assert hits() > 0
    programs.chmod(0o777)
    assert hits() == 0
    assert mode(programs) == 0o700
