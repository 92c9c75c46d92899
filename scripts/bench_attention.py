"""Measure the attention kernels of this device: ``python scripts/bench_attention.py --pixels 1024 2048``."""

import tyro

from sega_jax.cli import Bench

if __name__ == "__main__":
    bench = tyro.cli(Bench)
    print(bench.show(bench.run()))
