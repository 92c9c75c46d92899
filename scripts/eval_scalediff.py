"""ScaleDiff on nano: quality, seams and seconds of the ladder against direct generation, ablations, MultiDiffusion.

python scripts/eval_scalediff.py --out benchmarks/scalediff-nano.json --sides 512 1024 --count 100
"""

import argparse
from pathlib import Path

from sega_jax.evaluation import climbing
from sega_jax.pipeline import Pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--out", type=Path, required=True, help="table as JSON; a stopped run goes on from it")
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--cases", nargs="+", default=list(climbing.CASES), choices=list(climbing.CASES))
    parser.add_argument("--count", type=int, default=100, help="prompts")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    table = climbing.run(
        Pipeline.from_pretrained(args.model),
        args.out,
        cases=args.cases,
        sides=args.sides,
        count=args.count,
        steps=args.steps,
    )
    print(climbing.summarize(table))


if __name__ == "__main__":
    main()
