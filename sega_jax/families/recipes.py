"""What ``positional='auto'`` and unset options mean: per family and size, with the source of every number."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from sega_jax.geometry import Grid
from sega_jax.sampling.schedule import MuPolicy

# Published without restrictions; DyPE states "patent pending", SEGA's licence is unclear.
AUTO_ABOVE_NATIVE = "yarn"
# At twice nano's side PI keeps the object, and SEGA's magnitudes its colour and place (docs/nano.md).
NANO_ABOVE_NATIVE = "pi()+sega_magnitude()"
NANO_IN_WINDOWS = "pi"  # what nano's guidance LoRA was trained with


@dataclass(frozen=True)
class Recipe:
    """Defaults for one picture.

    Attributes:
        positional: positional method.
        mu: policy of the schedule's shift.
        steps: model evaluations.
        guidance: distilled guidance, None where the checkpoint has no such input.
        true_guidance: scale of classifier-free guidance when a negative prompt is given, 1 otherwise.
        source: where the numbers come from.
    """

    positional: str
    mu: MuPolicy
    steps: int
    guidance: float | None
    true_guidance: float
    source: str


def recipe(grid: Grid, *, guidance_embeds: bool, dynamic_shift: bool, text_width: int, guidance: float = 3.5) -> Recipe:
    """Defaults for a grid of a FLUX.1 checkpoint.

    Args:
        grid: token grid of the picture.
        guidance_embeds: whether the checkpoint takes distilled guidance (dev) or not.
        dynamic_shift: whether its schedule shifts with size (not schnell).
        text_width: width of the text stream; tells the demo model from FLUX.1.
        guidance: distilled guidance the checkpoint is published with.
    """
    beyond, nano = max(grid.stretch) > 1, text_width < 1024
    positional, size = "none", "at or below the trained grid: plain RoPE"
    if beyond and nano:
        positional, size = NANO_ABOVE_NATIVE, "beyond the trained grid: PI with SEGA's magnitudes"
    elif beyond:
        positional, size = AUTO_ABOVE_NATIVE, "beyond the trained grid: YaRN, as in DyPE's code (arXiv 2510.20766)"
    if guidance_embeds:
        card = "FLUX.1-dev model card" if guidance == 3.5 else "scripts of DyPE and SEGA for FLUX.1-Krea-dev"
        return Recipe(positional, "clamp", 28, guidance, 3.5, f"{card} (28 steps, guidance {guidance:g}); {size}")
    if not dynamic_shift:
        return Recipe(positional, "clamp", 4, None, 3.5, f"FLUX.1-schnell model card (4 steps); {size}")
    if nano:
        return Recipe(positional, "clamp", 20, None, 3.0, f"nano model card (20 steps); {size}")
    return Recipe(positional, "clamp", 28, None, 3.5, f"FLUX.1-dev model card (28 steps); {size}")


def guided_recipe(known: Recipe, guidance: float, *, nano: bool, positional: str | None = None) -> Recipe:
    """Defaults of layout ``scale-dit``, from those of the plain layout.

    Args:
        known: defaults of the plain layout.
        guidance: of the large picture, where the checkpoint takes it.
        nano: whether this is the demo model, which keeps PI and its own schedule.
        positional: what the LoRA was trained with, if it says so.
    """
    settings = {"guidance": None if known.guidance is None else guidance}
    if not nano:  # Scale-DiT's FLUX.1 code: ntk_factor 10, and the scheduler's static shift of 3
        settings |= {"positional": "rebase(factor=10.0)", "mu": math.log(3)}
    elif known.positional == NANO_ABOVE_NATIVE:
        settings["positional"] = NANO_IN_WINDOWS
    if positional is not None:
        settings["positional"] = positional
    return replace(known, **settings, source=f"Scale-DiT, release A; {known.source}")
