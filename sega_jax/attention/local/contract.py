"""The contract every attention kernel on one device obeys, and the registry of kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

from sega_jax.layouts.blocks import BlockMap


@dataclass(frozen=True)
class Request:
    """One attention on one device.

    Attributes:
        q: [B, Nq, H, D]; k: [B, Nk, H, D]; v: [B, Nk, H, Dv], all of one dtype, already rotated.
        scale: multiplies the logits.  (`supports` needs shapes and dtypes only.)
        kv_length: i32 [B], valid keys per sample (they come first), or None.
        block_map: visited key blocks, or None for all.
    """

    q: jax.Array | jax.ShapeDtypeStruct
    k: jax.Array | jax.ShapeDtypeStruct
    v: jax.Array | jax.ShapeDtypeStruct
    scale: float
    kv_length: jax.Array | None = None
    block_map: BlockMap | None = None


Tile = tuple[int, int]  # queries and keys treated together


@dataclass(frozen=True)
class Refusal:
    """Why a kernel cannot serve a request."""

    reason: str


@dataclass(frozen=True)
class Kernel:
    """A kernel: ``supports(request)`` gives a `Refusal` or None; ``run(request)`` gives ``(out, lse)``.

    ``out`` is [B, Nq, H, Dv] in the dtype of q.  ``lse`` is f32 [B, Nq, H], the natural logarithm of the full
    softmax denominator.  A query without any key gets out 0 and lse -inf.

    A kernel with sizes to choose gives the ``tilings`` of a dense request, its heuristic's first, and takes one of
    them in ``run(request, tile=...)``; without it, it takes the measured one (`tiles.tuned`), else the heuristic's.
    """

    name: str
    supports: Callable[[Request], Refusal | None]
    run: Callable[..., tuple[jax.Array, jax.Array]]
    tilings: Callable[[Request], tuple[Tile, ...]] | None = None


def accumulator(dtype) -> np.dtype:
    """Softmax and sums of values of ``dtype`` are kept in this: float32, or float64 for float64."""
    return np.promote_types(dtype, np.float32)  # not jnp's: strict promotion refuses float32 with 16 bits


_KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel, *, first: bool = False) -> Kernel:
    """Make a kernel known by name; also for kernels defined outside this package.

    ``auto`` asks kernels in the order in which they were registered; ``first`` puts this one before all others.
    """
    others = {name: other for name, other in _KERNELS.items() if name != kernel.name}
    _KERNELS.clear()
    _KERNELS.update({kernel.name: kernel, **others} if first else {**others, kernel.name: kernel})
    return kernel


def kernels() -> dict[str, Kernel]:
    """Registered kernels by name, in order of preference for `auto`."""
    return dict(_KERNELS)


def choose(request: Request, backend: str = "auto") -> tuple[Kernel, dict[str, str]]:
    """The kernel that serves ``request`` and, by name, why the others before it were passed over.

    Raises:
        ValueError: unknown backend, or a named one that refuses (with its reason).
    """
    if backend != "auto":
        if backend not in _KERNELS:
            raise ValueError(f"attention backend {backend!r} is unknown; known: auto, {', '.join(_KERNELS)}")
        refusal = _KERNELS[backend].supports(request)
        if refusal is not None:
            raise ValueError(f"attention backend {backend!r} cannot serve this request: {refusal.reason}")
        return _KERNELS[backend], {}
    passed: dict[str, str] = {}
    for kernel in _KERNELS.values():
        refusal = kernel.supports(request)
        if refusal is None:
            return kernel, passed
        passed[kernel.name] = refusal.reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed.items())
    raise ValueError(f"no attention backend can serve this request ({reasons})")


def explain(request: Request) -> str:
    """One line per kernel: what ``auto`` picks for ``request``, and why the others refuse."""
    lines, chosen = [], False
    for kernel in _KERNELS.values():
        refusal = kernel.supports(request)
        if refusal is not None:
            lines.append(f"{kernel.name}: refused, {refusal.reason}")
        else:
            lines.append(f"{kernel.name}: {'would serve' if chosen else 'chosen'}")
            chosen = True
    return "\n".join(lines)
