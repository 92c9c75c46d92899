"""Cache folders whose content is executed: the user's own, closed to others, every file known by its digest.

What is kept there (a compiled kernel, compiled programs) runs as soon as it is read back.  So nothing is read that
another user owns or could have written, and nothing that is not, bit for bit, what was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from pathlib import Path

from converters.files import atomic_path

_DIGEST = ".sha256"
_SEALS = "seals.json"
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def _own(status: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()


def private_folder(path: Path) -> Path:
    """A folder with permissions 0700, made where there is none.

    One that others could write to is emptied of files first: whatever lies in it may be theirs.

    Raises:
        OSError: it cannot be made, is no folder, or belongs to another user.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        status = path.stat()
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(f"{path} is no folder; remove it") from None
        if not _own(status):
            raise PermissionError(f"{path} belongs to another user; remove it, or set SEGA_JAX_CACHE") from None
        if stat.S_IMODE(status.st_mode) & 0o077 and os.name == "posix":
            path.chmod(0o700)
        if status.st_mode & _OTHERS_WRITE and os.name == "posix":
            for entry in path.iterdir():
                if not entry.is_dir() or entry.is_symlink():
                    entry.unlink(missing_ok=True)
    return path


def read_own(path: Path) -> bytes | None:
    """The content of a file that belongs to this user and that no other can write; None for any other."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        others = os.name == "posix" and status.st_mode & _OTHERS_WRITE
        if not stat.S_ISREG(status.st_mode) or not _own(status) or others:
            return None
        return file.read()


def _write(path: Path, data: bytes) -> None:
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
        temporary.chmod(0o600)


def keep(path: Path, data: bytes) -> None:
    """Writes a file and, beside it, its digest; each appears whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    _write(path, data)
    _write(path.with_name(path.name + _DIGEST), hashlib.sha256(data).hexdigest().encode())


def is_kept(path: Path) -> bool:
    """Whether a file is, bit for bit, what `keep` wrote, and nobody else's."""
    data, digest = read_own(path), read_own(path.with_name(path.name + _DIGEST))
    return data is not None and digest is not None and hashlib.sha256(data).hexdigest().encode() == digest


# -- files that another library writes -----------------------------------------------------------------------------


def _seals(folder: Path) -> dict[str, list]:
    try:
        seals = json.loads(read_own(folder / _SEALS) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return seals if isinstance(seals, dict) else {}


def _look(status: os.stat_result) -> list[int]:
    """What changes when somebody writes to a file: a glance that spares reading it."""
    return [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def seal(folder: Path, pattern: str) -> None:
    """Notes the files of a folder whose whole name matches, as they are now, for `remove_unsealed`.

    Raises:
        OSError: the note cannot be written.
    """
    known, seals = _seals(folder), {}
    for entry in folder.iterdir():
        if re.fullmatch(pattern, entry.name):
            look = _look(entry.lstat())
            noted = known.get(entry.name)
            if isinstance(noted, list) and noted[1:] == look:
                seals[entry.name] = noted
            else:
                data = read_own(entry)
                if data is not None:
                    seals[entry.name] = [hashlib.sha256(data).hexdigest(), *look]
    if seals != known:
        _write(folder / _SEALS, json.dumps(seals).encode())


def remove_unsealed(folder: Path, pattern: str) -> list[str]:
    """Removes files whose whole name matches and that are not as `seal` saw them.

    So goes what a killed process wrote halfway, what has changed since, and what another user put there.

    Returns:
        Their names.
    """
    seals, removed = _seals(folder), []
    for entry in folder.iterdir():
        if not re.fullmatch(pattern, entry.name):
            continue
        noted = seals.get(entry.name)
        sound = isinstance(noted, list) and len(noted) == 5
        if sound and noted[1:] != _look(entry.lstat()):
            data = read_own(entry)
            sound = data is not None and hashlib.sha256(data).hexdigest() == noted[0]
        if not sound:
            entry.unlink(missing_ok=True)
            removed.append(entry.name)
    return removed
