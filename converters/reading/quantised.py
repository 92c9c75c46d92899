"""Weights of eight bits with scales, as ComfyUI's single files hold them: read as the numbers they stand for, written.

Two formats, both ``value = stored x scale`` with float32 scales: ``fp8`` is float8_e4m3fn with one scale per weight
(``x.scale_weight`` beside ``x.weight``, and a ``scaled_fp8`` marker; newer files say ``x.weight_scale`` and
``x.comfy_quant``), ``int8`` is one scale per output row (``int8_tensorwise`` in ``x.comfy_quant``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import ml_dtypes
import numpy as np

from converters.errors import CheckpointError
from converters.reading.sources import ComputedSource, Source, is_float
from converters.stream import BLOCK, Output, contiguous

DEQUANTISED_KEY = "dequantised"  # in a source's metadata: what its weights were stored as
_SCALES = ("scale_weight", "weight_scale")  # older and newer name of a weight's scale
_BESIDE = ("scale_input", "input_scale", "comfy_quant")  # activations' scales (unused here), format notes
_MARKER = "scaled_fp8"
_READ = {"float8_e4m3fn": "float8_e4m3fn", "float8_e5m2": "float8_e5m2", "int8_tensorwise": "int8"}  # -> storage


@dataclass(frozen=True)
class Format:
    """A way to store weights in eight bits.

    Attributes:
        name: for people.
        storage: type of the stored values.
        largest: the stored value that the largest weight under a scale becomes.
        by_row: a scale per output row instead of one per weight.
        relative, absolute: a value ``x`` under scale ``s`` is rounded by at most
            ``max(relative |x|, absolute s)``, up to the rounding of float32 itself.
    """

    name: str
    storage: np.dtype
    largest: float
    by_row: bool
    relative: float
    absolute: float


FORMATS = {
    "fp8": Format("float8_e4m3fn with scales", np.dtype(ml_dtypes.float8_e4m3fn), 448.0, False, 2.0**-4, 2.0**-10),
    "int8": Format("int8 with scales", np.dtype(np.int8), 127.0, True, 0.0, 0.5),
}
BY_STORAGE = {form.storage.name: form for form in FORMATS.values()}
# Which tensors are quantised: the matrices of the blocks.  Embedders, norms, biases and the last layer are small
# and sensitive; CLIP and the autoencoder stay as they are.
_QUANTISED = {
    "transformer": re.compile(r"(double_blocks|single_blocks)\.\d+\..+\.weight"),
    "text_encoder_2": re.compile(
        r"encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.\w+)\.weight"
    ),
}


def dequantise(source: Source) -> Source:
    """The source with scaled weights multiplied out in float32; unchanged if it has none.

    A weight ``x.weight`` of type float8 or int8 with ``x.scale_weight`` (or ``x.weight_scale``; a scalar, or one
    value per output row) stands for their product.

    Raises:
        CheckpointError: a scale without its weight, of a wrong shape, or another quantised format.
    """
    names = set(source.keys())
    computed, hidden, scales, kinds = {}, set(), {}, set()
    for name in names:
        base, _, last = name.rpartition(".")
        if last == _MARKER:
            hidden.add(name)
        elif last in _BESIDE and f"{base}.weight" in names:
            if last == "comfy_quant":
                _check_format(source, name, f"{base}.weight")
            hidden.add(name)
        elif last in _SCALES:
            weight = f"{base}.weight"
            kind = source.storage(weight).name if weight in names else ""
            if not kind.startswith("float8") and not (kind == "int8" and f"{base}.comfy_quant" in names):
                raise CheckpointError(f"{name}: a scale, but {weight} is not float8; damaged or of an unknown format")
            shape, rows = source.shape(weight), source.shape(weight)[0]
            if source.shape(name) not in ((), (1,), (rows,), (rows, 1)):
                raise CheckpointError(
                    f"{name}: scale of shape {source.shape(name)} for a weight {shape}; expected one value, or one per "
                    "row (block-scaled formats are not supported: use the bfloat16 checkpoint)"
                )
            computed[weight] = (shape, np.dtype(np.float32), partial(_multiply, source, weight, name))
            scales[weight] = (kind, partial(_scale, source, weight, name))
            kinds.add(kind)
            hidden.add(name)
    if not computed:
        return ComputedSource(source, {}, sorted(hidden)) if hidden else source
    result = ComputedSource(source, computed, sorted(hidden), scales)
    result.metadata = {**source.metadata, DEQUANTISED_KEY: f"scaled {', '.join(sorted(kinds))}"}
    return result


def _scale(source: Source, weight: str, scale: str) -> np.ndarray:
    """The scale of every value of a weight, without a copy."""
    factor = source.view(scale).astype(np.float32).reshape(-1)
    shape = source.shape(weight)
    return np.broadcast_to(factor.reshape(-1, *[1] * (len(shape) - 1)), shape)


def _multiply(source: Source, weight: str, scale: str) -> np.ndarray:
    values = source.view(weight).astype(np.float32)
    values *= _scale(source, weight, scale)
    return values


def _check_format(source: Source, name: str, weight: str) -> None:
    try:
        note = json.loads(source.view(name).tobytes())
        kind = note.get("format")
    except (ValueError, AttributeError, RecursionError) as exc:
        raise CheckpointError(f"{name}: expected a JSON object that names a format ({exc})") from exc
    if kind not in _READ:
        raise CheckpointError(f"{name}: weights quantised as {kind!r} are not supported; use the bfloat16 checkpoint")
    if note.get("convrot"):
        raise CheckpointError(
            f"{name}: weights quantised as {kind!r} after a rotation (convrot) are not supported; "
            "use the bfloat16 checkpoint"
        )
    if source.storage(weight).name != _READ[kind]:
        raise CheckpointError(f"{name} says {kind!r}, but {weight} is {source.storage(weight).name}; damaged")


# -- writing -------------------------------------------------------------------------------------------------------


def quantised(outputs: Sequence[Output], family: str, form: Format) -> list[Output]:
    """What to write for a component whose block matrices are stored in eight bits; others as they are."""
    pattern = _QUANTISED.get(family)
    result: list[Output] = []
    changed = False
    for output in outputs:
        if pattern is None or not pattern.fullmatch(output.name) or len(output.shape) != 2:
            result.append(output)
            continue
        if not is_float(output.dtype):
            raise CheckpointError(f"{output.name}: {output.dtype.name} values cannot be quantised; expected floats")
        changed = True
        base = output.name.removesuffix(".weight")
        scale = lru_cache(maxsize=1)(partial(_scale_of, output, form))
        result.append(Output(output.name, output.shape, form.storage, partial(_stored, output, form, scale)))
        shape = (output.shape[0], 1) if form.by_row else ()
        name = f"{base}.{'weight_scale' if form.by_row else 'scale_weight'}"
        result.append(Output(name, shape, np.dtype(np.float32), partial(_shaped, scale, shape)))
        if form.by_row:
            note = np.frombuffer(json.dumps({"format": "int8_tensorwise"}).encode(), np.uint8)
            result.append(Output(f"{base}.comfy_quant", note.shape, note.dtype, lambda note=note: [note]))
    if changed and not form.by_row:
        # Two values say that products are computed in the type of the activations, none that they may be in float8.
        marker = np.zeros(2, form.storage)
        result.append(Output(_MARKER, marker.shape, marker.dtype, lambda: [marker]))
    return result


def _shaped(scale: Callable[[], np.ndarray], shape: tuple[int, ...]) -> list[np.ndarray]:
    return [scale().reshape(shape)]


def _scale_of(output: Output, form: Format) -> np.ndarray:
    """Scales [rows], all equal unless the format has one per row: the largest value becomes the largest stored."""
    tops = [np.abs(block.astype(np.float32)).max(axis=1) for block in _rows(output)]
    top = np.concatenate(tops)
    if not np.isfinite(top).all():
        raise CheckpointError(f"{output.name}: holds NaN or infinity, which cannot be quantised; the file is damaged")
    if not form.by_row:
        top = top.max(keepdims=True)
    return np.where(top > 0, top / np.float32(form.largest), np.float32(1)).astype(np.float32)


def _rows(output: Output) -> Iterator[np.ndarray]:
    """Blocks of whole rows."""
    count = max(1, BLOCK // (4 * output.shape[1]))
    for piece in output.pieces():
        for start in range(0, len(piece), count):
            yield contiguous(piece[start : start + count])


def _stored(output: Output, form: Format, scale: Callable[[], np.ndarray]) -> list[np.ndarray]:
    result, row, factor = np.empty(output.shape, form.storage), 0, scale()
    for block in _rows(output):
        rows = slice(row, row + len(block))
        values = block.astype(np.float32) / (factor[rows, None] if form.by_row else factor)
        np.clip(values, -form.largest, form.largest, out=values)
        result[rows] = np.rint(values) if form.storage.kind == "i" else values
        row += len(block)
    return [result]
