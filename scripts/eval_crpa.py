"""CRPA against its baselines on the demo model: velocity errors, prompt accuracy, seams, seconds, FLOPs.

python scripts/eval_crpa.py --side 384
python scripts/eval_crpa.py --side 768 --levels 3 --count 32 --among 64 --pictures 0.3

A table that exists goes on where it was.  ``--page FILE`` writes both tables into a page, between its marks.
"""

import argparse
import json

from sega_jax.evaluation import compare, contest, crpa
from sega_jax.media.images import Image
from sega_jax.pipeline.pipeline import Pipeline
from sega_jax.runtime.provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    contest.add_options(parser, "benchmarks/crpa-nano.json", 384)
    parser.add_argument("--levels", type=int, default=2)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.15, 0.3, 0.6], help="of velocity errors")
    parser.add_argument("--positional", default="none")
    parser.add_argument("--states", type=int, default=64, help="states of the velocity error, four per picture")
    parser.add_argument("--pictures", type=float, nargs="*", default=[0.15, 0.3, 0.6], help="shares of pictures")
    parser.add_argument("--bare", type=float, nargs="*", default=[0.3], help="shares also made without a fine stage")
    parser.add_argument("--seams", type=float, nargs="*", default=[], help="shares of one-step seams (two levels)")
    parser.add_argument("--time", action="store_true", help="only seconds of a mixed step over those of a full one")
    parser.add_argument("--heads", type=int, help="with --time: of a random transformer in the model's place")
    options = parser.parse_args()
    pipe = Pipeline.from_pretrained(options.model)
    among = options.among or options.count

    def layout(text: str) -> str:
        return text.replace("crpa(", f"crpa(levels={options.levels}, ") if options.levels != 2 else text

    if options.time:
        cases = [(text, f"center:{share}") for share in options.shares for text in ("crpa()", crpa.LAYOUTS["crpa"])]
        cases = [(layout(text), share) for text, share in cases]
        rows = crpa.step_times(pipe, options.side, layouts=cases, heads=options.heads)
        print(json.dumps(rows, indent=1), flush=True)
        compare.save(options.out, {"side": options.side, "heads": options.heads, "steps": rows, **provenance()})
        return
    cases = contest.crpa(options.pictures, options.levels, options.positional, options.bare)
    if options.sheet is not None:
        shown = contest.sheet(
            pipe, cases, options.side, prompts=options.prompts, among=among, steps=options.steps, shown=192
        )
        Image(shown).save(options.sheet)
        return
    table = contest.run(
        pipe, options.out, cases if options.count else {}, side=options.side, count=options.count, among=among,
        steps=options.steps, known=options.known, report=lambda text: print(text, flush=True),
    )  # fmt: skip
    done = {(row["side"], row["positional"], row["states"], row["model"]) for row in table.get("velocity", [])}
    if options.states and (options.side, options.positional, options.states, contest.identity(pipe)) not in done:
        rows = crpa.velocity_errors(
            pipe, options.side, shares=options.shares, positional=options.positional, pictures=options.states // 4,
            layouts={name: layout(text) for name, text in crpa.LAYOUTS.items()},
        )  # fmt: skip
        shared = {"side": options.side, "positional": options.positional, "model": contest.identity(pipe)}
        table["velocity"] = table.get("velocity", []) + [{**shared, **row} for row in rows]
        compare.save(options.out, table)
    known = {(row["side"], row["share"], row["model"]) for row in table.get("seams", [])}
    for share in options.seams:
        shared = {"side": options.side, "share": share, "model": contest.identity(pipe), "pictures": 16}
        if (options.side, share, shared["model"]) not in known:
            rows = crpa.seams_of_estimates(pipe, options.side, share=share, pictures=shared["pictures"])
            table["seams"] = table.get("seams", []) + [{**shared, **row} for row in rows]
            compare.save(options.out, table)
    print(crpa.summarize(table.get("velocity", [])))
    print(crpa.summarize_seams(table.get("seams", [])))
    if options.page is not None:
        contest.write_into(options.page, "velocities", crpa.summarize(table["velocity"]))
        contest.write_into(options.page, "seams", crpa.summarize_seams(table.get("seams", [])))
        contest.write_into(options.page, "pictures", contest.summarize(table))


if __name__ == "__main__":
    main()
