"""A loss curve as a small picture, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw


def draw(steps: Sequence[int], losses: Sequence[float], width: int = 640, height: int = 320) -> np.ndarray:
    """Loss on a logarithmic axis over steps, uint8 [height, width, 3]."""
    steps, losses = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
    if len(steps) < 2 or len(steps) != len(losses) or losses.min() <= 0:
        raise ValueError(f"{len(steps)} steps and {len(losses)} losses: expected two or more, losses above 0")
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    left, right, top, bottom = 48, width - 12, 12, height - 28
    low, high = np.log10(losses.min()) - 0.05, np.log10(losses.max()) + 0.05

    def x(step: float) -> float:
        return left + (right - left) * step / steps.max()

    def y(loss: float) -> float:
        return bottom - (bottom - top) * (np.log10(loss) - low) / (high - low)

    pen.rectangle((left, top, right, bottom), outline="grey")
    for value in (factor * 10.0**power for power in range(-4, 3) for factor in (1, 2, 5)):
        if low <= np.log10(value) <= high:
            pen.line((left, y(value), right, y(value)), fill="lightgrey")
            pen.text((4, y(value) - 6), f"{value:g}", fill="black")
    for step in np.linspace(0, steps.max(), 6):
        pen.text((x(step) - 12, bottom + 6), f"{step:.0f}", fill="black")
    pen.line([(x(s), y(v)) for s, v in zip(steps, losses, strict=True)], fill=(50, 95, 210), width=2)
    return np.asarray(image)
