"""Measure nano: ``python scripts/eval_nano.py benchmarks/nano-quality.json --scales 1 2 4 --count 64``.

Rows that the file already holds are kept.  ``--page FILE`` writes the table into the page, between its marks;
``--sheet FILE`` draws one prompt under several methods at 1x, 2x and 4x; ``--curve JSON PNG`` draws a loss curve.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import sega_jax as sj
from sega_jax.evaluation import compare, contest, curve
from sega_jax.media.images import Image

SHOWN = ("none", "ntk", "yarn", "dype-yarn", "sega")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, nargs="?", help="JSON file, made or continued")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--scales", type=int, nargs="+", default=[2])
    parser.add_argument("--methods", nargs="+", default=list(compare.METHODS), choices=compare.METHODS)
    parser.add_argument("--count", type=int, default=64, help="unseen prompts, one seed each")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--page", type=Path, help="Markdown page with <!-- table --> marks")
    parser.add_argument("--sheet", type=Path, help="PNG to draw")
    parser.add_argument("--prompt", default="a red circle with stripes in the centre, white background")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--curve", type=Path, nargs=2, metavar=("JSON", "PNG"), help="losses by step, and their picture"
    )
    arguments = parser.parse_args()

    if arguments.curve is not None:
        source, target = arguments.curve
        losses = json.loads(source.read_text())
        Image(curve.draw(losses["step"], losses["loss"])).save(target)
    if arguments.table is None and arguments.sheet is None:
        return
    pipe = sj.Pipeline.from_pretrained(arguments.model, dtype=arguments.dtype)
    native = pipe.parts.rope.trained[0] * pipe.parts.rope.pixels_per_token
    if arguments.table is not None:
        sides = [scale * native for scale in arguments.scales]
        table = compare.run(
            pipe, arguments.table, methods=arguments.methods, sides=sides, count=arguments.count,
            steps=arguments.steps, batch=arguments.batch, report=lambda text: print(text, flush=True),
        )  # fmt: skip
        summary = compare.summarize(table)
        print(summary)
        if arguments.page is not None:
            contest.write_into(arguments.page, "table", summary)
    if arguments.sheet is not None:
        sides = [native, 2 * native, 4 * native]
        picture = compare.sheet(
            pipe, arguments.prompt, sides, SHOWN, seed=arguments.seed, steps=arguments.steps, shown=native
        )
        Image(picture).save(arguments.sheet)


if __name__ == "__main__":
    main()
