"""Muon: momentum whose matrices are made nearly orthogonal, with products that are fast on a CPU.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): the quintic Newton-Schulz iteration and
its coefficients, in bfloat16 as there.  Updates have the size of AdamW's (Liu et al., arXiv 2502.16982, equation 4).
optax has the iteration too, in float32 and with transposed operands, which took as long as the gradient here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sega_jax.training.fast_products import product, turn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_LIKE_ADAM = 0.2  # root mean square of an update


class MomentumState(NamedTuple):
    """Running mean of gradients, in the shapes of the parameters."""

    momentum: optax.Updates


def _wide(x: jax.Array) -> jax.Array:
    """Matrices [..., M, N] scaled to a spectral norm of at most 1, in bfloat16, tall ones turned: [B, short, long]."""
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    x = turn(x) if x.shape[-2] > x.shape[-1] else x.astype(jnp.bfloat16)
    return x.reshape(-1, *x.shape[-2:])


def _iterate(x: jax.Array) -> jax.Array:
    """bfloat16 [B, M, N], M at most N: singular values between 0 and 1 moved close to 1; float32."""
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = product(x, turn(x))
        change = b * square + c * product(square, square)
        x = (a * x.astype(jnp.float32) + product(change, x)).astype(jnp.bfloat16)
    return x.astype(jnp.float32)


def orthogonalise(matrices: Sequence[jax.Array]) -> list[jax.Array]:
    """Every array of matrices [..., M, N] with its singular values moved close to 1, float32.

    Those of one shape, tall or wide, are stacked, so that few products run.
    """
    wide = [_wide(x) for x in matrices]
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, x in enumerate(wide):
        groups.setdefault(x.shape[1:], []).append(i)
    done: dict[int, jax.Array] = {}
    for members in groups.values():
        ends = np.cumsum([len(wide[i]) for i in members])[:-1]
        done |= zip(members, jnp.split(_iterate(jnp.concatenate([wide[i] for i in members])), ends), strict=True)
    turned = [jnp.swapaxes(done[i], -1, -2) if x.shape[-2] > x.shape[-1] else done[i] for i, x in enumerate(matrices)]
    return [y.reshape(x.shape) for x, y in zip(matrices, turned, strict=True)]


def scale_by_muon(decay: float = 0.95) -> optax.GradientTransformation:
    """Nesterov momentum, made orthogonal matrix by matrix; leaves [..., M, N]."""

    def init(params):
        return MomentumState(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        momentum = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, state.momentum, updates)
        ahead = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, momentum, updates)
        leaves, structure = jax.tree.flatten(ahead)
        sizes = [_LIKE_ADAM * max(x.shape[-2:]) ** 0.5 for x in leaves]
        directions = [size * x for size, x in zip(sizes, orthogonalise(leaves), strict=True)]
        return jax.tree.unflatten(structure, directions), MomentumState(momentum)

    return optax.GradientTransformation(init, update)
