"""Durable runs: a sampler's state on disk every few steps, from which the run goes on bit for bit.

A run's folder holds its latest state, ``step-000012/{run.json, state/}``: the request it belongs to, and the leaves of
the state's pytree as an Orbax checkpoint.  A state appears whole or not at all, and its predecessor goes away only
after that.  Any `Sampler` can be saved, as its state is all that the next step needs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.errors import CheckpointError
from converters.files import flush, remove_leftovers, staged
from sega_jax.sampling.sampler import State

Request = Mapping[str, Any]
_STEP = re.compile(r"step-(\d{6})")


class Stopped(Exception):
    """The run was asked to end and its state is saved.

    Attributes:
        folder: where; None if nothing had been done yet that is worth keeping.
        step: steps that are done.
    """

    def __init__(self, folder: Path | None, step: int):
        super().__init__(f"stopped after step {step}" + (f", state saved in {folder}" if folder else ""))
        self.folder, self.step = folder, step


def never() -> bool:
    return False


@dataclass(frozen=True)
class Checkpoint:
    """Where and when a run's state is saved.

    Attributes:
        folder: of the run; made by the first save.
        every: steps between saves.
        resume: go on from a state that is there; otherwise one that is there is an error.
        stop: asked after every step; True saves and raises `Stopped`.
        request: what the run makes, JSON-like, where the caller knows better than `Pipeline.generate`.
    """

    folder: Path
    every: int
    resume: bool = False
    stop: Callable[[], bool] = never
    request: Request | None = None

    def __post_init__(self):
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ValueError(f"checkpoint every {self.every!r} steps: expected a positive whole number")

    def part(self, name: str) -> Checkpoint:
        """The same for one of several parts of a run."""
        return replace(self, folder=self.folder / name)

    def prepare(self) -> None:
        """Makes the folder and tries to write there, before any time is spent.

        Raises:
            CheckpointError: it cannot be written.
        """
        probe = self.folder / ".probe"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: states of this run cannot be saved here ({error.strerror}); choose another folder"
            ) from error

    def saved(self) -> list[int]:
        """Steps of the states on disk, ascending."""
        if not self.folder.is_dir():
            return []
        found = (_STEP.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def start(self, request: Request, state: State) -> tuple[int, State]:
        """Where to go on: steps done and state; 0 and ``state`` as given for a new run.

        Args:
            request: what the run makes, JSON-like; must be what a saved state was made for.
            state: of step 0, which lends its structure.

        Raises:
            CheckpointError: a state of another request, one that is unreadable, or any at all without ``resume``.
        """
        steps = self.saved()
        if not steps:
            self.prepare()
            return 0, state
        folder = self._folder(steps[-1])
        if not self.resume:
            raise CheckpointError(
                f"{self.folder}: holds the state of a run that was interrupted after step {steps[-1]}; go on with it "
                "by --resume (resume=True), or remove the folder"
            )
        try:
            made_for = dict(json.loads((folder / "run.json").read_text())["request"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder}: unreadable ({error}); remove it to start again") from error
        wanted = json.loads(json.dumps(request))
        different = [k for k in dict.fromkeys([*wanted, *made_for]) if wanted.get(k) != made_for.get(k)]
        if different:
            raise CheckpointError(
                f"{folder}: is of another run ({', '.join(different)} differ); remove it, or change --out"
            )
        return steps[-1], _read(folder, state)

    def after(self, step: int, total: int, request: Request, state: State) -> None:
        """To be called after every step; ``step`` steps of ``total`` are done.

        Raises:
            Stopped: if it was time to stop.
            CheckpointError: the state cannot be saved; the last one that could is left.
        """
        stopping = self.stop()
        if stopping or step % self.every == 0 or step == total:
            self._save(step, request, state)
        if stopping:
            raise Stopped(self.folder, step)

    def clear(self) -> None:
        """Removes the states; for when what the run made is safe."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _folder(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _save(self, step: int, request: Request, state: State) -> None:
        before = self.saved()
        final = self._folder(step)
        try:
            with staged(final, overwrite=True) as stage:
                folder = stage / final.name
                folder.mkdir()
                (folder / "run.json").write_text(json.dumps({"step": step, "request": dict(request)}))
                _write(folder / "state", state)
                flush(folder)
        except Exception as error:  # Orbax reports a full disk as whatever its storage layer raises
            kept = f"the state after step {before[-1]} is left" if before else "no earlier state is there"
            reason = _reason(error)
            raise CheckpointError(
                f"{self.folder}: the state after step {step} cannot be saved: {reason}; {kept}.  Free some space or "
                "write elsewhere, then go on with --resume"
            ) from error
        for old in before:
            if old != step:
                remove_leftovers(self._folder(old))
                shutil.rmtree(self._folder(old), ignore_errors=True)


def digest(arrays: Any) -> str | None:
    """SHA-256 of a pytree of arrays, for a request; None for none."""
    leaves = jax.tree.leaves(arrays)
    total = hashlib.sha256()
    for leaf in leaves:
        array = np.ascontiguousarray(leaf)
        total.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return total.hexdigest() if leaves else None


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "No space left" in text:
        return "the disk is full (No space left on device)"
    if "File too large" in text:
        return "a file grew over the limit of this system or account (File too large)"
    return text[:300] or type(error).__name__


# -- leaves --------------------------------------------------------------------------------------------------------


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


def _write(folder: Path, state: State) -> None:
    """``folder/outline.json`` and ``folder/arrays``."""
    leaves: dict[str, Any] = {}
    folder.mkdir()
    (folder / "outline.json").write_text(json.dumps(_outline(state, leaves)))
    arrays = {name: x if isinstance(x, jax.Array) else np.asarray(x) for name, x in leaves.items()}
    with _checkpointer() as checkpointer:
        checkpointer.save((folder / "arrays").absolute(), arrays)


def _read(folder: Path, like: State) -> State:
    import orbax.checkpoint as ocp

    try:
        outline = json.loads((folder / "state" / "outline.json").read_text())
        names: dict[str, Any] = {}
        _names(outline, names)
        wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        with _checkpointer() as checkpointer:
            arrays = checkpointer.restore((folder / "state" / "arrays").absolute(), restore_args=wanted)
        return _filled(outline, arrays, like)
    except Exception as error:
        raise CheckpointError(f"{folder}: the saved state cannot be read ({_reason(error)}); remove it") from error


def _names(outline: Any, names: dict[str, Any]) -> None:
    if isinstance(outline, dict):
        kind, content = next(iter(outline.items()))
        if kind in ("key", "device", "host"):
            names[content] = None
        else:
            for value in content.values() if kind == "dict" else content:
                _names(value, names)


# -- signals -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """Within the block, SIGTERM only sets what the yielded function answers; where the main thread runs it."""
    asked = threading.Event()
    try:
        previous = signal.signal(signal.SIGTERM, lambda _number, _frame: asked.set())
    except ValueError:  # not the main thread
        yield asked.is_set
        return
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, previous)
