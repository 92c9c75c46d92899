"""Train and export the demo model `nano`: ``python scripts/train_nano.py WORK --out FOLDER``.

Every stage resumes from the files in WORK.  ``--smoke`` runs through all of them in a minute or two.
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
    parser.add_argument("work", type=Path, help="folder for checkpoints and latents (about 2 GB)")
    parser.add_argument("--out", type=Path, help="pipeline folder to write")
    parser.add_argument("--smoke", action="store_true", help="a toy that learns nothing")
    parser.add_argument("--stage", choices=("vae", "encode", "train", "all"), default="all")
    parser.add_argument("--seconds", type=float, help="stop training the generator after this time")
    arguments = parser.parse_args()

    jax.config.update("jax_compilation_cache_dir", str(arguments.work / "compiled"))
    plan = recipe.Recipe.smoke() if arguments.smoke else recipe.Recipe()

    def report(line: str) -> None:
        print(time.strftime("%H:%M:%S"), line, flush=True)

    modules = {"vae": recipe.train_vae(plan, arguments.work, report)}
    if arguments.stage in ("encode", "train", "all"):
        recipe.encode(plan, arguments.work, report)
    if arguments.stage in ("train", "all"):
        modules |= recipe.train_generator(plan, arguments.work, report, arguments.seconds)
    if arguments.out is not None and "transformer" in modules:
        report(f"exported {export(modules, arguments.out):,} bytes of weights to {arguments.out}")


if __name__ == "__main__":
    main()
