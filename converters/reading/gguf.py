"""GGUF files (extra ``gguf``): quantised weights read as the numbers they stand for, others as stored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters.errors import CheckpointError
from converters.reading.quantised import DEQUANTISED_KEY

MAGIC = b"GGUF"
_LONGEST_TEXT = 1000  # bytes of an entry that are shown


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            return False
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def _shape(reader: Any, tensor: Any) -> tuple[int, ...]:
    """A tensor's shape; where it was stored in another because of the blocks of its type, the original one."""
    stored = tuple(int(size) for size in tensor.shape[::-1])  # GGUF lists the innermost axis first
    noted = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
    if noted is None:
        return stored
    shape = tuple(int(noted.parts[index][0]) for index in noted.data)
    if any(size < 0 for size in shape) or math.prod(shape) != math.prod(stored):
        raise ValueError(f"{tensor.name} is {stored} but was {shape}")
    return shape


def _texts(reader: Any) -> dict[str, str]:
    """The file's entries that are short texts: name, author, architecture."""
    found = {}
    for name, field in reader.fields.items():
        if len(field.types) == 1 and field.types[0].name == "STRING" and field.data:
            text = bytes(field.parts[field.data[0]][:_LONGEST_TEXT])
            found[name] = text.decode("utf-8", "replace")
    return found


class GgufSource:
    """Tensors of a GGUF file, memory-mapped; quantised ones are dequantised to float32 when read.

    Attributes:
        dequantised: names of those.
        stored: name -> (type as GGUF calls it, number of values, bytes).

    Raises:
        CheckpointError: the package ``gguf`` is missing, or the file is damaged.
    """

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError as exc:
            raise CheckpointError(f"{path}: GGUF needs the package gguf: pip install 'sega-jax[gguf]'") from exc

        class Reader(gguf.GGUFReader):
            """The package's reader, which alone would read past the end of the file as nothing."""

            def _get(self, offset, dtype, count=1, override_order=None):
                array = super()._get(offset, dtype, count, override_order)
                if array.size != int(count):
                    raise ValueError(f"{int(count)} values at byte {offset} reach beyond the end of the file")
                return array

        try:
            reader = Reader(path)
            tensors = reader.tensors
            self._shapes = {tensor.name: _shape(reader, tensor) for tensor in tensors}
        except (ValueError, KeyError, IndexError, TypeError, OverflowError, OSError, MemoryError) as exc:
            raise CheckpointError(f"{path}: not a complete GGUF file ({exc}); download it again") from exc
        self._dequantise, types = gguf.quants.dequantize, gguf.GGMLQuantizationType
        self._stored = {
            types.F32: np.dtype(np.float32),
            types.F16: np.dtype(np.float16),
            types.F64: np.dtype(np.float64),
            types.BF16: np.dtype(ml_dtypes.bfloat16),
        }
        self.files = (path,)
        self.stored = {t.name: (t.tensor_type.name, math.prod(self._shapes[t.name]), int(t.n_bytes)) for t in tensors}
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self.dequantised = frozenset(t.name for t in tensors if t.tensor_type not in self._stored)
        quantised = sorted({t.tensor_type.name for t in tensors if t.name in self.dequantised})
        self.metadata = _texts(reader)
        if quantised:
            self.metadata[DEQUANTISED_KEY] = f"GGUF {', '.join(quantised)}"

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def storage(self, name: str) -> np.dtype:
        return self._stored.get(self._tensors[name].tensor_type, np.dtype(np.float32))

    def view(self, name: str) -> np.ndarray:
        """The tensor; over the mapped file unless it is quantised.

        Raises:
            CheckpointError: a quantised type the package cannot read.
        """
        tensor = self._tensors[name]
        kind = self._stored.get(tensor.tensor_type)
        if kind is not None:
            return np.asarray(tensor.data).reshape(-1).view(kind).reshape(self.shape(name))
        try:
            return np.asarray(self._dequantise(np.asarray(tensor.data), tensor.tensor_type)).reshape(self.shape(name))
        except (NotImplementedError, ValueError) as exc:
            raise CheckpointError(
                f"{self.files[0]}: {name!r} is stored as {tensor.tensor_type.name}, which cannot be read ({exc})"
            ) from exc

    def close(self) -> None:
        self._tensors = {}
