"""Latents to pixels and back, as compiled functions of plain arrays, and the choice among the ways to decode."""

from __future__ import annotations

import logging
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sega_jax.decoding.rows import decode_sharded
from sega_jax.decoding.strips import decode_strips
from sega_jax.decoding.tiles import decode_tiled
from sega_jax.models.abstract import Component
from sega_jax.models.codec import CodecConfig

logger = logging.getLogger(__name__)

VaeMode = Literal["auto", "plain", "exact", "tiled"]
PLAIN_DECODE_BYTES = 6 * 2**30  # the plain decode is chosen while its largest activations stay below this
TILE = 128  # latent pixels per side of a decoder tile, a quarter of it shared with the neighbour


@partial(jax.jit, static_argnames=("graphdef", "config", "dtype"))
def decode_latents(params, latents, *, graphdef: nnx.GraphDef, config, dtype: str) -> jax.Array:
    """Model-scale latents f32 [B, h, w, C] to images f32 [B, 8h, 8w, 3] in [-1, 1]."""
    raw = config.denormalize(latents).astype(dtype)
    return nnx.merge(graphdef, params).decode(raw).astype(jnp.float32)


def decode_with(
    vae: Component,
    config: CodecConfig,
    latents: jax.Array | np.ndarray,
    *,
    dtype: str,
    mode: VaeMode = "auto",
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Model-scale latents f32 [B, h, w, C] to images f32 [B, 8h, 8w, 3] in about [-1, 1].

    Args:
        vae: an autoencoder in ``dtype``.
        config: its configuration.
        latents: one picture at a time is on the device.
        dtype: of activations.
        mode: ``"plain"``; ``"exact"``, the same in strips of rows, with activations on the host in between;
            ``"tiled"`` (tiles of 128 latent pixels, a quarter shared with the neighbour, linear cross-fade: an
            approximation); or ``"auto"``: plain while it fits comfortably, else exact.
        mesh: devices that the parameters lie on; ``"exact"`` and ``"auto"`` then cut the rows over all of them.

    Raises:
        ValueError: for another mode.
    """
    if mode not in get_args(VaeMode):
        raise ValueError(f"vae={mode!r}: expected one of {', '.join(get_args(VaeMode))}")
    latents = np.asarray(latents, np.float32)
    run = partial(decode_latents, vae.params, graphdef=vae.graphdef, config=config, dtype=dtype)
    if mesh is not None and mode in ("auto", "exact"):
        module = nnx.merge(vae.graphdef, vae.params)

        def shared(one: np.ndarray) -> np.ndarray:
            raw = config.denormalize(jnp.asarray(one)).astype(dtype)
            return decode_sharded(module, raw, mesh=mesh).astype(np.float32)

        return np.concatenate([shared(one) for one in np.split(latents, len(latents))])
    pixels = latents.shape[1] * latents.shape[2] * config.factor**2
    largest = 3 * pixels * config.widest
    size = largest * jnp.dtype(dtype).itemsize
    if mode == "auto" and size > PLAIN_DECODE_BYTES:
        logger.info("decoding in strips: the plain decode would hold about %.1f GB of activations", size / 1e9)
        mode = "exact"
    if mode == "exact":
        module = nnx.merge(vae.graphdef, vae.params)

        def decode(one: np.ndarray) -> np.ndarray:
            return decode_strips(module, config.denormalize(jnp.asarray(one)).astype(dtype)).astype(np.float32)
    elif mode == "tiled":
        decode = partial(decode_tiled, run, tile=TILE)
    else:
        decode = run
    return np.concatenate([np.asarray(decode(one)) for one in np.split(latents, len(latents))])


@partial(jax.jit, static_argnames=("graphdef", "dtype"))
def encode_image(params, images, *, graphdef: nnx.GraphDef, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Images f32 [B, H, W, 3] in [-1, 1] to the posterior's mean and log-variance, f32 [B, H/8, W/8, C]."""
    mean, logvar = nnx.merge(graphdef, params).encode(images.astype(dtype))
    return mean.astype(jnp.float32), logvar.astype(jnp.float32)
