"""Merging LoRAs into checkpoints: what they make of each parameter, as it is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from converters.components import Checkpoint, Part
from converters.errors import CheckpointError
from converters.keymap import Slot, Tensor
from converters.kinds import slot_name
from converters.lora.factors import Lora, bias_slot
from converters.reading.sources import ComputedSource, is_float
from converters.stream import cast


@dataclass(frozen=True)
class Change:
    """What LoRAs make of one parameter; called with its values, gives float32 in the same order of axes.

    Several LoRAs that replace one parameter move it from where it was, each by its weight, as the changes they are; so
    their order does not matter, and one of weight 1 gives its own values bit for bit.

    Attributes:
        terms: functions that give what is added, float32, weights and scales included.
        replacing: (weight, values) that the parameter moves towards.
    """

    terms: tuple[Callable[[], np.ndarray], ...]
    replacing: tuple[tuple[float, np.ndarray], ...]

    def __call__(self, piece: np.ndarray) -> np.ndarray:
        piece = piece.astype(np.float32)
        if self.replacing:
            moved = np.float32(self.replacing[0][0]) * self.replacing[0][1].astype(np.float32)
            for weight, value in self.replacing[1:]:
                moved = moved + np.float32(weight) * value.astype(np.float32)
            piece = np.float32(1 - math.fsum(weight for weight, _ in self.replacing)) * piece + moved
        if self.terms:
            total = self.terms[0]()
            for term in self.terms[1:]:
                total = total + term()
            piece = piece + total
        return piece


def changes(
    parts: Mapping[str, Part], loras: Sequence[tuple[Lora, float]], where: str | Path = "the checkpoint"
) -> dict[str, dict[Slot, Change]]:
    """What LoRAs with their weights make of the parameters of a checkpoint: component -> slot -> change.

    Changes of one parameter are added up before they are added to it, so the order of LoRAs does not matter.
    Parameters that keep every bit (weight or scale zero) are left out.

    Raises:
        CheckpointError: a LoRA is for a component, layer or shape the checkpoint does not have.
    """
    loras = sorted(loras, key=lambda entry: (entry[0].name, entry[1]))  # sums of floats depend on their order
    problems = [
        f"{lora.name}: changes the {component}, which is not in {where}"
        for lora, _ in loras
        for component in sorted(lora.components - parts.keys())
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
        for slot, value in lora.added.get(name, {}).items():
            if fits(lora, slot, value.shape) and weight:
                terms.setdefault(slot, []).append(lambda v=value, w=weight: np.float32(w) * v.astype(np.float32))
        for slot, value in lora.replaced.get(name, {}).items():
            if fits(lora, slot, value.shape) and weight:
                replacing.setdefault(slot, []).append((weight, value))
    return {slot: Change(tuple(terms.get(slot, ())), tuple(replacing.get(slot, ()))) for slot in {**terms, **replacing}}


def fitting(lora: Lora, parts: Mapping[str, Part], where: str | Path = "the checkpoint") -> tuple[Lora, list[str]]:
    """The LoRA without what the checkpoint has no place for, and the names of what was left out.

    Args:
        lora: a LoRA.
        parts: components of an opened checkpoint.
        where: what to call the checkpoint in errors.

    Raises:
        CheckpointError: nothing of the LoRA is left.
    """
    known = {name: {slot for tensor in part.tensors for slot in tensor.slots} for name, part in parts.items()}
    left_out: list[str] = []

    def kept(values: Mapping[str, Mapping[Slot, Any]]) -> dict[str, dict[Slot, Any]]:
        result: dict[str, dict[Slot, Any]] = {}
        for component, slots in values.items():
            for slot, value in slots.items():
                if slot in known.get(component, ()):
                    result.setdefault(component, {})[slot] = value
                else:
                    left_out.append(f"{component}: {slot_name(slot)}")
        return result

    result = replace(lora, factors=kept(lora.factors), replaced=kept(lora.replaced), added=kept(lora.added))
    if not result.components:
        raise CheckpointError(f"{lora.name}: nothing in it fits {where}: {', '.join(left_out[:5])}")
    return result, left_out


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
