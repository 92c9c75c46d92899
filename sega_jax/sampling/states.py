"""One saved state on disk: containers as JSON, leaves as arrays, with a digest; written, read back, and removed.

A file is data: a state is refused where a byte of it has changed, where its arrays claim more memory than files of
their size hold, and where its structure is not one that was written here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.errors import CheckpointError
from converters.reading.formats import read_json
from converters.reading.sources import OrbaxSource
from sega_jax.sampling.sampler import State

RUN = "run.json"
_STATE, _OUTLINE, _ARRAYS = "state", "outline.json", "arrays"
# What Orbax writes beside the arrays themselves.
_ORBAX = re.compile(r"leaf\d{4}|array_metadatas|_sharding|_METADATA|_CHECKPOINT_METADATA|commit_success\.txt")
_DEEPEST = 100  # nested containers


def reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "No space left" in text:
        return "the disk is full (No space left on device)"
    if "File too large" in text:
        return "a file grew over the limit of this system or account (File too large)"
    return text[:300] or type(error).__name__


# A state is saved as data: its containers as JSON, its leaves as arrays.


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _name(number: int) -> str:
    return f"leaf{number:04d}"


def _outline(state: Any, leaves: dict[str, Any]) -> Any:
    """The containers of a state as JSON; its leaves go into ``leaves`` by name."""
    if state is None:
        return None
    if isinstance(state, dict):
        return {"dict": {key: _outline(value, leaves) for key, value in state.items()}}
    if type(state) in (list, tuple):
        return {type(state).__name__: [_outline(value, leaves) for value in state]}
    if jax.tree_util.all_leaves([state]):
        name = _name(len(leaves))
        leaves[name] = jax.random.key_data(state) if _is_key(state) else state
        kind = "key" if _is_key(state) else "device" if isinstance(state, jax.Array) else "host"
        return {kind: name} | ({"impl": str(jax.random.key_impl(state))} if kind == "key" else {})
    return {"node": [_outline(leaf, leaves) for leaf in jax.tree.leaves(state)]}


def _filled(outline: Any, arrays: Mapping[str, np.ndarray], like: Any) -> Any:
    """The state of an outline; nodes that are neither dict, list nor tuple are taken from ``like``."""
    if outline is None:
        return None
    kind, content = next(iter(outline.items()))
    if kind == "dict":
        below = like if isinstance(like, dict) else {}
        return {key: _filled(value, arrays, below.get(key)) for key, value in content.items()}
    if kind in ("list", "tuple"):
        below = like if isinstance(like, (list, tuple)) and len(like) == len(content) else [None] * len(content)
        made = [_filled(value, arrays, one) for value, one in zip(content, below, strict=True)]
        return tuple(made) if kind == "tuple" else made
    if kind == "node":
        return jax.tree.unflatten(jax.tree.structure(like), [_filled(value, arrays, None) for value in content])
    if kind == "key":
        return jax.random.wrap_key_data(jnp.asarray(arrays[content]), impl=outline["impl"])
    return jnp.asarray(arrays[content]) if kind == "device" else np.asarray(arrays[content])[()]


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    """Orbax, one file per array, without its remarks about that."""
    import orbax.checkpoint as ocp

    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=False)) as checkpointer:
            yield checkpointer
    finally:
        log.setLevel(level)


# -- files ---------------------------------------------------------------------------------------------------------


def _digest(folder: Path) -> str:
    """SHA-256 of all files below a folder and of their names."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return total.hexdigest()


def write(folder: Path, step: int, request: Mapping[str, Any], state: State) -> None:
    """A state after a step, and what it was made for, into an empty folder."""
    inner, leaves = folder / _STATE, {}
    inner.mkdir()
    (inner / _OUTLINE).write_text(json.dumps(_outline(state, leaves)))
    arrays = {name: x if isinstance(x, jax.Array) else np.asarray(x) for name, x in leaves.items()}
    with _checkpointer() as checkpointer:
        checkpointer.save((inner / _ARRAYS).absolute(), arrays)
    (folder / RUN).write_text(json.dumps({"step": step, "request": dict(request), "sha256": _digest(inner)}))


def is_state(folder: Path) -> bool:
    """Whether a folder is one that `write` made."""
    return (folder / RUN).is_file() and (folder / _STATE).is_dir() and not folder.is_symlink()


def read_request(folder: Path) -> dict[str, Any]:
    """What a state was made for.

    Raises:
        CheckpointError: the folder holds no state that can be read.
    """
    try:
        request = read_json(folder / RUN).get("request")
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: unreadable ({error}); remove it to start again") from error
    if not isinstance(request, dict):
        raise CheckpointError(f"{folder}: unreadable ({RUN} names no request); remove it to start again")
    return request


def read(folder: Path, step: int, like: State) -> State:
    """The state of a folder; ``like`` lends the structure of nodes that are neither dict, list nor tuple.

    Raises:
        CheckpointError: it is not, byte for byte, what was written after that step.
    """
    try:
        run = read_json(folder / RUN)
        if run.get("step") != step or run.get("sha256") != _digest(folder / _STATE):
            raise CheckpointError("it is not what was written: damaged, or changed since")
        outline = read_json(folder / _STATE / _OUTLINE)
        names: dict[str, None] = {}
        _names(outline, names, 0)
        source = OrbaxSource(folder / _STATE / _ARRAYS)
        arrays = {name: np.array(source.view(name)) for name in names}
        return _filled(outline, arrays, like)
    except Exception as error:
        raise CheckpointError(f"{folder}: the saved state cannot be read ({reason(error)}); remove it") from error


def _names(outline: Any, names: dict[str, None], depth: int) -> None:
    if outline is None:
        return
    if not isinstance(outline, dict) or not outline or depth > _DEEPEST:
        raise CheckpointError("its outline is not that of a state")
    kind, content = next(iter(outline.items()))
    if kind in ("key", "device", "host"):
        names[content] = None
    elif kind in ("dict", "list", "tuple", "node"):
        for value in content.values() if kind == "dict" else content:
            _names(value, names, depth + 1)
    else:
        raise CheckpointError(f"its outline has a node of kind {kind!r}")


def remove(folder: Path) -> None:
    """Removes what `write` wrote into a folder, and the folder unless something else is in it."""
    if not is_state(folder):
        return
    arrays = folder / _STATE / _ARRAYS
    if arrays.is_dir() and not arrays.is_symlink():
        for entry in arrays.iterdir():
            if _ORBAX.fullmatch(entry.name):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)
    for path in (folder / _STATE / _OUTLINE, folder / RUN):
        with contextlib.suppress(OSError):
            path.unlink()
    for path in (arrays, folder / _STATE, folder):
        with contextlib.suppress(OSError):  # somebody's files are in it
            os.rmdir(path)
