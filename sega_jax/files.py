"""Output files appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

_EXPLAIN = {
    errno.ENOSPC: "the disk is full; free some space or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some space or write elsewhere",
    errno.EACCES: "no permission to write here; choose another folder",
    errno.EPERM: "no permission to write here; choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
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
        _flush(temporary, os.O_RDWR)
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


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
