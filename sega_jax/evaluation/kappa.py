"""Queries and keys of a running model, layer by layer, for `kappa`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sega_jax.attention.kernels import Kernel, Request, choose, register
from sega_jax.layouts.dense import Dense
from sega_jax.positional.kappa import kappa
from sega_jax.positional.rope import plain, rotate, tables
from sega_jax.sampling.denoise import Conditioning, Velocity

_SEEN: list[tuple[np.ndarray, np.ndarray]] = []


def _run(request: Request) -> tuple[jax.Array, jax.Array]:
    jax.debug.callback(lambda q, k: _SEEN.append((np.asarray(q), np.asarray(k))), request.q, request.k, ordered=True)
    return choose(request)[0].run(request)


def record(
    velocity: Velocity, params: nnx.State, latents: jax.Array, sigma: float, conditioning: Conditioning
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Un-rotated image queries and keys f32 [B, N, heads, D] of every layer, at one state of a plain dense run."""
    register(Kernel("record", lambda request: choose(request) and None, _run))
    grid = velocity.grid(latents, conditioning)
    velocity = replace(velocity.with_method(_plain), layout=Dense(), backend="record")
    _SEEN.clear()
    jax.block_until_ready(velocity(params, latents, sigma, conditioning))
    jax.effects_barrier()
    cos, sin = tables(plain(grid), grid.ids()["image"])
    cos, sin = cos.astype(jnp.float32)[:, None, :], sin.astype(jnp.float32)[:, None, :]
    text = grid.text_tokens
    return [tuple(np.asarray(rotate(jnp.asarray(x[:, text:]), cos, -sin)) for x in layer) for layer in _SEEN]


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
