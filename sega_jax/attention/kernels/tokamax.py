"""tokamax's dense attention as a peer and a choice: its Mosaic kernels on TPU and Hopper.

An optional dependency (extra ``kernels``, Python >= 3.12); `auto` never takes it.  Its public function gives no
log-sum-exp, so the operators beneath are called; what they return beside the output differs by operator.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import jax
import jax.numpy as jnp

from sega_jax.attention.kernels import xla
from sega_jax.attention.kernels.contract import Kernel, Refusal, Request, platform

OPERATORS = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}  # those on CPU keep [N, N] or give no log-sum-exp


@lru_cache(maxsize=1)
def _installed() -> bool:
    return find_spec("tokamax") is not None


def supports(request: Request) -> Refusal | None:
    if not _installed():
        return Refusal("tokamax is not installed (extra `kernels`, Python >= 3.12)")
    if platform() not in OPERATORS:
        return Refusal(f"it runs on GPU and TPU, the default device is {platform()}")
    if request.block_map is not None:
        return Refusal("it takes no block map of ours")
    if request.q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return Refusal(f"it takes bfloat16, float16 and float32, got {request.q.dtype}")
    return None


def _forward(request: Request):
    from tokamax._src.ops.attention.api import IMPLEMENTATIONS
    from tokamax._src.ops.attention.base import Mask

    q, k, v, length = request.q, request.k, request.v, request.kv_length
    operator = IMPLEMENTATIONS[OPERATORS[platform()]]
    end = None if length is None else jnp.maximum(length, 1)[:, None, None]  # zero keys are ours to answer, below
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    mask = Mask(k_end=end, is_causal=request.causal)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out, residuals = operator(
            q,
            k,
            v,
            logits_scale=request.scale,
            mask=mask,
            precision=precision,
            return_residuals=True,
        )
    first, second = (x.astype(jnp.float32) for x in residuals)
    # the TPU operator gives (maximum, log-sum-exp), the others (maximum, sum of exponentials above it)
    lse = second if platform() == "tpu" else first + jnp.log(second)
    lse = lse.swapaxes(1, 2)
    if length is not None:
        empty = (length == 0)[:, None, None]
        out, lse = jnp.where(empty[..., None], 0, out), jnp.where(empty, -jnp.inf, lse)
    return out.astype(q.dtype), lse


run = xla.with_backward(_forward)
KERNEL = Kernel("tokamax", supports, run)
