"""ScaleDiff on nano: quality, seams and seconds of the ladder against direct generation, ablations, MultiDiffusion.

python scripts/eval_scalediff.py --side 384
python scripts/eval_scalediff.py --side 768

A table that exists goes on where it was.  ``--page FILE`` writes it into a page, between its marks.
"""

import argparse

from sega_jax.evaluation import contest
from sega_jax.media.images import Image
from sega_jax.pipeline.pipeline import Pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    contest.add_options(parser, "benchmarks/scalediff-nano.json", 384)
    parser.add_argument("--cases", nargs="+", default=list(contest.SCALEDIFF), choices=list(contest.SCALEDIFF))
    args = parser.parse_args()
    pipe = Pipeline.from_pretrained(args.model)
    cases = {name: contest.SCALEDIFF[name] for name in args.cases}
    among = args.among or args.count
    if args.sheet is not None:
        shown = contest.sheet(pipe, cases, args.side, prompts=args.prompts, among=among, steps=args.steps, shown=192)
        Image(shown).save(args.sheet)
        return
    table = contest.run(
        pipe, args.out, cases, side=args.side, count=args.count, among=among, steps=args.steps, known=args.known,
        report=lambda text: print(text, flush=True),
    )  # fmt: skip
    if args.page is not None:
        contest.write_into(args.page, "table", contest.summarize(table, list(contest.SCALEDIFF)))


if __name__ == "__main__":
    main()
