"""Ultra-high-resolution image generation with diffusion transformers in JAX.

import sega_jax as sj
pipe = sj.Pipeline.from_pretrained("nano")
pipe.generate("a red circle", width=512, height=512, positional="yarn").images[0].save("out.png")
"""

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_LAZY = {
    "Pipeline": "sega_jax.pipeline.pipeline",
    "Result": "sega_jax.pipeline.pipeline",
    "velocity": "sega_jax.pipeline.pipeline",
    "Conditioning": "sega_jax.sampling.denoise",
    "euler": "sega_jax.sampling.denoise",
    "Grid": "sega_jax.geometry",
    "RopeSpec": "sega_jax.geometry",
}

if TYPE_CHECKING:
    from sega_jax.geometry import Grid, RopeSpec
    from sega_jax.pipeline.pipeline import Pipeline, Result, velocity
    from sega_jax.sampling.denoise import Conditioning, euler

__all__ = ["Conditioning", "Grid", "Pipeline", "Result", "RopeSpec", "euler", "use_compilation_cache", "velocity"]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'sega_jax' has no attribute {name!r}")


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
