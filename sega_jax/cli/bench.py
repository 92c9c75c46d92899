"""``sega-jax bench``: the attention kernels of this device against each other, and their best tile sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from sega_jax.cli.options import option


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure attention: seconds, TFLOP/s, share of a matrix product's rate, speed against each peer, error."""

    pixels: Annotated[tuple[int, ...], option("PX ...", "1024 2048 4096 6144")] = (1024, 2048, 4096, 6144)
    """Sides of the image, at 16 pixels per token."""
    patterns: Annotated[tuple[str, ...], option("NAME ...", "all of them; dense with --tune")] = ()
    """dense, full, scale-dit-k, scale-dit-p, scalediff."""
    dtypes: Annotated[tuple[Literal["bfloat16", "float32"], ...], option("DTYPE ...", "bfloat16")] = ("bfloat16",)
    """Of queries, keys and values."""
    text: Annotated[tuple[int, ...], option("N ...", "512")] = (512,)
    """Text tokens, multiples of 128."""
    heads: Annotated[int, option("N", "24")] = 24
    """Attention heads."""
    depth: Annotated[int, option("N", "128")] = 128
    """Channels per head."""
    block: Annotated[tuple[int, int], option("Q K", "128 128")] = (128, 128)
    """Queries and keys of a block of the sparse patterns."""
    backends: Annotated[tuple[str, ...], option("NAME ...", "every kernel that serves the case")] = ()
    """Kernels to measure."""
    rounds: Annotated[int, option("N", "5")] = 5
    """Rounds over all contestants; the fastest counts."""
    tune: Annotated[bool, option("", "off")] = False
    """Measure tile sizes instead and keep the best: later runs on this device use them."""
    out: Annotated[Path | None, option("PATH", "folder benchmarks; with --tune the data folder")] = None
    """Where the result goes."""
    json: Annotated[bool, option("", "off")] = False
    """Result as JSON on standard output."""

    def run(self) -> dict:
        """``path`` of what was written and its ``rows``.

        Raises:
            ValueError: for a case that does not exist, or a kernel that refuses it.
        """
        from sega_jax.attention import bench
        from sega_jax.attention.kernels import tiles
        from sega_jax.cli.console import say
        from sega_jax.runtime.provenance import provenance

        patterns = self.patterns or (("dense",) if self.tune else bench.PATTERNS)
        cases = [
            bench.Case(pattern, pixels, text, self.heads, self.depth, dtype, self.block)
            for pixels in self.pixels
            for text in self.text
            for dtype in self.dtypes
            for pattern in patterns
        ]
        measure, line = (bench.tune, bench.tile_line) if self.tune else (bench.measure, bench.line)
        rows = []
        for case in cases:
            for row in measure(case, self.backends or None, self.rounds):
                rows.append(row if self.tune else bench.beside_full(row, rows))
                say(line(rows[-1]))
        if self.tune:
            path = self.out or tiles.user_file()
            tiles.write(rows, path, provenance())
        else:
            path = bench.report(rows, self.out or Path("benchmarks"))
        return {"path": str(path), "rows": [asdict(row) for row in rows]}

    def show(self, result: dict) -> str:
        """The result for people."""
        return result["path"]
