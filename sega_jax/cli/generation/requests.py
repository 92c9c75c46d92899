"""Requests: what one line of a prompts file, or the command line itself, asks for."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.files import expanded
from sega_jax.cli.generation.prompts import read_prompts
from sega_jax.cli.generation.records import check_record, check_text
from sega_jax.cli.outputs import check_pattern
from sega_jax.media.photos import check_fit
from sega_jax.sampling.keys import chosen_seed

# The types a value may have in a JSON row; the order of the fields is the order of the documentation.
ROW_SCHEMA: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "negative_prompt": (str,),
    "size": (int, str),
    "width": (int,),
    "height": (int,),
    "positional": (str,),
    "layout": (str,),
    "regions": (str,),
    "steps": (int,),
    "guidance": (int, float),
    "true_guidance": (int, float),
    "seed": (int, str),
    "num_images": (int,),
    "mu": (str, int, float),
    "init_image": (str,),
    "fit": (str,),
    "mask": (str,),
    "strength": (int, float),
    "ladder": (str,),
    "init_latents": (str,),
    "embeddings": (str,),
    "vae": (str,),
    "out": (str,),
    "save_latents": (str,),
}


@dataclass(frozen=True)
class FileRow:
    """A row of a file of arrays.

    Attributes:
        file: path as it was given; None for what was an array in Python.
        row: which row; None: all of them, one per picture.
        sha256: what the file's content must be, if that is known.
    """

    file: str | None
    row: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Request:
    """Pictures of one prompt, checked as far as that is possible without knowing the model.

    Attributes:
        where: prefix of complaints: file and line, or nothing.
        row: number of the row, from 0.
        size: (width, height) in pixels, or None for the default; a side that is None follows from the other's.
        indices: image indices to make.
        fit: how ``init_image`` is brought to size, or a size of no whole tokens made.
        strength: of an image-to-image run, None for its default.
        own: names of ``out`` and ``save_latents`` that a row of a file gives for itself, not for all rows.
        Other fields as in `Pipeline.generate`, None where the recipe decides.
    """

    where: str
    row: int
    prompt: str
    indices: tuple[int, ...]
    negative_prompt: str | None = None
    size: tuple[int | None, int | None] | None = None
    positional: str = "auto"
    layout: str = "dense"
    regions: str | None = None
    steps: int | None = None
    guidance: float | None = None
    true_guidance: float | None = None
    seed: int = 0
    mu: Any = None
    fit: str | None = None
    strength: float | None = None
    ladder: str | None = None
    init_image: FileRow | None = None
    mask: FileRow | None = None
    init_latents: FileRow | None = None
    embeddings: FileRow | None = None
    vae: str = "auto"
    out: str = "out.png"
    save_latents: str | None = None
    own: frozenset[str] = frozenset()


def parse_size(value: str | int) -> tuple[int, int]:
    """(width, height) of ``2048`` or ``2048x1024``.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"\s*(\d{1,9})(?:\s*[x×]\s*(\d{1,9}))?\s*", str(value)[:99], re.ASCII)
    if not match or not int(match[1]) or (match[2] is not None and not int(match[2])):
        raise ValueError(f"size={value!r}: expected a side in pixels such as 2048, or WIDTHxHEIGHT such as 2048x1024")
    return int(match[1]), int(match[2] or match[1])


def parse_mu(value: str | float) -> str | float:
    """``native``, ``clamp`` or a finite number.

    Raises:
        ValueError: for anything else.
    """
    if value in ("native", "clamp"):
        return value
    try:
        number = float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"mu={value!r}: expected native, clamp or a finite number")
    return number


def read_rows(path: Path) -> list[tuple[int, dict]]:
    """Line numbers (from 1) and rows of a file of prompts (`prompts.read_prompts`), their keys and types checked.

    Raises:
        ValueError: for a line that cannot be read, an unknown key, or a value of the wrong type.
        OSError: if it cannot be read.
    """
    rows = []
    for number, row in read_prompts(path):
        where = f"{path} line {number}"
        unknown = sorted(set(row) - set(ROW_SCHEMA))
        if unknown:
            raise ValueError(f"{where}: unknown keys {', '.join(unknown)}; known: {', '.join(ROW_SCHEMA)}")
        for name, value in row.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, ROW_SCHEMA[name])):
                expected = " or ".join("number" if t is float else t.__name__ for t in ROW_SCHEMA[name])
                raise ValueError(f"{where}: {name}={value!r}: expected {expected}")
        rows.append((number, {name: value for name, value in row.items() if value is not None}))
    return rows


def build(
    values: Mapping[str, Any],
    *,
    where: str = "",
    row: int = 0,
    indices: tuple[int, ...] | None = None,
    own: frozenset[str] = frozenset(),
) -> Request:
    """A request from fields of `ROW_SCHEMA`, checked.

    Args:
        values: field -> value; unset ones are left out.
        where: prefix of complaints.
        row: number of the row.
        indices: image indices instead of ``range(num_images)``.
        own: as in `Request`.

    Raises:
        ValueError: for the first field that no model could serve.
    """
    try:
        return _build(dict(values), where, row, indices, own)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def _build(
    values: dict[str, Any], where: str, row: int, indices: tuple[int, ...] | None, own: frozenset[str]
) -> Request:
    from sega_jax.pipeline.planning import MOST_IMAGES

    count = values.pop("num_images", 1)
    if count < 1:
        raise ValueError(f"num_images={count}: expected a positive whole number")
    if count > MOST_IMAGES:
        raise ValueError(f"num_images={count}: expected at most {MOST_IMAGES}; vary the seed for more")
    sides = values.pop("width", None), values.pop("height", None)
    if "size" in values:
        if sides != (None, None):
            raise ValueError(f"size={values['size']!r} with a width or height; give one of the two")
        values["size"] = parse_size(values["size"])
    elif sides != (None, None):
        values["size"] = sides
    if "mu" in values:
        values["mu"] = parse_mu(values["mu"])
    if "seed" in values:
        values["seed"] = chosen_seed(values["seed"])
    for name in ("init_image", "mask", "init_latents", "embeddings"):
        if isinstance(values.get(name), str):
            values[name] = FileRow(values[name])
    if "prompt" not in values:
        if "embeddings" not in values:
            raise ValueError("no prompt; give one, or --embeddings")
        values["prompt"] = ""
    for name, value in values.items():
        if isinstance(value, str) and name not in ("out", "save_latents"):  # of names, there is more to say
            check_text(value, name)
    request = Request(where, row, indices=tuple(range(count)) if indices is None else indices, own=own, **values)
    check(request)
    return request


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with those of ``over`` in their place; a size replaces sides, and sides a size."""
    sides = {"width", "height"}
    dropped = sides if "size" in over else {"size"} if sides & over.keys() else set()
    return {name: value for name, value in base.items() if name not in dropped} | dict(over)


def check(request: Request) -> None:
    """Whatever can be known to be wrong before a model is looked at.

    Raises:
        ValueError, TypeError: for the first such field.
    """
    from sega_jax import positional as pe
    from sega_jax.sampling import rungs
    from sega_jax.sampling.regions import parse_regions
    from sega_jax.sampling.registry import get_layout
    from sega_jax.sampling.schedule import check_steps

    if request.steps is not None:
        check_steps(request.steps)
    check_fit(request.fit)
    for name in ("guidance", "true_guidance"):
        value = getattr(request, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}={value}: expected a finite number of at least 0")
    if request.strength is not None:
        if request.init_image is None:
            raise ValueError(f"strength={request.strength}: only with an init_image")
        if not 0 < request.strength <= 1:
            raise ValueError(f"strength={request.strength}: expected a number above 0 and at most 1")
    if request.mask is not None and request.init_image is None:
        raise ValueError(f"mask={request.mask.file!r}: only with an init_image")
    if request.init_image is not None and request.init_latents is not None:
        raise ValueError("init_image and init_latents are both given; a run starts from one of them")
    if request.vae not in ("auto", "plain", "exact", "tiled"):
        raise ValueError(f"vae={request.vae!r}: expected auto, plain, exact or tiled")
    if request.positional != "auto":
        pe.get(request.positional)
    get_layout(request.layout)
    if request.regions is not None:
        parse_regions(request.regions)
    if request.ladder is not None:
        rungs.parse(request.ladder)
    check_pattern(request.out, (".png", ".jpg", ".jpeg", ".webp"), "out")
    if request.save_latents is not None:
        check_pattern(request.save_latents, (".safetensors",), "save_latents")
    for name in ("init_image", "mask", "init_latents", "embeddings"):
        file = getattr(request, name)
        if file is not None and not expanded(file.file).is_file():
            raise ValueError(f"{name}={file.file!r}: no such file")


# What a picture's metadata must say for it to be repeated.
NEEDED = (
    "prompt", "negative_prompt", "width", "height", "steps", "guidance", "true_guidance", "seed", "image_index",
    "positional", "layout", "mu", "strength", "dtype", "backend", "model", "revision", "transformer", "init_image",
    "init_latents", "embeddings", "vae", "batch_size",
)  # fmt: skip
# Fields that two equal requests may differ in: they change a picture by rounding at most.
INCIDENTAL = ("sega_jax", "jax", "device", "mesh", "batch_size")


IN_MEMORY = "mask:array@"  # how `sampling.regions.Drawn` names what came from no file


def from_record(record: Mapping[str, Any], where: str, replaced: Collection[str] = ()) -> dict[str, Any]:
    """Fields of a request that repeats the picture with this record.

    Args:
        record: of the picture.
        where: names its file.
        replaced: fields that are given anew.

    Raises:
        ValueError: the record lacks something, or the picture started from what was in memory only.
    """
    missing = [name for name in NEEDED if name not in record]
    if missing:
        raise ValueError(f"{where}: its record lacks {', '.join(missing)}, so the picture cannot be repeated exactly")
    check_record(record, where)
    # Where pictures go is for the person at the keyboard to say.
    used = [name for name in ROW_SCHEMA if name not in ("size", "width", "height", "num_images", "out", "save_latents")]
    values = {name: record[name] for name in used if name in record}
    values["size"] = f"{record['width']}x{record['height']}"
    for name in ("init_image", "mask", "init_latents", "embeddings"):
        if isinstance(record.get(name), Mapping):
            values[name] = FileRow(**record[name])
            if values[name].file is None and name not in replaced:
                raise ValueError(
                    f"{where} was made in Python with {name} in memory, which no file holds; save it and give "
                    f"--{name.replace('_', '-')}"
                )
    if IN_MEMORY in str(record.get("regions")) and "regions" not in replaced:
        raise ValueError(
            f"{where} was made in Python with regions drawn as an array, which no file holds; save them as a picture "
            "and give --regions mask:FILE"
        )
    if record["init_image"] is not None:
        values.setdefault("fit", "stretch")  # what was done before records said so
    if set(replaced) & {"init_image", "init_latents", "size", "width", "height", "ladder"}:  # it was meant for others
        values.pop("fit", None)
    return {name: value for name, value in values.items() if value is not None}
