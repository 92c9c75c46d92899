"""Ultra-high-resolution image generation with diffusion transformers in JAX.

import sega_jax as sj
pipe = sj.Pipeline.from_pretrained("nano")
pipe.generate("a red circle", width=512, height=512, positional="yarn").images[0].save("out.png")
"""

import importlib
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
    "use_compilation_cache": "sega_jax.runtime.cache",
}

if TYPE_CHECKING:
    from sega_jax.geometry import Grid, RopeSpec
    from sega_jax.pipeline.pipeline import Pipeline, Result, velocity
    from sega_jax.runtime.cache import use_compilation_cache
    from sega_jax.sampling.denoise import Conditioning, euler

__all__ = ["Conditioning", "Grid", "Pipeline", "Result", "RopeSpec", "euler", "use_compilation_cache", "velocity"]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'sega_jax' has no attribute {name!r}")
