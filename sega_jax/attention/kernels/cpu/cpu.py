"""Flash attention for CPUs in C++ (``attention.cc``), the whole of it in one pass: what `auto` takes on x86-64.

Scores, softmax and sums of a strip of queries never leave the core's caches, so that a block costs what its products
cost however small it is: time follows a block map's occupancy, and a traced map is as good as a constant one.
Products use what the processor has: AMX tiles, AVX-512's bfloat16 dot products, or fused multiply-adds.  It is compiled
at first use (`toolchain`); where there is no compiler it refuses and the path in plain XLA serves.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.attention.kernels import xla
from sega_jax.attention.kernels.contract import Kernel, Refusal, Request, platform
from sega_jax.attention.kernels.cpu import toolchain

TARGET = "sega_jax_attention"


def supports(request: Request) -> Refusal | None:
    if platform() != "cpu":
        return Refusal(f"it runs on CPU, the default device is {platform()}")
    if request.q.dtype not in (jnp.float32, jnp.bfloat16):
        return Refusal(f"it takes float32 and bfloat16, got {request.q.dtype}")
    library, reason = toolchain.attention()
    return None if library is not None else Refusal(reason)


def register(library, target: str) -> bool:
    """Make a compiled kernel known to XLA under a name; whether it has AMX tiles to use."""
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(library.sega_attention), platform="cpu")
    return bool(library.sega_has_tiles())


@toolchain.once
def _registered() -> bool:
    return register(toolchain.attention()[0], TARGET)


def forward(target: str, tiles: bool) -> Callable[[Request], tuple[jax.Array, jax.Array]]:
    """The registered kernel at our contract, without a backward pass; ``tiles`` for bfloat16."""

    def run(request: Request) -> tuple[jax.Array, jax.Array]:
        q, k, v, blocks = request.q, request.k, request.v, request.block_map
        length = request.kv_length
        if length is None:
            length = jnp.full((q.shape[0],), k.shape[1], jnp.int32)
        sides, visits = (0, 0), [np.zeros(n, np.int32) for n in ((0,), (0, 0), (0, 0))]
        patterns = np.zeros((0, 0, 0), bool)
        if blocks is not None:
            sides, patterns = (blocks.block_q, blocks.block_k), blocks.patterns
            visits = [jnp.asarray(x, jnp.int32) for x in (blocks.count, blocks.columns, blocks.pattern)]
        out = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype)
        lse = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
        call = jax.ffi.ffi_call(target, (out, lse), vmap_method="sequential")
        options = {"scale": np.float32(request.scale), "causal": np.bool_(request.causal), "tiles": np.bool_(tiles)}
        options |= {name: np.int64(side) for name, side in zip(("block_q", "block_k"), sides, strict=True)}
        return call(q, k, v, length, *visits, jnp.asarray(patterns, bool), **options)

    return run


def run(request: Request) -> tuple[jax.Array, jax.Array]:
    """Serve a request; the backward pass is the chunked one of `xla`."""
    return xla.with_backward(forward(TARGET, _registered()))(request)


KERNEL = Kernel("cpu", supports, run)
