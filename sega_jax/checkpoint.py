"""Checkpoint tensors into modules: exact cover, dtype cast on the way, one device array per parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from converters.errors import CheckpointError, CoverageError
from converters.keymap import Dims, Rename, Row, Tensor, canonical, expand
from sega_jax.models.abstract import build_abstract, parameters

Module = TypeVar("Module", bound=nnx.Module)


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors of a checkpoint, read lazily (memory-mapped)."""

    def keys(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> np.ndarray: ...


class ArraySource:
    """Tensors already in memory, as a `TensorSource`."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays

    def keys(self) -> Iterable[str]:
        return self._arrays.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._arrays[name].shape)

    def read(self, name: str) -> np.ndarray:
        return self._arrays[name]


class RenamedSource:
    """A source under the names a key map uses: other names of a tensor translated, ignorable tensors hidden.

    A tensor saved under several of its names is one tensor; its copies must be equal.
    """

    def __init__(self, source: TensorSource, rename: Rename):
        self._source = source
        self._names = canonical(source.keys(), rename)

    def keys(self) -> Iterable[str]:
        return self._names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._names[name][0])

    def read(self, name: str) -> np.ndarray:
        """The tensor.

        Raises:
            CheckpointError: if the checkpoint holds it several times and the copies differ.
        """
        first, *others = self._names[name]
        tensor = self._source.read(first)
        for other in others:
            if not np.array_equal(tensor, self._source.read(other)):
                raise CheckpointError(
                    f"{first} and {other} are two names of one tensor but differ in the checkpoint; "
                    "it is damaged or of another model: download or convert it again"
                )
        return tensor


def check_cover(tensors: Iterable[Tensor], source: TensorSource, targets: Mapping[str, tuple[int, ...]]) -> None:
    """Every source tensor used once, every parameter filled once, shapes as the map says.

    Args:
        tensors: the expanded key map.
        source: the checkpoint.
        targets: parameter path -> shape (with the leading ``layers`` dimension where stacked).

    Raises:
        CoverageError: listing all problems at once.
    """
    problems: list[str] = []
    available = set(source.keys())
    used: set[str] = set()
    filled: dict[str, set[int | None]] = {}
    for tensor in tensors:
        if tensor.source in used:
            problems.append(f"used twice: {tensor.source}")
        used.add(tensor.source)
        if tensor.source not in available:
            problems.append(f"missing: {tensor.source} {tensor.shape}")
        elif source.shape(tensor.source) != tensor.shape:
            problems.append(f"wrong shape: {tensor.source} is {source.shape(tensor.source)}, expected {tensor.shape}")
        for slot, shape in zip(tensor.slots, tensor.piece_shapes(), strict=True):
            expected = targets.get(slot.path)
            if expected is None:
                problems.append(f"key map names a parameter the model lacks: {slot.path}")
                continue
            if shape != (expected if slot.index is None else expected[1:]):
                problems.append(f"key map shape: {slot.path} takes {expected}, the map gives {shape}")
            taken = filled.setdefault(slot.path, set())
            if slot.index in taken:
                problems.append(f"filled twice: {slot.path}{'' if slot.index is None else [slot.index]}")
            taken.add(slot.index)
    problems += [f"not recognised: {name} {source.shape(name)}" for name in sorted(available - used)]
    for path, shape in targets.items():
        got = filled.get(path, set())
        every = set(range(shape[0])) if shape else {None}
        if not got and every:
            problems.append(f"never filled: {path} {shape}")
        elif got not in ({None}, every):
            problems.append(f"filled in part: {path} {shape}, by slices {sorted(got, key=str)}")
    if problems:
        shown = "\n  ".join(problems[:40])
        more = f"\n  ... and {len(problems) - 40} more" if len(problems) > 40 else ""
        raise CoverageError(f"the checkpoint does not match the model ({len(problems)} problems):\n  {shown}{more}")


def load(
    build: Callable[[nnx.Rngs], Module],
    rows: Iterable[Row],
    dims: Dims,
    source: TensorSource,
    *,
    dtype: DTypeLike = jnp.float32,
    place: Callable[[str, np.ndarray], jax.Array] | None = None,
) -> Module:
    """A module filled from a checkpoint.

    Args:
        build: makes the module from `nnx.Rngs` (only its shapes are used).
        rows: key map of the checkpoint's layout.
        dims: symbolic sizes and repeat counts of the map.
        source: the checkpoint's tensors.
        dtype: dtype of the loaded parameters.
        place: puts a host array on devices, given the parameter path; default: the default device.

    Raises:
        CoverageError: if the checkpoint does not cover the model exactly.
    """
    module = build_abstract(build)
    params = parameters(module)
    tensors = list(expand(list(rows), dims))
    check_cover(tensors, source, {path: tuple(param.shape) for path, param in params.items()})
    by_path: dict[str, list[tuple[int | None, Tensor, int]]] = {}
    for tensor in tensors:
        for position, slot in enumerate(tensor.slots):
            by_path.setdefault(slot.path, []).append((slot.index, tensor, position))
    put = place or (lambda _path, array: jnp.asarray(array))
    target_dtype = jnp.dtype(dtype)
    for path, param in params.items():
        host = np.empty(param.shape, target_dtype)
        for index, tensor, position in by_path[path]:
            host[() if index is None else index] = tensor.pieces(source.read(tensor.source))[position]
        param.set_value(put(path, host))
    return module
