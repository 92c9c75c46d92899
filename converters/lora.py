"""LoRAs: one meaning for every dialect, their effective change, and merging them into checkpoints.

A LoRA is held as factors per slot (one parameter of one layer): ``change of the weight [out, in] = weight x scale x
B [out, rank] @ A [rank, in]`` (Hu et al., arXiv 2106.09685), ``scale = alpha / rank``.  `converters.lora_dialects`
reads and writes the names in use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from converters.components import Checkpoint, Part
from converters.errors import CheckpointError
from converters.families import slot_name
from converters.keymap import OPERATIONS, Slot, Tensor
from converters.sources import ComputedSource, is_float
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


def merge(checkpoint: Checkpoint, loras: Sequence[tuple[Lora, float]], dtype: np.dtype | None = None) -> Checkpoint:
    """The checkpoint with LoRAs added to its weights as they are read: ``W + sum(weight x change)``.

    Args:
        checkpoint: an opened checkpoint.
        loras: LoRAs with their weights; order does not matter.
        dtype: type of the changed tensors; None keeps theirs.  The sum is made in float32 and rounded once.

    Raises:
        CheckpointError: a LoRA is for a component, layer or shape the checkpoint does not have.
    """
    problems: list[str] = []
    parts = dict(checkpoint.parts)
    for lora, _ in loras:
        for component in {*lora.factors, *lora.replaced} - parts.keys():
            problems.append(f"{lora.name}: changes the {component}, which is not in {checkpoint.path}")
    for name, part in parts.items():
        parts[name] = _merge_part(name, part, loras, dtype, problems)
    if problems:
        shown = "\n  ".join(problems[:20]) + ("\n  ..." if len(problems) > 20 else "")
        raise CheckpointError(f"the LoRA does not fit the checkpoint ({len(problems)} problems):\n  {shown}")
    return replace(checkpoint, parts=parts)


def _merge_part(
    name: str, part: Part, loras: Sequence[tuple[Lora, float]], dtype: np.dtype | None, problems: list[str]
) -> Part:
    slots = part.slots()
    shapes = {
        slot: shape for tensor in part.tensors for slot, shape in zip(tensor.slots, tensor.piece_shapes(), strict=True)
    }
    touched: dict[str, Tensor] = {}
    for lora, _ in loras:
        wanted = [(slot, (f.a.shape[1], f.b.shape[0])) for slot, f in lora.factors.get(name, {}).items()]
        wanted += [
            (bias_slot(slot), (f.b.shape[0],)) for slot, f in lora.factors.get(name, {}).items() if f.bias is not None
        ]
        wanted += [(slot, value.shape) for slot, value in lora.replaced.get(name, {}).items()]
        for slot, shape in wanted:
            if slot not in slots:
                problems.append(f"{lora.name}: {name} has no {slot_name(slot)}")
            elif shapes[slot] != shape:
                hint = (
                    "; a control LoRA that widens the input cannot be merged"
                    if slot.path == "image_embed.kernel"
                    else ""
                )
                problems.append(f"{lora.name}: {slot_name(slot)} is {shapes[slot]}, the LoRA is for {shape}{hint}")
            else:
                touched[slots[slot][0].source] = slots[slot][0]
    if not touched or problems:
        return part
    computed = {}
    for source_name, tensor in touched.items():
        stored = part.source.storage(source_name)
        kind = dtype if dtype is not None and is_float(stored) else stored
        computed[source_name] = (tensor.shape, kind, _merger(name, part, tensor, loras, kind))
    return replace(part, source=ComputedSource(part.source, computed))


def _merger(name: str, part: Part, tensor: Tensor, loras: Sequence[tuple[Lora, float]], kind: np.dtype):
    added: list[tuple[int, float, Callable[[], np.ndarray]]] = []
    replacing: list[tuple[int, float, np.ndarray]] = []
    for lora, weight in loras:
        factors = {k: f for k, f in lora.factors.get(name, {}).items() if weight * f.scale}  # zero changes no bit
        biases = {bias_slot(k): f for k, f in factors.items() if f.bias is not None}
        values = lora.replaced.get(name, {}) if weight else {}
        for i, slot in enumerate(tensor.slots):
            if slot in factors:
                added.append((i, weight, lambda f=factors[slot]: f.delta().T))
            if slot in biases:
                added.append((i, weight, biases[slot].delta_bias))
            if slot in values:
                replacing.append((i, weight, values[slot]))

    def read() -> np.ndarray:
        stored = part.source.view(tensor.source)
        if not added and not replacing:
            return stored if stored.dtype == kind else cast(stored, kind, tensor.source)
        pieces = [piece.astype(np.float32) for piece in tensor.pieces(stored)]
        changes: dict[int, np.ndarray] = {}
        for i, weight, change in added:
            term = np.float32(weight) * change()
            changes[i] = changes[i] + term if i in changes else term
        for i, change in changes.items():
            pieces[i] = pieces[i] + change
        for i, weight, value in replacing:
            pieces[i] = pieces[i] + np.float32(weight) * (value.astype(np.float32) - pieces[i])
        return cast(np.ascontiguousarray(tensor.assemble(pieces)), kind, tensor.source)

    return read


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
