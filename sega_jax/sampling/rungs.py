"""What a ladder asks for: sizes with options, read from text.

A ladder is written as sizes from small to large, separated by commas, each followed by its options::

    1024, 2048 positional=sega layout=dense, 4096 tau=0.5 layout=scalediff(jitter=True)
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from sega_jax.sampling import latent_ops as ops
from sega_jax.sampling.schedule import MOST_STEPS, MuPolicy

RHO = 0.25  # low-pass ratio of the published FLUX runs


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


LONGEST = 10_000  # characters of a ladder
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
        finite = math.isfinite(number)
    except (ValueError, OverflowError):
        finite = False
    if not finite:
        raise ValueError(f"{name}={text!r}: expected a {'whole ' if whole else ''}number")
    low, high = {"steps": (1, MOST_STEPS), "start": (0, MOST_STEPS), "mu": (-math.inf, math.inf)}.get(name, (0, 1))
    if not low <= number <= high or (number == 0 and name not in ("start", "mu")):
        raise ValueError(
            f"{name}={text}: expected a number {f'from {low} to {high}' if whole else 'above 0 and at most 1'}"
        )
    return number


def parse(text: str) -> tuple[Rung, ...]:
    """Rungs of a ladder; see the module's docstring.

    Raises:
        ValueError: naming the entry, and what was expected.
    """
    if len(text) > LONGEST:
        raise ValueError(f"a ladder of {len(text)} characters; expected at most {LONGEST}")
    rungs = []
    for entry in _split(text, ","):
        size, *options = [word for word in _split(entry, " ") if word] or [""]
        where = f"ladder entry {entry!r}: "
        match = re.fullmatch(r"(\d{1,9})(?:[x×](\d{1,9}))?", size, re.ASCII)
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


def text_of(rungs: Sequence[Rung]) -> str:
    """A ladder as text that `parse` reads back."""
    return ", ".join(map(str, rungs))


def gammas_of(rung: Rung, sigmas: np.ndarray) -> np.ndarray | None:
    """Share of structure guidance at every step, f32 [steps], or None."""
    if rung.gamma in (None, "none"):
        return None
    if rung.gamma == "sigma":
        return ops.gamma_of_flow(sigmas)
    return ops.gamma_of_diffusion(sigmas / np.maximum(1 - sigmas, 1e-6))  # noise over signal of a flow
