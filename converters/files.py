"""Output files and folders appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
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


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file to write, which takes the name ``path`` when the block ends well.

    The temporary file lies in the same folder and is flushed to the disk before the rename, so a crash leaves
    either the old file or the new one.  If the block raises, it is removed and ``path`` is untouched.

    Args:
        path: the final name; replaced if it exists.  Its folder must exist.

    Yields:
        The temporary file's path (an empty file, ending in the same suffix).

    Raises:
        OSError: with the usual error number and a message that says what to do.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; give a file name", str(path))
    temporary = path.parent / f".{secrets.token_hex(8)}.part{path.suffix}"
    try:
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(errno.ENOENT, "the folder does not exist; create it first", str(path)) from None
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    except BaseException as exc:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # Errors about other files, which the block may read, keep their own words.
        ours = isinstance(exc, OSError) and exc.filename in (None, str(temporary))
        if ours and exc.errno in _EXPLAIN:
            raise OSError(exc.errno, f"{_EXPLAIN[exc.errno]} ({os.strerror(exc.errno)})", str(path)) from exc
        raise
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
_OLD = ".lock.old"  # what an overwritten destination is called until the new one is in place


def _stages(final: Path) -> list[Path]:
    """Staging folders that runs with the same destination have made."""
    pattern = re.compile(re.escape(f".{final.name}.partial-") + "[0-9a-f]{16}")
    return [entry for entry in final.parent.iterdir() if pattern.fullmatch(entry.name) and entry.is_dir()]


def _hold(stage: Path) -> int | None:
    """An exclusive lock on a staging folder, which ends with the process; None if another process has it."""
    descriptor = os.open(stage / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return None
    return descriptor


def remove_leftovers(final: str | os.PathLike[str]) -> list[Path]:
    """Removes what killed runs with this destination left behind; runs still alive keep theirs.

    A destination that such a run had taken away to replace it, and did not replace, comes back.

    Returns:
        The folders that were removed.
    """
    final, removed = Path(final), []
    if fcntl is None:
        return removed
    for stage in _stages(final):
        descriptor = _hold(stage)
        if descriptor is not None:
            # Killed between taking the old destination away and putting the new one in its place.
            if os.path.lexists(stage / _OLD) and not os.path.lexists(final):
                os.replace(stage / _OLD, final)
            shutil.rmtree(stage, ignore_errors=True)
            os.close(descriptor)
            removed.append(stage)
    return removed


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
    stage = final.parent / f".{final.name}.partial-{secrets.token_hex(8)}"
    try:
        remove_leftovers(final)  # may bring back a destination, so it comes before the question whether there is one
        if os.path.lexists(final) and not overwrite:
            raise CheckpointError(
                f"{final}: already exists; choose another destination, or pass --overwrite to replace it"
            )
        stage.mkdir()
        lock = _hold(stage)
    except OSError as exc:
        raise explained(exc, final) from exc
    try:
        yield stage
        product = stage / final.name
        companions = [entry for entry in stage.iterdir() if entry.name not in (_LOCK, final.name)]
        old = None
        if os.path.lexists(final):
            old = stage / _OLD
            os.replace(final, old)
        try:
            for companion in companions:
                os.replace(companion, final.parent / companion.name)
            os.replace(product, final)
        except OSError:
            if old is not None and not os.path.lexists(final):
                os.replace(old, final)
            raise
        with contextlib.suppress(OSError):
            _flush(final.parent, os.O_RDONLY)
    except OSError as exc:
        raise explained(exc, final) from exc
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if lock is not None:
            os.close(lock)
