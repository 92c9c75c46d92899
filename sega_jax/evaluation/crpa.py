"""Mixed resolution compared on nano: velocities with single-resolution models, pictures with their prompts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sega_jax.layouts.crpa import arrange, core, level_name, up
from sega_jax.models.abstract import initialize
from sega_jax.nano import accuracy, render
from sega_jax.pipeline.pipeline import Pipeline
from sega_jax.sampling.crpa import (
    RESIZERS,
    Canvases,
    block_mean,
    composite,
    levels_map,
    noises,
    pixels_of,
)
from sega_jax.sampling.regions import parse_regions
from sega_jax.sampling.registry import get_layout

# Without bands for velocities: there every token is compared.
LAYOUTS = {
    "crpa": "crpa(pad_fine=0, pad_coarse=0)",
    "pi-lr": "crpa(pad_fine=0, pad_coarse=0, positions='pi-lr')",
    "pi-hr": "crpa(pad_fine=0, pad_coarse=0, positions='pi-hr')",
}


def truth(pipe: Pipeline, count: int, side: int, seed: int = 0) -> tuple[list[str], jax.Array]:
    """Unseen prompts and the latents of their rendered pictures, f32 [count, h, w, C]."""
    cases = accuracy.unseen_prompts(count, seed)
    rng = np.random.default_rng(seed)
    pictures = np.stack([render.to_float(render.render(scene, side, side, rng)) for scene, _ in cases])
    return [prompt for _, prompt in cases], pipe.encode_image(pictures, seed)


def canvases(clean: jax.Array, noise: Canvases, sigma: float) -> Canvases:
    """Every level of a picture at one noise level."""
    out = {}
    for name, field in noise.items():
        out[name] = (1 - sigma) * clean + sigma * field
        clean = block_mean(clean)
    return out


def _squares(got: Canvases, alone: Canvases, masks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Squared differences and squares of the reference, summed over the content of each level: f64 [2] a level."""
    sums = []
    for level, mask in enumerate(core(masks)):
        reference = np.asarray(alone[level_name(level)], np.float64)
        inside = np.asarray(pixels_of(mask, reference))
        difference = np.square(np.asarray(got[level_name(level)], np.float64) - reference)
        sums.append(np.array([(difference * inside).sum(), (np.square(reference) * inside).sum()]))
    return sums


def velocity_errors(
    pipe: Pipeline,
    side: int,
    *,
    shares: Sequence[float],
    layouts: Mapping[str, str] = LAYOUTS,
    positional: str = "none",
    sigmas: Sequence[float] = (0.9, 0.75, 0.6, 0.45),
    pictures: int = 16,
    batch: int = 8,
) -> list[dict[str, Any]]:
    """Relative squared error of mixed velocities against the single-resolution models at equal ``x_sigma``.

    The reference of a level's tokens is the same model run on that level's whole canvas.  States are rendered
    pictures, encoded and noised: ``len(sigmas) * pictures`` of them.

    Args:
        pipe: the demo model.
        side: pixels of the finest level.
        shares: of the area that a centred region refines.
        layouts: name -> layout expression.
        positional: method of all of them.
        sigmas: noise levels.
        pictures: number of pictures.
        batch: pictures per model call.

    Returns:
        Rows with layout, share, level, and ``error``: sum of squared differences over the sum of squares of the
        reference, over the tokens that are the level's content; ``by_sigma`` the same for each noise level.
    """
    prompts, clean = truth(pipe, pictures, side)
    conditioning = pipe.encode(prompts)
    levels = max(get_layout(layout).levels for layout in layouts.values())
    field = pipe.noise(0, side, side, range(pictures))
    fields, grid = noises(field, levels), pipe.grid(side, side)
    velocity = pipe.velocity(positional)
    sums: dict[tuple, np.ndarray] = {}
    for sigma in sigmas:
        x = canvases(clean, fields, sigma)
        for first in range(0, pictures, batch):
            rows = slice(first, first + batch)
            part = {name: canvas[rows] for name, canvas in x.items()}
            asked = jax.tree.map(lambda a, rows=rows: a[rows] if a.ndim else a, conditioning)
            alone = {name: velocity(pipe.params, canvas, sigma, asked) for name, canvas in part.items()}
            for share in shares:
                for name, layout in layouts.items():
                    options = get_layout(layout)
                    masks = parse_regions(f"center:{share}").spread(options.levels - 1).masks(grid)
                    mixed = options.mixed(masks, grid)
                    content = arrange(tuple(map(jnp.asarray, masks)), mixed)
                    own = {level_name(level): part[level_name(level)] for level in range(options.levels)}
                    got, _ = replace(velocity, layout=mixed).advance(pipe.params, own, sigma, asked, content=content)
                    for level, found in enumerate(_squares(got, alone, masks)):
                        key = (name, share, level, sigma)
                        sums[key] = sums.get(key, np.zeros(2)) + found
    rows = []
    for name, share, level in dict.fromkeys(key[:3] for key in sums):
        each = {sigma: sums[name, share, level, sigma] for sigma in sigmas}
        total = sum(each.values())
        rows.append(
            {
                "layout": name,
                "share": share,
                "level": level,
                "error": float(total[0] / total[1]),
                "by_sigma": {str(sigma): float(a / b) for sigma, (a, b) in each.items()},
                "states": len(sigmas) * pictures,
            }
        )
    return rows


def summarize(rows: Sequence[Mapping[str, Any]]) -> str:
    """Velocity errors in Markdown: a line per size, method, share and layout; finest tokens (inside) first."""
    levels = max((row["level"] for row in rows), default=1) + 1
    names = ["inside", *(f"level {level}" for level in range(1, levels - 1)), "outside"]
    titles = ("pixels", "positional", "share", "layout", *names, "states")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    found: dict[tuple, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in ("side", "positional", "share", "layout")), {})[row["level"]] = row
    for (side, positional, share, layout), each in found.items():
        middle = [f"{each[level]['error']:.4f}" if level < max(each) else "" for level in range(1, levels - 1)]
        cells = [f"{each[0]['error']:.4f}", *middle, f"{each[max(each)]['error']:.4f}", str(each[0]["states"])]
        lines.append("| " + " | ".join([str(side), f"`{positional}`", f"{share:.0%}", layout, *cells]) + " |")
    return "\n".join(lines)


def seams_of_estimates(
    pipe: Pipeline,
    side: int,
    *,
    share: float,
    sigmas: Sequence[float] = (0.9, 0.6, 0.3),
    pictures: int = 16,
    batch: int = 4,
) -> list[dict[str, Any]]:
    """Seams of clean pictures estimated in one step of two levels, with and without exchange across the boundary.

    The third case, ``"spliced"``, takes each side from the single-resolution model of its level: what a mixed model
    without any error of its own would give.

    Args:
        pipe: the demo model.
        side: pixels of the fine level.
        share: of the area that a centred region refines.
        sigmas: noise levels.
        pictures: number of rendered pictures, noised.
        batch: pictures per model call.

    Returns:
        Rows with sigma, case, seam (energy of steps across the boundary over that beside it, `boundary_energies`),
        and the velocities' relative squared errors ``inside`` and ``outside``.
    """
    cases = {"exchange": "crpa", "no exchange": LAYOUTS["crpa"], "spliced": None}
    prompts, clean = truth(pipe, pictures, side)
    conditioning = pipe.encode(prompts)
    fields, grid = noises(pipe.noise(0, side, side, range(pictures)), 2), pipe.grid(side, side)
    masks = parse_regions(f"center:{share}").spread(1).masks(grid)
    refined, shown = tuple(map(jnp.asarray, masks)), levels_map(masks)
    velocity = pipe.velocity()
    rows = []
    for sigma in sigmas:
        x = canvases(clean, fields, sigma)
        energies, errors = {case: np.zeros(2) for case in cases}, {case: np.zeros((2, 2)) for case in cases}
        for first in range(0, pictures, batch):
            part = {name: canvas[first : first + batch] for name, canvas in x.items()}
            asked = jax.tree.map(lambda a, first=first: a[first : first + batch] if a.ndim else a, conditioning)
            alone = {name: velocity(pipe.params, canvas, sigma, asked) for name, canvas in part.items()}
            for case, layout in cases.items():
                got = alone
                if layout is not None:
                    mixed = get_layout(layout).mixed(masks, grid)
                    model = replace(velocity, layout=mixed)
                    got, _ = model.advance(pipe.params, part, sigma, asked, content=arrange(refined, mixed))
                estimate = {name: canvas - sigma * got[name] for name, canvas in part.items()}
                whole = composite(estimate, refined, RESIZERS["bicubic"])[level_name(0)]
                energies[case] += boundary_energies(pipe.decode(whole), shown).sum(0)
                errors[case] += _squares(got, alone, masks)
        for case in cases:
            across, beside = energies[case]
            inside, outside = errors[case][:, 0] / errors[case][:, 1]
            row = {"sigma": sigma, "case": case, "seam": across / beside, "inside": inside, "outside": outside}
            rows.append({name: value if name == "case" else float(value) for name, value in row.items()})
    return rows


def summarize_seams(rows: Sequence[Mapping[str, Any]]) -> str:
    """`seams_of_estimates` in Markdown: a line per size, share, noise level and case."""
    names = ("side", "share", "sigma", "case", "seam", "inside", "outside", "pictures")
    lines = ["| pixels | " + " | ".join(names[1:]) + " |", "|---" * len(names) + "|"]
    for row in rows:
        cells = (row["side"], f"{row['share']:.0%}", row["sigma"], row["case"], f"{row['seam']:.2f}")
        errors = (f"{row[name]:.4f}" for name in ("inside", "outside"))
        lines.append("| " + " | ".join(map(str, (*cells, *errors, row["pictures"]))) + " |")
    return "\n".join(lines)


def boundary_energies(pictures: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Energy of steps between neighbouring pixels across the boundary of regions, and next to it: f64 [N, 2].

    Equal energies, summed over pictures, mean that there is no seam.

    Args:
        pictures: [N, H, W, C].
        levels: int [N or 1, h, w], level of the token at each fine place.

    Returns:
        Mean squares; "next to it" is within half a coarse token, so that the picture's content counts little.
    """
    pictures = np.asarray(pictures, np.float64)
    out = []
    for picture, level in zip(pictures, np.broadcast_to(levels, (len(pictures), *levels.shape[1:])), strict=True):
        side = picture.shape[0] // level.shape[0]
        level = up(level, side)
        across, beside = [], []
        for axis in (0, 1):
            steps = np.square(np.diff(picture, axis=axis)).mean(-1)
            seam = np.diff(level.astype(int), axis=axis) != 0
            near = np.zeros_like(seam)
            for shift in range(2, side + 1):
                near |= np.roll(seam, shift, axis) | np.roll(seam, -shift, axis)
            across.append(steps[seam])
            beside.append(steps[near & ~seam])
        out.append([np.concatenate(across).mean(), np.concatenate(beside).mean()])
    return np.asarray(out)


def step_times(
    pipe: Pipeline, side: int, *, layouts: Sequence[tuple[str, str]], heads: int | None = None, repeats: int = 8
) -> list[dict]:
    """Seconds of a mixed step over those of a full one, measured, and as the FLOP model has it.

    Args:
        pipe: the demo model.
        side: pixels of the finest level.
        layouts: (layout expression, regions) of each row.
        heads: of a transformer with random weights in the demo model's place, so wide that what a step costs beside
            its operations counts little.
        repeats: full and mixed steps take turns; the fastest of each counts.
    """
    prompt = accuracy.unseen_prompts(1)[0][1]
    asked, grid = pipe.encode([prompt]), pipe.grid(side, side)
    velocity, field, params = pipe.velocity(), pipe.noise(0, side, side), pipe.params
    config = pipe.parts.transformer_config
    if heads is not None:
        config = replace(config, heads=heads, double_layers=1, single_layers=2)
        build = pipe.family.network(replace(pipe.parts, transformer_config=config))
        graphdef, params = nnx.split(initialize(lambda rngs: build(rngs=rngs)))
        velocity = replace(velocity, graphdef=graphdef)
    runs = {("dense", ""): (velocity, field, None, 1.0)}
    whole = config.step_flops(grid.tokens, grid.text_tokens, (grid.tokens + grid.text_tokens) ** 2)
    for name, regions in layouts:
        options = get_layout(name)
        masks = parse_regions(regions).spread(options.levels - 1).masks(grid)
        layout = options.mixed(masks, grid)
        share = config.step_flops(layout.tokens, grid.text_tokens, layout.pairs(grid.text_tokens)) / whole
        content = arrange(tuple(map(jnp.asarray, masks)), layout)
        runs[name, regions] = replace(velocity, layout=layout), noises(field, options.levels), content, share
    best = dict.fromkeys(runs, np.inf)
    for repeat in range(repeats + 1):
        for key, (model, latents, content, _) in runs.items():
            begun = time.perf_counter()
            jax.block_until_ready(model.advance(params, latents, 0.5, asked, content=content))
            if repeat:  # the first compiles
                best[key] = min(best[key], time.perf_counter() - begun)
    full = best["dense", ""]
    return [
        {"layout": key[0], "regions": key[1], "seconds": best[key], "measured": best[key] / full, "flops": run[3]}
        for key, run in runs.items()
    ]
