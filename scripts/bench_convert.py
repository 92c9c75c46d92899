"""Speed and memory of conversions against ``cp`` of the same bytes: a synthetic sharded FLUX.1 checkpoint.

    python scripts/bench_convert.py --gigabytes 6

Each conversion runs in a process of its own whose anonymous memory (RssAnon) is sampled; ``cp`` is timed before
each, and the fastest of several rounds counts on both sides.  Prints a table and, with --json, writes the figures
with machine, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from converters.files import flush
from converters.kinds import BY_NAME
from converters.report import stored_report
from converters.stream import Output, Progress, write_sharded
from sega_jax.runtime.provenance import provenance

CONFIG = {
    "_class_name": "FluxTransformer2DModel", "in_channels": 64, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
SINGLE, DOUBLE = 283_159_552, 679_594_496  # bytes of one block in bfloat16, rounded


def make(folder: Path, gigabytes: float) -> int:
    """A diffusers transformer folder of random finite bfloat16 weights at full width; returns its bytes."""
    singles = max(1, round(gigabytes * 1e9 / 2 / SINGLE))
    doubles = max(1, round(gigabytes * 1e9 / 2 / DOUBLE))
    config = CONFIG | {"num_layers": doubles, "num_single_layers": singles}
    block = np.random.default_rng(0).standard_normal(1 << 23, np.float32).astype(ml_dtypes.bfloat16)

    def pieces(values: int, start: int):
        whole, rest = divmod(values, block.size - start)
        return lambda: [block[start:]] * whole + [block[start : start + rest]]

    outputs = [
        Output(t.source, t.shape, block.dtype, pieces(int(np.prod(t.shape)), i % 1000))
        for i, t in enumerate(BY_NAME["transformer"].tensors(config, "diffusers"))
    ]
    total = sum(output.nbytes for output in outputs)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with Progress(total, "make", True) as bar:
        write_sharded(folder, "diffusion_pytorch_model", outputs, 2 * 10**9, 2, bar)
    flush(folder)
    return total


def copy(source: Path, to: Path) -> tuple[float, float]:
    """Seconds of ``cp -r``, and of that with the copy flushed to the disk."""
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(to)], check=True)
    copied = time.perf_counter()
    flush(to)
    flushed = time.perf_counter()
    shutil.rmtree(to)
    return copied - started, flushed - started


def peak_anonymous(process: subprocess.Popen) -> int:
    """Largest RssAnon of a process until it ends, in bytes."""
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]) * 1024)
        except (OSError, IndexError):
            pass
        time.sleep(0.01)
    return peak


def convert(source: Path, to: Path, target: str) -> dict:
    """Converts with verification in a process of its own."""
    command = [sys.executable, "-m", "converters", "convert", source, to, "--to", target, "--verify", "--quiet"]
    process = subprocess.Popen(list(map(str, command)), cwd=Path(__file__).parents[1])
    peak = peak_anonymous(process)
    if process.returncode:
        raise SystemExit(process.returncode)
    seconds = stored_report(to)["seconds"]
    shutil.rmtree(to) if to.is_dir() else to.unlink()
    return {"peak_anonymous": peak, **seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--repeat", type=int, default=3, help="copies and conversions in turn; the fastest count")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="where to store the figures")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-convert-") as work:
        folder = Path(work)
        total = make(folder / "source", options.gigabytes)
        largest = 15360 * 3072 * 2
        for target, name in (("orbax", "out"), ("bfl", "out.safetensors"), ("diffusers", "out")):
            copies, runs = [], []
            for _ in range(options.repeat):
                copies.append(copy(folder / "source", folder / "copy"))
                runs.append(convert(folder / "source", folder / name, target))
            plain, durable = (min(each) for each in zip(*copies, strict=True))
            found = {key: max(run[key] for run in runs) if key == "peak_anonymous" else min(run[key] for run in runs)
                     for key in runs[0]}  # fmt: skip
            rate = total / found["write"]
            results.append(
                {
                    "to": target,
                    "bytes": total,
                    "cp_MBps": total / plain / 1e6,
                    "convert_MBps": rate / 1e6,
                    "convert_over_cp": plain / found["write"],
                    "durable_over_durable_cp": durable / (found["write"] + found["flush"]),
                    "verify_over_convert": found["write"] / found["verify"],
                    "peak_anonymous_MB": found["peak_anonymous"] / 1e6,
                    "allowed_MB": 600 + 2 * largest / 1e6,
                }
            )
            print(json.dumps(results[-1]), flush=True)
    header = ("to", "cp_MBps", "convert_MBps", "convert_over_cp", "durable_over_durable_cp", "verify_over_convert",
              "peak_anonymous_MB", "allowed_MB")  # fmt: skip
    print("  ".join(header))
    for row in results:
        print("  ".join(f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key]) for key in header))
    if options.json:
        options.json.write_text(json.dumps({"rows": results, **provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
