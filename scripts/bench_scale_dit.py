"""Seconds of one denoising step, dense against Scale-DiT: ``python scripts/bench_scale_dit.py --side 1024``.

All contestants are compiled first and then run in turn, round after round; the fastest round counts.  Seconds of
processor time are given too: they do not depend on what else runs.  One JSON file goes to ``benchmarks/``.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from sega_jax.layouts.dense import Dense
from sega_jax.layouts.scale_dit import ScaleDiT
from sega_jax.models.flux import PACKING
from sega_jax.pipeline.pipeline import Pipeline
from sega_jax.runtime.provenance import provenance
from sega_jax.sampling.scale_dit import small_stream

CONTESTANTS = {
    "dense": Dense(),
    "K, no small stream": ScaleDiT(low="off"),
    "K, cached": ScaleDiT(low="cached"),
    "K": ScaleDiT(),
    "P": ScaleDiT(mask="paper"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    arguments = parser.parse_args()

    pipe = Pipeline.from_pretrained(arguments.model)
    asked = pipe.encode(["a red circle"])
    latents = pipe.noise(0, arguments.side, arguments.side)
    low = pipe.noise(0, arguments.side // 4, arguments.side // 4)
    grid = pipe.grid(arguments.side, arguments.side)
    runs = {}
    for name, layout in CONTESTANTS.items():
        velocity = pipe.velocity("none", layout)
        content = {"low": PACKING.pack(low)} if layout in (CONTESTANTS["K"], CONTESTANTS["P"]) else None
        if layout == CONTESTANTS["K, cached"]:
            made = small_stream(
                pipe.params, velocity.method, low, asked, graphdef=velocity.graphdef,
                layout=replace(layout, low="alone"), grid=grid, dtype=pipe.dtype,
            )  # fmt: skip
            content = {"given": {"low": made}}

        def run(velocity=velocity, content=content):
            jax.block_until_ready(velocity.advance(pipe.params, latents, jnp.float32(0.5), asked, content=content))

        run()
        print(f"compiled {name}", flush=True)
        runs[name] = run
    best = {name: [float("inf")] * 2 for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            spent = time.perf_counter() - wall, time.process_time() - processor
            best[name] = [min(old, new) for old, new in zip(best[name], spent, strict=True)]
    rows = [
        {"layout": name, "seconds": wall, "processor_seconds": processor, "over_dense": best["dense"][1] / processor}
        for name, (wall, processor) in best.items()
    ]
    for row in rows:
        print(
            f"{row['layout']:20} {row['seconds']:.3f} s, {row['processor_seconds']:.3f} s of processor, "
            f"{row['over_dense']:.2f} x faster than dense by processor time"
        )
    arguments.out.mkdir(exist_ok=True)
    report = {"model": arguments.model, "side": arguments.side, "rows": rows, **provenance()}
    path = arguments.out / f"scale-dit-step-{arguments.model.split('/')[-1]}-{arguments.side}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
