"""What a run gives back and says on its way."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sega_jax.media.images import Image


@dataclass(frozen=True)
class Result:
    """Pictures and how they came about.

    Attributes:
        images: one `Image` per prompt and image index, in that order; empty with ``decode=False``.
        latents: model-scale latents, float32 [B, h, w, C].
        records: metadata of every picture.
        timings: seconds spent in ``encode``, ``denoise`` and ``decode``.
        levels: with layout ``crpa``, size class of the token that shows each fine token's place, int8 [B, H, W].
    """

    images: list[Image]
    latents: np.ndarray
    records: list[dict]
    timings: dict[str, float]
    levels: np.ndarray | None = None


@dataclass(frozen=True)
class Progress:
    """What ``on_step`` receives: ``index`` of ``total`` steps are done, and how long the last of them took."""

    index: int
    total: int
    seconds: float


class Clock:
    """Adds the time since the last stop to a stage, after the device is done."""

    def __init__(self, timings: dict[str, float]):
        self._timings = timings
        self._last = time.perf_counter()

    def stop(self, stage: str, results: Any = None) -> None:
        jax.block_until_ready(results)
        now = time.perf_counter()
        self._timings[stage] += now - self._last
        self._last = now
