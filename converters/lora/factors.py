"""LoRAs: one meaning for every dialect, and their effective change.

A LoRA is held as factors per slot (one parameter of one layer): ``change of the weight [out, in] = weight x scale x
B [out, rank] @ A [rank, in]`` (Hu et al., arXiv 2106.09685), ``scale = alpha / rank``.  `converters.lora.read`
and `converters.lora.dialects` read and write the names in use.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from converters.keymap import OPERATIONS, Slot


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
        added: component name -> slot -> values that are added to a parameter (biases and norms of extracted LoRAs).
        metadata: of the file it was read from.
    """

    factors: Mapping[str, Mapping[Slot, Factors]]
    replaced: Mapping[str, Mapping[Slot, np.ndarray]] = field(default_factory=dict)
    name: str = "LoRA"
    added: Mapping[str, Mapping[Slot, np.ndarray]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def components(self) -> set[str]:
        """Names of the components it changes."""
        return {*self.factors, *self.replaced, *self.added}

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
    if not colon or os.path.exists(text):
        return Path(text), 1.0
    try:
        value = float(weight)
    except ValueError:
        return Path(text), 1.0
    if not np.isfinite(value):
        raise ValueError(f"LoRA {text!r}: the weight must be a finite number")
    return Path(path), value
