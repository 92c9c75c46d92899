"""Quality at several times the trained size: Scale-DiT with its LoRA, training-free, SEGA and dense, on nano's world.

``python scripts/eval_scale_dit.py --lora lora.safetensors --side 768``

A table that exists goes on where it was.  ``--page FILE`` writes it into a page, between its marks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sega_jax.evaluation import contest
from sega_jax.media.images import Image
from sega_jax.pipeline.pipeline import Pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    contest.add_options(parser, "benchmarks/scale-dit-nano.json", 768)
    parser.add_argument("--lora", type=Path, help="LoRA of the guidance stream, from scripts/train_lora.py")
    parser.add_argument("--cases", nargs="+", choices=list(contest.SCALE_DIT), help="default: all that can be made")
    args = parser.parse_args()
    pipe = Pipeline.from_pretrained(args.model)
    made = [name for name, case in contest.SCALE_DIT.items() if args.lora is not None or not case.lora]
    cases = {name: contest.SCALE_DIT[name] for name in args.cases or made}
    among = args.among or args.count
    if args.sheet is not None:
        shown = contest.sheet(
            pipe, cases, args.side, prompts=args.prompts, among=among, steps=args.steps, shown=192, lora=args.lora
        )
        Image(shown).save(args.sheet)
        return
    table = contest.run(
        pipe, args.out, cases, side=args.side, count=args.count, among=among, steps=args.steps, lora=args.lora,
        known=args.known, report=lambda text: print(text, flush=True),
    )  # fmt: skip
    if args.page is not None:
        contest.write_into(args.page, "table", contest.summarize(table, list(contest.SCALE_DIT)))


if __name__ == "__main__":
    main()
