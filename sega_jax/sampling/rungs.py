"""What a ladder asks for: sizes with options, read from text, checked and filled in before anything is loaded.

A ladder is written as sizes from small to large, separated by commas, each followed by its options::

    1024, 2048 positional=sega layout=dense, 4096 tau=0.5 layout=scalediff(jitter=True)
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from sega_jax import positional as pe
from sega_jax.families.flux import Outline
from sega_jax.families.recipes import recipe
from sega_jax.geometry import Grid
from sega_jax.layouts.scalediff import Neighborhood
from sega_jax.layouts.streams import Layout
from sega_jax.sampling import latent_ops as ops
from sega_jax.sampling.registry import get_layout
from sega_jax.sampling.schedule import MuPolicy

RHO = 0.25  # low-pass ratio of the published FLUX runs
TAU, TAU_FEW_STEPS = 0.6, 0.5  # share of the steps that a stage runs: FLUX.1-dev, FLUX.1-schnell


@dataclass(frozen=True)
class Rung:
    """One size of a ladder as it was asked for; None where a default applies.

    Attributes:
        width, height: pixels.
        positional: method by name or expression.
        layout: by name or expression.
        steps: of the whole schedule, of which the stage runs the last part.
        tau: share of the steps to run, in (0, 1]; the noise level is that of the first of them.
        start: the first step instead of ``tau``.
        mu: shift of the schedule: native, clamp or a number; default the first size's.
        rho, rho_mix, rho_guide: low-pass ratio of both operators, of frequency mixing, of structure guidance.
        gamma: structure guidance: ``sigma``, ``relative`` (as for SDXL, 1 at the stage's start) or ``none``.
        reference: ``mixed``, ``image`` or ``latent``.
        posterior: ``sample`` or ``mean``.
    """

    width: int
    height: int
    positional: str | None = None
    layout: str | None = None
    steps: int | None = None
    tau: float | None = None
    start: int | None = None
    mu: MuPolicy | None = None
    rho: float | None = None
    rho_mix: float | None = None
    rho_guide: float | None = None
    gamma: str | None = None
    reference: str | None = None
    posterior: str | None = None

    def __str__(self) -> str:
        size = str(self.width) if self.width == self.height else f"{self.width}x{self.height}"
        given = [(f.name, getattr(self, f.name)) for f in fields(self)[2:]]
        return " ".join([size, *(f"{name}={value}" for name, value in given if value is not None)])


OPTIONS = tuple(f.name for f in fields(Rung)[2:])
_CHOICES = {
    "gamma": ("sigma", "relative", "none"),
    "reference": ("mixed", "image", "latent"),
    "posterior": ("sample", "mean"),
}


def _split(text: str, separator: str) -> list[str]:
    """Parts of a text at separators outside brackets and quotes."""
    parts, depth, quote, part = [], 0, "", ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif not depth and (c.isspace() if separator == " " else c == separator):
            parts.append(part)
            part = ""
            continue
        part += c
    return [p.strip() for p in [*parts, part]]


def _value(name: str, text: str) -> object:
    if name in ("positional", "layout"):
        return text
    if name in _CHOICES:
        if text not in _CHOICES[name]:
            raise ValueError(f"{name}={text!r}: expected {', '.join(_CHOICES[name])}")
        return text
    if name == "mu" and text in ("native", "clamp"):
        return text
    whole = name in ("steps", "start")
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name}={text!r}: expected a {'whole ' if whole else ''}number")
    low, high = {"steps": (1, math.inf), "start": (0, math.inf), "mu": (-math.inf, math.inf)}.get(name, (0, 1))
    if not low <= number <= high or (number == 0 and name not in ("start", "mu")):
        raise ValueError(
            f"{name}={text}: expected a number {f'of at least {low}' if whole else 'above 0 and at most 1'}"
        )
    return number


def parse(text: str) -> tuple[Rung, ...]:
    """Rungs of a ladder; see the module's docstring.

    Raises:
        ValueError: naming the entry, and what was expected.
    """
    rungs = []
    for entry in _split(text, ","):
        size, *options = [word for word in _split(entry, " ") if word] or [""]
        where = f"ladder entry {entry!r}: "
        match = re.fullmatch(r"(\d+)(?:[x×](\d+))?", size, re.ASCII)
        if not match:
            raise ValueError(f"{where}expected a size such as 2048 or 2048x1024 first, then options name=value")
        values: dict[str, object] = {}
        for option in options:
            name, equals, value = option.partition("=")
            if not equals or name not in OPTIONS:
                raise ValueError(f"{where}{option!r} is no option; known: {', '.join(f'{o}=…' for o in OPTIONS)}")
            if name in values:
                raise ValueError(f"{where}{name} is given twice")
            try:
                values[name] = _value(name, value)
            except ValueError as error:
                raise ValueError(f"{where}{error}") from error
        if "tau" in values and "start" in values:
            raise ValueError(f"{where}tau and start are both given; one of them says where the stage starts")
        if "rho" in values and ("rho_mix" in values or "rho_guide" in values):
            raise ValueError(f"{where}rho stands for rho_mix and rho_guide; give it or them")
        rungs.append(Rung(int(match[1]), int(match[2] or match[1]), **values))
    return tuple(rungs)


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


def text_of(rungs: Sequence[Rung]) -> str:
    """A ladder as text that `parse` reads back."""
    return ", ".join(map(str, rungs))


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
    spec, config, schedule = outline.rope, outline.transformer_config, outline.schedule
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
            known = recipe(
                seen,
                guidance_embeds=config.guidance_embeds,
                dynamic_shift=schedule.dynamic,
                text_width=config.text_dim,
            )
            named = positional if rung.positional is None else rung.positional
            method = pe.describe(pe.get(known.positional if named == "auto" else named))
            count = rung.steps or steps or known.steps
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


def gammas_of(rung: Rung, sigmas: np.ndarray) -> np.ndarray | None:
    """Share of structure guidance at every step, f32 [steps], or None."""
    if rung.gamma in (None, "none"):
        return None
    if rung.gamma == "sigma":
        return ops.gamma_of_flow(sigmas)
    return ops.gamma_of_diffusion(sigmas / np.maximum(1 - sigmas, 1e-6))  # noise over signal of a flow
