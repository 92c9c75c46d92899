"""Latents on disk: safetensors that torch and diffusers can read and write.

The file holds one tensor ``latents``, float32 [B, C, H, W], in the scale the transformer works in (normalised by the
VAE's shift and scale, as diffusers returns with ``output_type="latent"`` before packing).  The record of the run is
JSON under the metadata key ``sega_jax``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike
from safetensors.numpy import save

from converters.errors import CheckpointError
from converters.files import atomic_path
from converters.reading.formats import METADATA_KEY, open_tensors
from sega_jax.media.images import decode_metadata, encode_metadata

_FLOATS = ("F16", "BF16", "F32", "F64")


def save_latents(path: str | os.PathLike[str], latents: ArrayLike, metadata: Mapping[str, object]) -> Path:
    """Writes latents; the file appears whole or not at all.

    Args:
        path: file name ending in ``.safetensors``.
        latents: [B, H, W, C], any float dtype, stored as float32.
        metadata: JSON-like record; ``height`` and ``width`` are the image's in pixels.

    Returns:
        The path.

    Raises:
        ValueError: wrong suffix, shape, or NaN/infinite values.
        TypeError: not floats.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: latents are stored as .safetensors")
    array = np.asarray(latents)
    if array.ndim != 4 or 0 in array.shape:
        raise ValueError(f"latents have shape [batch, height, width, channels], got {array.shape}")
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise TypeError(f"latents are floats, got {array.dtype}")
    stored = np.ascontiguousarray(array.astype(np.float32).transpose(0, 3, 1, 2))
    if not np.isfinite(stored).all():
        raise ValueError("latents hold NaN or infinity and are not worth keeping; look for the step that broke them")
    data = save({"latents": stored}, metadata={METADATA_KEY: encode_metadata(metadata)})
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return path


def load_latents(
    path: str | os.PathLike[str], *, height: int | None = None, width: int | None = None
) -> tuple[np.ndarray, dict]:
    """Latents and their record.

    Args:
        path: a file written by `save_latents`, or by torch with a tensor ``latents`` [B, C, H, W], or packed as
            diffusers' FLUX pipelines return it, [B, N, 4 C] (2x2 latent pixels per token, row by row).
        height: of the image, needed for packed latents whose file does not say; pixels, latent pixels or tokens,
            as long as ``width`` is in the same unit.
        width: see ``height``.

    Returns:
        float32 [B, H, W, C], and the metadata (empty if the file has none of ours).

    Raises:
        CheckpointError: unreadable file, no ``latents``, wrong rank or dtype, NaN, or a size that does not fit.
    """
    path = Path(path)
    with open_tensors(path) as source:
        if "latents" not in source.keys():  # noqa: SIM118  not a mapping
            names = ", ".join(source.keys()[:5])
            raise CheckpointError(f"{path}: no tensor named 'latents'; it holds {names or 'nothing'}")
        shape, dtype = source.shape("latents"), source.dtype("latents")
        if len(shape) not in (3, 4) or 0 in shape:
            raise CheckpointError(
                f"{path}: latents have shape {list(shape)}; expected [B, C, H, W], or packed [B, N, 4 C]"
            )
        if dtype not in _FLOATS:
            raise CheckpointError(f"{path}: latents are stored as {dtype}; expected one of {', '.join(_FLOATS)}")
        text = source.metadata.get(METADATA_KEY)
        array = source.read("latents").astype(np.float32)
    try:
        metadata = decode_metadata(text, str(path)) if text is not None else {}
    except ValueError as exc:
        raise CheckpointError(str(exc)) from exc
    if not np.isfinite(array).all():
        raise CheckpointError(f"{path}: latents hold NaN or infinity; the run that wrote them failed")
    if array.ndim == 3:
        rows, columns = _grid(path, shape, height or metadata.get("height"), width or metadata.get("width"))
        array = unpack(array, rows, columns)
    else:
        array = array.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(array), metadata


def unpack(packed: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """[B, rows * columns, 4 C] tokens of 2x2 latent pixels -> [B, 2 rows, 2 columns, C].

    A token's features are channel-major: feature ``4 c + 2 y + x`` is channel ``c`` of the pixel at ``(y, x)``.
    """
    batch, _, features = packed.shape
    pixels = packed.reshape(batch, rows, columns, features // 4, 2, 2)
    return pixels.transpose(0, 1, 4, 2, 5, 3).reshape(batch, 2 * rows, 2 * columns, features // 4)


def _grid(path: Path, shape: tuple[int, ...], height: object, width: object) -> tuple[int, int]:
    """Token rows and columns of packed latents."""
    _, tokens, features = shape
    if features % 4:
        raise CheckpointError(f"{path}: packed latents have {features} features per token; expected a multiple of 4")
    if not isinstance(height, int) or not isinstance(width, int) or min(height, width) < 1:
        raise CheckpointError(
            f"{path}: packed latents of {tokens} tokens do not say their shape; give height= and width= of the image"
        )
    unit = math.isqrt(height * width // tokens)
    if unit == 0 or height % unit or width % unit or (height // unit) * (width // unit) != tokens:
        raise CheckpointError(f"{path}: {tokens} tokens do not make up an image of {width}x{height}")
    return height // unit, width // unit
