"""What a run of coarse, mixed and fine steps costs, before it is made."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sega_jax.geometry import Grid
from sega_jax.layouts.crpa import Mixed
from sega_jax.models.denoiser import NetworkConfig
from sega_jax.sampling.crpa import Crpa, stages_of
from sega_jax.sampling.regions import Regions


@dataclass(frozen=True)
class Estimate:
    """What a run will cost, in FLOPs of the transformer for one picture.

    Attributes:
        stages: name -> (steps, image tokens, FLOPs of a step).
        full: FLOPs of the same steps at full resolution.
        layout: of the mixed stage; what it compiles for.
    """

    stages: dict[str, tuple[int, int, float]]
    full: float
    layout: Mixed

    @property
    def flops(self) -> float:
        return sum(steps * flops for steps, _, flops in self.stages.values())

    @property
    def share(self) -> float:
        """Of the cost at full resolution."""
        return self.flops / self.full

    def __str__(self) -> str:
        parts = [
            f"{steps} {name} x {tokens} tokens ({flops:.3g} FLOP)"
            for name, (steps, tokens, flops) in self.stages.items()
            if steps
        ]
        return f"{', '.join(parts)}: {100 * self.share:.0f} % of full resolution"


def estimate(
    config: NetworkConfig, grid: Grid, sigmas: np.ndarray, options: Crpa, regions: Regions, rows: int = 1
) -> Estimate:
    """The cost of a run before it is made.

    Args:
        config: of the network.
        grid: of the finest tokens, with its text tokens.
        sigmas: schedule f32 [steps + 1].
        options, regions: of the run.
        rows: model rows per picture, 2 with true guidance.
    """
    pairs, (first, second) = stages_of(sigmas, options)
    text, layout = grid.text_tokens, options.expected(regions, grid)

    def plain(level: int) -> tuple[int, float]:
        tokens = grid.tokens // 4**level
        return tokens, rows * config.step_flops(tokens, text, (tokens + text) ** 2)

    mixed = layout.tokens, rows * config.step_flops(layout.tokens, text, layout.pairs(text))
    stages = {
        "coarse": (first, *plain(options.levels - 1)),
        "mixed": (second - first, *mixed),
        "fine": (len(pairs) - second, *plain(0)),
    }
    return Estimate(stages, (len(sigmas) - 1) * plain(0)[1], layout)
