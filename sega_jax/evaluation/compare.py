"""Positional methods compared on nano, where the truth is known: the same unseen prompts and seeds for every method.

A table is a dict of rows, kept in a file as they are made, so that a stopped run goes on where it was.  Every row holds
its values per picture; `summarize` makes means, paired differences and bootstrap intervals of them.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from sega_jax.evaluation import metrics
from sega_jax.families.recipes import NANO_ABOVE_NATIVE
from sega_jax.nano import accuracy, check, grammar, render
from sega_jax.nano.grammar import Scene
from sega_jax.pipeline.pipeline import Pipeline
from sega_jax.runtime.provenance import provenance

METHODS = ("none", "pi", "ntk", "yarn", "dype-ntk", "dype-yarn", "sega", NANO_ABOVE_NATIVE)
ATTRIBUTES = tuple(field.name for field in fields(Scene))
INK = 60.0  # RGB units from the paper


def repetitions(picture: np.ndarray) -> int:
    """Objects beyond the first in a picture uint8 [H, W, 3] of nano's world."""
    height, width = picture.shape[:2]
    frame = max(min(height, width) // 32, 2)
    pixels = picture.astype(np.float32)
    edges = (pixels[:frame], pixels[-frame:], pixels[:, :frame], pixels[:, -frame:])
    paper = np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)
    return max(metrics.objects(np.linalg.norm(pixels - paper, axis=-1) > INK) - 1, 0)


def measure(scenes: Sequence[Scene], pictures: np.ndarray) -> dict[str, list[float]]:
    """Values per picture: each attribute and ``all`` (0 or 1), repeated objects, autocorrelation peak."""
    values: dict[str, list[float]] = {name: [] for name in (*ATTRIBUTES, "all", "repetitions", "autocorrelation")}
    for scene, picture in zip(scenes, pictures, strict=True):
        matches = check.read(picture).matches(scene)
        for name, match in matches.items():
            values[name].append(float(match))
        values["all"].append(float(all(matches.values())))
        values["repetitions"].append(float(repetitions(picture)))
        values["autocorrelation"].append(round(metrics.autocorrelation_peak(picture), 4))
    return values


def draw(
    pipe: Pipeline, prompts: Sequence[str], side: int, *, method: str, steps: int, batch: int, first: int = 0
) -> np.ndarray:
    """Pictures uint8 [N, side, side, 3]; prompt ``i`` starts from the noise of seed ``first + i``."""
    parts = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        noise = [np.asarray(pipe.noise(first + start + i, side, side)) for i in range(len(part))]
        made = pipe.generate(
            part, width=side, height=side, steps=steps, positional=method, batch_size=len(part),
            init_latents=np.concatenate(noise),
        )  # fmt: skip
        parts += [image.array for image in made.images]
    return np.stack(parts)


def truth(count: int, side: int, seed: int) -> tuple[list[Scene], np.ndarray]:
    """The scenes of the first ``count`` unseen prompts, rendered with the jitter of ``seed``."""
    scenes = [scene for scene, _ in accuracy.unseen_prompts(count)]
    return scenes, render_scenes(scenes, side, seed)


def render_scenes(scenes: Sequence[Scene], side: int, seed: int) -> np.ndarray:
    """Rendered truth uint8 [N, side, side, 3] with the jitter of ``seed``."""
    rng = np.random.default_rng((seed, side))
    return np.stack([render.render(scene, side, side, rng) for scene in scenes])


@functools.cache
def _truth_features(count: int, side: int, repeats: int) -> tuple[np.ndarray, ...]:
    return tuple(metrics.features(truth(count, side, seed)[1]) for seed in range(1, repeats + 2))


def distances(pictures: np.ndarray, side: int, repeats: int = 4) -> dict[str, float]:
    """Fréchet distance to truth of the same scenes, and truth against truth at the same size (mean of ``repeats``)."""
    return distance(metrics.features(pictures), _truth_features(len(pictures), side, repeats))


def distance(made: np.ndarray, references: Sequence[np.ndarray]) -> dict[str, float]:
    """Fréchet distance of features to those of several truths, the first of these to the others, and the ratio."""
    own = np.mean([metrics.frechet(references[0], other) for other in references[1:]])
    mean = np.mean([metrics.frechet(made, other) for other in references])
    return {"frechet": float(mean), "truth": float(own), "ratio": float(mean / own)}


def run(
    pipe: Pipeline,
    path: Path,
    *,
    methods: Sequence[str] = METHODS,
    sides: Sequence[int],
    count: int,
    steps: int,
    batch: int = 8,
    report: Callable[[str], None] = print,
) -> dict:
    """Make the missing rows of the table in ``path`` and return it; each row is saved as soon as it is made.

    Raises:
        ValueError: the file holds rows of another number of steps.
    """
    table = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    cases = accuracy.unseen_prompts(count)
    for side in sides:
        for method in methods:
            key = f"{side}/{method}"
            row = table["rows"].get(key)
            if row is not None and row["steps"] != steps:
                raise ValueError(f"{path}: row {key} was made with {row['steps']} steps, not {steps}; use another file")
            if row is not None and row["count"] >= count:
                continue
            begin = time.perf_counter()
            prompts = [text for _, text in cases]
            pictures = draw(pipe, prompts, side, method=method, steps=steps, batch=batch)
            values = measure([scene for scene, _ in cases], pictures)
            seconds = time.perf_counter() - begin
            row = {"side": side, "method": method, "count": count, "steps": steps, "seconds": round(seconds, 1)}
            table["rows"][key] = row | {"distance": distances(pictures, side), "values": values}
            table |= provenance()
            table["dtype"] = pipe.dtype
            save(path, table)
            report(line(table["rows"][key]))
    return table


def save(path: Path, table: dict) -> None:
    """The table as JSON; the file appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(partial, path)


def line(row: dict) -> str:
    """One row in words."""
    means = " ".join(f"{name} {np.mean(row['values'][name]):.2f}" for name in (*ATTRIBUTES, "all", "repetitions"))
    return (
        f"{row['side']} {row['method']}: {means} Fréchet ratio {row['distance']['ratio']:.1f}, {row['seconds']:.0f} s"
    )


def summarize(table: dict) -> str:
    """Markdown: per size and method the accuracies, and the paired difference of ``all`` from ``none``."""
    titles = ("pixels", "method", "all five", "minus `none`", *ATTRIBUTES, "repeated objects", "Fréchet / truth")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row in sorted(table["rows"].values(), key=lambda row: (row["side"], METHODS.index(row["method"]))):
        values, base = row["values"], table["rows"].get(f"{row['side']}/none")
        whole = metrics.bootstrap(values["all"])
        difference = ""
        if base is not None and row["method"] != "none" and base["count"] == row["count"]:
            gain = metrics.paired(values["all"], base["values"]["all"])
            difference = f"{gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]"
        repeated = metrics.bootstrap(values["repetitions"])
        cells = (
            str(row["side"]),
            f"`{row['method']}`",
            f"{whole.mean:.2f} [{whole.low:.2f}, {whole.high:.2f}]",
            difference,
            *(f"{np.mean(values[name]):.2f}" for name in ATTRIBUTES),
            f"{repeated.mean:.2f} [{repeated.low:.2f}, {repeated.high:.2f}]",
            f"{row['distance']['ratio']:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sheet(
    pipe: Pipeline, prompt: str, sides: Sequence[int], methods: Sequence[str], *, seed: int, steps: int, shown: int
) -> np.ndarray:
    """One picture of all: a row per method, a column per size, each scaled to ``shown`` pixels; uint8 [H, W, 3]."""
    from PIL import Image

    unknown = grammar.unknown_words(prompt)
    if unknown:
        raise ValueError(f"prompt has words that nano does not know: {', '.join(unknown)}")
    rows = []
    for method in methods:
        cells = []
        for side in sides:
            picture = draw(pipe, [prompt], side, method=method, steps=steps, batch=1, first=seed)[0]
            cells.append(np.asarray(Image.fromarray(picture).resize((shown, shown), Image.Resampling.LANCZOS)))
        rows.append(np.concatenate(cells, 1))
    return np.concatenate(rows, 0)
