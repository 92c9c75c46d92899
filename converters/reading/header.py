"""The header of a safetensors file, checked whole before anything is allocated.

The format (github.com/huggingface/safetensors, "Format"): eight bytes of length, a JSON object of that many bytes, and
the tensors one after another without gaps.  The library's reader refuses a header whose metadata holds anything but
strings, which other tools write; everything else is checked here as it checks it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError

HEADER_LIMIT = 100_000_000  # bytes, the library's
_MOST_VALUES = 2**58  # along the axes of a shape that are not empty; numpy counts bytes in 63 bits
_MOST_AXES = 32  # more than numpy 1 could hold; no model has more than five
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor as the header describes it.

    Attributes:
        dtype: in safetensors' spelling (``"BF16"``).
        shape: its shape.
        start, end: bytes in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """Tensors by name in the order of the header, and the metadata; values that are no strings are given as JSON."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file.

    Raises:
        CheckpointError: it is damaged, describes a tensor twice, or does not fit the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(HEADER_LIMIT, size - 8):
                raise ValueError(f"a header of {length} bytes")
            text = file.read(length)
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once)
        if not isinstance(header, dict) or text[:1] != b"{":
            raise ValueError("its header is no object")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no object")
        return Header(
            _entries(header, 8 + length, size),
            {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()},
        )
    except _Twice as exc:
        raise CheckpointError(f"{path}: its header describes {exc} twice; damaged or tampered with") from None
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({size} bytes; {exc}); truncated or damaged, download it again"
        ) from exc


class _Twice(Exception):
    """A name that an object has twice, of which a parser would keep the last."""


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    for name, value in items:  # half of a surrogate pair is no text that could be shown or written
        name.encode()
        if isinstance(value, str):
            value.encode()
    if len(found) != len(items):
        names = [name for name, _ in items]
        raise _Twice(repr(next(name for name in names if names.count(name) > 1)))
    return found


def _entries(header: Mapping[str, Any], start: int, size: int) -> dict[str, Entry]:
    """Entries whose tensors follow one another from ``start`` to the end of the file.  ValueError otherwise."""
    found = {name: _entry(name, value, start) for name, value in header.items()}
    position = start
    for name, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            raise ValueError(f"tensor {name!r} begins at byte {entry.start}, expected {position}")
        position = entry.end
    if position != size:
        raise ValueError(f"its tensors end at byte {position}")
    return found


def _entry(name: str, value: Any, start: int) -> Entry:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise ValueError(f"tensor {name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    numbers = [shape, offsets]
    if not all(isinstance(part, list) and all(type(n) is int and 0 <= n < 2**64 for n in part) for part in numbers):
        raise ValueError(f"tensor {name!r} has no shape or offsets of whole numbers")
    if len(shape) > _MOST_AXES or math.prod(n for n in shape if n) > _MOST_VALUES:
        raise ValueError(f"tensor {name!r} has {len(shape)} axes, too many or too large")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"tensor {name!r} is stored as {dtype!r:.40}, which is not known")
    if len(offsets) != 2 or 8 * (offsets[1] - offsets[0]) != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"tensor {name!r} of shape {shape} and type {dtype} does not fit its offsets {offsets}")
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])
