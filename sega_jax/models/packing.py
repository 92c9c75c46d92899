"""Latents to tokens and back: square patches of latent pixels, in the channel order that a family's weights expect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax


@dataclass(frozen=True)
class Packing:
    """Patches of ``patch`` x ``patch`` latent pixels as one token.

    Attributes:
        patch: latent pixels per token side.
        order: of a token's channels: ``"channel"``, latent channels outermost (FLUX.1, Qwen-Image), or ``"pixel"``,
            the pixels of the patch outermost.
    """

    patch: int = 2
    order: Literal["channel", "pixel"] = "channel"

    def tokens(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of latents of these sides.

        Raises:
            ValueError: for sides that patches do not divide.
        """
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"latents of {height} x {width}: both sides must be multiples of {self.patch}, the patches of a token"
            )
        return height // self.patch, width // self.patch

    def latents(self, rows: int, columns: int) -> tuple[int, int]:
        """Sides of the latents that a grid of tokens covers."""
        return rows * self.patch, columns * self.patch

    def channels(self, features: int) -> int:
        """Latent channels of tokens with ``features`` channels."""
        return features // self.patch**2

    def pack(self, latents: jax.Array) -> jax.Array:
        """Latents [B, H, W, C] to tokens [B, H/p * W/p, p * p * C], row by row."""
        batch, height, width, channels = latents.shape
        rows, columns = self.tokens(height, width)
        x = latents.reshape(batch, rows, self.patch, columns, self.patch, channels)
        x = x.transpose(0, 1, 3, 5, 2, 4) if self.order == "channel" else x.transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, rows * columns, channels * self.patch**2)

    def unpack(self, tokens: jax.Array, rows: int, columns: int) -> jax.Array:
        """Inverse of `pack` for a grid of ``rows`` x ``columns`` tokens: -> [B, p * rows, p * columns, C]."""
        batch, _, features = tokens.shape
        channels, p = self.channels(features), self.patch
        if self.order == "channel":
            x = tokens.reshape(batch, rows, columns, channels, p, p).transpose(0, 1, 4, 2, 5, 3)
        else:
            x = tokens.reshape(batch, rows, columns, p, p, channels).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, rows * p, columns * p, channels)
