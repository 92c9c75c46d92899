"""LoRAs: one meaning for every dialect, their effective change, and merging them into checkpoints.

A LoRA is held as factors per slot (one parameter of one layer): ``change of the weight [out, in] = weight x scale x
B [out, rank] @ A [rank, in]`` (Hu et al., arXiv 2106.09685), ``scale = alpha / rank``.  `converters.lora.dialects`
reads and writes the names in use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from converters.components import Checkpoint, Part
from converters.errors import CheckpointError
from converters.keymap import OPERATIONS, Slot, Tensor
from converters.kinds import slot_name
from converters.reading.sources import ComputedSource, is_float
from converters.stream import cast


@dataclass(frozen=True)
class Factors:
    """The change of one linear layer.

    Attributes:
        a: ``[rank, in]``.
        b: ``[out, rank]``.
        scale: ``alpha / rank``.
        bias: change of the bias before scaling, ``[out]``, if any.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float = 1.0
    bias: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def delta(self) -> np.ndarray:
        """The change of the weight, float32 ``[out, in]``."""
        return np.float32(self.scale) * (self.b.astype(np.float32) @ self.a.astype(np.float32))

    def delta_bias(self) -> np.ndarray | None:
        """The change of the bias, float32 ``[out]``."""
        return None if self.bias is None else np.float32(self.scale) * self.bias.astype(np.float32)

    def trimmed(self) -> Factors:
        """The same change without the ranks whose column of ``b`` is zero (what splitting a fused LoRA leaves)."""
        used = np.flatnonzero(np.any(self.b != 0, axis=0))
        if used.size in (0, self.rank):
            return self
        return replace(self, a=self.a[used], b=self.b[:, used])


@dataclass(frozen=True)
class Lora:
    """A LoRA of one or several components.

    Attributes:
        factors: component name -> slot of the weight -> factors.
        replaced: component name -> slot -> values that replace a parameter (norms of control LoRAs).
        name: for messages.
    """

    factors: Mapping[str, Mapping[Slot, Factors]]
    replaced: Mapping[str, Mapping[Slot, np.ndarray]] = field(default_factory=dict)
    name: str = "LoRA"

    def deltas(self) -> dict[tuple[str, Slot], np.ndarray]:
        """The change of every weight, float32 ``[out, in]``."""
        return {
            (component, slot): factors.delta()
            for component, slots in self.factors.items()
            for slot, factors in slots.items()
        }


def bias_slot(slot: Slot) -> Slot:
    """The bias beside a kernel."""
    return Slot(slot.path.removesuffix("kernel") + "bias", slot.index)


def combine(parts: Sequence[Factors | None], sizes: Sequence[int]) -> Factors:
    """One LoRA of a fused layer from those of its parts (None: unchanged), along the output axis.

    Equal ``a`` and scale are kept once; otherwise the ranks are laid side by side, and scales that differ are
    multiplied into ``b``.
    """
    present = [part for part in parts if part is not None]
    first = present[0]
    scales = {part.scale for part in present}
    shared = len(scales) == 1 and all(np.array_equal(part.a, first.a) for part in present)
    scale = first.scale if len(scales) == 1 else 1.0
    kind = np.result_type(*(widened(part.b, part.scale, len(scales) > 1) for part in present))
    rank = first.rank if shared else sum(part.rank for part in present)
    b = np.zeros((sum(sizes), rank), kind)
    bias = None
    if any(part.bias is not None for part in present):
        bias = np.zeros(sum(sizes), np.float32)
    row = column = 0
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            factor = np.float32(part.scale) if len(scales) > 1 else np.float32(1)
            b[row : row + size, column : column + part.rank] = (part.b.astype(np.float32) * factor).astype(kind)
            if bias is not None and part.bias is not None:
                bias[row : row + size] = part.bias.astype(np.float32) * factor
            column += 0 if shared else part.rank
        row += size
    a = (
        first.a
        if shared
        else np.concatenate([part.a.astype(np.result_type(*(p.a for p in present))) for part in present])
    )
    return Factors(a, b, scale, bias)


def widened(b: np.ndarray, scale: float, folded: bool) -> np.dtype:
    """The type that holds ``b`` times its scale exactly enough: its own for powers of two, else float32."""
    exact = not folded or scale == 0 or np.frexp(scale)[0] in (0.5, -0.5)
    return b.dtype if exact else np.dtype(np.float32)


def fold(factors: Factors) -> Factors:
    """The same change with the scale multiplied into ``b``, for dialects that know no alpha."""
    if factors.scale == 1:
        return factors
    kind = widened(factors.b, factors.scale, True)
    b = (factors.b.astype(np.float32) * np.float32(factors.scale)).astype(kind)
    bias = None if factors.bias is None else factors.bias.astype(np.float32) * np.float32(factors.scale)
    return Factors(factors.a, b, 1.0, bias)


# -- merging -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """What LoRAs make of one parameter; called with its values, gives float32 in the same order of axes.

    Attributes:
        terms: functions that give what is added, float32, weights and scales included.
        replacing: (weight, values) that the parameter moves towards.
    """

    terms: tuple[Callable[[], np.ndarray], ...]
    replacing: tuple[tuple[float, np.ndarray], ...]

    def __call__(self, piece: np.ndarray) -> np.ndarray:
        piece = piece.astype(np.float32)
        if self.terms:
            total = self.terms[0]()
            for term in self.terms[1:]:
                total = total + term()
            piece = piece + total
        for weight, value in self.replacing:
            piece = piece + np.float32(weight) * (value.astype(np.float32) - piece)
        return piece


def changes(
    parts: Mapping[str, Part], loras: Sequence[tuple[Lora, float]], where: str | Path = "the checkpoint"
) -> dict[str, dict[Slot, Change]]:
    """What LoRAs with their weights make of the parameters of a checkpoint: component -> slot -> change.

    Changes of one parameter are added up before they are added to it, so the order of two LoRAs does not matter.
    Parameters that keep every bit (weight or scale zero) are left out.

    Raises:
        CheckpointError: a LoRA is for a component, layer or shape the checkpoint does not have.
    """
    problems = [
        f"{lora.name}: changes the {component}, which is not in {where}"
        for lora, _ in loras
        for component in sorted({*lora.factors, *lora.replaced} - parts.keys())
    ]
    found = {name: _part_changes(name, part, loras, problems) for name, part in parts.items()}
    if problems:
        shown = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
        raise CheckpointError(f"the LoRA does not fit {where} ({len(problems)} problems):\n  {shown}")
    return found


def _part_changes(
    name: str, part: Part, loras: Sequence[tuple[Lora, float]], problems: list[str]
) -> dict[Slot, Change]:
    shapes = {
        slot: shape for tensor in part.tensors for slot, shape in zip(tensor.slots, tensor.piece_shapes(), strict=True)
    }
    terms: dict[Slot, list[Callable[[], np.ndarray]]] = {}
    replacing: dict[Slot, list[tuple[float, np.ndarray]]] = {}

    def fits(lora: Lora, slot: Slot, shape: tuple[int, ...]) -> bool:
        if slot not in shapes:
            problems.append(f"{lora.name}: {name} has no {slot_name(slot)}")
        elif shapes[slot] != shape:
            hint = (
                "; a control LoRA that widens the input cannot be merged" if slot.path == "image_embed.kernel" else ""
            )
            problems.append(f"{lora.name}: {slot_name(slot)} is {shapes[slot]}, the LoRA is for {shape}{hint}")
        return shapes.get(slot) == shape

    for lora, weight in loras:
        for slot, factors in lora.factors.get(name, {}).items():
            used = bool(weight * factors.scale)  # zero changes no bit
            if fits(lora, slot, (factors.a.shape[1], factors.b.shape[0])) and used:
                terms.setdefault(slot, []).append(lambda f=factors, w=weight: np.float32(w) * f.delta().T)
            if factors.bias is not None and fits(lora, bias_slot(slot), factors.bias.shape) and used:
                terms.setdefault(bias_slot(slot), []).append(lambda f=factors, w=weight: np.float32(w) * f.delta_bias())
        for slot, value in lora.replaced.get(name, {}).items():
            if fits(lora, slot, value.shape) and weight:
                replacing.setdefault(slot, []).append((weight, value))
    return {slot: Change(tuple(terms.get(slot, ())), tuple(replacing.get(slot, ()))) for slot in {**terms, **replacing}}


def merge(checkpoint: Checkpoint, loras: Sequence[tuple[Lora, float]], dtype: np.dtype | None = None) -> Checkpoint:
    """The checkpoint with LoRAs added to its weights as they are read: ``W + sum(weight x change)``.

    Args:
        checkpoint: an opened checkpoint.
        loras: LoRAs with their weights; order does not matter.
        dtype: type of the changed tensors; None keeps theirs.  The sum is made in float32 and rounded once.

    Raises:
        CheckpointError: as `changes`.
    """
    wanted = changes(checkpoint.parts, loras, checkpoint.path)
    parts = {name: _merge_part(part, wanted[name], dtype) for name, part in checkpoint.parts.items()}
    return replace(checkpoint, parts=parts)


def _merge_part(part: Part, wanted: Mapping[Slot, Change], dtype: np.dtype | None) -> Part:
    computed = {}
    for tensor in part.tensors:
        if any(slot in wanted for slot in tensor.slots):
            stored = part.source.storage(tensor.source)
            kind = dtype if dtype is not None and is_float(stored) else stored
            computed[tensor.source] = (tensor.shape, kind, partial(_merged, part, tensor, wanted, kind))
    return replace(part, source=ComputedSource(part.source, computed)) if computed else part


def _merged(part: Part, tensor: Tensor, wanted: Mapping[Slot, Change], kind: np.dtype) -> np.ndarray:
    pieces = [
        wanted[slot](piece) if slot in wanted else piece.astype(np.float32)
        for slot, piece in zip(tensor.slots, tensor.pieces(part.source.view(tensor.source)), strict=True)
    ]
    return cast(np.ascontiguousarray(tensor.assemble(pieces)), kind, tensor.source)


def inverse_rows(ops: Sequence[str], b: np.ndarray) -> np.ndarray:
    """Rows of an ``[out, ...]`` factor in the order a layout stores them, from their order in the slot."""
    return OPERATIONS["swap_halves"][1](b) if "swap_halves" in ops else b


def slot_rows(ops: Sequence[str], b: np.ndarray) -> np.ndarray:
    """Rows of an ``[out, ...]`` factor in the order of the slot, from the order a layout stores them in."""
    return OPERATIONS["swap_halves"][0](b) if "swap_halves" in ops else b


def parse_lora(text: str) -> tuple[Path, float]:
    """A path and a weight from ``path`` or ``path:weight``.

    Raises:
        ValueError: the weight is not a finite number.
    """
    path, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        value = float(weight)
    except ValueError:
        return Path(text), 1.0
    if not np.isfinite(value):
        raise ValueError(f"LoRA {text!r}: the weight must be a finite number")
    return Path(path), value
