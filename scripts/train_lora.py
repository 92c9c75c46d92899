"""Train the LoRA of Scale-DiT's guidance stream: ``python scripts/train_lora.py WORK --data PICTURES --out FILE``.

WORK holds checkpoints, the loss log and, with --data or --nano, the encoded samples; a run that is started again
continues, bit for bit.  Use the result with ``sega-jax generate --layout scale-dit --lora FILE``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import fields
from pathlib import Path

from sega_jax.models.adapters import save, size
from sega_jax.pipeline.pipeline import Pipeline
from sega_jax.training import scale_dit, scale_dit_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the run")
    parser.add_argument("--model", default="nano", help="pipeline folder, hub id or nano")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the frozen weights and activations")
    parser.add_argument("--mesh", help="devices, auto or sizes such as data=4,context=2")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--data", type=Path, help="folder of pictures with .txt captions beside them or captions.jsonl")
    data.add_argument("--latents", type=Path, help="folder of encoded samples")
    data.add_argument("--nano", type=int, nargs="+", metavar="SIDE", help="scenes of nano's renderer, of these sides")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 1024), metavar=("W", "H"), help="of --data")
    parser.add_argument("--count", type=int, default=500, help="scenes per side with --nano")
    parser.add_argument("--out", type=Path, help="LoRA to write; WORK/lora.safetensors")
    parser.add_argument("--every", type=int, default=100, help="steps between reports and checkpoints")
    parser.add_argument("--seconds", type=float, help="stop after this time")
    for field in fields(scale_dit.Recipe):
        if field.name == "remat":
            continue
        kind = {"rate": float}.get(field.name, type(field.default))
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    arguments = parser.parse_args()
    recipe = scale_dit.Recipe(
        **{f.name: getattr(arguments, f.name) for f in fields(scale_dit.Recipe) if f.name != "remat"}
    )

    def report(line: str) -> None:
        print(time.strftime("%H:%M:%S"), line, flush=True)

    pipe = Pipeline.from_pretrained(arguments.model, dtype=arguments.dtype, mesh=arguments.mesh)
    ratio, samples = recipe.windows().ratio, arguments.latents or arguments.work / "samples"
    if arguments.data is not None:
        scale_dit_data.encode_folder(pipe, arguments.data, samples, tuple(arguments.size), ratio, recipe.seed, report)
    elif arguments.nano is not None:
        scale_dit_data.encode_nano(pipe, samples, arguments.nano, arguments.count, ratio, recipe.seed, report)
    batches = scale_dit_data.batches(
        samples, recipe.batch, caption_drop=recipe.caption_drop, ratio=ratio, seed=recipe.seed
    )
    parts = pipe.parts
    adapters = scale_dit.train(
        recipe, parts.transformer, parts.rope, batches, arguments.work / "run",
        dtype=pipe.dtype, every=arguments.every, report=report, seconds=arguments.seconds,
        mesh=pipe.mesh,
    )  # fmt: skip
    out = arguments.out or arguments.work / "lora.safetensors"
    save(out, adapters, recipe.tags())
    report(f"wrote {out}: {size(adapters):,} parameters of rank {recipe.rank}")


if __name__ == "__main__":
    main()
