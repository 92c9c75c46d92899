"""Output files and folders appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from converters.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows: leftovers of killed runs are then left to the user
    fcntl = None

_EXPLAIN = {
    errno.ENOSPC: "the disk is full; free some space or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some space or write elsewhere",
    errno.EACCES: "no permission to write here; choose another folder",
    errno.EPERM: "no permission to write here; choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EFBIG: "a file grew over the limit of this system or account (`ulimit -f`); use smaller shards",
}


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path with ``~`` as the user's home; a user nobody knows stays as it is written."""
    return Path(os.path.expanduser(path))


def _partial(path: Path) -> str:
    """How the temporary files of a target begin; short and plain however the target is called."""
    return f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"


def _lock(descriptor: int) -> bool:
    """Takes an exclusive lock that ends with the process; False if another process has it."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def remove_partials(path: str | os.PathLike[str]) -> None:
    """Removes the temporary files of a target that killed runs left behind; those of runs still alive stay."""
    path = Path(path)
    if fcntl is None or not path.parent.is_dir():
        return
    pattern = re.compile(re.escape(_partial(path)) + "[0-9a-f]{16}" + re.escape(f".part{path.suffix}"))
    for entry in os.listdir(path.parent):
        if pattern.fullmatch(entry):
            with contextlib.suppress(OSError):
                descriptor = os.open(path.parent / entry, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    if _lock(descriptor):
                        (path.parent / entry).unlink()
                finally:
                    os.close(descriptor)


def _new_partial(path: Path) -> tuple[Path, int]:
    """A temporary file of a target, and a descriptor that holds its lock."""
    while True:
        temporary = path.parent / f"{_partial(path)}{secrets.token_hex(8)}.part{path.suffix}"
        held = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        # Another process may take it for a leftover before the lock is there; then there is another name.
        if _lock(held) and temporary.exists():
            return temporary, held
        os.close(held)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file to write, which takes the name ``path`` when the block ends well.

    The temporary file lies in the same folder and is flushed to the disk before the rename, so a crash leaves
    either the old file or the new one.  If the block raises, it is removed and ``path`` is untouched; after a SIGKILL
    the next run that writes ``path`` removes it.

    Args:
        path: the final name; replaced if it exists.  Its folder must exist.

    Yields:
        The temporary file's path (an empty file, ending in the same suffix); to be written in place, not replaced.

    Raises:
        OSError: with the usual error number and a message that says what to do.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; give a file name", str(path))
    remove_partials(path)
    start = str(path.parent / _partial(path))
    temporary = held = None
    try:
        try:
            temporary, held = _new_partial(path)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(errno.ENOENT, "the folder does not exist; create it first", str(path)) from None
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except BaseException as exc:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        # Errors about other files, which the block may read, keep their own words.
        ours = isinstance(exc, OSError) and (exc.filename is None or str(exc.filename).startswith(start))
        if ours and exc.errno in _EXPLAIN:
            raise OSError(exc.errno, f"{_EXPLAIN[exc.errno]} ({os.strerror(exc.errno)})", str(path)) from exc
        raise
    finally:
        if held is not None:
            os.close(held)
    with contextlib.suppress(OSError):  # the file is in place; not every system can flush a folder
        _flush(path.parent, os.O_RDONLY)


def flush(path: Path) -> None:
    """Waits until a file, or every file and folder below a folder, is on the disk."""
    if not path.is_dir():
        _flush(path, os.O_RDWR)
        return
    for entry in path.iterdir():
        flush(entry)
    with contextlib.suppress(OSError):  # not every system can flush a folder
        _flush(path, os.O_RDONLY)


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- staging: several files that appear together -------------------------------------------------------------------

_LOCK = ".lock"
_OLD = ".lock.old"  # folder of what is overwritten, until everything new is in place
_MOVING = ".lock.moving"  # names of the companions, once things begin to move


def _stages(final: Path) -> list[Path]:
    """Staging folders that runs with the same destination have made."""
    pattern = re.compile(re.escape(f".{final.name}.partial-") + "[0-9a-f]{16}")
    return [entry for entry in final.parent.iterdir() if pattern.fullmatch(entry.name) and entry.is_dir()]


def _hold(stage: Path) -> int | None:
    """An exclusive lock on a staging folder, which ends with the process; None if another process has it."""
    descriptor = os.open(stage / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    if not _lock(descriptor):
        os.close(descriptor)
        return None
    return descriptor


def _new_stage(final: Path) -> tuple[Path, int]:
    """A staging folder of a destination, and a descriptor that holds its lock."""
    while True:
        stage = final.parent / f".{final.name}.partial-{secrets.token_hex(8)}"
        stage.mkdir()
        # Another process may take it for a leftover before the lock is there; then there is another name.
        with contextlib.suppress(FileNotFoundError):
            lock = _hold(stage)
            if lock is not None:
                return stage, lock


def remove_leftovers(final: str | os.PathLike[str]) -> list[Path]:
    """Removes what killed runs with this destination left behind; runs still alive keep theirs.

    What such a run had taken away to replace it, and did not replace, comes back.

    Returns:
        The folders that were removed.
    """
    final, removed = Path(final), []
    if fcntl is None:
        return removed
    for stage in _stages(final):
        descriptor = _hold(stage)
        if descriptor is not None:
            if not os.path.lexists(final):
                _bring_back(stage, final)
            shutil.rmtree(stage, ignore_errors=True)
            os.close(descriptor)
            removed.append(stage)
    return removed


def _bring_back(stage: Path, final: Path) -> None:
    """Undoes a move that was cut off between taking the old things away and putting the last new one in place."""
    if (stage / _MOVING).is_file():
        for name in (stage / _MOVING).read_text().splitlines():
            # A name that is not there any more has been moved; nothing but companions of this destination is touched.
            entry, target = stage / name, final.parent / name
            ours = name.startswith(f"{final.name}.") and Path(name).name == name and target.exists()
            if ours and (not os.path.lexists(entry) or os.path.samefile(entry, target)):
                target.unlink()
    if (stage / _OLD).is_dir():
        for old in (stage / _OLD).iterdir():
            os.replace(old, final.parent / old.name)


def explained(exc: OSError, path: Path) -> CheckpointError:
    """The error to show for an `OSError` met while writing ``path``."""
    reason = _EXPLAIN.get(exc.errno or 0, "")
    detail = exc.strerror or str(exc)
    return CheckpointError(f"{path}: cannot be written: {f'{reason} ({detail})' if reason else detail}")


@contextlib.contextmanager
def staged(final: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write in, beside ``final``, whose content takes that name when the block ends well.

    The block makes either ``<stage>/<name of final>`` (a file, or a folder) and, for a file, any number of
    companions; companions move first and ``final`` last, so that once it is there everything is.  Files must be
    flushed by whoever writes them.  Whatever happens, the staging folder is removed; after a SIGKILL
    the next run with the same destination removes it.

    Args:
        final: the destination; its folder must exist.
        overwrite: replace an existing destination (the old one goes away only once the new one is complete).

    Raises:
        CheckpointError: the destination exists, its folder does not, or it cannot be written.
    """
    final = Path(final)
    if not final.parent.is_dir():
        raise CheckpointError(f"{final.parent}: no such folder; create it first")
    try:
        remove_leftovers(final)  # may bring back a destination, so it comes before the question whether there is one
        if not overwrite:
            _refuse_existing(final)
        stage, lock = _new_stage(final)
    except OSError as exc:
        raise explained(exc, final) from exc
    try:
        yield stage
        _move(stage, final, overwrite)
        with contextlib.suppress(OSError):
            _flush(final.parent, os.O_RDONLY)
    except OSError as exc:
        raise explained(exc, final) from exc
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        os.close(lock)


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: already exists; choose another destination, or pass --overwrite to replace it")


def _move(stage: Path, final: Path, overwrite: bool) -> None:
    """What lies in a staging folder to its place, the product last."""
    names = [entry.name for entry in stage.iterdir() if entry.name not in (_LOCK, final.name)]
    targets = [final.parent / name for name in (*names, final.name)]
    if not overwrite:  # it may have come to be since the start, by another process
        for target in targets:
            _refuse_existing(target)
    (stage / _OLD).mkdir()
    (stage / _MOVING).write_text("\n".join(names))
    try:
        for target in targets:
            with contextlib.suppress(FileNotFoundError):
                os.replace(target, stage / _OLD / target.name)
        for target in targets:
            _put(stage / target.name, target)
    except OSError:
        if not os.path.lexists(final):
            _bring_back(stage, final)
        raise


def _put(entry: Path, target: Path) -> None:
    """Moves a file or folder to where nothing is.

    Raises:
        CheckpointError: another process has put something there meanwhile.
    """
    try:
        if entry.is_dir():
            os.rename(entry, target)  # over a folder that holds something it fails
        else:
            os.link(entry, target)  # unlike renaming, it fails over a file
            entry.unlink()
    except OSError as exc:
        if os.path.lexists(target):
            raise CheckpointError(f"{target}: already exists, another run has written it meanwhile") from exc
        os.replace(entry, target)  # a file system without links
