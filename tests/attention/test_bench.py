"""The benchmark runs every pattern at a small size and its own error figures agree with the kernels' bounds."""

import json
from dataclasses import replace

import pytest

from sega_jax.attention import bench


@pytest.mark.parametrize(
    ("pattern", "pixels", "pairs"),
    [
        ("dense", 512, (1024 + 128) ** 2),
        ("full", 512, (1024 + 128) ** 2),
        ("scalediff", 512, 1 * (1024 + 128) * (1024 + 128)),
        ("scale-dit-p", 1024, None),
    ],
)
def test_measure_and_report(pattern, pixels, pairs, tmp_path):
    case = bench.Case(pattern, pixels, text=128, heads=1, depth=8, dtype="float32", block=(128, 64))
    rows = bench.measure(case, ("xla", "reference") if pixels == 512 else ("xla",), rounds=1)
    names = [row.backend for row in rows]
    assert names[0] == "xla"
    for row in rows:
        assert row.error < 1e-5
        assert row.seconds > 0
        assert set(row.speed_against) == set(names) - {row.backend}
        if pairs is not None:
            assert row.teraflops * 1e12 * row.seconds == pytest.approx(4 * pairs * 8)
            assert row.occupancy == 1
    if pattern == "scale-dit-p":
        assert rows[0].occupancy < 0.5
        assert "per pair" not in bench.line(rows[0])
        full = replace(rows[0], case=replace(case, pattern="full"), seconds=1.0, teraflops=2 * rows[0].teraflops)
        rows[0] = bench.beside_full(rows[0], [rows[0], full])
        assert rows[0].per_pair == 2
        assert "at 2.00 times" in bench.line(rows[0])
        assert bench.beside_full(full, [rows[0]]).per_pair is None
    record = json.loads(bench.report(rows, tmp_path).read_text())
    assert [row["backend"] for row in record["rows"]] == names
    assert record["versions"]["jax"]
    assert pattern in bench.line(rows[0])
    assert bench.table([record]).count("\n") == 1 + len(rows)


@pytest.mark.parametrize(("pattern", "pixels"), [("ring", 1024), ("dense", 1000)])
def test_refusals(pattern, pixels):
    with pytest.raises(ValueError, match=r"ring|1000"):
        bench.Case(pattern, pixels)
