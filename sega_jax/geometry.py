"""Static geometry: what a model family was trained on, and the token grid of one image.

Everything here is Python and NumPy, hashable, and known before anything is traced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

IdConvention = Literal["corner", "centered"]
TextIds = Literal["origin", "diagonal", "sequence", "frames"]


LONGEST_SIDE = 65_536  # pixels; ten times the largest picture that any of the methods has been shown on


@dataclass(frozen=True)
class RopeSpec:
    """Rotary geometry of a model family.

    Attributes:
        dims: head channels per rotary axis, each even.
        theta: base of the frequencies ``theta ** (-2 i / d)``.
        trained: tokens per side ``(rows, columns)`` the model was trained on.
        ids: position convention of the image.  ``"corner"`` (FLUX): rows and columns from 0.  ``"centered"``
            (Qwen-Image): centred on 0, the last of ``n`` at ``n // 2 - 1``.
        pixels_per_token: pixels per token side (VAE factor times patch side).
        roles: what each axis of ``dims`` counts: ``"row"`` and ``"column"`` of the image, which positional methods
            rescale, and others, which stay as trained: ``"frame"``, ``"sequence"`` (of the text), or any name.
        text: where text tokens are.  ``"origin"`` (FLUX.1, Krea-2): all at 0.  ``"diagonal"`` (Qwen-Image): token k on
            every axis at k plus what comes after the image's last row or column.  ``"sequence"`` (FLUX.2): at k on the
            axis of that role, at 0 on the others.  ``"frames"`` (Z-Image): at 1 + k on the frame axis, the image in the
            frame after the last.  None: ``"origin"`` beside ``"corner"``, ``"diagonal"`` beside ``"centered"``.
    """

    dims: tuple[int, ...] = (16, 56, 56)
    theta: float = 10_000.0
    trained: tuple[int, int] = (64, 64)
    ids: IdConvention = "corner"
    pixels_per_token: int = 16
    roles: tuple[str, ...] = ("frame", "row", "column")
    text: TextIds | None = None

    def __post_init__(self):
        if len(self.dims) != len(self.roles) or any(d <= 0 or d % 2 for d in self.dims):
            raise ValueError(f"dims={self.dims}: expected positive even channel counts, one per role of {self.roles}")
        if len(set(self.roles)) < len(self.roles) or not {"row", "column"} <= set(self.roles):
            raise ValueError(f"roles={self.roles}: expected 'row', 'column' and others, each once")
        if self.text not in (None, "origin", "diagonal", "sequence", "frames"):
            raise ValueError(f"text={self.text!r}: expected 'origin', 'diagonal', 'sequence', 'frames' or None")
        needed = {"sequence": "sequence", "frames": "frame"}.get(self.text)
        if needed is not None and needed not in self.roles:
            raise ValueError(f"text={self.text!r}: needs an axis of the role {needed!r}; the roles are {self.roles}")
        if self.theta <= 1:
            raise ValueError(f"theta={self.theta}: the rotary base must exceed 1")
        if min(self.trained) < 1:
            raise ValueError(f"trained={self.trained}: expected positive tokens per side (rows, columns)")
        if self.ids not in ("corner", "centered"):
            raise ValueError(f"ids={self.ids!r}: expected 'corner' (FLUX) or 'centered' (Qwen-Image)")
        if self.pixels_per_token < 1:
            raise ValueError(f"pixels_per_token={self.pixels_per_token}: expected a positive integer")

    def axis(self, role: str) -> int:
        """Number of the axis that counts ``role``.

        Raises:
            ValueError: there is none.
        """
        if role not in self.roles:
            raise ValueError(f"role {role!r}: no axis counts it; the roles are {self.roles}")
        return self.roles.index(role)

    @property
    def spatial(self) -> tuple[int, int]:
        """Numbers of the axes of rows and columns."""
        return self.axis("row"), self.axis("column")

    @property
    def spatial_dims(self) -> tuple[int, int]:
        """Head channels of the axes of rows and columns."""
        rows, columns = self.spatial
        return self.dims[rows], self.dims[columns]

    @property
    def text_ids(self) -> TextIds:
        """``text``, or what goes with ``ids``."""
        return self.text or ("origin" if self.ids == "corner" else "diagonal")

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

    @property
    def origin(self) -> np.ndarray:
        """Ids of image tokens where rows and columns are 0: f32 [axes]."""
        origin = np.zeros(len(self.spec.dims), np.float32)
        if self.spec.text_ids == "frames":
            origin[self.spec.axis("frame")] = self.text_tokens + 1
        return origin

    def ids(self, largest: int | None = None) -> dict[str, np.ndarray]:
        """Position ids, float32 (exact; never bf16, which collides above 256).

        Args:
            largest: only for ``"corner"``: shift rows and columns so that the last id of a longer side is this
                value, and the text with the first image token, as SEGA's FLUX pipeline (arXiv 2605.22668) does with
                256.  RoPE is relative, so the shift changes no logit.

        Returns:
            ``{"text": f32[text_tokens, axes], "image": f32[height * width, axes]}``, image row by row.
        """
        spec = self.spec
        row, column = spec.spatial
        rows, columns = np.arange(self.height), np.arange(self.width)
        if spec.ids == "centered":
            rows = rows - (self.height - self.height // 2)
            columns = columns - (self.width - self.width // 2)
        number = np.arange(self.text_tokens, dtype=np.float32)
        text = np.zeros((self.text_tokens, len(spec.dims)), np.float32)
        if spec.text_ids == "diagonal":
            text += (max(rows[-1], columns[-1]) + 1 + number)[:, None]
        elif spec.text_ids == "sequence":
            text[:, spec.axis("sequence")] = number
        elif spec.text_ids == "frames":
            text[:, spec.axis("frame")] = 1 + number
        if largest is not None:
            if spec.ids != "corner":
                raise ValueError(f"largest={largest}: only 'corner' ids can be capped; this grid uses {spec.ids!r}")
            rows = rows - max(0, self.height - 1 - largest)
            columns = columns - max(0, self.width - 1 - largest)
            text[:, row] += rows[0]
            text[:, column] += columns[0]
        image = np.tile(self.origin, (self.height, self.width, 1))
        image[..., row] = rows[:, None]
        image[..., column] = columns[None, :]
        return {"text": text, "image": image.reshape(-1, len(spec.dims))}
