"""GGUF files (extra ``gguf``): quantised weights read as the numbers they stand for, others as stored."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from converters.errors import CheckpointError
from converters.reading.quantised import DEQUANTISED_KEY

MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


class GgufSource:
    """Tensors of a GGUF file, memory-mapped; quantised ones are dequantised to float32 when read.

    Attributes:
        dequantised: names of those.

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
            tensors = Reader(path).tensors
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
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self.dequantised = frozenset(t.name for t in tensors if t.tensor_type not in self._stored)
        quantised = sorted({t.tensor_type.name for t in tensors if t.name in self.dequantised})
        self.metadata = {DEQUANTISED_KEY: f"GGUF {', '.join(quantised)}"} if quantised else {}

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in self._tensors[name].shape[::-1])  # GGUF lists the innermost axis first

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
