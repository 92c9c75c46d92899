"""Train and export the demo model `nano`: ``python scripts/train_nano.py WORK --out FOLDER``.

Every stage resumes from the files in WORK.  ``--resume-from FOLDER`` fills a new WORK with a finished autoencoder and a
generator's state, so that a run goes on elsewhere; ``--smoke`` runs through all stages in a minute or two.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax

from sega_jax.nano.export import export
from sega_jax.training import recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for checkpoints and latents (about 1 GB)")
    parser.add_argument("--out", type=Path, help="pipeline folder to write")
    parser.add_argument("--smoke", action="store_true", help="a toy that learns nothing")
    parser.add_argument(
        "--stage",
        choices=("vae", "encode", "train", "all", "export"),
        default="all",
        help="how far to go; export writes --out from the state that WORK has, without any training",
    )
    parser.add_argument("--seconds", type=float, help="stop training the generator after this time")
    parser.add_argument("--resume-from", type=Path, help="folder with the state of a run, copied into an empty WORK")
    arguments = parser.parse_args()
    if arguments.stage == "export" and arguments.out is None:
        parser.error("--stage export: give the folder to write as --out")

    jax.config.update("jax_compilation_cache_dir", str(arguments.work / "compiled"))
    plan = recipe.Recipe.smoke() if arguments.smoke else recipe.Recipe()

    def report(line: str) -> None:
        print(time.strftime("%H:%M:%S"), line, flush=True)

    if arguments.resume_from is not None:
        copied = recipe.begin_from(arguments.resume_from, arguments.work)
        report(f"from {arguments.resume_from}: {', '.join(copied) or 'nothing, the work folder has a run already'}")
    modules = {"vae": recipe.train_vae(plan, arguments.work, report)}
    if arguments.stage in ("encode", "train", "all"):
        recipe.encode(plan, arguments.work, report)
    if arguments.stage in ("train", "all"):
        modules |= recipe.train_generator(plan, arguments.work, report, arguments.seconds)
    if arguments.stage == "export":
        modules |= recipe.averaged_generator(arguments.work)
    if arguments.out is not None and "transformer" in modules:
        report(f"exported {export(modules, arguments.out):,} bytes of weights to {arguments.out}")


if __name__ == "__main__":
    main()
