"""CRPA against its baselines on the demo model: velocity errors, prompt accuracy, seams, seconds, FLOPs."""

import argparse
import json
from pathlib import Path

from sega_jax.evaluation import regions
from sega_jax.pipeline import Pipeline
from sega_jax.provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--side", type=int, default=512, help="pixels of the finest level")
    parser.add_argument("--levels", type=int, default=2)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.15, 0.3, 0.6])
    parser.add_argument("--positional", default="none")
    parser.add_argument("--states", type=int, default=64, help="states of the velocity error, four per picture")
    parser.add_argument("--pictures", type=int, default=0, help="pictures per layout for accuracy and seams")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--time", action="store_true", help="only seconds of a mixed step over those of a full one")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    options = parser.parse_args()

    pipe = Pipeline.from_pretrained(options.model)
    extra = f"levels={options.levels}, " if options.levels != 2 else ""
    layouts = {name: text.replace("crpa(", f"crpa({extra}") for name, text in regions.LAYOUTS.items()}
    table = {"options": {name: str(value) for name, value in vars(options).items()}, "velocity": [], "pictures": []}

    def save() -> None:
        options.out.write_text(json.dumps(table | provenance(), indent=1) + "\n")

    if options.time:
        cases = [(text, f"center:{share}") for share in options.shares for text in ("crpa", layouts["crpa"])]
        table = {"options": table["options"], "steps": regions.step_times(pipe, options.side, layouts=cases)}
        print(json.dumps(table["steps"], indent=1), flush=True)
        save()
        return
    for share in options.shares:
        rows = regions.velocity_errors(
            pipe, options.side, shares=[share], layouts=layouts, positional=options.positional,
            pictures=options.states // 4, batch=options.batch,
        )  # fmt: skip
        for row in rows:
            print(f"{row['layout']:6} share {share:.2f} level {row['level']}: error {row['error']:.5f}", flush=True)
        table["velocity"] += rows
        save()
    if options.pictures:
        cases = [("dense", None)]
        for share in options.shares:
            wide = [f"crpa(levels={options.levels})", f"crpa(levels={options.levels}, pad_fine=0, pad_coarse=0)"]
            wide += [f"crpa(levels={options.levels}, positions='{p}')" for p in ("pi-lr", "pi-hr")]
            cases += [(layout, f"center:{share}") for layout in wide]
        for layout, chosen in cases:
            row = regions.pictures(
                pipe, options.side, layout=layout, regions=chosen, positional=options.positional,
                count=options.pictures, steps=options.steps, batch=options.batch,
            )  # fmt: skip
            print(row, flush=True)
            table["pictures"].append(row)
            save()


if __name__ == "__main__":
    main()
