"""ScaleDiff's ladder on nano against direct generation, with its ablations and the MultiDiffusion baseline.

Same unseen prompts and seeds for every case; rows are kept in a file as they are made (`evaluation.compare`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sega_jax.evaluation import compare, metrics
from sega_jax.images import to_uint8
from sega_jax.nano import accuracy
from sega_jax.pipeline import Pipeline
from sega_jax.provenance import provenance
from sega_jax.sampling.multidiffusion import multidiffusion
from sega_jax.sampling.sampler import Noise


@dataclass(frozen=True)
class Case:
    """One way to a size.

    Attributes:
        positional: method.
        layout: ``None`` for direct generation, else the layout of every size above the first.
        options: of every size above the first, as in a ladder.
        windows: whether those sizes go by MultiDiffusion instead of a layout.
    """

    positional: str = "none"
    layout: str | None = None
    options: str = ""
    windows: bool = False

    def request(self, native: int, side: int) -> dict:
        """Fields of `Pipeline.plan` for ``side`` pixels, climbing by doubling from ``native``."""
        if self.layout is None:
            return {"width": side, "height": side, "positional": self.positional}
        sizes = [native]
        while sizes[-1] < side:
            sizes.append(2 * sizes[-1])
        ladder = ", ".join([str(native), *(f"{size} {self.options}" for size in sizes[1:])])
        return {"ladder": ladder, "layout": self.layout, "positional": self.positional}


CASES = {
    "direct none": Case(),
    "direct dype-yarn": Case("dype-yarn"),
    "direct sega": Case("sega"),
    "ladder scalediff": Case(layout="scalediff"),
    "ladder scalediff, jitter": Case(layout="scalediff(jitter=True)"),
    "ladder scalediff, mixing off": Case(layout="scalediff", options="reference=image"),
    "ladder scalediff, guidance off": Case(layout="scalediff", options="gamma=none"),
    "ladder dense sega": Case("sega", layout="dense"),
    "ladder multidiffusion": Case(layout="dense", windows=True),
}


def draw(pipe: Pipeline, prompt: str, case: Case, side: int, *, steps: int, seed: int) -> np.ndarray:
    """One picture uint8 [side, side, 3]; every case starts from the seed's noise of its first size."""
    native = pipe.parts.rope.trained[0] * pipe.parts.rope.pixels_per_token
    request = case.request(native, side)
    plan = pipe.plan(prompt, steps=steps, seed=seed, **request)
    sampler = pipe.sampler(plan, plan.positional, request.get("layout", "dense"))
    if case.windows:
        sampler = multidiffusion(sampler, pipe.velocity("none"))
    conditioning = pipe.encode([prompt])
    state = sampler.start(Noise(seed, (0,)), conditioning)
    for index in range(sampler.steps):
        state = sampler.step(pipe.params, state, conditioning, index)
    return to_uint8(pipe.decode(sampler.latents(state))[0])


def run(
    pipe: Pipeline,
    path: Path,
    *,
    cases: Sequence[str] = tuple(CASES),
    sides: Sequence[int],
    count: int,
    steps: int,
    report: Callable[[str], None] = print,
) -> dict:
    """Make the missing rows of the table in ``path`` and return it; each row is saved as soon as it is made."""
    table = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    wanted = accuracy.unseen_prompts(count)
    half_window = pipe.parts.rope.trained[0] * pipe.parts.rope.pixels_per_token // 2
    for side in sides:
        for name in cases:
            key = f"{side}/{name}"
            row = table["rows"].get(key)
            if row is not None and (row["steps"], row["count"]) == (steps, count):
                continue
            draw(pipe, wanted[0][1], CASES[name], side, steps=steps, seed=0)  # compiles
            begun = time.perf_counter()
            pictures = np.stack(
                [draw(pipe, text, CASES[name], side, steps=steps, seed=i) for i, (_, text) in enumerate(wanted)]
            )
            seconds = (time.perf_counter() - begun) / count
            values = compare.measure([scene for scene, _ in wanted], pictures)
            values["seam"] = [round(float(x), 4) for x in metrics.seam_energy(pictures, half_window)]
            table["rows"][key] = {
                "side": side,
                "case": name,
                "count": count,
                "steps": steps,
                "seconds": round(seconds, 2),
                "distance": compare.distances(pictures, side),
                "values": values,
            }
            table |= provenance()
            compare.save(path, table)
            report(line(table["rows"][key]))
    return table


def line(row: dict) -> str:
    """One row of the table in Markdown."""
    whole = metrics.bootstrap(row["values"]["all"])
    cells = (
        str(row["side"]),
        row["case"],
        f"{whole.mean:.2f} [{whole.low:.2f}, {whole.high:.2f}]",
        f"{np.mean(row['values']['repetitions']):.2f}",
        f"{row['distance']['ratio']:.1f}",
        f"{np.nanmean(row['values']['seam']):.2f}",
        f"{row['seconds']:.1f}",
    )
    return "| " + " | ".join(cells) + " |"


HEADER = """| pixels | case | all five | repeated objects | Fréchet / truth | seam energy | seconds |
|---|---|---|---|---|---|---|"""


def summarize(table: dict) -> str:
    """The table in Markdown."""
    rows = sorted(table["rows"].values(), key=lambda row: (row["side"], list(CASES).index(row["case"])))
    return "\n".join([HEADER, *map(line, rows)])
