"""Whether a run could write its files, asked before the first step."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Collection, Iterable
from pathlib import Path


def check_names(paths: Iterable[Path]) -> None:
    """Refuses names that no file can have, or that a record could not hold.

    Raises:
        ValueError: not Unicode, control characters, or too long for the file system.
    """
    for path in paths:
        text = str(path)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{text!r}: the name is not UTF-8; give another with --out") from None
        if any(ord(c) < 32 for c in text):
            raise ValueError(f"{text!r}: control characters in a file's name; give another with --out")
        try:
            os.lstat(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ValueError(f"{text[:80]!r}: cannot be a file's name ({error.strerror}); give another") from error


def check_targets(paths: Collection[Path], *, look_only: bool = False) -> None:
    """Refuses files that could not be written, whatever lies there may be replaced.

    Args:
        paths: files to be written; folders that are missing are made later, in the nearest that is there.
        look_only: nothing is written to try, where the system has no way of trying unseen.

    Raises:
        IsADirectoryError: a folder, where a file is to be.
        PermissionError, OSError: read-only, or not a file; or a folder in which no file can be made.
    """
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            continue
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder; give a file name", str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "is no file but a device, pipe or socket; give another name", str(path))
        if not status.st_mode & 0o222 or not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "is read-only; give another name, or make it writable", str(path))
    folders = (next((above for above in path.parents if os.path.lexists(above)), path.parent) for path in paths)
    for folder in dict.fromkeys(folders):
        _check_folder(folder, look_only)


def _check_folder(folder: Path, look_only: bool) -> None:
    try:
        if not folder.stat().st_mode & 0o222:
            raise PermissionError(errno.EACCES, "read-only")
        _try_to_write(folder, look_only)
    except OSError as error:
        words = {errno.EROFS: "the file system is read-only", errno.ENOSPC: "the disk is full"}
        reason = words.get(error.errno or 0, "no file can be written here")
        raise PermissionError(
            errno.EACCES, f"{reason} ({error.strerror}); choose another folder", str(folder)
        ) from None


def _try_to_write(folder: Path, look_only: bool) -> None:
    if hasattr(os, "O_TMPFILE"):
        try:
            os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o600))  # a file without a name: nobody sees it
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
                raise
    if look_only:
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "Permission denied")
        return
    probe = folder / f".{secrets.token_hex(8)}.probe"
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    finally:
        probe.unlink(missing_ok=True)
