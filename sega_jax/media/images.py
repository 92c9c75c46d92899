"""Pictures on disk: arrays to PNG, JPEG or WebP with the generation's record inside, and back."""

from __future__ import annotations

import contextlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike
from PIL import Image as pillow
from PIL import ImageOps, PngImagePlugin, UnidentifiedImageError

from converters.files import atomic_path
from converters.reading.formats import METADATA_KEY

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_LONGEST_SIDE = {"JPEG": 65_535, "WEBP": 16_383}
_EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_EXIF_FOLDER, _USER_COMMENT = 0x8769, 0x9286
_ASCII = b"ASCII\0\0\0"  # EXIF's marker for the encoding of a user comment
_EXIF_LIMIT = 65_000  # bytes; a JPEG segment holds 65,533, and the tables around the comment take some
_PNG_LIMIT = 16_000_000  # bytes of a record; Pillow reads at most 64 MB of text back, which holds it twice
READ_FORMATS = ("PNG", "JPEG", "WEBP")  # nothing else is decoded: other decoders take gigabytes for a few bytes
MOST_PIXELS = 100_000_000  # of a picture that is decoded; at 4 bytes each, and as many again while it is turned
_QUICK_PNG_PIXELS = 4_000_000  # above this, zlib level 1: a few percent larger, several times faster


def to_uint8(image: ArrayLike) -> np.ndarray:
    """8-bit image from [-1, 1]: ``round((x + 1) * 127.5)``, halves to even, values outside clipped.

    Args:
        image: [H, W, 3], any float dtype; a uint8 image is returned as it is.

    Raises:
        ValueError: wrong shape, or NaN (a failed decode).
        TypeError: neither float nor uint8.
    """
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(f"an image has shape [height, width, 3], got {array.shape}")
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
        raise TypeError(f"an image is float in [-1, 1] or uint8, got {array.dtype}")
    result = np.empty(array.shape, np.uint8)
    for start in range(0, len(array), 256):  # a 36 MP image would need three float32 copies of 0.4 GB at once
        rows = array[start : start + 256].astype(np.float32)
        if np.isnan(rows).any():
            raise ValueError("the image holds NaN; decode in float32 or look for the step where the latents broke")
        result[start : start + 256] = np.rint(np.clip((rows + 1.0) * 127.5, 0.0, 255.0)).astype(np.uint8)
    return result


def encode_metadata(metadata: Mapping[str, object]) -> str:
    """Metadata as JSON text; numpy scalars and arrays become numbers and lists.

    Raises:
        TypeError: a value that JSON cannot hold.
        ValueError: NaN or infinity.
    """

    def plain(value: object) -> object:
        if isinstance(value, np.generic | np.ndarray):
            return value.tolist()
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        raise TypeError(f"metadata value {value!r} of type {type(value).__name__} cannot be stored as JSON")

    try:
        return json.dumps(dict(metadata), default=plain, allow_nan=False, ensure_ascii=False)
    except ValueError as exc:
        raise ValueError(f"metadata cannot be stored as JSON: {exc}") from exc


def decode_metadata(text: str, where: str) -> dict:
    """Inverse of `encode_metadata`; ``where`` names the file in errors.

    Raises:
        ValueError: not a JSON object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"{where}: its {METADATA_KEY} metadata is not valid JSON ({exc})") from exc
    if not isinstance(value, dict):
        raise ValueError(f"{where}: its {METADATA_KEY} metadata is {type(value).__name__}, expected an object")
    return value


def _describe(metadata: Mapping[str, object]) -> str:
    """The record in the way people read it: the prompt, then the other fields."""
    fields = ", ".join(f"{name}: {value}" for name, value in metadata.items() if name != "prompt" and value is not None)
    return "\n".join(str(part) for part in (metadata.get("prompt"), fields) if part).replace("\0", "")


@dataclass(frozen=True, eq=False)
class Image:
    """A generated picture and the record of how it was made.

    Attributes:
        array: uint8 [H, W, 3]; float images in [-1, 1] are converted by `to_uint8`.
        metadata: JSON-like record, stored in the file by `save`.
    """

    array: np.ndarray
    metadata: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "array", to_uint8(self.array))

    def __repr__(self) -> str:
        height, width, _ = self.array.shape
        return f"Image({width}x{height})"

    def pil(self) -> pillow.Image:
        """The picture as a Pillow image (no metadata)."""
        return pillow.fromarray(self.array)

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        buffer = io.BytesIO()
        self.pil().save(buffer, format="PNG", compress_level=1)
        return buffer.getvalue()

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the picture with its metadata; the file appears whole or not at all.

        ``.png`` and ``.webp`` are lossless, ``.jpg`` is quality 95 without chroma subsampling.  PNG keeps the
        metadata in text chunks (``sega_jax``: JSON, ``parameters``: for people), the others in the EXIF user comment.

        Returns:
            The path.

        Raises:
            ValueError: unknown suffix, a side or metadata too large for the format.
            OSError: the file cannot be written.
        """
        path = Path(path)
        height, width, _ = self.array.shape
        form, text = check_saveable(path, width, height, self.metadata)
        options = _png_options(text, self.metadata, height * width) if form == "PNG" else _exif_options(form, text)
        with atomic_path(path) as temporary:
            self.pil().save(temporary, format=form, **options)
        return path


def check_saveable(
    path: Path, width: int, height: int, metadata: Mapping[str, object], spare: int = 0
) -> tuple[str, str]:
    """Whether a picture of this size with this record can be saved under this name.

    Args:
        path: the file's name.
        width, height: pixels.
        metadata: the record.
        spare: bytes that the record may still grow.

    Returns:
        The format as Pillow calls it, and the record as text.

    Raises:
        ValueError: unknown suffix, a side or metadata too large for the format, metadata that JSON cannot hold.
        TypeError: a value that JSON cannot hold.
    """
    form = _FORMATS.get(path.suffix.lower())
    if form is None:
        raise ValueError(f"{path}: unknown image suffix {path.suffix!r}; use {', '.join(_FORMATS)}")
    if max(height, width) > _LONGEST_SIDE.get(form, max(height, width)):
        raise ValueError(f"{path}: {form} sides are at most {_LONGEST_SIDE[form]} px, got {width}x{height}; use .png")
    text = encode_metadata(metadata)
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise ValueError(f"{path}: the metadata holds half a character (a lone surrogate): {exc.reason}") from exc
    if form == "PNG" and len(text.encode()) + spare > _PNG_LIMIT:
        raise ValueError(f"{path}: {len(text.encode())} bytes of metadata; expected at most {_PNG_LIMIT}")
    if form == "JPEG" and len(_comment(text)) + spare > _EXIF_LIMIT:
        raise ValueError(f"{path}: {len(_comment(text))} bytes of metadata, JPEG holds {_EXIF_LIMIT}; save as .png")
    return form, text


def _comment(text: str) -> bytes:
    """A record as an EXIF user comment; non-ASCII characters are escaped."""
    return _ASCII + json.dumps({METADATA_KEY: json.loads(text)}).encode("ascii")


def _png_options(text: str, metadata: Mapping[str, object], pixels: int) -> dict:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(METADATA_KEY, text)
    chunks.add_itxt("parameters", _describe(metadata))
    return {"pnginfo": chunks, "compress_level": 1 if pixels > _QUICK_PNG_PIXELS else 6}


def _exif_options(form: str, text: str) -> dict:
    exif = pillow.Exif()
    exif[_EXIF_FOLDER] = {_USER_COMMENT: _comment(text)}
    quality = {"quality": 95, "subsampling": 0} if form == "JPEG" else {"lossless": True, "quality": 0, "method": 0}
    return {"exif": exif, **quality}


@contextlib.contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[pillow.Image]:
    """An image file opened by Pillow (header only), its errors in our words."""
    path = Path(path)
    with warnings.catch_warnings():
        # Pillow warns above 89 MP, which are sizes this package makes, and refuses above 179 MP.
        warnings.simplefilter("ignore", pillow.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)  # a damaged EXIF block, which is then taken as absent
        try:
            if path.exists() and not path.is_file():
                raise ValueError(f"{path}: not a file; expected a PNG, JPEG or WebP picture")
            with pillow.open(path, formats=READ_FORMATS) as image:
                yield image
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such image file") from None
        except UnidentifiedImageError as exc:
            raise ValueError(f"{path}: not an image that can be read; expected PNG, JPEG or WebP") from exc
        except pillow.DecompressionBombError as exc:
            raise ValueError(f"{path}: too large to open safely ({exc})") from exc
        except Exception as exc:  # decoders meet damage in many ways, such as struct.error and ZeroDivisionError
            if isinstance(exc, ValueError) and str(exc).startswith(f"{path}: "):  # ours, from the caller's block
                raise
            raise ValueError(f"{path}: cannot be read as an image ({exc or type(exc).__name__})") from exc


def read_metadata(path: str | os.PathLike[str]) -> dict:
    """The record that `Image.save` stored in a PNG, JPEG or WebP file.

    Raises:
        ValueError: not an image, or no sega_jax metadata in it (many web sites and editors strip it).
        FileNotFoundError: no such file.
    """
    with open_image(path) as image:
        text = image.info.get(METADATA_KEY)
        if not isinstance(text, str):
            comment = image.getexif().get_ifd(_EXIF_FOLDER).get(_USER_COMMENT, b"")
            comment = comment if isinstance(comment, bytes) else b""
            text = comment.removeprefix(_ASCII).decode("ascii", "replace") if comment.startswith(_ASCII) else None
            found = decode_metadata(text, str(path)).get(METADATA_KEY) if text else None
            if not isinstance(found, dict):
                raise ValueError(f"{path}: no {METADATA_KEY} metadata; not made by sega-jax, or stripped on the way")
            return found
    return decode_metadata(text, str(path))


def load_image(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> np.ndarray:
    """An image file as model input: float32 [H, W, 3] in [-1, 1].

    EXIF orientation is applied; grey and palette images become RGB; colour profiles are ignored (sRGB assumed).

    Args:
        path: an 8-bit PNG, JPEG or WebP picture.
        size: (width, height) to resize to with a Lanczos filter, whatever its shape; default as it is
            (`sega_jax.media.photos.photo` keeps shapes).

    Raises:
        ValueError: not such an image, transparent pixels, more than 8 bits per channel, more than `MOST_PIXELS`, or a
            size below one pixel.
        FileNotFoundError: no such file.
    """
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size is (width, height) in pixels, got {size}")
    with decoded(path) as image:
        if size is not None and image.size != tuple(size):
            image = image.resize(tuple(size), pillow.Resampling.LANCZOS)
        pixels = np.asarray(image).astype(np.float32)
    pixels /= np.float32(127.5)
    pixels -= np.float32(1.0)
    return pixels


def load_mask(path: str | os.PathLike[str]) -> np.ndarray:
    """A picture as a mask, bool [H, W]: its grey is at least 128.

    Raises:
        ValueError: not a PNG, JPEG or WebP picture, or more than `MOST_PIXELS`.
        FileNotFoundError: no such file.
    """
    with open_image(path) as image:
        _check_pixels(path, image)
        return np.asarray(image.convert("L")) >= 128


@contextlib.contextmanager
def decoded(path: str | os.PathLike[str]) -> Iterator[pillow.Image]:
    """A picture to start from, as 8-bit RGB and upright; raises as `load_image`."""
    with open_image(path) as image:
        _check_pixels(path, image)
        yield flat_rgb(image, str(path))


def flat_rgb(image: pillow.Image, where: str) -> pillow.Image:
    """An opened picture as 8-bit RGB and upright; grey and palettes made colours.

    Raises:
        ValueError: transparent pixels, or more than 8 bits per channel; ``where`` names the picture.
    """
    if image.mode not in _EIGHT_BIT:
        raise ValueError(f"{where}: Pillow mode {image.mode!r}; expected 8 bits per channel, convert to RGB first")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            raise ValueError(f"{where}: has transparent pixels; put it on a background (flatten it) first")
    return image if image.mode == "RGB" else image.convert("RGB")


def _check_pixels(path: str | os.PathLike[str], image: pillow.Image) -> None:
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(
            f"{path}: {image.width}x{image.height} pixels; at most {MOST_PIXELS // 10**6} million are read, so scale "
            "it down first"
        )
