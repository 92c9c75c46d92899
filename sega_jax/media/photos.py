"""Pictures to start from: whatever people have them as, brought to the size of a run without bending their shape."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image as pillow

from sega_jax.media.images import Image, decoded, flat_rgb, open_image

logger = logging.getLogger(__name__)

Fit = Literal["crop", "pad", "stretch"]
FITS: tuple[Fit, ...] = ("crop", "pad", "stretch")
SAME_SHAPE = 0.02  # share of a side that may be cut off without being asked: what rounding to whole tokens takes
_OVERSHOOT = 2.0  # decoded pictures leave [-1, 1] a little; numbers of 8 bits leave it by far


def check_fit(fit: Any) -> Fit | None:
    """``fit`` itself.

    Raises:
        ValueError: anything but None, ``"crop"``, ``"pad"`` and ``"stretch"``.
    """
    if fit is not None and fit not in FITS:
        raise ValueError(f"fit={fit!r}: expected {', '.join(FITS)}")
    return fit


def photo_size(image: Any, name: str = "init_image") -> tuple[int, int]:
    """(width, height) in pixels of a picture in any form that `photo` takes; of a file only the header is read."""
    if isinstance(image, str | os.PathLike):
        with open_image(image) as opened:
            turned = opened.getexif().get(0x0112, 1) >= 5  # EXIF orientations that swap the sides
            return (opened.height, opened.width) if turned else opened.size
    if isinstance(image, pillow.Image):
        return image.size
    array = image.array if isinstance(image, Image) else _array(image, name)
    return array.shape[1], array.shape[0]


def own_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) of a run that starts from a photo of ``size``: the next multiples of ``side``, the token side."""
    return tuple(-(-length // side) * side for length in size)


def photo(
    image: Any, size: tuple[int, int] | None = None, fit: Fit | None = None, *, name: str = "init_image"
) -> np.ndarray:
    """A picture as model input: f32 [H, W, 3] in [-1, 1].

    Args:
        image: a file, a Pillow image, an `Image`, or an array [H, W, 3]: uint8, or floats in [-1, 1] or, where none is
            negative, in [0, 1].
        size: (width, height) to bring it to; default as it is.
        fit: how, where the shapes differ: ``"crop"`` fills the size and cuts off what stands over, evenly on both
            sides; ``"pad"`` shows all of it, with black bars; ``"stretch"`` bends it.  None takes a picture of the
            same shape only, up to rounding to whole tokens.
        name: of the argument, in errors.

    Raises:
        ValueError: NaN or infinity, a range that is none of those, transparency, another shape without ``fit``.
        TypeError: something else.
        FileNotFoundError: no such file.
    """
    check_fit(fit)
    if isinstance(image, str | os.PathLike):
        with decoded(image) as opened:
            opened.load()
            image = opened
    elif isinstance(image, pillow.Image):
        image = flat_rgb(image, name)
    else:
        array = image.array if isinstance(image, Image) else _array(image, name)
        image = pillow.fromarray(array) if array.dtype == np.uint8 else _signed(array, name)
    if size is not None:
        shape = image.size if isinstance(image, pillow.Image) else image.shape[1::-1]
        image = _placed(image, shape, tuple(size), fit, name)
    if isinstance(image, pillow.Image):
        return np.asarray(image, np.float32) / np.float32(127.5) - np.float32(1.0)
    return image


def _array(image: Any, name: str) -> np.ndarray:
    array = np.asarray(image)
    if array.dtype.kind not in "uif" and array.dtype.name != "bfloat16":
        raise TypeError(
            f"{name} of type {type(image).__name__}: expected a file, a Pillow image, an Image, or an array "
            "[height, width, 3] of uint8 or floats"
        )
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(f"{name} of shape {array.shape}: expected [height, width, 3]")
    if array.dtype == np.uint8 or array.dtype.kind not in "ui":
        return array
    raise TypeError(f"{name} of dtype {array.dtype}: expected uint8 (0 to 255), or floats in [-1, 1] or [0, 1]")


def _signed(array: np.ndarray, name: str) -> np.ndarray:
    """Floats in [-1, 1], from those or from [0, 1]."""
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinity; look for the step that made them")
    low, high = float(array.min()), float(array.max())
    if low >= 0 and high <= 1:
        logger.warning(
            "%s: floats without a negative value are read as 0 to 1; give uint8 or a Pillow image where that is wrong",
            name,
        )
        return 2 * array - 1
    if max(-low, high) > _OVERSHOOT:
        raise ValueError(
            f"{name}: floats from {low:g} to {high:g}; expected [-1, 1] or [0, 1] (0 to 255 as uint8: "
            "array.round().astype(np.uint8))"
        )
    return array


def mask_of(
    mask: Any, photo_shape: tuple[int, int], size: tuple[int, int], fit: Fit | None = None, *, name: str = "mask"
) -> np.ndarray:
    """Where a picture may change: bool [H, W] of the run, from a mask of the photo.

    Args:
        mask: white (or True, or at least half of the largest value) where it may change: a file, a Pillow image, or an
            array [H, W] or [H, W, 3] of bool, uint8 or floats in [0, 1].
        photo_shape: (width, height) of the photo, which the mask must have.
        size: (width, height) of the run.
        fit: how the photo is brought there (`photo`); the mask goes the same way, and what is padded stays.
        name: of the argument, in errors.

    Raises:
        ValueError: another size than the photo's, or a mask that lets nothing change.
        TypeError: something else.
    """
    if isinstance(mask, np.ndarray | list):
        array = np.asarray(mask)
        array = np.repeat(array[..., None], 3, -1) if array.ndim == 2 else array
        mask = np.where(array, np.uint8(255), np.uint8(0)) if array.dtype == bool else array
    colours = photo(mask, name=name)
    shape = colours.shape[1::-1]
    if shape != photo_shape:
        own = f"{photo_shape[0]}x{photo_shape[1]}"
        raise ValueError(f"{name} is {shape[0]}x{shape[1]}, the picture {own}; they must agree")
    placed = _placed(colours, shape, size, fit, name)
    free = placed.mean(-1) >= 0
    if not free.any():
        raise ValueError(f"{name}: nothing in it is white, so that nothing could change")
    return free


def check_shape(shape: tuple[int, int], size: tuple[int, int], fit: Fit | None, name: str = "init_image") -> None:
    """Complains about a picture of another shape than the run's, where nobody said what to do with it.

    Args:
        shape, size: (width, height) of the picture and of the run.
        fit: as in `photo`.
        name: of the argument.

    Raises:
        ValueError: the shapes differ by more than rounding to whole tokens, and ``fit`` is None.
    """
    scales = size[0] / shape[0], size[1] / shape[1]
    lost = 1 - min(scales) / max(scales)  # of the longer side, by filling the size
    if fit is None and lost > SAME_SHAPE:
        raise ValueError(
            f"{name} is {shape[0]}x{shape[1]}, the run {size[0]}x{size[1]}: another shape; give fit='crop' (cuts off "
            f"{lost:.0%} of one side), 'pad' (black bars) or 'stretch', or a size of the picture's shape"
        )


def _placed(
    image: pillow.Image | np.ndarray, shape: tuple[int, int], size: tuple[int, int], fit: Fit | None, name: str
) -> pillow.Image | np.ndarray:
    """The picture, of ``shape``, at ``size``; both (width, height)."""
    if min(size) < 1:
        raise ValueError(f"size is (width, height) in pixels, got {size}")
    if shape == size:
        return image
    check_shape(shape, size, fit, name)
    cover, inside = (pick(size[0] / shape[0], size[1] / shape[1]) for pick in (max, min))
    if fit == "stretch":
        return _resized(image, size)
    if fit == "pad":
        inner = tuple(max(1, min(full, round(length * inside))) for length, full in zip(shape, size, strict=True))
        return _framed(_resized(image, inner), inner, size)
    kept = size[0] / cover, size[1] / cover  # of the picture, in its own pixels
    left, top = (shape[0] - kept[0]) / 2, (shape[1] - kept[1]) / 2
    return _resized(
        image, size, (max(left, 0), max(top, 0), min(left + kept[0], shape[0]), min(top + kept[1], shape[1]))
    )


def _resized(
    image: pillow.Image | np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> pillow.Image | np.ndarray:
    """By a Lanczos filter, from ``box`` (left, top, right, bottom) of the picture; floats stay floats."""
    if isinstance(image, pillow.Image):
        return image.resize(size, pillow.Resampling.LANCZOS, box=box)
    planes = (pillow.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(image, -1, 0))
    return np.stack([np.asarray(plane.resize(size, pillow.Resampling.LANCZOS, box=box)) for plane in planes], -1)


def _framed(
    image: pillow.Image | np.ndarray, inner: tuple[int, int], size: tuple[int, int]
) -> pillow.Image | np.ndarray:
    left, top = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    if isinstance(image, pillow.Image):
        framed = pillow.new("RGB", size)
        framed.paste(image, (left, top))
        return framed
    framed = np.full((size[1], size[0], 3), -1, np.float32)
    framed[top : top + inner[1], left : left + inner[0]] = image
    return framed


def cut(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of a picture [H, W, 3], ``size`` (width, height) of it: what a run of whole tokens made too much."""
    height, width = picture.shape[:2]
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    if min(top, left) < 0:
        raise ValueError(f"a picture of {width}x{height} cannot be cut to {size[0]}x{size[1]}")
    return picture[top : top + size[1], left : left + size[0]]


def cut_as_recorded(picture: np.ndarray, record: Mapping[str, Any]) -> np.ndarray:
    """A decoded picture [H, W, 3], cut to its record's size where that is no whole tokens."""
    height, width = picture.shape[:2]
    size = record.get("width"), record.get("height")
    inside = all(isinstance(side, int) and 0 < side <= full for side, full in zip(size, (width, height), strict=True))
    return cut(picture, size) if record.get("fit") == "crop" and inside else picture
