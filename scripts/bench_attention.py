"""Measure the attention kernels of this device: ``python scripts/bench_attention.py --pixels 1024 2048``."""

import argparse
from pathlib import Path

from sega_jax.attention import bench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pixels", type=int, nargs="+", default=[1024, 2048, 4096, 6144], help="sides of the image")
    parser.add_argument("--patterns", nargs="+", default=list(bench.PATTERNS), choices=bench.PATTERNS)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--text", type=int, default=512, help="text tokens, a multiple of 128")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--depth", type=int, default=128, help="channels per head")
    parser.add_argument("--block", type=int, nargs=2, default=[128, 128], help="queries and keys of a block")
    parser.add_argument("--backends", nargs="+", default=None, help="default: every kernel that serves the case")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    options = parser.parse_args()
    rows = []
    for pixels in options.pixels:
        for dtype in options.dtypes:
            for pattern in options.patterns:
                case = bench.Case(
                    pattern, pixels, options.text, options.heads, options.depth, dtype, tuple(options.block)
                )
                backends = tuple(options.backends) if options.backends else None
                for row in bench.measure(case, backends, options.rounds):
                    print(bench.line(row), flush=True)
                    rows.append(row)
    print(bench.report(rows, options.out))


if __name__ == "__main__":
    main()
