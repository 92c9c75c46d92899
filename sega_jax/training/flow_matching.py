"""Rectified flow: the loss FLUX.1's family is trained with, and the joint training of nano's generator.

A clean latent ``x0`` and noise ``e`` are mixed as ``x = (1 - sigma) x0 + sigma e``; the network predicts the velocity
``e - x0`` (Liu et al., arXiv 2209.03003; sigma is drawn from a shifted logit-normal as in Esser et al., arXiv
2403.03206, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sega_jax.layouts.streams import Call, KeySet, Tokens, bind
from sega_jax.models.denoiser import StepInputs
from sega_jax.nano import model as nano
from sega_jax.positional.rope import plain
from sega_jax.training import fast_products
from sega_jax.training.loop import Loss
from sega_jax.training.muon import scale_by_muon

Velocity = Callable[[jax.Array, jax.Array], jax.Array]


def sample_sigma(key: jax.Array, count: int, mu: jax.Array) -> jax.Array:
    """Noise levels f32 [count]: logit-normal, shifted by ``mu``.

    The sampler's shift ``e^mu s / (1 + (e^mu - 1) s)`` adds ``mu`` to the logit of ``s``, so training meets the levels
    that sampling with the same ``mu`` visits.
    """
    return jax.nn.sigmoid(jax.random.normal(key, (count,)) + mu)


def flow_matching_loss(velocity: Velocity, clean: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """Mean squared error of the velocity.

    Args:
        velocity: ``velocity(noisy [B, N, C], sigma [B]) -> [B, N, C]``.
        clean, noise: [B, N, C].
        sigma: [B], 0 is clean and 1 is noise.
    """
    level = sigma[:, None, None]
    predicted = velocity((1.0 - level) * clean + level * noise, sigma)
    return jnp.square(predicted.astype(jnp.float32) - (noise - clean).astype(jnp.float32)).mean()


class Batch(NamedTuple):
    """One step's data: packed latents of pictures with one token count, and the captions' token ids.

    Attributes:
        tokens: normalised packed latents, f32 [B, N, C].
        clip_ids: i32 [B, up to 77]; t5_ids: i32 [B, T].
        mu: schedule shift of the token count, f32 scalar.
        positions: ids of the image tokens, f32 [B, N, 3]: the pictures of a batch may have different sides.
    """

    tokens: jax.Array
    clip_ids: jax.Array
    t5_ids: jax.Array
    mu: jax.Array
    positions: jax.Array


def calls_for(positions: jax.Array) -> tuple[Call, ...]:
    """Bound dense attention calls, with the plain rotation, of image tokens at ``positions`` [B, N, 3]."""
    grid = nano.grid(*nano.TRAINED)  # its text and its frequencies are those of every grid
    text, image = Tokens("text", ("image", "text"), grid.ids()["text"]), Tokens("image", ("image", "image"), positions)
    rope = plain(grid)
    call = Call((KeySet((text, image), (text, image)),), ("scatter", "scatter"))
    return bind((call,), {"image": {"text": rope, "image": rope}})


def predict(modules: Mapping[str, nnx.Module], batch: Batch, noisy: jax.Array, sigma: jax.Array) -> jax.Array:
    """Velocity [B, N, C] of noisy tokens under the batch's captions."""
    _, pooled = modules["text_encoder"](batch.clip_ids)
    text = modules["text_encoder_2"](batch.t5_ids)
    inputs = {"text": text, "image": noisy}
    inputs = StepInputs(inputs, sigma, {"pooled": pooled})
    calls = calls_for(batch.positions)
    velocity = modules["transformer"](inputs, calls, backend=fast_products.BACKEND, unroll=True)
    return velocity["image"]


def generator_loss(graphs: Mapping[str, nnx.GraphDef]) -> Loss:
    """``loss(params, batch, key)`` of transformer and text encoders together; ``params`` has the keys of ``graphs``."""

    def loss(params, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        modules = {name: nnx.merge(graph, params[name]) for name, graph in graphs.items()}
        sigma_key, noise_key = jax.random.split(key)
        sigma = sample_sigma(sigma_key, batch.tokens.shape[0], batch.mu)
        noise = jax.random.normal(noise_key, batch.tokens.shape)

        def velocity(noisy: jax.Array, sigma: jax.Array) -> jax.Array:
            return predict(modules, batch, noisy, sigma)

        return flow_matching_loss(velocity, batch.tokens, noise, sigma), {}

    return loss


def split(modules: Mapping[str, nnx.Module]) -> tuple[dict[str, nnx.GraphDef], dict[str, nnx.State]]:
    """Graph definitions and parameters of several modules, by name."""
    pairs = {name: nnx.split(module) for name, module in modules.items()}
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}


def _kind(path: tuple, param: jax.Array) -> str:
    """Muon's are kernels between hidden layers, stacked ones included: not what reads or writes data or modulates."""
    name = jax.tree_util.keystr(path)
    if "'kernel'" not in name or "'modulation'" in name:
        return "adam"
    return "adam" if param.ndim == 2 and ("_embed'" in name or "'out'" in name or "out_modulation" in name) else "muon"


def muon(rate: optax.Schedule, adam_rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon for the kernels of hidden layers, Adam for the rest; gradients clipped to norm 1.

    Updates are scaled to the size of AdamW's (Liu et al., arXiv 2502.16982), so that ``rate`` compares with its rates.
    """
    decay = optax.add_decayed_weights(0.01)
    hidden = optax.chain(scale_by_muon(), decay, optax.scale_by_learning_rate(rate))
    rest = optax.chain(optax.scale_by_adam(b1=0.9, b2=0.99), decay, optax.scale_by_learning_rate(adam_rate))
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition({"muon": hidden, "adam": rest}, lambda params: jax.tree_util.tree_map_with_path(_kind, params)),
    )
