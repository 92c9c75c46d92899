"""The sizes of a ladder, checked against the model and filled in before anything is loaded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from sega_jax import positional as pe
from sega_jax.families.base import Outline
from sega_jax.families.registry import family_named
from sega_jax.geometry import Grid
from sega_jax.layouts.scalediff import Neighborhood
from sega_jax.layouts.streams import Layout
from sega_jax.sampling.registry import get_layout
from sega_jax.sampling.rungs import RHO, Rung, text_of
from sega_jax.sampling.schedule import MuPolicy, check_steps

TAU, TAU_FEW_STEPS = 0.6, 0.5  # share of the steps that a stage runs: FLUX.1-dev, FLUX.1-schnell


def default(grid: Grid) -> tuple[Rung, ...]:
    """From the trained size, or the nearest below it that divides the grid, by factors of three, then of two.

    Raises:
        ValueError: no such size.
    """
    trained = grid.spec.trained[0] * grid.spec.trained[1]
    for factor in range(1, min(grid.height, grid.width) // 4 + 1):
        rows, columns = grid.height // factor, grid.width // factor
        whole = (rows * factor, columns * factor) == (grid.height, grid.width) and not rows % 4 and not columns % 4
        twos = factor & -factor
        threes = round(math.log(factor // twos, 3))
        if whole and rows * columns <= 1.05 * trained and twos * 3**threes == factor:
            growth = itertools.accumulate([1] + [3] * threes + [2] * (twos.bit_length() - 1), int.__mul__)
            side = grid.spec.pixels_per_token
            return tuple(Rung(columns * side * n, rows * side * n) for n in growth)
    raise ValueError(
        f"{grid.pixels[1]}x{grid.pixels[0]} is no trained size enlarged by factors of two and three; give the sizes, "
        "as in ladder='1024,2048,4096'"
    )


def resolve(
    rungs: Sequence[Rung],
    outline: Outline,
    *,
    positional: str,
    layout: Layout,
    steps: int | None,
    mu: MuPolicy | None,
    source: bool,
) -> tuple[Rung, ...]:
    """Rungs with every default filled in.

    Args:
        rungs: as asked for.
        outline: of the pipeline.
        positional: method of rungs that name none; ``"auto"`` goes by the recipe for what the layout shows it.
        layout: of rungs that name none; the first is dense unless it names one.
        steps, mu: of rungs that name none; None goes by recipe.
        source: whether a picture takes the place of the first stage's result.

    Raises:
        ValueError: for the first field that cannot be served, with value and remedy.
    """
    if source and len(rungs) < 2:
        raise ValueError(
            f"ladder={text_of(rungs)!r} with init_image: the picture takes the place of the first size; give two sizes"
        )
    spec, schedule = outline.rope, outline.schedule
    grids = [spec.grid_for_pixels(rung.height, rung.width, outline.text_tokens) for rung in rungs]
    for below, above in itertools.pairwise(rungs):
        if above.width <= below.width or above.height <= below.height:
            raise ValueError(
                f"ladder: {above.width}x{above.height} after {below.width}x{below.height}: sizes must grow"
            )
        if above.width * below.height != above.height * below.width:
            raise ValueError(
                f"ladder: {above.width}x{above.height} has another aspect ratio than {below.width}x{below.height}; "
                f"try {above.width}x{max(1, round(above.width * below.height / below.width))}"
            )
    base = grids[0]
    small = base.tokens <= 1.05 * spec.trained[0] * spec.trained[1]
    window = (base.height, base.width) if small else spec.trained
    done = []
    for number, (rung, grid) in enumerate(zip(rungs, grids, strict=True)):
        where = f"ladder entry {str(rung)!r}: "
        try:
            whose = get_layout(rung.layout if rung.layout is not None else "dense" if number == 0 else layout)
            if not hasattr(whose, "calls"):  # crpa, scale-dit: runs of several sizes themselves
                raise ValueError(f"layout={whose.name!r} climbs by itself; a ladder takes dense or scalediff")
            if isinstance(whose, Neighborhood) and whose.window is None and window != spec.trained:
                whose = replace(whose, window=window)
            seen = next(iter(whose.grids(grid).values()))
            known = family_named(outline.family).recipe(outline, seen)
            named = positional if rung.positional is None else rung.positional
            method = pe.describe(pe.get(known.positional if named == "auto" else named))
            count = check_steps(rung.steps or steps or known.steps)
            tau = rung.tau or (TAU if schedule.dynamic else TAU_FEW_STEPS)
            first = rung.start
            if first is None:
                # spec: the float product may fall just below a whole number
                first = 0 if number == 0 else math.floor(count * (1 - tau) + 1e-6)
            if first >= count:
                raise ValueError(f"start={first}: leaves no step of {count}")
            if number == 0 and (rung.tau is not None or first):
                raise ValueError("the first size starts from noise; tau and start are for the others")
            policy = rung.mu if rung.mu is not None else mu if mu is not None else known.mu
            schedule.mu(grid.tokens, policy)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error
        filled = Rung(rung.width, rung.height, positional=method, layout=whose.name, steps=count, mu=policy)
        if number:
            filled = replace(
                filled,
                start=first,
                rho_mix=rung.rho_mix or rung.rho or RHO,
                rho_guide=rung.rho_guide or rung.rho or RHO,
                gamma=rung.gamma or "sigma",
                reference=rung.reference or "mixed",
                posterior=rung.posterior or "sample",
            )
        done.append(filled)
    return tuple(done)


def sigmas_of(rungs: Sequence[Rung], number: int, outline: Outline) -> np.ndarray:
    """Noise levels of a rung filled in by `resolve`, f32 [steps + 1].

    The shift is that of the first size at every rung, as published, unless a rung's ``mu`` is ``native``.
    """
    rung = rungs[number]
    sized = rung if rung.mu == "native" else rungs[0]
    grid = outline.rope.grid_for_pixels(sized.height, sized.width)
    return outline.schedule.sigmas(rung.steps, grid.tokens, rung.mu)[rung.start or 0 :]
