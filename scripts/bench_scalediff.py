"""Time and memory of ScaleDiff's neighborhood attention against dense attention on this machine.

python scripts/bench_scalediff.py --side 128 --window 64 --text 256
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.attention import attend
from sega_jax.costs.visits import attention_flops
from sega_jax.geometry import RopeSpec
from sega_jax.layouts.dense import Dense
from sega_jax.layouts.scalediff import Neighborhood
from sega_jax.layouts.streams import bind
from sega_jax.positional import plain
from sega_jax.runtime.provenance import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=128, help="tokens per side of the canvas")
    parser.add_argument("--window", type=int, default=64, help="trained tokens per side")
    parser.add_argument("--text", type=int, default=256, help="text tokens")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()

    grid = RopeSpec(trained=(args.window, args.window)).grid(args.side, args.side, args.text)
    sizes = {"text": args.text, "image": grid.tokens}
    random = np.random.default_rng(0)
    q, k, v = (
        {n: jnp.asarray(random.standard_normal((1, s, args.heads, 128)), args.dtype) for n, s in sizes.items()}
        for _ in range(3)
    )
    offsets = jnp.asarray([[args.window // 7, args.window // 3]], jnp.int32)
    cases = {
        "dense": (Dense(), None),
        "scalediff, blocks": (Neighborhood(), None),
        "scalediff, windows": (Neighborhood(path="windows"), None),
        "scalediff, jitter": (Neighborhood(jitter=True), offsets),
    }

    @partial(jax.jit, static_argnames="layout")
    def run(q, k, v, offsets, layout):
        calls = layout.calls(grid, None if offsets is None else {"offsets": offsets})
        ropes = {name: dict.fromkeys(("text", "image"), plain(g)) for name, g in layout.grids(grid).items()}
        return attend(q, k, v, bind(calls, ropes), backend=args.backend)

    programs = {name: (run.lower(q, k, v, o, layout).compile(), o) for name, (layout, o) in cases.items()}
    for program, o in programs.values():
        jax.block_until_ready(program(q, k, v, o))
    seconds = {name: [] for name in cases}
    for _ in range(args.rounds):  # interleaved, so that a busy moment hits all alike
        for name, (program, o) in programs.items():
            begun = time.perf_counter()
            jax.block_until_ready(program(q, k, v, o))
            seconds[name].append(time.perf_counter() - begun)
    best = {name: min(times) for name, times in seconds.items()}
    rows = []
    for name, (layout, _) in cases.items():
        flops = attention_flops(layout, grid, args.heads * 128)
        rows.append(
            {
                "case": name,
                "seconds": best[name],
                "of dense": best[name] / best["dense"],
                "flops": flops,
                "flops of dense": flops / attention_flops(Dense(), grid, args.heads * 128),
                "temporary MB": programs[name][0].memory_analysis().temp_size_in_bytes / 1e6,
            }
        )
        row = rows[-1]
        print(
            f"{name:20s} {row['seconds']:8.3f} s  {row['of dense']:5.2f} of dense   {flops:.3e} FLOPs "
            f"({row['flops of dense']:.2f})   {row['temporary MB']:8.1f} MB temporary"
        )
    if args.json:
        options = {name: value for name, value in vars(args).items() if name != "json"}
        args.json.write_text(json.dumps({"options": options, "rows": rows, **provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
