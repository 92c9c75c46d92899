"""Files are data: a picture's record and a row of prompts name no code, no place to write, and no host to ask.

What they may name is looked at before anything else does: types of all fields, positional methods and regions as
presets and expressions.  ``module:name`` is imported only where a person typed it, and only then the current folder
is a place to find it.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_NUMBER, _FILE = (int, float), (dict,)
# Fields of a record that are used again, with their types; None is allowed for all of them.
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("prompt", "negative_prompt", "positional", "layout", "regions", "ladder", "fit"), (str,)),
    **dict.fromkeys(("width", "height", "steps", "seed", "image_index", "batch_size"), (int,)),
    **dict.fromkeys(("guidance", "true_guidance", "strength"), _NUMBER),
    **dict.fromkeys(("dtype", "backend", "model", "revision", "transformer", "weights", "vae", "output"), (str,)),
    **dict.fromkeys(("init_image", "mask", "init_latents", "embeddings"), _FILE),
    "mu": (str, *_NUMBER),
    "loras": (list,),
}
_FILE_TYPES: dict[str, tuple[type, ...]] = {"file": (str,), "row": (int,), "sha256": (str,), "weight": _NUMBER}
_CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "weights": ("full", "int8"),
    "vae": ("auto", "plain", "exact", "tiled"),
    "fit": ("crop", "pad", "stretch"),
}
_REVISION = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)*", re.ASCII)  # of git, and of a hub cache's folders
_LONGEST = 1_000_000  # characters of one field
NAMING_CODE = ("positional", "layout", "regions", "ladder")


def _wrong(value: Any, types: tuple[type, ...]) -> bool:
    return value is not None and (isinstance(value, bool) or not isinstance(value, types))


def check_record(record: Mapping[str, Any], where: str) -> None:
    """Refuses a record with fields that no run of this package writes.

    Args:
        record: as it was read.
        where: the file's name, for complaints.

    Raises:
        ValueError: a field of another type, an unknown choice, or a file entry with other fields.
    """
    for name, types in _TYPES.items():
        value = record.get(name)
        if _wrong(value, types):
            expected = " or ".join("number" if t is float else t.__name__ for t in types)
            raise ValueError(f"{where}: {name}={str(value)[:80]!r} in its record; expected {expected}")
        if isinstance(value, str):
            check_text(value, f"{where}: {name}")
        if value is not None and name in _CHOICES and value not in _CHOICES[name]:
            raise ValueError(f"{where}: {name}={value!r} in its record; expected {', '.join(_CHOICES[name])}")
    for name, least in (("width", 1), ("height", 1), ("steps", 1), ("batch_size", 1), ("image_index", 0), ("seed", 0)):
        if record.get(name) is not None and record[name] < least:
            raise ValueError(f"{where}: {name}={record[name]} in its record; expected at least {least}")
    for name in ("init_image", "mask", "init_latents", "embeddings", "loras"):
        value = record.get(name)
        for entry in value if isinstance(value, list) else [value] if value is not None else []:
            _check_file(entry, f"{where}: {name}", name == "loras")
    if record.get("revision") is not None and not _REVISION.fullmatch(record["revision"]):
        raise ValueError(f"{where}: revision={record['revision']!r} in its record is no branch, tag or commit")


def _check_file(entry: Any, where: str, lora: bool) -> None:
    in_memory = isinstance(entry, Mapping) and not lora and entry.get("file", "") is None  # an array in Python
    if not isinstance(entry, Mapping) or not (in_memory or isinstance(entry.get("file"), str)):
        raise ValueError(f"{where} in its record; expected an object with a file")
    fields = ("file", "sha256", "weight") if lora else ("file", "row", "sha256")
    unknown = sorted(set(entry) - set(fields))
    wrong = [name for name in fields if _wrong(entry.get(name), _FILE_TYPES[name]) or (lora and name not in entry)]
    if unknown or wrong:
        raise ValueError(f"{where} in its record: {', '.join(map(repr, unknown or wrong))}; expected {fields}")
    check_text(entry["file"] or "", where)
    row = entry.get("row")
    if row is not None and row < 0:
        raise ValueError(f"{where}: row={row} in its record; expected a whole number from 0")


def check_text(text: str, where: str) -> None:
    """Refuses text that can be neither stored nor tokenised.

    Raises:
        ValueError: lone surrogates, or more than a million characters.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"{where} has {len(text)} characters; expected at most {_LONGEST}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds {text[error.start : error.start + 1]!r}, half of a character (a lone surrogate); write the "
            "character itself"
        ) from error


# -- names of code -------------------------------------------------------------------------------------------------


def refuse_code(values: Mapping[str, Any], where: str) -> None:
    """Refuses names that would have to be imported, in fields that come out of a file.

    Args:
        values: field -> text, of a row or a record; others than `NAMING_CODE` do not matter.
        where: the file, and the line.

    Raises:
        ValueError: ``module:name`` or an entry point, or text that cannot be read at all.
    """
    try:
        _each_name(values, imports=False)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error


def import_typed(values: Mapping[str, Any]) -> None:
    """Imports what a person named; for just that long modules of the current folder are found too.

    Raises:
        ValueError, TypeError: a name that cannot be imported, or text that cannot be read.
    """
    with _importable(Path.cwd()):
        _each_name(values, imports=True)


def _each_name(values: Mapping[str, Any], *, imports: bool) -> None:
    from sega_jax import positional as pe
    from sega_jax.sampling import rungs
    from sega_jax.sampling.regions import parse_regions

    texts = [values.get("positional")]
    if isinstance(values.get("ladder"), str):
        texts += [rung.positional for rung in rungs.parse(values["ladder"])]
    for text in texts:
        if isinstance(text, str) and text != "auto":
            pe.get(text, imports=imports)
    if isinstance(values.get("regions"), str):
        regions = parse_regions(values["regions"], imports=imports)
        for auto in regions.automatic or ():
            auto.function()


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules in a folder can be imported, after all others."""
    place = str(folder)
    added = place not in sys.path and "" not in sys.path
    if added:
        sys.path.append(place)
    try:
        yield
    finally:
        if added:
            with contextlib.suppress(ValueError):
                sys.path.remove(place)
