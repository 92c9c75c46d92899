"""Where things are kept between runs: the cache folder, and compiled programs in it."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
from pathlib import Path

import jax

from sega_jax.runtime.private import private_folder, remove_unsealed, seal

_PROGRAM = r".+-[0-9a-f]{64}-cache"  # how JAX calls the entries of its cache

logger = logging.getLogger(__name__)


def cache_folder() -> Path | None:
    """``$SEGA_JAX_CACHE``, else ``sega_jax`` in the user's cache folder; None where ``SEGA_JAX_CACHE=off``."""
    chosen = os.environ.get("SEGA_JAX_CACHE")
    if chosen == "off":
        return None
    if not chosen:
        chosen = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sega_jax"
    return Path(chosen).expanduser()


def use_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Keep compiled programs on disk between runs, in ``programs`` of the cache folder.

    They are code, so the folder is closed to other users, and what is not as this package's processes left it
    (`sega_jax.runtime.private`) is removed and compiled anew.

    Args:
        folder: cache folder; default ``$SEGA_JAX_CACHE``, else ``sega_jax`` in the user's cache folder.  A directory
            that JAX was configured with (``JAX_COMPILATION_CACHE_DIR``) is left alone, and ``SEGA_JAX_CACHE=off``
            switches the cache off.

    Returns:
        The folder in use, or None.
    """
    configured = jax.config.jax_compilation_cache_dir
    if configured and (folder is None or configured == str(_programs(folder))):
        return Path(configured)
    root = cache_folder() if not folder else Path(folder).expanduser()
    if root is None:
        return None
    path = _programs(root)
    try:
        remove_unsealed(private_folder(path), _PROGRAM)
    except OSError as error:
        logger.warning("compiled programs are not kept: %s", error)
        return None
    atexit.register(keep_compiled)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return path


def _programs(folder: str | os.PathLike[str]) -> Path:
    return Path(folder).expanduser() / "programs"


def keep_compiled() -> None:
    """Notes what was compiled so far as sound; called at the end of a process."""
    folder = jax.config.jax_compilation_cache_dir
    if folder and Path(folder).name == "programs":
        with contextlib.suppress(OSError):
            seal(Path(folder), _PROGRAM)
