"""What many tests build: inputs of FLUX.1's kind in one line."""

from typing import Any

from sega_jax.models.denoiser import StepInputs
from sega_jax.sampling.denoise import Conditioning


def flux_conditioning(
    text: Any, pooled: Any, guidance: Any = None, negative: tuple | None = None, scale: Any = None
) -> Conditioning:
    """A T5 sequence, a pooled vector, distilled guidance; ``negative``: the first two of another prompt."""
    names = ("text", "pooled")
    return Conditioning(
        dict(zip(names, (text, pooled), strict=True)),
        {} if guidance is None else {"guidance": guidance},
        None if negative is None else dict(zip(names, negative, strict=True)),
        scale,
    )


def step_inputs(streams: dict, sigma: Any, pooled: Any, guidance: Any = None) -> StepInputs:
    """One evaluation's inputs of a FLUX.1 network."""
    return StepInputs(streams, sigma, {"pooled": pooled} | ({} if guidance is None else {"guidance": guidance}))
