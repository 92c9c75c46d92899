"""How attention scores of a running model depend on the RoPE distance alone, layer by layer.

The diagnostic behind phase alignment (CRPA, arXiv 2511.19778): scores of trained heads fall with the distance.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sega_jax.attention.kernels import Kernel, Request, choose, serving
from sega_jax.layouts.dense import Dense
from sega_jax.positional.rope import plain, rotate, tables
from sega_jax.sampling.denoise import Conditioning, Velocity

_NUMBERS = itertools.count()


def kappa(q: jax.Array, k: jax.Array, frequencies: Sequence[jax.Array], axis: int, max_delta: int) -> jax.Array:
    """Mean of ``<q, R(delta) k>`` of normalised queries and keys over all their pairs, one axis rotated.

    Args:
        q, k: un-rotated queries and keys [..., heads, D]; leading axes are averaged over.
        frequencies: per rotary axis f32 [d_a / 2], radians per token.
        axis: the rotated one; the others are held at distance 0.
        max_delta: largest distance, in tokens.

    Returns:
        f32 [heads, 2 max_delta + 1], distances ``-max_delta .. max_delta``.

    Raises:
        ValueError: an axis there is not, or frequencies of another head size.
    """
    sizes = [len(f) for f in frequencies]
    if not 0 <= axis < len(sizes) or 2 * sum(sizes) != q.shape[-1] or q.shape[-2:] != k.shape[-2:]:
        raise ValueError(
            f"queries {q.shape}, keys {k.shape}, axis {axis} of {len(sizes)} with {sizes} pairs: expected heads and "
            "channels alike, and two channels per pair"
        )

    def mean(x: jax.Array) -> jax.Array:  # the score is linear in each, so the mean over pairs is that of the means
        x = x.astype(jnp.float32).reshape(-1, *x.shape[-2:])
        x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        x = x.mean(0)
        return jax.lax.complex(x[:, 0::2], x[:, 1::2])

    product = mean(q) * jnp.conj(mean(k))  # [heads, pairs]
    start = sum(sizes[:axis])
    turned = product[:, start : start + sizes[axis]]
    still = product.real.sum(-1) - turned.real.sum(-1)
    delta = np.arange(-max_delta, max_delta + 1, dtype=np.float32)
    angle = jnp.asarray(delta)[:, None] * jnp.asarray(frequencies[axis], jnp.float32)[None, :]
    phase = jax.lax.complex(jnp.cos(angle), -jnp.sin(angle))
    scores = jnp.einsum("hp,dp->hd", turned, phase, precision="highest")
    return still[:, None] + scores.real


def _recorder(seen: list[tuple[np.ndarray, np.ndarray]]) -> Kernel:
    """A kernel that serves like `auto` and keeps what it is asked."""

    def run(request: Request) -> tuple[jax.Array, jax.Array]:
        jax.debug.callback(lambda q, k: seen.append((np.asarray(q), np.asarray(k))), request.q, request.k, ordered=True)
        return choose(request)[0].run(request)

    # a name of its own: a program compiled for another recorder would fill that one's list
    return Kernel(f"record-{next(_NUMBERS)}", lambda request: choose(request) and None, run)


def record(
    velocity: Velocity, params: nnx.State, latents: jax.Array, sigma: float, conditioning: Conditioning
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Un-rotated image queries and keys f32 [B, N, heads, D] of every layer, at one state of a plain dense run."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    grid = velocity.grid(latents, conditioning)
    recorder = _recorder(seen)
    velocity = replace(velocity.with_method(_plain), layout=Dense(), backend=recorder.name)
    with serving(recorder):
        jax.block_until_ready(velocity(params, latents, sigma, conditioning))
        jax.effects_barrier()
    cos, sin = tables(plain(grid), grid.ids()["image"])
    cos, sin = cos.astype(jnp.float32)[:, None, :], sin.astype(jnp.float32)[:, None, :]
    text = grid.text_tokens
    return [tuple(np.asarray(rotate(jnp.asarray(x[:, text:]), cos, -sin)) for x in layer) for layer in seen]


def _plain(grid: Any, signals: Any) -> dict:
    del signals
    return {"text": plain(grid), "image": plain(grid)}


def curves(layers: list[tuple[np.ndarray, np.ndarray]], spec: Any, axis: int, max_delta: int) -> np.ndarray:
    """`kappa` of every layer and head, f32 [layers, heads, 2 max_delta + 1]."""
    frequencies = [f.astype(jnp.float32) for f in plain(spec.grid(1, 1)).frequencies]
    return np.stack(
        [np.asarray(kappa(jnp.asarray(q), jnp.asarray(k), frequencies, axis, max_delta)) for q, k in layers]
    )


def plot(values: np.ndarray, path: Any, title: str) -> None:
    """One panel per layer, one line per head; needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plotting needs matplotlib: pip install matplotlib") from error
    layers, heads, count = values.shape
    columns = min(4, layers)
    rows = -(-layers // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns, sharex=True)).ravel()
    delta = np.arange(count) - count // 2
    for layer, panel in enumerate(panels[:layers]):
        for head in range(heads):
            panel.plot(delta, values[layer, head], linewidth=0.9)
        panel.set_title(f"layer {layer}", fontsize=8)
    for panel in panels[layers:]:
        panel.set_axis_off()
    figure.supxlabel("distance in tokens")
    figure.supylabel("mean score of normalised q, k")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
