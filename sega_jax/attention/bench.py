"""Measuring attention kernels against each other and against a large matrix product, in one process.

All contestants of a case are compiled first and then timed in turn, round after round; the fastest round counts,
so that other load on the machine hurts everyone alike.  On CPU the seconds of processor time are given as well:
they do not depend on what else runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sega_jax.attention.kernels import Request, choose, registered, tiles
from sega_jax.layouts.blocks import from_blocks
from sega_jax.layouts.scale_dit import block_map
from sega_jax.runtime.provenance import provenance, threads

PATTERNS = ("dense", "full", "scale-dit-k", "scale-dit-p", "scalediff")
NATIVE = 64  # tokens per side of a ScaleDiff window's keys; its queries are half as wide


@dataclass(frozen=True)
class Case:
    """One attention to measure: ``pixels`` per side at 16 pixels per token, plus text.

    ``"full"`` is the dense one under a block map that visits everything: what a map costs by itself.
    """

    pattern: str
    pixels: int
    text: int = 512
    heads: int = 24
    depth: int = 128
    dtype: str = "bfloat16"
    block: tuple[int, int] = (128, 128)

    def __post_init__(self):
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern {self.pattern!r} is unknown; known: {', '.join(PATTERNS)}")
        if self.pixels < 256 or self.pixels % 256:
            raise ValueError(f"pixels={self.pixels}: expected a positive multiple of 256")

    def request(self, seed: int = 0) -> tuple[Request, float]:
        """Random normal operands, and the number of (query, key) pairs that the kernel must evaluate."""
        side = self.pixels // 16
        batch, blocks = 1, None
        queries = keys = side**2 + self.text
        pairs = float(queries) * keys
        if self.pattern == "scalediff":
            batch = max(1, 2 * side // NATIVE) ** 2
            queries, keys = (NATIVE // 2) ** 2 + self.text, min(side, NATIVE) ** 2 + self.text
            pairs = float(batch) * queries * keys
        elif self.pattern == "full":
            rows, columns = (-(-queries // side) for side in self.block)
            blocks = from_blocks(np.zeros((rows, columns), int), np.zeros((0, *self.block), bool), *self.block)
        elif self.pattern != "dense":
            mask = "kernel" if self.pattern == "scale-dit-k" else "paper"
            blocks = block_map(side, side, self.text, mask, *self.block)
            queries = keys = queries + side**2 // 16
            pairs = float(blocks.visited) * self.block[0] * self.block[1]
        keyring = jax.random.split(jax.random.key(seed), 3)
        q, k, v = (
            jax.random.normal(key, (batch, n, self.heads, self.depth), jnp.float32).astype(self.dtype)
            for key, n in zip(keyring, (queries, keys, keys), strict=True)
        )
        return Request(q, k, v, self.depth**-0.5, None, blocks), pairs


@dataclass(frozen=True)
class Row:
    """What one contestant did in one case; rates in TFLOP/s, ``error`` relative to float64 on sampled rows.

    ``per_pair``: time per visited pair, over that of the same kernel under a full map; None where that is not known.
    """

    case: Case
    backend: str
    seconds: float
    processor_seconds: float
    teraflops: float
    of_matmul: float
    occupancy: float
    temporary_bytes: int | None
    error: float
    speed_against: dict[str, float] = field(default_factory=dict)
    processor_against: dict[str, float] = field(default_factory=dict)
    per_pair: float | None = None


def beside_full(row: Row, others: Iterable[Row]) -> Row:
    """The row with its ``per_pair`` by the full map's row among ``others``, if it is there."""
    full = replace(row.case, pattern="full")
    for other in others:
        if (other.backend, other.case) == (row.backend, full):
            return replace(row, per_pair=other.teraflops / row.teraflops)
    return row


def _torch_attention(request: Request) -> Callable[[], object] | None:
    """PyTorch's kernel on the same numbers, where it is installed and the device is a CPU."""
    if jax.default_backend() != "cpu" or request.block_map is not None:
        return None
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads())
    kind = getattr(torch, request.q.dtype.name)
    q, k, v = (
        torch.from_numpy(np.array(x, np.float32)).to(kind).transpose(1, 2).contiguous()
        for x in (request.q, request.k, request.v)
    )

    def run():
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=request.scale)

    return run


def _error(request: Request, out, rows: int = 16) -> float:
    """Largest error on a few query rows of the first sample and head, over the largest value there."""
    q, k, v = (np.asarray(x[0, :, 0], np.float64) for x in (request.q, request.k, request.v))
    picked = np.linspace(0, len(q) - 1, rows).astype(int)
    scores = q[picked] @ k.T * request.scale
    if request.block_map is not None:
        b = request.block_map
        for n, row in enumerate(picked // b.block_q):
            seen = np.zeros(-(-len(k) // b.block_k) * b.block_k, bool)
            for c, kind in zip(
                np.asarray(b.columns[row])[: b.count[row]], np.asarray(b.pattern[row])[: b.count[row]], strict=True
            ):
                inside = True if kind == 0 else np.asarray(b.patterns[kind - 1])[picked[n] % b.block_q]
                seen[c * b.block_k : (c + 1) * b.block_k] = inside
            scores[n, ~seen[: len(k)]] = -np.inf
    weights = np.exp(scores - scores.max(1, keepdims=True))
    expected = (weights / weights.sum(1, keepdims=True)) @ v
    got = np.asarray(out[0, picked, 0], np.float64)
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def _once(run: Callable[[], object]) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    return time.perf_counter() - wall, time.process_time() - processor


def _compiled(request: Request, run: Callable) -> partial:
    """The compiled kernel with the request's arrays; its ``func`` is the executable."""
    q, k, v = request.q, request.k, request.v
    compiled = jax.jit(lambda q, k, v: run(replace(request, q=q, k=k, v=v))).lower(q, k, v).compile()
    return partial(compiled, q, k, v)


def _fastest(runs: dict, rounds: int) -> dict:
    """Wall and processor seconds of the fastest round of each, all in turn after one round to warm up."""
    times = {name: [_once(run)] for name, run in runs.items()}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_once(run))
    return {name: tuple(min(t[i] for t in seen[1:]) for i in (0, 1)) for name, seen in times.items()}


def _matrix_product(dtype: DTypeLike) -> tuple[Callable[[], object], int]:
    """A large square product, and its operations."""
    size = 2_048 if jax.default_backend() == "cpu" else 8_192
    # random numbers: a GPU multiplies constants on less power, and so faster than anything real
    square = jax.random.normal(jax.random.key(1), (size, size), jnp.float32).astype(dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
    return lambda: product(square), 2 * size**3


def matmul_rate(dtype: DTypeLike, rounds: int = 5) -> float:
    """Operations per second of a large matrix product on the default device."""
    run, flops = _matrix_product(dtype)
    return flops / _fastest({"matmul": run}, rounds)["matmul"][0]


def measure(case: Case, backends: tuple[str, ...] | None = None, rounds: int = 5) -> list[Row]:
    """Time every backend that serves the case (or those named), the peers, and a matrix product."""
    request, pairs = case.request()
    names = backends or tuple(
        n for n, kernel in registered().items() if n != "reference" and not kernel.supports(request)
    )
    runs: dict[str, Callable[[], object]] = {}
    temporary: dict[str, int | None] = {}
    errors: dict[str, float] = {}
    for name in names:
        kernel, _ = choose(request, name)
        runs[name] = _compiled(request, kernel.run)
        memory = runs[name].func.memory_analysis()
        temporary[name] = None if memory is None else int(memory.temp_size_in_bytes)
        errors[name] = _error(request, runs[name]()[0])
    if (peer := _torch_attention(request)) is not None:
        runs["torch"], temporary["torch"] = peer, None
        errors["torch"] = _error(request, peer().transpose(1, 2).float().numpy())
    runs["matmul"], product = _matrix_product(case.dtype)
    best = _fastest(runs, rounds)
    rate = product / best["matmul"][0]
    flops = 4 * pairs * case.heads * case.depth
    everything = request.q.shape[0] * request.q.shape[1] * request.k.shape[1]
    contestants = [name for name in runs if name != "matmul"]
    return [
        Row(
            case,
            name,
            *best[name],
            flops / best[name][0] / 1e12,
            flops / best[name][0] / rate,
            pairs / everything,
            temporary[name],
            errors[name],
            {other: best[other][0] / best[name][0] for other in contestants if other != name},
            {other: best[other][1] / best[name][1] for other in contestants if other != name},
        )
        for name in contestants
    ]


def report(rows: list[Row], folder: Path) -> Path:
    """Write ``attention-<device>.json``: rows with machine, versions and commit."""
    path = folder / f"attention-{tiles.device_name()}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**provenance(), "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return path


HEADLINES = (("dense", "float32"), ("dense", "bfloat16"), ("scale-dit-p", "bfloat16"))  # of CPUs, with text


def headlines(reports: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The reports cut to a row per case of `HEADLINES`: the kernel that `auto` takes, where it was slowest."""
    chosen = []
    for pattern, dtype in HEADLINES:
        rows = [
            (report, row)
            for report in reports
            for row in report["rows"]
            if (row["case"]["pattern"], row["case"]["dtype"]) == (pattern, dtype)
            and row["backend"] == "cpu"
            and row["case"]["text"]
        ]
        report, row = max(rows, key=lambda pair: pair[1]["seconds"])
        chosen.append({**report, "rows": [row]})
    return chosen


def table(reports: Iterable[Mapping[str, Any]]) -> str:
    """Written reports in Markdown, a line per row; rates of sparse patterns count visited blocks alone, "per pair" is
    their time per visited pair over that of the full map."""
    names = ("machine", "pattern", "picture", "heads", "dtype", "kernel", "seconds", "TFLOP/s", "of a matrix product")
    names += ("occupancy", "per pair", "speed", "error")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for report in reports:
        name = report["processor"] if report["device"] == "cpu" else report["device"]
        machine = f"{name}, {report['threads']} threads"
        for row in report["rows"]:
            case = row["case"]
            cells = (
                machine,
                case["pattern"],
                f"{case['pixels']}² + {case['text']} text",
                f"{case['heads']} x {case['depth']}",
                case["dtype"],
                row["backend"],
                f"{row['seconds']:.3f}",
                f"{row['teraflops']:.3f}",
                f"{row['of_matmul']:.2f}",
                f"{row['occupancy']:.3f}",
                "" if row["per_pair"] is None else f"{row['per_pair']:.2f}",
                ", ".join(f"{ratio:.2f}x {other}" for other, ratio in row["speed_against"].items()),
                f"{row['error']:.0e}",
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tune(case: Case, backends: tuple[str, ...] | None = None, rounds: int = 5) -> list[tiles.Entry]:
    """The fastest tile of every kernel that has a choice and serves the case (or of those named).

    Raises:
        ValueError: a case under a block map, whose blocks are its layout's.
    """
    if case.pattern != "dense":
        raise ValueError(f"pattern {case.pattern!r}: tiles are measured on dense cases; a block map brings its own")
    request, _ = case.request()
    names = backends or tuple(registered())
    found = []
    for name in names:
        kernel = registered()[name]
        if kernel.tilings is None or kernel.supports(request):
            continue
        choices = kernel.tilings(request)
        runs = {tile: _compiled(request, partial(kernel.run, tile=tile)) for tile in choices}
        best = {tile: seconds for tile, (seconds, _) in _fastest(runs, rounds).items()}
        if best:
            tile = min(best, key=best.get)
            keys = request.k.shape[1]
            entry = (name, case.dtype, case.depth, keys, tile, best[tile], choices[0], best[choices[0]])
            found.append(tiles.Entry(*entry))
    return found


def line(row: Row) -> str:
    """One row for the terminal."""
    c = row.case
    against = ", ".join(
        f"{ratio:.2f}x {other} ({row.processor_against[other]:.2f}x by processor time)"
        for other, ratio in row.speed_against.items()
    )
    what = f"{c.pattern} {c.pixels}² + {c.text} text, {c.heads} x {c.depth}, {c.dtype}, {row.backend}"
    rate = f"{row.seconds:.3f} s, {row.teraflops:.3f} TFLOP/s, {row.of_matmul:.2f} of a matmul"
    occupancy = f"occupancy {row.occupancy:.3f}"
    if row.per_pair is not None:
        occupancy += f" at {row.per_pair:.2f} times the full map's time per pair"
    return f"{what}: {rate}, {occupancy}, error {row.error:.1e}" + (f"; speed {against}" if against else "")


def tile_line(entry: tiles.Entry) -> str:
    """One measured tile for the terminal."""
    ratio = entry.heuristic_seconds / entry.seconds
    return (
        f"{entry.kernel}, {entry.dtype}, head size {entry.depth}, {entry.keys} keys: tile {entry.tile} in "
        f"{entry.seconds:.4f} s, {ratio:.2f}x the heuristic {entry.heuristic_tile}"
    )
