"""What the library asks of an autoencoder, whatever its family."""

from __future__ import annotations

from typing import Protocol

import jax


class CodecConfig(Protocol):
    """Sizes and statistics of an autoencoder.

    Attributes:
        latent_channels: channels of the latents.
        factor: pixels per latent pixel along one side.
        widest: channels of the largest activations of a decode, at full resolution of the picture.
        narrowest_width: channels at the resolution of the latents, where the middle block attends.
    """

    latent_channels: int

    @property
    def factor(self) -> int: ...

    @property
    def widest(self) -> int: ...

    @property
    def narrowest_width(self) -> int: ...

    def normalize(self, latents: jax.Array) -> jax.Array:
        """Raw latents [B, h, w, C] as the network sees them, same shape and dtype."""

    def denormalize(self, latents: jax.Array) -> jax.Array:
        """Inverse of `normalize`."""


class Codec(Protocol):
    """An autoencoder.  Its exact decode by rows (`decoding.rows`, `decoding.strips`) walks its layers."""

    config: CodecConfig

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance [B, h, w, C] of the raw latents of images [B, H, W, 3] in [-1, 1]."""

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images [B, H, W, 3] in about [-1, 1] of raw latents [B, h, w, C]."""
