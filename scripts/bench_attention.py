"""``sega-jax bench`` with its options, then the tables of the pages from every ``benchmarks/attention-*.json``.

python scripts/bench_attention.py --pixels 1024 2048 --text 0 512
"""

import json
import sys
from pathlib import Path

from sega_jax.attention.bench import headlines, table
from sega_jax.cli import main
from sega_jax.evaluation.contest import write_into

if __name__ == "__main__":
    if code := main(["bench", *sys.argv[1:]]):
        sys.exit(code)
    root = Path(__file__).parents[1]
    reports = [json.loads(path.read_text()) for path in sorted(root.glob("benchmarks/attention-*.json"))]
    write_into(root / "docs" / "attention.md", "attention", table(reports))
    write_into(root / "README.md", "attention", table(headlines(reports)))
