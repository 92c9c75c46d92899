"""Files appear whole or not at all, also when writing fails halfway."""

import errno
import os
import subprocess
import sys

import pytest

from converters.files import atomic_path


def leftovers(folder):
    return [entry.name for entry in folder.iterdir()]


def test_replaces_the_old_file_only_at_the_end(tmp_path):
    target = tmp_path / "out.bin"
    target.write_text("old")
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".bin"
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert leftovers(tmp_path) == ["out.bin"]


def test_ordinary_permissions(tmp_path):
    umask = os.umask(0o022)
    try:
        with atomic_path(tmp_path / "out") as temporary:
            temporary.write_text("x")
    finally:
        os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), OSError(errno.EIO, "disk on fire")])
def test_errors_leave_no_trace(tmp_path, error):
    target = tmp_path / "out"
    target.write_text("old")

    def write():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)) as caught:
        write()
    assert caught.value is error
    assert target.read_text() == "old"
    assert leftovers(tmp_path) == ["out"]


def test_disk_full(tmp_path):
    with pytest.raises(OSError, match="disk is full") as caught, atomic_path(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_disk_full_while_flushing(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk is full"), atomic_path(tmp_path / "out") as temporary:
        temporary.write_text("x")
    assert leftovers(tmp_path) == []


def test_read_only_folder(tmp_path, monkeypatch):
    # Whoever runs the tests may be root, whom permissions do not stop.
    def refuse(path, *_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match="no permission to write here"), atomic_path(tmp_path / "out"):
        pytest.fail("the block must not run")


def test_errors_about_other_files_keep_their_words(tmp_path):
    other = PermissionError(errno.EACCES, "Permission denied", "input.txt")
    with pytest.raises(PermissionError) as caught, atomic_path(tmp_path / "out"):
        raise other
    assert caught.value is other


def test_bad_targets(tmp_path):
    with pytest.raises(IsADirectoryError, match="give a file name"), atomic_path(tmp_path):
        pass
    with pytest.raises(FileNotFoundError, match="folder does not exist"), atomic_path(tmp_path / "no" / "out"):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileNotFoundError, match="folder does not exist"), atomic_path(tmp_path / "file" / "out"):
        pass


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    """Of the same target only, and not while its writer lives."""
    code = (
        "import os, signal, sys\n"
        "from converters.files import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    print(temporary.name, flush=True)\n"
        "    input()\n"
    )
    names = []
    processes = []
    for target in ("a.png", "b.png"):
        command = [sys.executable, "-c", code, str(tmp_path / target)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        names.append(process.stdout.readline().strip())
        processes.append(process)
    with atomic_path(tmp_path / "a.png") as temporary:
        temporary.write_text("whole")
    assert sorted(leftovers(tmp_path)) == sorted(["a.png", *names])
    for process in processes:
        process.kill()
        process.communicate()
    with atomic_path(tmp_path / "a.png") as temporary:
        temporary.write_text("whole")
    assert sorted(leftovers(tmp_path)) == sorted(["a.png", names[1]])
