"""What a run gives back and says on its way."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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


@dataclass(frozen=True, eq=False)
class Progress:
    """What ``on_step`` receives.

    Attributes:
        index: of ``total`` steps are done.
        total: steps of this batch, over all stages.
        seconds: that the last of them took.
        latents: that it left, f32 [B, h, w, C], of the size that stage works on.
        sigma: their noise level.
        clean: the step's estimate of what the noise hides, of the same shape.
        look: turns clean latents into small pictures; see `preview`.
    """

    index: int
    total: int
    seconds: float
    latents: jax.Array
    sigma: float
    clean: jax.Array
    look: Callable[[jax.Array], np.ndarray] = field(repr=False)

    def preview(self) -> list[Image]:
        """The clean estimate as pictures of one pixel per latent pixel, by a linear map: costs next to nothing."""
        return [Image(picture) for picture in self.look(self.clean)]


@contextlib.contextmanager
def progress_bar(shown: bool, total: int, done: int = 0) -> Iterator[Callable[[], Any]]:
    """A bar on standard error over the steps of a batch, if it is wanted; gives what advances it."""
    if not shown:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=done, unit="step", file=sys.stderr) as bar:
        yield bar.update


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
