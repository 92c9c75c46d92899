"""Layouts by name or expression, those of one step and those that are ways of sampling alike."""

from __future__ import annotations

import ast
from dataclasses import fields, replace
from typing import Any

from sega_jax.layouts.dense import Dense
from sega_jax.layouts.scalediff import Neighborhood
from sega_jax.layouts.streams import Layout
from sega_jax.sampling import scale_dit
from sega_jax.sampling.crpa import Crpa

LAYOUTS: dict[str, Any] = {"dense": Dense(), "crpa": Crpa(), "scalediff": Neighborhood()}


def get_layout(layout: str | Layout | Crpa | scale_dit.Guided) -> Layout | Crpa | scale_dit.Guided:
    """A layout by name or expression such as ``crpa(levels=3, fine=0.2)``, or the object itself;
    ``scale-dit`` names the settings of a two-stage run.

    Raises:
        ValueError: for an unknown name or option; the known ones are listed.
        TypeError: neither text nor a layout.
    """
    if not isinstance(layout, str):
        if not isinstance(getattr(layout, "name", None), str) or isinstance(layout, type):
            raise TypeError(
                f"layout={layout!r}: expected a name, an expression or a layout; got {type(layout).__name__}"
            )
        return layout
    if layout.partition("(")[0].strip() in scale_dit.PRESETS:
        return scale_dit.parse(layout.strip())
    if layout in LAYOUTS:
        return LAYOUTS[layout]
    try:
        call = ast.parse(layout.strip(), mode="eval").body
        name = call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else ""
        options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords} if name else {}
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        name, options = "", {}
    if name not in LAYOUTS or (name and call.args):
        names = ", ".join([*LAYOUTS, *scale_dit.PRESETS])
        raise ValueError(f"layout={layout!r} is unknown; known: {names}, with options as crpa(levels=3)")
    known = [field.name for field in fields(LAYOUTS[name]) if field.name != "name"]
    unknown = [str(option) for option in options if option not in known]
    if unknown:
        raise ValueError(
            f"layout={layout!r}: {name} has no option {', '.join(unknown)}; known: {', '.join(known) or 'none'}"
        )
    return replace(LAYOUTS[name], **options)
