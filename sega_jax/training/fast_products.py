"""Products of a training step on a CPU: bfloat16 operands where they meet a fast routine, float32 sums and state.

XLA's CPU backend has one fast routine for bfloat16: both operands row by row, the left one's last axis against the
right one's first, with a float32 result.  On two cores with AMX (jax 0.10, [8192, 256] by [256, 256]) it does 400
GFLOP/s, where the same product with a transposed operand does 60 to 80 and float32 about 100: XLA folds a transposition
into the product and loses the routine.  Here every transposed operand is laid out anew first (`_turn` pins its layout),
which costs less than a tenth of what it saves.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint

from sega_jax.attention.kernels import Kernel, Refusal, Request, register
from sega_jax.models.layers import Linear

BACKEND = "training"


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a @ b`` of operands rounded to bfloat16, summed in float32."""
    return jnp.matmul(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


def turn(x: jax.Array) -> jax.Array:
    """The last two axes of ``x`` swapped, in bfloat16 and row by row in memory."""
    turned = jnp.swapaxes(x.astype(jnp.bfloat16), -1, -2)
    return with_layout_constraint(turned, Layout(major_to_minor=tuple(range(turned.ndim))))


@jax.custom_vjp
def _matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return product(x, kernel)


def _matmul_forward(x: jax.Array, kernel: jax.Array):
    x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    return product(x, kernel), (x, kernel)


def _matmul_backward(saved, gradient: jax.Array):
    x, kernel = saved
    gradient = gradient.astype(jnp.bfloat16)
    rows, gradient_rows = (y.reshape(-1, y.shape[-1]) for y in (x, gradient))
    return product(gradient, turn(kernel)), product(turn(rows), gradient_rows)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """``x @ kernel`` for float32 x [..., N, K] and kernel [K, M]; vectors of a batch ([B, K]) stay float32."""
    return _matmul(x, kernel) if x.ndim > 2 else jnp.matmul(x, kernel)


@jax.custom_vjp
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    return _attention_forward(q, k, v, scale)[0]


def _attention_forward(q, k, v, scale):
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    weights = jax.nn.softmax(scale * product(q, turn(k)), -1).astype(jnp.bfloat16)
    return product(weights, v), (q, k, v, weights, scale)


def _attention_backward(saved, gradient):
    q, k, v, weights, scale = saved
    gradient = gradient.astype(jnp.bfloat16)
    by_weight = product(gradient, turn(v))
    shares = weights.astype(jnp.float32)
    by_score = scale * shares * (by_weight - (by_weight * shares).sum(-1, keepdims=True))
    by_score = by_score.astype(jnp.bfloat16)
    return (
        product(by_score, k),
        product(turn(by_score), q),
        product(turn(weights), gradient),
        jnp.zeros_like(scale),
    )


_attention.defvjp(_attention_forward, _attention_backward)


def _supports(request: Request) -> Refusal | None:
    if request.q.dtype != jnp.float32:
        return Refusal(f"for float32 training, not {request.q.dtype}")
    if request.kv_length is not None or request.block_map is not None:
        return Refusal("dense attention only, no kv_length and no block map")
    if request.causal or request.group > 1:
        return Refusal("every query sees every key of its own head: no causal attention and no grouped keys")
    return None


def _run(request: Request) -> tuple[jax.Array, jax.Array]:
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (request.q, request.k, request.v))
    out = _attention(q, k, v, jnp.float32(request.scale))
    still = jax.lax.stop_gradient((q, k))
    scores = request.scale * product(still[0], turn(still[1]))  # dropped if unused
    return jnp.swapaxes(out, 1, 2), jnp.swapaxes(jax.nn.logsumexp(scores, -1), 1, 2)


KERNEL = register(Kernel(BACKEND, _supports, _run))  # after all others: `auto` does not get here


def prepare(modules: Iterable[nnx.Module]) -> None:
    """Let every `Linear` of these modules multiply by `matmul`."""
    for module in modules:
        for _, part in nnx.iter_graph(module):
            if isinstance(part, Linear):
                part.product = matmul
