"""Names of output files, and what lies there already."""

from __future__ import annotations

import os
import re
import string
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from converters.files import expanded

FIELDS = ("seed", "index", "row", "width", "height", "prompt_slug")
STATE_SUFFIX = ".state"
TEMPORARY = "until_decoded"  # in the record of latents that go once their picture is there
OF_LATENTS = ("output", TEMPORARY)  # what latents say besides the record of their picture
LATENTS_SUFFIX = ".latents.safetensors"


def slug(prompt: str, longest: int = 48) -> str:
    """A prompt as part of a file name: lower-case ASCII letters and digits, words joined by ``-``."""
    plain = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode().lower()
    text = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    return text[:longest].rstrip("-") or "untitled"


# What may follow the colon of a field: how many digits or characters; a name has at most 255.
_FORMAT = re.compile(r"0?\d{0,3}d?|\d{0,3}(\.\d{1,3})?s?")


def _fields(pattern: str) -> list[str]:
    names = []
    for _, name, form, conversion in string.Formatter().parse(pattern):
        if name is not None:
            names.append(name)
            if conversion or not _FORMAT.fullmatch(form or ""):
                raise ValueError(f"{{{name}{'!' + conversion if conversion else ''}:{form}}}; try {{{name}:04d}}")
    return names


def check_pattern(pattern: str, suffixes: Sequence[str], option: str) -> None:
    """Complains about a file name pattern that cannot work.

    Raises:
        ValueError: unreadable braces, an unknown field or format, a suffix that is not among ``suffixes``.
    """
    try:
        unknown = [name for name in _fields(pattern) if name not in FIELDS]
        if not unknown:
            example = pattern.format(**dict.fromkeys(FIELDS[:5], 1), prompt_slug="x")
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{option}={pattern!r}: cannot be read as a pattern ({error})") from error
    if unknown:
        known = ", ".join(f"{{{name}}}" for name in FIELDS)
        raise ValueError(f"{option}={pattern!r}: unknown field {{{unknown[0]}}}; known: {known}")
    if Path(example).suffix.lower() not in suffixes:
        raise ValueError(f"{option}={pattern!r}: expected a name ending in {', '.join(suffixes)}")


def expand(pattern: str, number: int | None, values: dict[str, Any]) -> Path:
    """The file of one picture.

    Args:
        pattern: as in ``--out``.
        number: appended to the stem where the pattern has no field; None: nothing is appended.
        values: field -> value.
    """
    path = expanded(pattern.format(**values))
    if number is None or _fields(pattern):
        return path
    return path.with_name(f"{path.stem}-{number:03d}{path.suffix}")


def latents_beside(out: Path) -> Path:
    """Where the latents of a picture are kept until it is decoded."""
    return out.with_name(out.stem + LATENTS_SUFFIX)


def state_beside(out: Path) -> Path:
    """Where the state of an unfinished run is kept, under the name of its first picture."""
    return out.with_name(out.stem + STATE_SUFFIX)


def check_distinct(paths: Sequence[Path], option: str) -> None:
    """Complains if two pictures would have one file.

    Raises:
        ValueError: naming the file.
    """
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            raise ValueError(f"--{option} gives {path} to more than one picture; use {{row}} and {{index}} in it")
        seen.add(path)


def check_folders(paths: Collection[Path]) -> None:
    """Complains about a folder that neither is there nor can be made.

    Raises:
        ValueError: naming what is in the way.
    """
    for folder in dict.fromkeys(path.parent for path in paths):
        there = next(above for above in (folder, *folder.parents) if os.path.lexists(above))
        if not there.is_dir():
            raise ValueError(f"{folder}: no folder can be there, {there} is none")
        if there != folder and not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"{folder}: cannot be made, {there} is not writable")


def make_folders(paths: Collection[Path]) -> None:
    """Makes the folders of files that are to be written."""
    for folder in dict.fromkeys(path.parent for path in paths):
        folder.mkdir(parents=True, exist_ok=True)


def differences(expected: dict, found: dict, ignored: Collection[str]) -> list[str]:
    """Names of the fields in which two records differ."""
    return [
        name
        for name in dict.fromkeys([*expected, *found])
        if name not in ignored and (name not in expected or name not in found or expected[name] != found[name])
    ]
