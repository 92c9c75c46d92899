"""Errors about checkpoint files.  Every one of them says what was given, what was expected, what to do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


class CheckpointError(Exception):
    """A checkpoint cannot be used: missing, damaged, of another model, or incomplete."""


class CoverageError(CheckpointError):
    """Source tensors and targets do not match one to one; lists every missing, extra and misshapen tensor."""


@contextlib.contextmanager
def naming(*paths: str | os.PathLike[str]) -> Iterator[None]:
    """Puts the first path before the message of a `CheckpointError` that names none of them."""
    try:
        yield
    except CheckpointError as exc:
        if any(os.fspath(path) in str(exc) for path in paths):
            raise
        raise type(exc)(f"{os.fspath(paths[0])}: {exc}") from exc
