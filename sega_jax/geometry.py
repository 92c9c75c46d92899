"""Static geometry: what a model family was trained on, and the token grid of one image.

Everything here is Python and NumPy, hashable, and known before anything is traced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

IdConvention = Literal["corner", "centered"]


LONGEST_SIDE = 65_536  # pixels; ten times the largest picture that any of the methods has been shown on


@dataclass(frozen=True)
class RopeSpec:
    """Rotary geometry of a model family.

    Attributes:
        dims: head channels per rotary axis ``(frame, row, column)``, each even.
        theta: base of the frequencies ``theta ** (-2 i / d)``.
        trained: tokens per side ``(rows, columns)`` the model was trained on.
        ids: position convention.  ``"corner"`` (FLUX): text at (0, 0, 0), image rows and columns from 0.
            ``"centered"`` (Qwen-Image): image ids centred on 0, text on the diagonal behind them.
        pixels_per_token: pixels per token side (VAE factor times patch side).
    """

    dims: tuple[int, ...] = (16, 56, 56)
    theta: float = 10_000.0
    trained: tuple[int, int] = (64, 64)
    ids: IdConvention = "corner"
    pixels_per_token: int = 16

    def __post_init__(self):
        if len(self.dims) != 3 or any(d <= 0 or d % 2 for d in self.dims):
            raise ValueError(f"dims={self.dims}: expected three positive even channel counts (frame, row, column)")
        if self.theta <= 1:
            raise ValueError(f"theta={self.theta}: the rotary base must exceed 1")
        if min(self.trained) < 1:
            raise ValueError(f"trained={self.trained}: expected positive tokens per side (rows, columns)")
        if self.ids not in ("corner", "centered"):
            raise ValueError(f"ids={self.ids!r}: expected 'corner' (FLUX) or 'centered' (Qwen-Image)")
        if self.pixels_per_token < 1:
            raise ValueError(f"pixels_per_token={self.pixels_per_token}: expected a positive integer")

    def grid(self, height: int, width: int, text_tokens: int = 0) -> Grid:
        """Token grid of ``height`` rows by ``width`` columns, with ``text_tokens`` text tokens."""
        return Grid(self, height, width, text_tokens)

    def grid_for_pixels(self, height: int, width: int, text_tokens: int = 0) -> Grid:
        """Token grid of an image of ``height`` x ``width`` pixels; sides must be multiples of the token side."""
        side = self.pixels_per_token
        for name, value in (("height", height), ("width", width)):
            if value < side or value % side:
                nearest = max(side, round(value / side) * side)
                raise ValueError(f"{name}={value}: must be a positive multiple of {side} pixels; try {nearest}")
            if value > LONGEST_SIDE:
                raise ValueError(f"{name}={value}: expected at most {LONGEST_SIDE} pixels")
        return Grid(self, height // side, width // side, text_tokens)


@dataclass(frozen=True)
class Grid:
    """The token grid of one image: rows, columns and text tokens, under a `RopeSpec`."""

    spec: RopeSpec
    height: int
    width: int
    text_tokens: int = 0

    def __post_init__(self):
        if self.height < 1 or self.width < 1 or self.text_tokens < 0:
            raise ValueError(
                f"grid of {self.height} x {self.width} tokens with {self.text_tokens} text tokens: "
                "height and width must be positive, text_tokens must not be negative"
            )

    @property
    def tokens(self) -> int:
        """Number of image tokens."""
        return self.height * self.width

    @property
    def pixels(self) -> tuple[int, int]:
        """Image size (height, width) in pixels."""
        return self.height * self.spec.pixels_per_token, self.width * self.spec.pixels_per_token

    @property
    def stretch(self) -> tuple[float, float]:
        """Tokens per side over trained tokens per side (rows, columns); below 1 for small images."""
        return self.height / self.spec.trained[0], self.width / self.spec.trained[1]

    def ids(self, largest: int | None = None) -> dict[str, np.ndarray]:
        """Position ids, float32 (exact; never bf16, which collides above 256).

        Args:
            largest: only for ``"corner"``: shift rows and columns so that the last id of a longer side is this
                value, and the text to the first image token, as SEGA's FLUX pipeline does with 256 (arXiv 2605.22668).
                RoPE is relative, so the shift changes no logit.

        Returns:
            ``{"text": f32[text_tokens, 3], "image": f32[height * width, 3]}``, image row by row.
        """
        rows, columns = np.arange(self.height), np.arange(self.width)
        text = np.zeros((self.text_tokens, 3), np.float32)
        if self.spec.ids == "centered":
            rows = rows - (self.height - self.height // 2)
            columns = columns - (self.width - self.width // 2)
            first = max(self.height // 2, self.width // 2)
            text = text + (first + np.arange(self.text_tokens, dtype=np.float32))[:, None]
        if largest is not None:
            if self.spec.ids != "corner":
                raise ValueError(
                    f"largest={largest}: only 'corner' ids can be capped; this grid uses {self.spec.ids!r}"
                )
            rows = rows - max(0, self.height - 1 - largest)
            columns = columns - max(0, self.width - 1 - largest)
            text = text + np.array([0, rows[0], columns[0]], np.float32)
        image = np.zeros((self.height, self.width, 3), np.float32)
        image[..., 1] = rows[:, None]
        image[..., 2] = columns[None, :]
        return {"text": text, "image": image.reshape(-1, 3)}
