"""Ways to a large picture compared on nano, where the truth is known: the same unseen prompts and noise for each.

A table is a dict of rows, kept in a file as they are made, so that a stopped run goes on where it was; a row that
another table holds already is taken from there.  Every row holds its values per picture.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from sega_jax.evaluation import compare, metrics
from sega_jax.evaluation.crpa import boundary_energies
from sega_jax.evaluation.multidiffusion import multidiffusion
from sega_jax.media.images import to_uint8
from sega_jax.nano import accuracy
from sega_jax.nano.grammar import Scene
from sega_jax.pipeline.pipeline import Pipeline
from sega_jax.runtime.provenance import provenance
from sega_jax.sampling.crpa import levels_map
from sega_jax.sampling.regions import get_regions
from sega_jax.sampling.registry import get_layout
from sega_jax.sampling.resume import digest
from sega_jax.sampling.sampler import Noise


@dataclass(frozen=True)
class Case:
    """One way to a picture.

    Attributes:
        positional: method.
        layout: of the run, or of every size of a ladder above the first.
        regions: what ``crpa`` refines.
        ladder: None for one size; else the options of every size above the first, which is the trained one.
        windows: whether those sizes go by MultiDiffusion instead of a layout.
        lora: whether the small stream of ``scale-dit`` carries a LoRA.
    """

    positional: str = "none"
    layout: str = "dense"
    regions: str | None = None
    ladder: str | None = None
    windows: bool = False
    lora: bool = False

    def request(self, native: int, side: int) -> dict[str, Any]:
        """Fields of `Pipeline.plan` for ``side`` pixels, climbing by doubling from ``native``."""
        common = {"positional": self.positional, "layout": self.layout}
        if self.ladder is not None:
            sizes = [native]
            while sizes[-1] < side:
                sizes.append(2 * sizes[-1])
            steps = ", ".join([str(native), *(f"{size} {self.ladder}".strip() for size in sizes[1:])])
            return {"ladder": steps, **common}
        regions = {} if self.regions is None else {"regions": self.regions}
        return {"width": side, "height": side, **common, **regions}


DIRECT = {
    "direct none": Case(),
    "direct dype-yarn": Case("dype-yarn"),
    "direct sega": Case("sega"),
}
SCALEDIFF = {
    **DIRECT,
    "ladder scalediff": Case(layout="scalediff", ladder=""),
    "ladder scalediff, jitter": Case(layout="scalediff(jitter=True)", ladder=""),
    "ladder scalediff, mixing off": Case(layout="scalediff", ladder="reference=image"),
    "ladder scalediff, guidance off": Case(layout="scalediff", ladder="gamma=none"),
    "ladder dense sega": Case("sega", ladder=""),
    "ladder multidiffusion": Case(ladder="", windows=True),
}
SCALE_DIT = {
    "direct none": Case(),
    "direct pi": Case("pi"),
    "direct sega": Case("sega"),
    "training-free": Case("pi", "scale-dit"),
    "training-free, mask P": Case("pi", "scale-dit(mask='paper')"),
    "LoRA": Case("pi", "scale-dit", lora=True),
    "LoRA, low frequencies guided": Case("pi", "scale-dit(flow='cosine')", lora=True),
}


def crpa(
    shares: Sequence[float], levels: int = 2, positional: str = "none", bare: Sequence[float] = ()
) -> dict[str, Case]:
    """CRPA with and without exchange across the boundary, its single-map baselines, and full resolution.

    Args:
        shares: of the area that a centred region refines.
        levels: sizes of tokens.
        positional: method of all of them.
        bare: shares that are also made without a fine stage, which hides seams.
    """
    deep = {} if levels == 2 else {"levels": levels}
    ways = {
        "crpa": {},
        "crpa, no exchange": {"pad_fine": 0, "pad_coarse": 0},
        "crpa, no fine stage": {"fine": 0.0},
        "crpa, no fine stage, no exchange": {"fine": 0.0, "pad_fine": 0, "pad_coarse": 0},
        "PI to LR": {"positions": "pi-lr"},
        "PI to HR": {"positions": "pi-hr"},
    }
    under = "" if positional == "none" else f", {positional}"
    cases = {f"full{under}": Case(positional)}
    for share in shares:
        for name, options in ways.items():
            if options.get("fine") == 0 and share not in bare:
                continue
            options = {**deep, **options}
            told = ", ".join(f"{key}={value!r}" for key, value in options.items())
            layout = f"crpa({told})" if told else "crpa"
            cases[f"{name}, {share:.0%}{under}"] = Case(positional, layout, f"center:{share}")
    return cases


def identity(pipe: Pipeline) -> str:
    """Twelve digits that name the transformer's weights."""
    return digest(pipe.params)[:12]


class Drawn(NamedTuple):
    """A picture uint8 [H, W, 3], seconds of processor time from noise to latents, and operations where known."""

    picture: np.ndarray
    seconds: float
    flops: float | None


def draw(pipe: Pipeline, prompt: str, case: Case, side: int, *, steps: int, seed: int) -> Drawn:
    """One picture; every case starts from the seed's noise of its first size."""
    native = pipe.parts.rope.trained[0] * pipe.parts.rope.pixels_per_token
    plan = pipe.plan(prompt, steps=steps, seed=seed, **case.request(native, side))
    sampler = pipe.sampler(plan, plan.positional, plan.layout)
    if case.windows:
        sampler = multidiffusion(sampler, pipe.velocity("none"))
    conditioning = pipe.encode([prompt])
    begun = time.process_time()
    state = sampler.start(Noise(seed, (0,)), conditioning)
    for index in range(sampler.steps):
        state = sampler.step(pipe.params, state, conditioning, index)
    latents = jax.block_until_ready(sampler.latents(state))
    seconds = time.process_time() - begun
    flops = None
    if plan.estimate is not None:
        flops = plan.estimate.flops
    elif case.layout == "dense" and case.ladder is None:
        grid = pipe.grid(side, side)
        pairs = (grid.tokens + grid.text_tokens) ** 2
        flops = plan.steps * pipe.parts.transformer_config.step_flops(grid.tokens, grid.text_tokens, pairs)
    return Drawn(to_uint8(pipe.decode(latents)[0]), seconds, flops)


@functools.cache
def _truth_features(scenes: tuple[Scene, ...], side: int) -> tuple[np.ndarray, ...]:
    return tuple(metrics.features(compare.render_scenes(scenes, side, seed)) for seed in range(1, 6))


def run(
    pipe: Pipeline,
    path: Path,
    cases: Mapping[str, Case],
    *,
    side: int,
    count: int,
    among: int | None = None,
    steps: int,
    lora: Path | None = None,
    known: Sequence[Path] = (),
    report: Callable[[str], None] = print,
) -> dict:
    """Make the missing rows of the table in ``path`` and return it; each row is saved as soon as it is made.

    Args:
        pipe: the demo model.
        path: JSON file.
        cases: name -> way.
        side: pixels.
        count: prompts: the first of ``among`` (default: ``count``) that `nano.accuracy` draws.
        among: see ``count``; two runs over the same number share their first prompts.
        steps: of the whole schedule.
        lora: of cases that have one.
        known: tables to take finished rows from.
        report: receives one line per row.
    """
    table = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    rope = pipe.parts.rope
    native, half = rope.trained[0] * rope.pixels_per_token, rope.trained[0] * rope.pixels_per_token // 2
    wanted = accuracy.unseen_prompts(among or count)[:count]
    scenes = tuple(scene for scene, _ in wanted)
    maps = {case.regions: _levels(pipe, case, side) for case in cases.values() if case.regions is not None}
    shared = {"among": among or count, "steps": steps, "model": identity(pipe)}
    seen = [row for other in known if other.exists() for row in json.loads(other.read_text())["rows"].values()]
    changed = None
    for name, case in cases.items():
        key = f"{side}/{name}"
        model = pipe
        made = {**shared, "request": case.request(native, side), "windows": case.windows}
        if case.lora:
            if lora is None:
                raise ValueError(f"case {name!r} needs a LoRA; give one")
            changed = changed or pipe.with_guidance_lora(lora)
            model = changed
            made["lora"] = identity(model)

        def fits(row: dict, made: dict = made) -> bool:
            regions = set(row["values"]) >= {f"boundary {text}" for text in maps}
            return row["count"] >= count and regions and all(row.get(field) == made[field] for field in made)

        if key in table["rows"] and fits(table["rows"][key]):
            continue
        found = next(filter(fits, seen), None)
        if found is not None:
            table["rows"][key] = {**found, "case": name}
        else:
            draw(model, wanted[0][1], case, side, steps=steps, seed=0)  # compiles
            drawn = [draw(model, text, case, side, steps=steps, seed=i) for i, (_, text) in enumerate(wanted)]
            pictures = np.stack([one.picture for one in drawn])
            values = compare.measure(scenes, pictures)
            values["seam"] = metrics.seam_energy(pictures, half).round(4).tolist()
            for text, levels in maps.items():
                values[f"boundary {text}"] = boundary_energies(pictures, levels).round(4).tolist()
            table["rows"][key] = {
                "side": side,
                "case": name,
                "regions": case.regions,
                "count": count,
                **made,
                "seconds": round(float(np.median([one.seconds for one in drawn])), 3),
                "flops": drawn[0].flops,
                "distance": compare.distance(metrics.features(pictures), _truth_features(scenes, side)),
                "values": values,
            }
        table |= provenance()
        compare.save(path, table)
        report(line(table["rows"][key]))
    return table


def _levels(pipe: Pipeline, case: Case, side: int) -> np.ndarray:
    layout = get_layout(case.layout)
    return levels_map(get_regions(case.regions).spread(layout.levels - 1).masks(pipe.grid(side, side)))


def add_options(parser: argparse.ArgumentParser, out: str, side: int) -> None:
    """Options that the scripts of every table share; ``out`` and ``side`` are their defaults."""
    parser.add_argument("--model", default="nano")
    parser.add_argument("--out", type=Path, default=Path(out), help="table as JSON")
    parser.add_argument("--side", type=int, default=side, help="pixels: the trained side, doubled as often as you like")
    parser.add_argument("--count", type=int, default=64, help="prompts")
    parser.add_argument("--among", type=int, help="prompts that these are the first of")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="tables to take finished rows from")
    parser.add_argument("--page", type=Path, help="Markdown page with marks of the tables")
    parser.add_argument("--sheet", type=Path, help="PNG to draw, with --prompts")
    parser.add_argument("--prompts", type=int, nargs="+", default=[0, 1, 2], help="numbers of prompts")


# -- tables --------------------------------------------------------------------------------------------------------


def seam(row: dict) -> float:
    """Energy of steps across the boundaries of a row over that beside them: of its own regions, else of patches."""
    if row.get("regions") is None:
        return float(np.nanmean(row["values"]["seam"]))
    return pooled(row["values"][f"boundary {row['regions']}"])


def pooled(energies: Sequence[Sequence[float]]) -> float:
    """Energy across over energy beside, each summed over pictures."""
    across, beside = np.asarray(energies).sum(0)
    return float(across / beside)


COLUMNS = (
    "pixels", "case", "pictures", "all five", *compare.ATTRIBUTES, "repeated objects", "Fréchet / truth", "seam",
    "processor seconds", "FLOP",
)  # fmt: skip


def line(row: dict) -> str:
    """One row in Markdown, in the order of `COLUMNS`; operations where they are known."""
    whole = metrics.bootstrap(row["values"]["all"])
    cells = (
        str(row["side"]),
        row["case"],
        str(len(row["values"]["all"])),
        f"{whole.mean:.2f} [{whole.low:.2f}, {whole.high:.2f}]",
        *(f"{np.mean(row['values'][name]):.2f}" for name in compare.ATTRIBUTES),
        f"{np.mean(row['values']['repetitions']):.2f}",
        f"{row['distance']['ratio']:.1f}",
        f"{seam(row):.2f}",
        f"{row['seconds']:.2f}",
        f"{row['flops']:.2e}" if row["flops"] else "",
    )
    return "| " + " | ".join(cells) + " |"


def summarize(table: dict, order: Sequence[str] = ()) -> str:
    """The table in Markdown, by size; cases in ``order``, and others behind them as they were made."""
    place = {name: number for number, name in enumerate(order)}
    rows = sorted(table["rows"].values(), key=lambda row: (row["side"], place.get(row["case"], len(place))))
    return "\n".join(["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", *map(line, rows)])


def write_into(page: Path, mark: str, text: str) -> None:
    """Put ``text`` between ``<!-- MARK -->`` and ``<!-- end of MARK -->`` of a Markdown page.

    Raises:
        ValueError: a page without these marks.
    """
    marked = re.compile(rf"(<!-- {re.escape(mark)} -->\n).*?(<!-- end of {re.escape(mark)} -->)", re.DOTALL)
    content = page.read_text()
    if not marked.search(content):
        raise ValueError(f"{page} has no <!-- {mark} --> and <!-- end of {mark} --> marks")
    page.write_text(marked.sub(lambda found: f"{found[1]}{text}\n{found[2]}", content))


def sheet(
    pipe: Pipeline,
    cases: Mapping[str, Case],
    side: int,
    *,
    prompts: Sequence[int],
    among: int,
    steps: int,
    shown: int,
    lora: Path | None = None,
) -> np.ndarray:
    """Pictures side by side: a row per prompt, a titled column per case, uint8 [H, W, 3].

    Args:
        pipe, cases, side, steps, lora: as in `run`.
        prompts: numbers of prompts of a table over ``among``, with the noise they have there.
        among: see ``prompts``.
        shown: pixels of a cell.
    """
    from PIL import Image, ImageDraw

    wanted, title = accuracy.unseen_prompts(among), 14
    changed = pipe.with_guidance_lora(lora) if lora is not None else None
    whole = Image.new("RGB", (len(cases) * shown, title + len(prompts) * shown), "white")
    pen = ImageDraw.Draw(whole)
    for column, (name, case) in enumerate(cases.items()):
        pen.text((column * shown + 3, 1), name, fill="black")
        for row, number in enumerate(prompts):
            model = changed if case.lora else pipe
            drawn = draw(model, wanted[number][1], case, side, steps=steps, seed=number)
            cell = Image.fromarray(drawn.picture).resize((shown, shown), Image.Resampling.LANCZOS)
            whole.paste(cell, (column * shown, title + row * shown))
    return np.asarray(whole)
