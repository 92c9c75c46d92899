"""Measure the attention kernels of this device, and write README's table from every file in ``benchmarks``.

python scripts/bench_attention.py --pixels 1024 2048
"""

import json
from pathlib import Path

import tyro

from sega_jax.attention.bench import table
from sega_jax.cli import Bench
from sega_jax.evaluation.contest import write_into

if __name__ == "__main__":
    bench = tyro.cli(Bench, description=__doc__)
    print(bench.show(bench.run()))
    root = Path(__file__).parents[1]
    reports = [json.loads(path.read_text()) for path in sorted(root.glob("benchmarks/attention-*.json"))]
    write_into(root / "README.md", "attention", table(reports))
