"""What is kept on disk between runs: compiled programs and compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """``$SEGA_JAX_CACHE``, else ``sega_jax`` in the user's cache folder; None where ``SEGA_JAX_CACHE=off``."""
    chosen = os.environ.get("SEGA_JAX_CACHE")
    if chosen == "off":
        return None
    if not chosen:
        chosen = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sega_jax"
    return Path(chosen).expanduser()


def use_compilation_cache(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Keep compiled programs on disk between runs.

    Args:
        folder: where; default ``$SEGA_JAX_CACHE``, else ``sega_jax`` in the user's cache folder.  A directory that
            JAX was configured with (``JAX_COMPILATION_CACHE_DIR``) is left alone, and ``SEGA_JAX_CACHE=off``
            switches the cache off.

    Returns:
        The folder in use, or None.
    """
    import jax

    if folder is None and jax.config.jax_compilation_cache_dir:
        return Path(jax.config.jax_compilation_cache_dir)
    path = cache_folder() if not folder else Path(folder).expanduser()
    if path is None:
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return path
