"""ComfyUI's scaled float8 weights, read as the numbers they stand for."""

from __future__ import annotations

import json
from functools import partial

import numpy as np

from converters.errors import CheckpointError
from converters.sources import ComputedSource, Source

DEQUANTISED_KEY = "dequantised"  # in a source's metadata: what its weights were stored as
_SCALES = ("scale_weight", "weight_scale")  # older and newer name of a weight's scale
_BESIDE = ("scale_input", "input_scale", "comfy_quant")  # activations' scales (unused here), format notes
_MARKER = "scaled_fp8"


def dequantise(source: Source) -> Source:
    """The source with scaled float8 weights multiplied out in float32; unchanged if it has none.

    A weight ``x.weight`` of type float8 with ``x.scale_weight`` (or ``x.weight_scale``; a scalar, or one value
    per output row) stands for their product.

    Raises:
        CheckpointError: a scale without its float8 weight, of a wrong shape, or another quantised format.
    """
    names = set(source.keys())
    computed, hidden = {}, set()
    for name in names:
        base, _, last = name.rpartition(".")
        if last == _MARKER:
            hidden.add(name)
        elif last in _BESIDE and f"{base}.weight" in names:
            if last == "comfy_quant":
                _check_format(source, name)
            hidden.add(name)
        elif last in _SCALES:
            weight = f"{base}.weight"
            if weight not in names or not source.storage(weight).name.startswith("float8"):
                raise CheckpointError(f"{name}: a scale, but {weight} is not float8; damaged or of an unknown format")
            shape, rows = source.shape(weight), source.shape(weight)[0]
            if source.shape(name) not in ((), (1,), (rows,), (rows, 1)):
                raise CheckpointError(
                    f"{name}: scale of shape {source.shape(name)} for a weight {shape}; expected one value, or one per "
                    "row (block-scaled formats are not supported: use the bfloat16 checkpoint)"
                )
            computed[weight] = (shape, np.dtype(np.float32), partial(_multiply, source, weight, name))
            hidden.add(name)
    if not computed:
        if hidden:
            return ComputedSource(source, {}, sorted(hidden))
        return source
    result = ComputedSource(source, computed, sorted(hidden))
    result.metadata = {**source.metadata, DEQUANTISED_KEY: "scaled float8"}
    return result


def _multiply(source: Source, weight: str, scale: str) -> np.ndarray:
    values = source.view(weight).astype(np.float32)
    factor = source.view(scale).astype(np.float32).reshape(-1)
    values *= factor if factor.size == 1 else factor.reshape(-1, *[1] * (values.ndim - 1))
    return values


def _check_format(source: Source, name: str) -> None:
    try:
        kind = json.loads(source.view(name).tobytes()).get("format")
    except (ValueError, AttributeError, RecursionError) as exc:
        raise CheckpointError(f"{name}: expected a JSON object that names a format ({exc})") from exc
    if kind not in ("float8_e4m3fn", "float8_e5m2"):
        raise CheckpointError(f"{name}: weights quantised as {kind!r} are not supported; use the bfloat16 checkpoint")
