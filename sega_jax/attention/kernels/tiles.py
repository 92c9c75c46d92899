"""Tile sizes measured on a device: ``tiles/<device>.json`` beside this module, or written by ``sega-jax bench --tune``.

A kernel asks for its tile when a call is traced and falls back on its own stated heuristic; what the user measured on
the machine goes before what came with the package.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import jax

from sega_jax.attention.kernels.contract import Request, Tile
from sega_jax.runtime.provenance import processor, threads

PACKAGED = Path(__file__).parent / "tiles"
NEAR = 2.0  # an entry serves lengths up to this factor away from its own


@dataclass(frozen=True)
class Entry:
    """The fastest tile found for dense requests of one kind, beside the heuristic's seconds in the same run."""

    kernel: str
    dtype: str
    depth: int
    keys: int
    tile: Tile
    seconds: float
    heuristic_tile: Tile
    heuristic_seconds: float


@lru_cache(maxsize=1)
def device_name() -> str:
    """The default device as a file name; a CPU by its model and the processors given to us."""
    device = jax.devices()[0]
    name = f"{processor()} {threads()} threads" if device.platform == "cpu" else device.device_kind
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def user_file() -> Path:
    """Where measurements of this machine are kept."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "sega_jax" / "tiles" / f"{device_name()}.json"


def read(path: Path) -> tuple[Entry, ...]:
    """The entries of a file; none where there is no such file.

    Raises:
        ValueError: it is not a file of tiles.
    """
    try:
        rows = json.loads(path.read_text())["tiles"]
        return tuple(
            Entry(**{**row, "tile": tuple(row["tile"]), "heuristic_tile": tuple(row["heuristic_tile"])}) for row in rows
        )
    except FileNotFoundError:
        return ()
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a file of measured tiles ({error}); remove it or measure again") from error


def write(entries: list[Entry], path: Path, provenance: dict) -> None:
    """Entries with where they come from; those of other kinds that the file holds already are kept."""
    fresh = {(e.kernel, e.dtype, e.depth, e.keys): e for e in (*read(path), *entries)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps({**provenance, "tiles": [asdict(e) for e in fresh.values()]}, indent=1) + "\n")
    temporary.replace(path)
    known.cache_clear()


@lru_cache(maxsize=1)
def known() -> tuple[Entry, ...]:
    """Entries for the default device, the user's first."""
    return (*read(user_file()), *read(PACKAGED / user_file().name))


def tuned(kernel: str, request: Request) -> Tile | None:
    """The measured tile of a kernel for a dense request of this kind; None where nothing near was measured."""
    if request.block_map is not None or request.causal:
        return None
    keys, best = request.k.shape[1], None
    for entry in known():
        if (entry.kernel, entry.dtype, entry.depth) != (kernel, request.q.dtype.name, request.q.shape[-1]):
            continue
        distance = max(entry.keys / keys, keys / entry.keys)
        if distance <= NEAR and (best is None or distance < best[0]):
            best = distance, entry.tile
    return None if best is None else best[1]
