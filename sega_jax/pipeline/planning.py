"""From a request to a plan: every field validated, every default filled in, before anything is loaded or compiled."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sega_jax import positional as pe
from sega_jax.families.base import Outline
from sega_jax.families.registry import family_named
from sega_jax.geometry import Grid
from sega_jax.layouts.scalediff import Neighborhood
from sega_jax.layouts.streams import Layout
from sega_jax.media.photos import Fit, check_fit, check_shape
from sega_jax.pipeline import ladders
from sega_jax.pipeline.arguments import real, several, text, whole
from sega_jax.pipeline.sizes import size_of
from sega_jax.sampling import scale_dit
from sega_jax.sampling.crpa import Crpa, levels_map, stages_of
from sega_jax.sampling.crpa_cost import Estimate, estimate
from sega_jax.sampling.keys import chosen_seed
from sega_jax.sampling.regions import Regions, get_regions
from sega_jax.sampling.registry import get_layout
from sega_jax.sampling.rungs import Rung, parse, text_of
from sega_jax.sampling.schedule import MuPolicy, check_steps, collapse_warning, start_index

logger = logging.getLogger(__name__)

MOST_IMAGES = 10_000  # of one prompt and seed
REGIONS = "auto:0.3"  # what crpa refines unless told


@dataclass(frozen=True)
class Plan:
    """A request with every default filled in; what ``--dry-run`` prints and metadata stores."""

    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    steps: int
    guidance: float | None
    true_guidance: float
    seed: int
    num_images: int
    positional: str
    layout: str
    mu: MuPolicy
    mu_value: float | None
    strength: float | None
    recipe: str
    regions: str | None = None
    estimate: Estimate | None = None  # of layouts of mixed resolution
    ladder: tuple[Rung, ...] | None = None
    fit: Fit | None = None  # how the photo it starts from is brought to size
    shown: tuple[int, int] | None = None  # (width, height) the picture is cut to, where those are no whole tokens

    @property
    def first_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the initial noise has."""
        return (self.height, self.width) if self.ladder is None else (self.ladder[0].height, self.ladder[0].width)

    def evaluations(self, from_picture: bool = False) -> int:
        """Steps that are run, over all stages."""
        if self.ladder is not None:
            counts = [rung.steps - (rung.start or 0) for rung in self.ladder]
            return sum(counts[1:] if from_picture else counts)
        if self.estimate is not None:
            return sum(steps for steps, _, _ in self.estimate.stages.values())
        return self.steps - (0 if self.strength is None else start_index(self.steps, self.strength))

    def record(self, index: int) -> dict:
        """The fields that determine picture ``index``, as metadata stores them."""
        width, height = self.shown or (self.width, self.height)
        fit = self.fit if self.shown is None else "crop"
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "width": width,
            "height": height,
            "steps": self.steps,
            "guidance": self.guidance,
            "true_guidance": self.true_guidance if self.negative_prompt is not None else None,
            "seed": self.seed,
            "image_index": index,
            "positional": self.positional,
            "layout": self.layout,
            "mu": self.mu,
            "strength": self.strength,
            **({} if self.ladder is None else {"ladder": text_of(self.ladder)}),
            **({} if fit is None else {"fit": fit}),
        } | ({} if self.regions is None else {"regions": self.regions})


def plan(
    outline: Outline,
    prompt: str,
    *,
    negative_prompt: str | None = None,
    width: int | None = None,
    height: int | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    true_guidance: float | None = None,
    seed: int | str = 0,
    num_images: int = 1,
    positional: str | pe.Method = "auto",
    layout: str | Layout | Crpa | scale_dit.Guided = "dense",
    mu: MuPolicy | None = None,
    strength: float | None = None,
    regions: Any = None,
    ladder: str | Sequence[Rung] | None = None,
    photo: tuple[int, int] | None = None,
    fit: Fit | None = None,
    guidance_lora: Mapping[str, Any] | None = None,
) -> Plan:
    """Validate a request and fill in its defaults; loads, compiles and computes nothing.

    Args:
        outline: of the pipeline that is to serve it.
        prompt: text; the other fields as in `Pipeline.generate`.
        photo: (width, height) of the picture the run starts from; None starts from noise.
        guidance_lora: what the LoRA of layout scale-dit says about itself; None without one.

    Raises:
        ValueError, TypeError: for the first field that cannot be served, with value and remedy.
    """
    prompt = text("prompt", prompt)
    negative_prompt = None if negative_prompt is None else text("negative_prompt", negative_prompt)
    num_images, seed = whole("num_images", num_images), chosen_seed(seed)
    guidance = None if guidance is None else real("guidance", guidance)
    true_guidance = None if true_guidance is None else real("true_guidance", true_guidance)
    strength = None if strength is None else real("strength", strength)
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"strength={strength:g}: expected a number above 0 and at most 1")
    steps = None if steps is None else whole("steps", steps)
    rungs = parse(ladder) if isinstance(ladder, str) else ladder
    if rungs is not None:
        rungs = tuple(several("ladder", rungs))
        if not rungs or not all(isinstance(rung, Rung) for rung in rungs):
            raise TypeError(f"ladder={ladder!r}: expected text such as '1024,2048', or a list of Rung")
        if (width, height) not in ((None, None), (rungs[-1].width, rungs[-1].height)):
            raise ValueError(
                f"width={width}, height={height} with a ladder that ends at {rungs[-1].width}x{rungs[-1].height}; "
                "leave the size out, or make the last size of the ladder the same"
            )
        width, height = rungs[-1].width, rungs[-1].height
        if strength is not None:
            raise ValueError(f"strength={strength} with a ladder: its stages start at tau=… (or start=…) instead")
    from_picture = photo is not None
    size = size_of(outline.rope, width, height, *((photo, fit) if rungs is None else ()))
    width, height = size.width, size.height
    grid = outline.rope.grid_for_pixels(height, width, outline.text_tokens)
    config, schedule = outline.transformer_config, outline.schedule
    family = family_named(outline.family)
    known = family.recipe(outline, grid)
    if guidance is not None and not outline.takes_guidance:
        raise ValueError(
            f"guidance={guidance}: this checkpoint has no guidance input; use negative_prompt with true_guidance"
        )
    if true_guidance is not None and negative_prompt is None:
        raise ValueError(f"true_guidance={true_guidance}: needs a negative_prompt (an empty one is allowed)")
    if num_images > MOST_IMAGES:
        raise ValueError(f"num_images={num_images}: expected at most {MOST_IMAGES}; vary the seed for more")
    layout = get_layout(layout)
    if isinstance(layout, Neighborhood) and rungs is None and strength is None and max(grid.stretch) > 1:
        rungs = ladders.default(grid)
    if isinstance(layout, Neighborhood) and layout.jitter and rungs is None:
        raise ValueError(f"layout={layout.name!r}: jitter is drawn by the sizes of a ladder, or leave it out")
    if rungs is not None:
        if isinstance(layout, scale_dit.Guided) or any(str(r.layout).startswith(scale_dit.NAME) for r in rungs):
            raise ValueError("ladder: layout scale-dit is a run of two sizes itself; give --size alone")
        auto = isinstance(positional, str) and positional == "auto"
        rungs = ladders.resolve(
            rungs,
            outline,
            positional="auto" if auto else pe.describe(pe.get(positional)),
            layout=layout,
            steps=steps,
            mu=mu,
            source=from_picture,
        )
        if auto:
            positional = rungs[-1].positional
        layout = get_layout(rungs[-1].layout)
        if from_picture:
            check_shape(photo, (rungs[0].width, rungs[0].height), check_fit(fit))
            size = replace(size, fit=fit or "crop")
        elif fit is not None:
            raise ValueError(f"fit={fit!r} with a ladder: only with an init_image")
    if from_picture and rungs is None and strength is None:
        strength = 0.6
    if isinstance(layout, scale_dit.Guided):
        if strength is not None:
            raise ValueError("init_image: layout scale-dit starts from a small picture of its own; use layout='dense'")
        own = guidance_lora or {}
        known = family.guided_recipe(outline, known, layout.guidance, own.get("positional"))
    elif guidance_lora is not None:
        raise ValueError(f"layout={layout.name!r}: a LoRA of the guidance stream works with layout='scale-dit' only")
    if isinstance(positional, str) and positional == "auto":
        method = pe.get(known.positional, imports=False)  # it may be what the header of a LoRA says
    else:
        method = pe.get(positional)
    if isinstance(layout, scale_dit.Guided):
        layout = scale_dit.resolve(layout, method, grid, guidance_lora)
        if guidance_lora is None:
            logger.warning("%s", scale_dit.TRAINING_FREE)
    elif not isinstance(layout, Crpa):
        layout.grids(grid)  # refuses a grid that it cannot lay out
    steps = check_steps(known.steps if steps is None else steps)
    mu = known.mu if mu is None else mu
    sigmas = schedule.sigmas(steps, grid.tokens, mu)
    if strength is not None:
        sigmas = sigmas[start_index(steps, strength) :]
    chosen = _regions(layout, regions, grid, sigmas)
    rows = 1 if negative_prompt is None else 2
    warning = collapse_warning(sigmas)
    if warning:
        logger.warning("%s", warning)
    return Plan(
        prompt=prompt,
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        steps=steps,
        guidance=(known.guidance if guidance is None else guidance) if outline.takes_guidance else None,
        true_guidance=known.true_guidance if true_guidance is None else true_guidance,
        seed=seed,
        num_images=num_images,
        positional=pe.describe(method),
        layout=layout.name,
        mu=mu,
        mu_value=schedule.mu(grid.tokens, mu),
        strength=strength,
        recipe=known.source,
        regions=None if chosen is None else str(chosen),
        estimate=None if chosen is None else estimate(config, grid, sigmas, layout, chosen, rows),
        ladder=rungs,
        fit=size.fit,
        shown=size.shown,
    )


def _regions(layout: Layout | Crpa, regions: Any, grid: Grid, sigmas: np.ndarray) -> Regions | None:
    """The regions of a request, checked against its picture."""
    if not isinstance(layout, Crpa):
        if regions is not None:
            raise ValueError(f"regions={str(regions)!r}: layout={layout.name!r} has none; give layout='crpa'")
        return None
    layout.check(grid)
    chosen = get_regions(REGIONS if regions is None else regions)
    whole = chosen.spread(layout.levels - 1)
    if whole.automatic is None:
        whole.masks(grid)
    elif not stages_of(sigmas, layout)[1][0]:
        raise ValueError(
            f"regions={str(chosen)!r} are chosen from the coarse result, but no step of this run comes before "
            f"coarse={layout.coarse:g}; draw the regions (center:0.3), or lower coarse in layout={layout.name!r}"
        )
    return chosen


def regions_map(grid: Grid, plan: Plan) -> np.ndarray:
    """Level of the token at each fine place, int8 [H, W], of regions known beforehand."""
    layout = get_layout(plan.layout)
    return levels_map(get_regions(plan.regions).spread(layout.levels - 1).masks(grid))[0]
