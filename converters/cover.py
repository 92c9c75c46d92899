"""Exact cover: every tensor of a checkpoint is used once, everything the model needs is filled once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from converters.errors import CoverageError
from converters.keymap import Tensor

_SHOWN = 40


class Shaped(Protocol):
    """Named tensors, of which only names and shapes are looked at."""

    def keys(self) -> Iterable[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...


def check_cover(
    tensors: Iterable[Tensor],
    source: Shaped,
    targets: Mapping[str, tuple[int, ...]] | None = None,
    where: str = "the checkpoint",
) -> None:
    """Every source tensor used once, none missing, shapes as the map says, every parameter filled once.

    Args:
        tensors: the expanded key map.
        source: the checkpoint.
        targets: parameter path -> shape (with the leading ``layers`` dimension where stacked), to be filled
            exactly; None where there is no model to compare with.
        where: what to call the checkpoint in errors.

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
            if targets is not None and (problem := _target_problem(slot.path, slot.index, shape, targets)):
                problems.append(problem)
                if slot.path not in targets:
                    continue
            taken = filled.setdefault(slot.path, set())
            if slot.index in taken:
                problems.append(f"filled twice: {slot.path}{'' if slot.index is None else [slot.index]}")
            taken.add(slot.index)
    problems += [f"not recognised: {name} {source.shape(name)}" for name in sorted(available - used)]
    for path, shape in (targets or {}).items():
        got = filled.get(path, set())
        every = set(range(shape[0])) if shape else {None}
        if not got and every:
            problems.append(f"never filled: {path} {shape}")
        elif got not in ({None}, every):
            problems.append(f"filled in part: {path} {shape}, by slices {sorted(got, key=str)}")
    if problems:
        shown = "\n  ".join(problems[:_SHOWN])
        more = f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CoverageError(f"{where} does not match the model ({len(problems)} problems):\n  {shown}{more}")


def _target_problem(
    path: str, index: int | None, shape: tuple[int, ...], targets: Mapping[str, tuple[int, ...]]
) -> str | None:
    if path not in targets:
        return f"key map names a parameter the model lacks: {path}"
    expected = targets[path]
    if shape != (expected if index is None else expected[1:]):
        return f"key map shape: {path} takes {expected}, the map gives {shape}"
    return None
