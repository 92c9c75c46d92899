"""cuDNN's flash attention on NVIDIA GPUs, dense, at our contract.

The function under `jax.nn.dot_product_attention` is called directly: the public one rounds the log-sum-exp to the
dtype of the output (in bfloat16 an error of 3 % per merged part).  cuDNN's own backward pass ignores the cotangent
of the log-sum-exp, ours does not.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused

from sega_jax.attention.kernels import xla
from sega_jax.attention.kernels.contract import Kernel, Refusal, Request, platform

LARGEST_HEAD = 128


def supports(request: Request) -> Refusal | None:
    q, v = request.q, request.v
    if platform() != "gpu":
        return Refusal(f"it runs on NVIDIA GPUs, the default device is {platform()}")
    if jax.default_backend() != "gpu":
        return Refusal("without a GPU present its plans cannot be made")
    if "cuda" not in jax.devices()[0].client.platform_version:
        return Refusal("it runs on NVIDIA GPUs")
    if request.block_map is not None:
        return Refusal("it takes no block map")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return Refusal(f"it takes bfloat16 and float16, got {q.dtype}")
    if q.shape[-1] != v.shape[-1] or q.shape[-1] % 8 or q.shape[-1] > LARGEST_HEAD:
        return Refusal(
            f"it takes one head size, a multiple of 8 up to {LARGEST_HEAD}, got {q.shape[-1]} and {v.shape[-1]}"
        )
    return None


def _forward(request: Request):
    q, k, v, length = request.q, request.k, request.v, request.kv_length
    kinds = fused.MaskType
    masks = {"mask_type": kinds.CAUSAL if request.causal else kinds.NO_MASK}
    if length is not None:
        masks["q_seqlen"] = jnp.full((q.shape[0],), q.shape[1], jnp.int32)
        masks["kv_seqlen"] = jnp.maximum(length, 1)  # zero keys are ours to answer, below
        masks["mask_type"] = kinds.PADDING_CAUSAL if request.causal else kinds.PADDING
    out, lse = fused.dot_product_attention(q, k, v, scale=request.scale, return_residual=True, **masks)
    lse = lse.swapaxes(1, 2)  # [B, H, Nq]
    if length is not None:
        empty = (length == 0)[:, None, None]
        out, lse = jnp.where(empty[..., None], 0, out), jnp.where(empty, -jnp.inf, lse)
    return out, lse.astype(jnp.float32)


run = xla.with_backward(_forward)
KERNEL = Kernel("cudnn", supports, run)
