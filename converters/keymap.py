"""Key maps: which source tensor fills which parameter, as invertible data.

A `Row` says ``source name -> target path(s)`` with the symbolic source shape and a short chain of operations.
``{i}`` in a name runs over a repeat count.  In a target, ``blocks[{i}].query.kernel`` means "slice ``i`` of the
stacked parameter ``blocks.query.kernel``"; ``blocks.{i}.query.kernel`` means a separate parameter.
Several targets mean that the source is split along its first axis (BFL's fused qkv); the pieces' sizes follow
from ``sizes``.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Dims = Mapping[str, int]
Size = int | str
# A key map's declared variants of source names: the name its rows use, or None for a tensor to ignore.
Rename = Callable[[str], str | None]
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def evaluate(size: Size, dims: Dims) -> int:
    """A size such as ``"3*hidden + mlp"`` with names taken from ``dims``."""

    def walk(node: ast.AST) -> int:
        match node:
            case ast.Expression():
                return walk(node.body)
            case ast.Constant(value=int()):
                return node.value
            case ast.Name():
                return dims[node.id]
            case ast.BinOp() if type(node.op) in _OPERATORS:
                return _OPERATORS[type(node.op)](walk(node.left), walk(node.right))
        raise ValueError(f"size {size!r}: only names, integers and + - * // are allowed")

    return size if isinstance(size, int) else walk(ast.parse(size, mode="eval"))


def _transpose(x: np.ndarray) -> np.ndarray:
    return x.T


def _swap_halves(x: np.ndarray) -> np.ndarray:
    half = x.shape[0] // 2
    return np.concatenate([x[half:], x[:half]])


# name: (source -> target, target -> source, shape -> shape)
OPERATIONS = {
    "transpose": (_transpose, _transpose, lambda s: s[::-1]),
    "conv": (
        lambda x: x.transpose(2, 3, 1, 0),  # OIHW -> HWIO
        lambda x: x.transpose(3, 2, 0, 1),
        lambda s: (s[2], s[3], s[1], s[0]),
    ),
    "squeeze_conv": (  # a 1x1 convolution [O, I, 1, 1] as a linear kernel [I, O]
        lambda x: x[:, :, 0, 0].T,
        lambda x: x.T[:, :, None, None],
        lambda s: (s[1], s[0]),
    ),
    "swap_halves": (_swap_halves, _swap_halves, lambda s: s),
}


@dataclass(frozen=True)
class Row:
    """One line of a key map.

    Attributes:
        source: source tensor name, optionally with ``{i}``.
        targets: one target path, or several when the source is split along its first axis.
        shape: symbolic source shape.
        ops: operations of `OPERATIONS`, applied to each piece in order.
        repeat: name in ``dims`` of the count that ``{i}`` runs over.
        sizes: first-axis sizes of the pieces when there are several targets.
        optional: the source may be absent only if the target is absent too (decided by ``dims[optional] == 0``).
    """

    source: str
    targets: str | tuple[str, ...]
    shape: tuple[Size, ...]
    ops: tuple[str, ...] = ()
    repeat: str | None = None
    sizes: tuple[Size, ...] = ()
    optional: str | None = None


@dataclass(frozen=True)
class Slot:
    """Where a piece goes: a parameter path and, for stacked parameters, the index on the ``layers`` axis."""

    path: str
    index: int | None = None


@dataclass(frozen=True)
class Tensor:
    """A row with ``{i}`` filled in: a concrete source tensor and its slots."""

    source: str
    shape: tuple[int, ...]
    slots: tuple[Slot, ...]
    ops: tuple[str, ...]
    sizes: tuple[int, ...]

    def pieces(self, source: np.ndarray) -> list[np.ndarray]:
        """The target arrays, one per slot, in order."""
        parts = [source] if not self.sizes else np.split(source, np.cumsum(self.sizes)[:-1], axis=0)
        for op in self.ops:
            parts = [OPERATIONS[op][0](part) for part in parts]
        return parts

    def assemble(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Inverse of `pieces`."""
        parts = list(parts)
        for op in reversed(self.ops):
            parts = [OPERATIONS[op][1](part) for part in parts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=0)

    def piece_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of `pieces` without touching data."""
        shapes = [(size, *self.shape[1:]) for size in self.sizes] or [self.shape]
        for op in self.ops:
            shapes = [OPERATIONS[op][2](shape) for shape in shapes]
        return shapes


_STACKED = re.compile(r"\[(\d+)\]")


def _slot(target: str) -> Slot:
    match = _STACKED.search(target)
    if match is None:
        return Slot(target)
    return Slot(_STACKED.sub("", target), int(match.group(1)))


def expand(rows: Sequence[Row], dims: Dims) -> Iterator[Tensor]:
    """Concrete tensors of a key map for one configuration."""
    for row in rows:
        if row.optional is not None and not dims[row.optional]:
            continue
        targets = (row.targets,) if isinstance(row.targets, str) else row.targets
        shape = tuple(evaluate(size, dims) for size in row.shape)
        sizes = tuple(evaluate(size, dims) for size in row.sizes)
        if (sizes and sum(sizes) != shape[0]) or (len(targets) > 1) != bool(sizes):
            raise ValueError(f"key map row {row.source!r}: pieces {sizes} do not make up shape {shape}")
        count = dims[row.repeat] if row.repeat else 1
        for i in range(count):
            slots = tuple(_slot(target.replace("{i}", str(i))) for target in targets)
            yield Tensor(row.source.replace("{i}", str(i)), shape, slots, row.ops, sizes)


def canonical(names: Iterable[str], rename: Rename) -> dict[str, tuple[str, ...]]:
    """The names a key map's rows use, each with the names it goes by in a checkpoint; ignored ones left out.

    More than one means that the checkpoint holds the same tensor several times, under declared aliases.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        known = rename(name)
        if known is not None:
            found.setdefault(known, []).append(name)
    return {known: tuple(aliases) for known, aliases in found.items()}
