"""Runs that end badly: a clear error, the old output kept, and nothing left that looks complete."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from converters import stream
from converters.__main__ import main
from converters.convert import convert
from converters.errors import CheckpointError
from tests.converters.hostile import file_of, refused

REPOSITORY = Path(__file__).parents[2]


def test_full_disk_is_seen_before_writing(tmp_path, tiny, monkeypatch):
    source = tiny.component(tmp_path / "source", "vae")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    refused(source, tmp_path, "the disk has 0.00 GB free")


def test_disk_that_fills_up_midway(tmp_path, tiny, monkeypatch):
    source = tiny.component(tmp_path / "source", "transformer")
    calls = []

    def pwrite(descriptor, data, offset, real=os.pwrite):
        calls.append(offset)
        if len(calls) > 50:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    refused(source, tmp_path, "the disk is full")
    assert len(calls) > 50


def test_writes_that_are_cut_short_are_continued(tmp_path, tiny, monkeypatch):
    source = tiny.component(tmp_path / "source", "vae")
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset, real=os.pwrite: real(fd, bytes(data[:97]), offset))
    convert(source, tmp_path / "out", to="diffusers", verify="exact", progress=False)
    assert tiny.read(file_of(source)) == tiny.read(file_of(tmp_path / "out"))


def test_file_size_limit_of_the_account(tmp_path, tiny):
    source = tiny.component(tmp_path / "source", "transformer")
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from converters.__main__ import main\n"
        f"sys.exit(main(['convert', {str(source)!r}, {str(tmp_path / 'out.safetensors')!r}, '--to', 'bfl']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    assert done.returncode == 1
    assert "ulimit -f" in done.stderr
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_unwritable_targets(tmp_path, tiny, capsys):
    source = tiny.component(tmp_path / "source", "vae")
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    for target in ("no/out", "file/out", "taken", "file"):
        assert main(["convert", str(source), str(tmp_path / target), "--to", "orbax"]) == 1
        assert capsys.readouterr().err.startswith(f"error: {tmp_path}")
    assert main(["convert", str(source), "/proc/out", "--to", "orbax"]) == 1
    assert "/proc/out: " in capsys.readouterr().err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "source", "taken"]


def test_overwrite_keeps_the_old_one_until_the_new_one_is_whole(tmp_path, tiny):
    good, bad = tiny.component(tmp_path / "good", "vae"), tiny.state("vae", seed=1)
    bad["decoder.conv_in.bias"][0] = math.nan
    bad = tiny.component(tmp_path / "bad", "vae", bad)
    convert(good, tmp_path / "out", to="diffusers", progress=False)
    with pytest.raises(CheckpointError):
        convert(bad, tmp_path / "out", to="diffusers", verify="exact", overwrite=True, progress=False)
    assert tiny.read(file_of(tmp_path / "out")) == tiny.read(file_of(good))
    convert(bad, tmp_path / "out", to="diffusers", overwrite=True, progress=False)
    assert tiny.read(file_of(tmp_path / "out")) == tiny.read(file_of(bad))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bad", "good", "out"]


def test_a_writer_that_errs_is_caught(tmp_path, tiny, monkeypatch):
    """One flipped bit on the way to the disk: verification says which parameter, and nothing appears."""
    source = tiny.component(tmp_path / "source", "transformer")
    real = stream.cast

    def flip(block, dtype, name):
        block = real(block, dtype, name)
        if name == "single.out.bias.2":
            block = block.copy()
            block.view(np.uint16)[5] ^= 1
        return block

    monkeypatch.setattr(stream, "cast", flip)
    refused(source, tmp_path, "single.out.bias.2: values differ")


@pytest.mark.parametrize("target", ["orbax", "bfl"])
def test_sigkill_midway(tmp_path, tiny, target):
    """Killed while writing: no destination; the next run removes what was left and succeeds."""
    source = tiny.component(tmp_path / "source", "transformer")
    code = f"""
import time
from converters import stream
real = stream.cast
def slow(block, dtype, name):
    print(name, flush=True)
    time.sleep(0.02)
    return real(block, dtype, name)
stream.cast = slow
from converters.convert import convert
convert({str(source)!r}, {str(tmp_path / "out")!r}, to={target!r}, workers=1, progress=False)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    for _ in range(20):
        assert process.stdout.readline()
    during = [entry.name for entry in tmp_path.iterdir() if ".partial-" in entry.name]
    assert len(during) == 1
    with pytest.raises(CheckpointError):  # another run does not disturb one that is alive
        convert(tmp_path / "absent", tmp_path / "out", to=target, progress=False)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    process.stdout.close()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([*during, "source"])
    convert(source, tmp_path / "out", to=target, verify="exact", progress=False)
    extra = ["out.conversion.json"] if target == "bfl" else []
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(["source", "out", *extra])


def test_sigkill_while_overwriting_brings_the_old_one_back(tmp_path, tiny):
    """Killed between taking the old destination away and putting the new one there."""
    old, new = tiny.component(tmp_path / "old", "vae"), tiny.component(tmp_path / "new", "vae", seed=1)
    convert(old, tmp_path / "out", to="diffusers", progress=False)
    code = f"""
import os, signal
from converters import files
real = os.replace
def replace(source, target):
    real(source, target)
    if str(source) == {str(tmp_path / "out")!r}:
        os.kill(os.getpid(), signal.SIGKILL)
files.os.replace = replace
from converters.convert import convert
convert({str(new)!r}, {str(tmp_path / "out")!r}, to="diffusers", overwrite=True, progress=False)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="already exists"):
        convert(new, tmp_path / "out", to="diffusers", progress=False)
    assert tiny.read(file_of(tmp_path / "out")) == tiny.read(file_of(old))
    convert(new, tmp_path / "out", to="diffusers", overwrite=True, progress=False)
    assert tiny.read(file_of(tmp_path / "out")) == tiny.read(file_of(new))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["new", "old", "out"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("last", ["out.conversion.json", "out"])
def test_sigkill_at_any_move_of_a_file_with_its_report(tmp_path, tiny, last, overwrite):
    """Killed after every rename: the old file with its old report or nothing, and the same run goes through later."""
    source = tiny.component(tmp_path / "source", "vae")
    if overwrite:
        convert(source, tmp_path / "out", to="bfl", dtype="f16", progress=False)
        (tmp_path / "out").rename(tmp_path / "out.safetensors")
        (tmp_path / "out.conversion.json").rename(tmp_path / "out.safetensors.conversion.json")
    target = tmp_path / "out.safetensors" if overwrite else tmp_path / "out"
    last = last.replace("out", target.name)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    code = f"""
import os, signal
from converters import files
real = os.link
def link(source, target):
    if os.path.basename(target) == {last!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
files.os.link = link
from converters.convert import convert
convert({str(source)!r}, {str(target)!r}, to="bfl", overwrite={overwrite}, progress=False)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60)
    assert done.returncode == -signal.SIGKILL
    from converters.files import remove_leftovers

    remove_leftovers(target)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    convert(source, target, to="bfl", overwrite=overwrite, verify="exact", progress=False)
    names = sorted(entry.name for entry in tmp_path.iterdir())
    assert names == sorted(["source", target.name, f"{target.name}.conversion.json"])


def test_two_conversions_at_once_do_not_replace_each_other(tmp_path):
    from converters.files import staged

    def write():
        with staged(tmp_path / "out") as stage:
            (stage / "out").write_text("ours")
            (tmp_path / "out").write_text("theirs")  # it came to be meanwhile

    with pytest.raises(CheckpointError, match="already exists"):
        write()
    assert (tmp_path / "out").read_text() == "theirs"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_living_run_keeps_its_folder(tmp_path, tiny):
    from converters.files import remove_leftovers, staged

    with staged(tmp_path / "out") as stage:
        code = (
            "import sys; from converters.files import remove_leftovers; "
            f"print(len(remove_leftovers({str(tmp_path / 'out')!r})))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
        assert done.stdout == "0\n"
        assert stage.is_dir()
        (stage / "out").write_text("x")
    assert (tmp_path / "out").read_text() == "x"
    assert remove_leftovers(tmp_path / "out") == []


def test_interrupted_from_the_keyboard(tmp_path, tiny):
    source = tiny.component(tmp_path / "source", "transformer")
    code = f"""
import signal, sys, time
from converters import stream
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
real = stream.cast
def slow(*arguments):
    print("x", flush=True)
    time.sleep(0.02)
    return real(*arguments)
stream.cast = slow
from converters.__main__ import main
sys.exit(main(["convert", {str(source)!r}, {str(tmp_path / "out")!r}, "--to", "orbax", "--quiet"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    assert process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "stopped; nothing was written\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_the_command_line_says_what_is_wrong(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "absent"), str(tmp_path / "out"), "--to", "bfl"]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'absent'}: no such file\n"
    with pytest.raises(SystemExit) as caught:
        main(["convert", "a", "b", "--to", "onnx"])
    assert caught.value.code == 2
    capsys.readouterr()
