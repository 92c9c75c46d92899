"""LoRA files as a pipeline is asked for them: found, weighted, and known by their content.

The dialects in use, their alphas and fused projections are the business of `converters.lora`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converters.files import expanded
from converters.lora import Lora, lora_files, parse_lora, read_lora

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA with the weight it is used with.

    Attributes:
        file: path as it was given: a safetensors file of any dialect, or a folder (PEFT's, or Orbax).
        weight: factor on its change; 0 leaves every bit as it is.
        sha256: digest of the content.
    """

    file: str
    weight: float
    sha256: str

    def record(self) -> dict:
        """As metadata stores it."""
        return {"file": self.file, "weight": self.weight, "sha256": self.sha256}

    def read(self) -> Lora:
        """The LoRA.

        Raises:
            CheckpointError: as `converters.lora.read_lora`.
        """
        return read_lora(expanded(self.file))


def lora_specs(loras: Sequence[PathLike | tuple[PathLike, int | float] | Mapping | LoraSpec]) -> tuple[LoraSpec, ...]:
    """LoRAs as asked for, each found and digested.

    Args:
        loras: paths, ``"path:weight"``, (path, weight), `LoraSpec`, or its records, whose digest must still be right.

    Raises:
        ValueError: a file that is missing or has changed, or a weight that is not a finite number.
    """
    if isinstance(loras, str | os.PathLike):
        raise ValueError(f"loras={os.fspath(loras)!r}: expected a list of paths or of (path, weight)")
    return tuple(_spec(entry) for entry in loras)


def _spec(entry: PathLike | tuple[PathLike, int | float] | Mapping | LoraSpec) -> LoraSpec:
    known = None
    if isinstance(entry, LoraSpec):
        return entry
    if isinstance(entry, Mapping):
        file, weight, known = entry["file"], entry["weight"], entry["sha256"]
    elif isinstance(entry, str | os.PathLike):
        path, weight = parse_lora(os.fspath(entry))
        file = str(path)
    else:
        file, weight = os.fspath(entry[0]), entry[1]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not np.isfinite(weight):
        raise ValueError(f"LoRA {file!r}: weight {weight!r}; expected a finite number")
    path = expanded(file)
    if not entry or not (path.is_file() or path.is_dir()):
        raise ValueError(f"LoRA {file!r}: no such file or folder")
    digest = _lora_digest(path)
    if known not in (None, digest):
        raise ValueError(f"LoRA {file!r} has changed since the picture was made; give --lora")
    return LoraSpec(file, float(weight), digest)


def _lora_digest(path: Path) -> str:
    """`content_digest` of what makes up a LoRA: settings that lie beside a file decide its scale, so they count."""
    config = lora_files(path)[1] if path.is_file() else None
    if config is None:
        return content_digest(path)
    return hashlib.sha256(f"{content_digest(path)} {content_digest(config)}".encode()).hexdigest()


def content_digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of the files of a folder."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for name in files:
        digest.update(f"{name} {content_digest(path / name)}\n".encode())
    return digest.hexdigest()
