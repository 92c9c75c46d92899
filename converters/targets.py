"""What a conversion may replace: its destination only, and only what a conversion or a download can bring back."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from converters.errors import CheckpointError
from converters.files import remove_leftovers
from converters.reading.sources import is_orbax
from converters.report import REPORT_FILE, report_path, stored_report

# Files that the folders of diffusers, transformers and this package consist of.
_KNOWN = re.compile(
    r"model_index\.json|(.*_)?config\.json|.*\.index\.json|vocab\.json|merges\.txt|tokenizer\.json|added_tokens\.json"
    r"|special_tokens_map\.json|spiece\.model|.*\.jinja|README\.md|LICENSE(\..*)?|\.gitattributes|.*\.safetensors|"
    + re.escape(REPORT_FILE)
)
_MANIFESTS = ("model_index.json", "config.json", REPORT_FILE)  # one of these makes a folder a checkpoint
# What Orbax writes: its descriptions, and a folder of chunks per array.
_ORBAX = re.compile(r"_METADATA|_CHECKPOINT_METADATA|_sharding|\.zarray|\d+(\.\d+)*|manifest\.ocdbt|zarr\.json")
_SHOWN = 3


def check_destination(destination: Path, inputs: Iterable[str | os.PathLike[str]], overwrite: bool) -> None:
    """Refuses a destination at which something would be lost.

    Args:
        destination: file or folder to be written; its report may lie beside it.
        inputs: what the conversion reads, files or folders.
        overwrite: whether a checkpoint that lies there may be replaced.

    Raises:
        CheckpointError: something lies there that may not be replaced: anything without ``overwrite``; with it what
            is no checkpoint, a folder with files in it that no checkpoint has, or one that holds an input.
    """
    if destination.parent.is_dir():
        with contextlib.suppress(OSError):
            remove_leftovers(destination)  # may bring something back
    place = Path(os.path.realpath(destination))
    for given in inputs:
        source = Path(os.path.realpath(given))
        if place == source or place in source.parents:
            raise CheckpointError(
                f"{destination}: {'is' if place == source else 'holds'} the input {given}, which would be lost; choose "
                "another destination"
            )
    beside = destination.with_name(f"{destination.name}.{REPORT_FILE}")
    for path in (destination, beside):
        if os.path.lexists(path) and not overwrite:
            raise CheckpointError(
                f"{path}: already exists; choose another destination, or pass --overwrite to replace it"
            )
    if destination.is_dir():
        _check_folder(destination)
    elif os.path.lexists(destination) and destination.suffix != ".safetensors":
        raise CheckpointError(f"{destination}: is no checkpoint, so it is not replaced; remove it yourself")
    if os.path.lexists(beside) and not _is_report(beside):
        raise CheckpointError(f"{beside}: is no report of a conversion, so it is not replaced; move it away")


def _is_report(path: Path) -> bool:
    return path.is_file() and bool(stored_report(path.with_name(path.name.removesuffix(f".{REPORT_FILE}"))))


def foreign_files(folder: Path) -> list[str]:
    """Files below a folder that neither a checkpoint consists of nor its report lists as copied, as relative names."""
    copied = stored_report(folder).get("copied", []) if report_path(folder).is_file() else []
    known = set(copied) if isinstance(copied, list) and all(isinstance(name, str) for name in copied) else set()
    found = []
    for root, folders, files in os.walk(folder):
        place = Path(root)
        orbax = is_orbax(place) or is_orbax(place.parent)
        links = [name for name in folders if (place / name).is_symlink()]
        for name in (*files, *links):
            relative = str((place / name).relative_to(folder))
            ours = _KNOWN.fullmatch(name) or (orbax and _ORBAX.fullmatch(name)) or relative in known
            if not ours or name in links:
                found.append(relative)
    return sorted(found)


def _check_folder(folder: Path) -> None:
    entries = {entry.name for entry in folder.iterdir()}
    if not entries:
        return
    single = entries and all(name.endswith((".safetensors", ".json")) for name in entries)
    if not single and not is_orbax(folder) and not entries.intersection(_MANIFESTS):
        raise CheckpointError(f"{folder}: is no checkpoint, so it is not replaced; remove it yourself")
    foreign = foreign_files(folder)
    if foreign:
        more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
        raise CheckpointError(
            f"{folder}: holds files that are of no checkpoint ({', '.join(foreign[:_SHOWN])}{more}), so it is not "
            "replaced; move them away, or choose another destination"
        )
