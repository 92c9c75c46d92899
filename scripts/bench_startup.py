"""Where the time before the first picture goes: import, weights, compilation, first step; cold and warm cache.

    python scripts/bench_startup.py --model nano --size 256 --json benchmarks/startup-cpu.json

Every figure is of a process of its own.  "overlapped" compiles the step while the weights are read, as
`sega-jax generate` does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sega_jax.runtime.provenance import provenance

CHILD = """
import json, sys, time
model, side, overlapped = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "overlapped"
begun = time.perf_counter()
seconds = {}
def lap(name):
    global begun
    now = time.perf_counter()
    seconds[name], begun = round(now - begun, 2), now
import jax
lap("import jax")
import sega_jax as sj
from sega_jax import positional as pe
from sega_jax.pipeline import warmup
from sega_jax.pipeline.pipeline import default_dtype
lap("import sega_jax")
jax.devices()
sj.use_compilation_cache()
lap("devices")
total = time.perf_counter()
method = pe.get("pi")
future = None
if overlapped:
    outline = warmup.outline(model, dtype=default_dtype(), hub={})
    plan = outline.plan("a red circle", width=side, height=side, positional=method)
    future = warmup.ahead(warmup.compile_step, outline, plan, method, batch=1)
pipe = sj.Pipeline.from_pretrained(model)
jax.block_until_ready(pipe.params)
lap("weights")
if future is not None:
    future.result()
    lap("rest of the compilation")
conditioning = pipe.encode(["a red circle"])
jax.block_until_ready(conditioning)
lap("encode, first time")
velocity = pipe.velocity(method)
x = pipe.noise(0, side, side)
for name in ("first step", "second step"):
    velocity(pipe.params, x, 0.9, conditioning).block_until_ready()
    lap(name)
seconds["from weights to first step"] = round(time.perf_counter() - total - seconds["second step"], 2)
print(json.dumps({"seconds": seconds, "dtype": pipe.dtype}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--size", type=int, default=256, help="side of the picture in pixels")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    runs = []
    for overlap in ("one after the other", "overlapped"):
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "SEGA_JAX_CACHE": cache}  # of programs, and of the CPU's attention kernel
            environment.pop("JAX_COMPILATION_CACHE_DIR", None)
            for state in ("cold", "warm"):
                command = [sys.executable, "-c", CHILD, options.model, str(options.size), overlap]
                begun = time.perf_counter()
                made = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
                run = {"cache": state, "weights and compilation": overlap, **json.loads(made.stdout.splitlines()[-1])}
                run["seconds"]["process"] = round(time.perf_counter() - begun, 2)
                runs.append(run)
                print(f"{state} cache, {overlap}:")
                for name, seconds in run["seconds"].items():
                    print(f"  {name:28} {seconds:8.2f} s")
    if options.json is not None:
        report = {"model": options.model, "size": options.size, "runs": runs, **provenance()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
