"""Training of a small `Vae` on rendered scenes: L1 + L2 reconstruction and a light KL term."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters.components import open_component
from sega_jax import nano
from sega_jax.models.vae import Vae, VaeConfig, sample_posterior
from sega_jax.nano.model import build_vae
from sega_jax.nano.next import grammar, render
from sega_jax.training.loop import Loss
from sega_jax.weights.load import load_part

CANVASES = ((128, 128), (192, 192), (256, 256), (192, 320), (320, 192), (512, 512), (1024, 1024))


def shipped() -> Vae:
    """The autoencoder of the weights that ship, in float32: where training begins, as edges and colours stay alike."""
    part = open_component(Path(nano.__file__).parent / "checkpoint" / "vae", "vae")
    with closing(part.source):
        return load_part(build_vae, part)


def vae_loss(graph: nnx.GraphDef, *, kl_weight: float) -> Loss:
    """``loss(params, images, key)`` for images float32 [B, H, W, 3] in [-1, 1].

    The posterior's noise teaches the decoder to forgive small errors of a sampled latent.
    """

    def loss(params: nnx.State, images: jax.Array, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        vae = nnx.merge(graph, params)
        mean, logvar = vae.encode(images)
        error = vae.decode(sample_posterior(mean, logvar, key)) - images
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar).mean()
        squared = jnp.square(error).mean()
        psnr = -10.0 * jnp.log10(squared / 4.0)
        return jnp.abs(error).mean() + squared + kl_weight * kl, {"psnr": psnr, "kl": kl}

    return loss


def crops(seed: int, batch: int, side: int) -> Callable[[int], np.ndarray]:
    """``batches(step)``: float32 [batch, side, side, 3] windows of canvases at 1x, 2x and 4x."""
    canvases = [canvas for canvas in CANVASES if min(canvas) >= side]

    def batches(step: int) -> np.ndarray:
        rng = np.random.default_rng((seed, step))
        images = [
            render.crop(rng, grammar.sample(rng), canvases[rng.integers(len(canvases))], side) for _ in range(batch)
        ]
        return render.to_float(np.stack(images))

    return batches


def psnr(vae: Vae, images: np.ndarray) -> float:
    """Mean reconstruction PSNR in dB of uint8 images [N, H, W, 3], through the posterior mean."""
    roundtrip = nnx.jit(lambda vae, x: vae.decode(vae.encode(x)[0]))
    values = []
    for image in images:
        decoded = render.to_uint8(np.asarray(roundtrip(vae, jnp.asarray(render.to_float(image))[None]))[0])
        mse = np.square(decoded.astype(np.float64) - image).mean()
        values.append(10 * np.log10(255.0**2 / max(mse, 1e-3)))
    return float(np.mean(values))


def with_latent_statistics(config: VaeConfig, vae: Vae, images: np.ndarray) -> VaeConfig:
    """``config`` with the shift and scale that give latents of ``images`` (uint8 [N, H, W, 3]) mean 0 and std 1."""
    encode = nnx.jit(lambda vae, x: vae.encode(x)[0])
    latents = np.stack([np.asarray(encode(vae, jnp.asarray(render.to_float(image))[None])) for image in images])
    shift, scale = float(latents.mean()), float(1.0 / latents.std())
    return dataclasses.replace(config, shift_factor=round(shift, 4), scaling_factor=round(scale, 4))
