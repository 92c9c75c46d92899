"""``.pt`` and ``.ckpt`` files, by opt-in only: torch's weights-only loader, which builds tensors and nothing else."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from converters.errors import CheckpointError


def check_archive(path: Path) -> None:
    """Refuses anything but an uncompressed archive as ``torch.save`` writes it, before torch sees it.

    Raises:
        CheckpointError: not a zip archive, compressed entries, or entries larger than the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as exc:
        raise CheckpointError(
            f"{path}: not an archive that torch.save writes since version 1.6 ({exc}); save it again with "
            "safetensors.torch.save_file"
        ) from exc
    size = path.stat().st_size
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise CheckpointError(f"{path}: compressed or overlapping entries, which torch.save never writes; not opened")


class TorchSource:
    """Tensors of a ``.pt`` file, memory-mapped by torch.

    Raises:
        CheckpointError: torch is missing, the file holds other things than tensors, or it is damaged.
    """

    def __init__(self, path: Path):
        check_archive(path)
        try:
            import torch
        except ImportError as exc:
            raise CheckpointError(f"{path}: reading it needs torch; use the safetensors version instead") from exc
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, KeyError, EOFError, OSError) as exc:
            raise CheckpointError(
                f"{path}: torch's weights-only loader refuses it ({str(exc).splitlines()[0]}); it is damaged or holds "
                "more than tensors, and is not loaded"
            ) from exc
        if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
            state = state["state_dict"]
        plain = isinstance(state, Mapping) and all(isinstance(name, str) for name in state)
        if not plain or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise CheckpointError(f"{path}: expected a dictionary from names to tensors")
        self.files = (path,)
        self.metadata: dict[str, str] = {}
        self._state = {name: value.detach() for name, value in state.items()}
        self._kinds = {torch.bfloat16: ml_dtypes.bfloat16, torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
                       torch.float8_e5m2: ml_dtypes.float8_e5m2}  # fmt: skip
        self._bits = {2: torch.uint16, 1: torch.uint8}
        for name, value in self._state.items():
            if value.layout is not torch.strided or value.is_quantized:
                raise CheckpointError(f"{path}: {name!r} is a sparse or quantised tensor, which is not supported")

    def keys(self) -> list[str]:
        return list(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def storage(self, name: str) -> np.dtype:
        value = self._state[name]
        if value.dtype in self._kinds:
            return np.dtype(self._kinds[value.dtype])
        return value[..., :0].numpy().dtype if value.ndim else value.numpy().dtype

    def view(self, name: str) -> np.ndarray:
        """The tensor, over torch's mapping."""
        value = self._state[name].contiguous()
        if value.dtype in self._kinds:
            return value.view(self._bits[value.element_size()]).numpy().view(self._kinds[value.dtype])
        return value.numpy()

    def close(self) -> None:
        self._state = {}
