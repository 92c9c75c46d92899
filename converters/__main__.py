"""``python -m converters``: convert, inspect and fingerprint checkpoints without jax."""

from __future__ import annotations

from converters.current import leave

leave(__file__)

import argparse
import sys
from collections.abc import Sequence

from converters.errors import CheckpointError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m converters", description="Convert FLUX.1 checkpoints between layouts, and prove the result."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    convert = verbs.add_parser("convert", help="write a checkpoint in another layout or type")
    convert.add_argument("source", help="diffusers folder, BFL or ComfyUI single file, or Orbax folder")
    convert.add_argument("destination", help="a folder; a file for --to bfl of one component")
    convert.add_argument("--to", required=True, choices=("orbax", "diffusers", "bfl"))
    convert.add_argument(
        "--dtype",
        choices=("bf16", "f16", "f32", "fp8", "int8"),
        help="default: each tensor's own; fp8 and int8 with scales, for bfl",
    )
    convert.add_argument(
        "--verify",
        nargs="?",
        const="exact",
        choices=("exact", "forward"),
        help="read the output back and compare every parameter; 'forward' also compares every block's output with "
        "the reference modules of diffusers and transformers",
    )
    convert.add_argument("--overwrite", action="store_true", help="replace an existing destination")
    convert.add_argument("--base", help="pipeline folder that gives tokenisers and scheduler to a single file")
    convert.add_argument("--lora", action="append", default=[], help="merge a LoRA: FILE or FILE:WEIGHT; repeatable")
    convert.add_argument("--ignore-unknown", action="store_true", help="leave out what of a LoRA fits nothing")
    convert.add_argument("--max-shard-size", default="10GB", help="largest file of a diffusers component")
    convert.add_argument(
        "--trust-pickle", action="store_true", help="read .pt and .ckpt files, with torch's weights-only loader"
    )
    convert.add_argument(
        "--allow-nonfinite", action="store_true", help="with --verify: report NaN and infinity, do not refuse them"
    )
    convert.add_argument("--workers", type=int, help="threads (default: up to four)")
    convert.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    lora = verbs.add_parser("lora", help="write a LoRA in another dialect")
    lora.add_argument("source", help="safetensors file in any dialect, or an Orbax folder made here")
    lora.add_argument("destination")
    lora.add_argument("--to", required=True, choices=("diffusers", "kohya", "bfl", "ai-toolkit", "xlabs", "orbax"))
    lora.add_argument("--overwrite", action="store_true", help="replace an existing destination")
    lora.add_argument("--ignore-unknown", action="store_true", help="leave out keys that fit nothing")
    inspect = verbs.add_parser("inspect", help="what a checkpoint is made of")
    inspect.add_argument("path")
    fingerprint = verbs.add_parser("fingerprint", help="a hash of the parameters, equal for every layout")
    fingerprint.add_argument("path")
    return parser


def _run(options: argparse.Namespace) -> None:
    match options.verb:
        case "convert":
            from converters.convert import convert
            from converters.report import summary

            report = convert(
                options.source,
                options.destination,
                to=options.to,
                dtype=options.dtype,
                verify=options.verify,
                overwrite=options.overwrite,
                base=options.base,
                loras=options.lora,
                ignore_unknown=options.ignore_unknown,
                max_shard_size=options.max_shard_size,
                allow_nonfinite=options.allow_nonfinite,
                workers=options.workers,
                trust_pickle=options.trust_pickle,
                progress=not options.quiet,
            )
            if not options.quiet:
                print(summary(report))
        case "lora":
            from converters.lora import convert_lora

            done = convert_lora(
                options.source,
                options.destination,
                to=options.to,
                overwrite=options.overwrite,
                ignore_unknown=options.ignore_unknown,
            )
            weights = ", ".join(f"{count} weights of the {name}" for name, count in done["weights"].items())
            print(f"wrote {options.destination} ({done['to']}): {weights}, rank up to {done['largest_rank']}")
        case "inspect":
            from converters.inspect import inspect

            print(inspect(options.path))
        case "fingerprint":
            from converters.verify import fingerprint

            print(fingerprint(options.path, progress=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; 0 on success, 1 if a checkpoint is refused, 2 for wrong arguments."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (CheckpointError, ValueError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 1 if isinstance(exc, CheckpointError) else 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
