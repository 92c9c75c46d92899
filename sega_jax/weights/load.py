"""Checkpoint tensors into modules: exact cover, dtype cast on the way, one device array per parameter.

Layouts are the business of `converters`: whatever `converters.components` opens (diffusers folders, single files of
Black Forest Labs and ComfyUI, Orbax, GGUF) can be loaded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from converters.components import Part
from converters.cover import check_cover
from converters.keymap import Dims, Row, Slot, Tensor, expand
from converters.reading.sources import bits
from converters.stream import TILE, default_workers
from sega_jax.models.abstract import build_abstract, parameters
from sega_jax.models.quantized import quantize, scales
from sega_jax.sharding.rules import Shardings

Module = TypeVar("Module", bound=nnx.Module)
Change = Callable[[np.ndarray], np.ndarray]


class TensorSource(Protocol):
    """Named tensors of a checkpoint, read lazily (memory-mapped)."""

    def keys(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def view(self, name: str) -> np.ndarray: ...


def load(
    build: Callable[[nnx.Rngs], Module],
    rows: Iterable[Row],
    dims: Dims,
    source: TensorSource,
    *,
    dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
) -> Module:
    """A module filled from the tensors of a layout; arguments as in `fill`.

    Args:
        rows: key map of the layout.
        dims: symbolic sizes and repeat counts of the map.
    """
    return fill(build, list(expand(list(rows), dims)), source, dtype=dtype, shardings=shardings)


def load_part(
    build: Callable[[nnx.Rngs], Module],
    part: Part,
    *,
    dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
    changes: Mapping[Slot, Change] | None = None,
) -> Module:
    """A module filled from an opened component of any layout; arguments as in `fill`."""
    return fill(build, part.tensors, part.source, dtype=dtype, shardings=shardings, changes=changes)


def fill(
    build: Callable[[nnx.Rngs], Module],
    tensors: Sequence[Tensor],
    source: TensorSource,
    *,
    dtype: DTypeLike = jnp.float32,
    shardings: Shardings | None = None,
    changes: Mapping[Slot, Change] | None = None,
) -> Module:
    """A module filled from a checkpoint.

    Tensors are read once each, in the order of the key map and on several threads, and a parameter goes to its devices
    as soon as its last slice has been read.

    Args:
        build: makes the module from `nnx.Rngs` (only its shapes are used); its kernels in int8 (`models.quantized`)
            are quantised matrix by matrix.
        tensors: the expanded key map.
        source: the checkpoint's tensors.
        dtype: dtype of the loaded parameters, but for int8 kernels and their scales.
        shardings: where a parameter goes, from its path and its abstract value (which has its logical axes); a
            process then only holds on its devices what they need.  None, or a None from it: the default device.
        changes: made to slices as they are read, before the cast (`converters.lora.changes`).

    Raises:
        CoverageError: if the checkpoint does not cover the model exactly.
    """
    module = build_abstract(build)
    params = parameters(module)
    scale_of = scales(module)
    kinds = dict.fromkeys(params, jnp.dtype(dtype))
    kinds |= {path: params[path].dtype for pair in scale_of.items() for path in pair}
    made = set(scale_of.values())
    check_cover(tensors, source, {path: tuple(param.shape) for path, param in params.items() if path not in made})

    def filled(tensor: Tensor) -> list[str]:
        """Paths of the parameters that a tensor goes to, as often as it does."""
        paths = [slot.path for slot in tensor.slots]
        return paths + [scale_of[path] for path in paths if path in scale_of]

    left = dict.fromkeys(params, 0)
    for tensor in tensors:
        for path in filled(tensor):
            left[path] += 1
    hosts: dict[str, np.ndarray] = {}
    for path, param in params.items():
        if not left[path]:  # a stack without layers
            param.set_value(jnp.zeros(param.shape, kinds[path]))

    def read(tensor: Tensor, targets: Mapping[str, np.ndarray]) -> None:
        pieces = tensor.pieces(source.view(tensor.source))
        for slot, piece in zip(tensor.slots, pieces, strict=True):
            change = (changes or {}).get(slot)
            piece = piece if change is None else change(piece)
            at = ... if slot.index is None else (slot.index, ...)
            if slot.path in scale_of:
                piece, targets[scale_of[slot.path]][at] = quantize(piece)
            assign(targets[slot.path][at], piece)

    def finish(tensor: Tensor, reading: Future[None]) -> None:
        reading.result()
        for path in filled(tensor):
            left[path] -= 1
            if not left[path]:
                param = params[path]
                param.set_value(_put(hosts.pop(path), shardings and shardings(path, param)))

    workers = default_workers()
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[tuple[Tensor, Future[None]]] = deque()
        for tensor in tensors:
            paths = filled(tensor)
            for path in paths:
                if path not in hosts:
                    hosts[path] = np.empty(params[path].shape, kinds[path])
            targets = {path: hosts[path] for path in paths}
            pending.append((tensor, pool.submit(read, tensor, targets)))
            if len(pending) > workers:  # no further ahead, so that few parameters are on the host at a time
                finish(*pending.popleft())
        while pending:
            finish(*pending.popleft())
    return module


def assign(target: np.ndarray, values: np.ndarray) -> None:
    """``target[...] = values``; transposed matrices tile by tile, which the memory likes several times better."""
    if values.ndim != 2 or values.flags.c_contiguous or values.strides[0] >= values.strides[1]:
        target[...] = values
        return
    if target.dtype == values.dtype:
        target, values = bits(target), bits(values)
    for i in range(0, values.shape[0], TILE):
        for j in range(0, values.shape[1], TILE):
            target[i : i + TILE, j : j + TILE] = values[i : i + TILE, j : j + TILE]


def _put(host: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jnp.asarray(host)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
