"""The contract every attention kernel on one device obeys, and the registry of kernels."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sega_jax.layouts.blocks import BlockMap


@dataclass(frozen=True)
class Request:
    """One attention on one device.

    Attributes:
        q: [B, Nq, H, D]; k: [B, Nk, Hk, D]; v: [B, Nk, Hk, Dv], all of one dtype, already rotated.  Where Hk is less
            than H, which it divides, keys are grouped: query head ``h`` meets key head ``h // (H / Hk)``.
        scale: multiplies the logits.  (`supports` needs shapes and dtypes only.)
        kv_length: i32 [B], valid keys per sample (they come first), or None.
        block_map: visited key blocks, or None for all.
        causal: query ``i`` sees keys ``0 .. i`` only, both counted from the first.

    Raises:
        ValueError: shapes that do not belong together, or a causal request with a block map.
    """

    q: jax.Array | jax.ShapeDtypeStruct
    k: jax.Array | jax.ShapeDtypeStruct
    v: jax.Array | jax.ShapeDtypeStruct
    scale: float
    kv_length: jax.Array | None = None
    block_map: BlockMap | None = None
    causal: bool = False

    def __post_init__(self):
        q, k, v = self.q.shape, self.k.shape, self.v.shape
        alike = len(q) == len(k) == len(v) == 4 and q[0] == k[0] == v[0] and q[3] == k[3] and k[1:3] == v[1:3]
        if not alike or not k[2] or q[2] % k[2]:
            raise ValueError(
                f"attention of q {q}, k {k} and v {v}: expected [B, Nq, H, D], [B, Nk, Hk, D] and [B, Nk, Hk, Dv], "
                "where Hk divides H"
            )
        if self.causal and self.block_map is not None:
            raise ValueError("causal attention under a block map: draw what a query may not see in the map's patterns")

    @property
    def kv_heads(self) -> int:
        """Heads of the keys and values."""
        return self.k.shape[2]

    @property
    def group(self) -> int:
        """Query heads that share one key head; 1 where every head has its own."""
        return self.q.shape[2] // self.k.shape[2]


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

    def __post_init__(self):
        if not getattr(self.run, "bears_cost", False):
            object.__setattr__(self, "run", _costed(self.run))


def accumulator(dtype) -> np.dtype:
    """Softmax and sums of values of ``dtype`` are kept in this: float32, or float64 for float64."""
    return np.promote_types(dtype, np.float32)  # not jnp's: strict promotion refuses float32 with 16 bits


def device() -> Any:
    """The `jax.Device` that kernels are chosen for: `jax.default_device`, else JAX's first.

    Compiling ahead of time, ``with jax.default_device(topologies.devices("v6e:2x4")[0])`` makes ``auto`` choose for
    that device.
    """
    chosen = jax.config.jax_default_device
    if chosen is None:
        return jax.devices()[0]
    return jax.devices(chosen)[0] if isinstance(chosen, str) else chosen


def platform() -> str:
    """The platform of `device`: ``"cpu"``, ``"gpu"`` or ``"tpu"``."""
    if jax.config.jax_default_device is None:
        return jax.default_backend()
    kind = device().platform
    return {"cuda": "gpu", "rocm": "gpu"}.get(kind, kind)


# -- cost --------------------------------------------------------------------------------------------------------------

QUERY_TILE = 1_024  # queries that share one reading of the keys


@dataclass(frozen=True)
class Cost:
    """What a request costs any kernel: operations (a multiply-add is two), and bytes read and written."""

    flops: int
    bytes: int


def cost(request: Request) -> Cost:
    """Closed form: ``2 (D + Dv)`` per sample, query head and pair of a query and a key that it meets.

    Pairs are ``Nq Nk``, those up to the diagonal of a causal request, those of visited blocks where there is a map.
    Queries, results and log-sum-exps cross memory once, keys and values once per `QUERY_TILE` queries, for all heads
    that share them at once.  Key lengths, and what a pattern hides inside a visited block, are not taken off; a traced
    map counts all its slots.
    """
    q, k, v, blocks = request.q, request.k, request.v, request.block_map
    batch, queries, heads, depth = q.shape
    keys, width = k.shape[1], depth + v.shape[-1]
    planes, size = batch * heads, np.dtype(q.dtype).itemsize
    pairs, rows = queries * keys, -(-queries // QUERY_TILE) * keys
    if request.causal:
        pairs = causal_pairs(queries, keys)
        rows = sum(min(start + QUERY_TILE, queries, keys) for start in range(0, queries, QUERY_TILE))
    if blocks is not None:
        traced = isinstance(blocks.count, jax.core.Tracer)
        visits = int(np.prod(blocks.columns.shape)) if traced else int(np.sum(np.asarray(blocks.count)))
        pairs, rows = min(visits * blocks.block_q * blocks.block_k, pairs), visits * blocks.block_k
    return Cost(
        2 * planes * pairs * width,
        planes * (size * queries * width + 4 * queries) + batch * request.kv_heads * size * rows * width,
    )


def causal_pairs(queries: int, keys: int) -> int:
    """Pairs of a query and a key not behind it: the triangle, and whole rows of queries past the last key."""
    square = min(queries, keys)
    return square * (square + 1) // 2 + (queries - square) * keys


def read_cost(scope: str) -> Cost | None:
    """The cost in the innermost scope of a name stack that has one (`sega_jax.costs.jaxpr`)."""
    found = re.findall(r"attention\[(\d+) flops, (\d+) bytes\]", scope)
    return Cost(*map(int, found[-1])) if found else None


def _costed(run: Callable) -> Callable:
    """``run`` inside a scope that bears the request's cost, for counters and profiles to read."""

    @functools.wraps(run)
    def named(request: Request, *arguments, **options):
        known = cost(request)
        with jax.named_scope(f"attention[{known.flops} flops, {known.bytes} bytes]"):
            return run(request, *arguments, **options)

    named.bears_cost = True
    return named


# -- registry ----------------------------------------------------------------------------------------------------------

_KERNELS: dict[str, Kernel] = {}


def register(kernel: Kernel, *, first: bool = False) -> Kernel:
    """Make a kernel known by name; also for kernels defined outside this package.

    ``auto`` asks kernels in the order in which they were registered; ``first`` puts this one before all others.
    """
    others = {name: other for name, other in _KERNELS.items() if name != kernel.name}
    _KERNELS.clear()
    _KERNELS.update({kernel.name: kernel, **others} if first else {**others, kernel.name: kernel})
    return kernel


@contextmanager
def serving(kernel: Kernel) -> Iterator[None]:
    """The kernel in the registry, by name only, for the length of the block."""
    register(kernel)
    try:
        yield
    finally:
        del _KERNELS[kernel.name]


def registered() -> dict[str, Kernel]:
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
