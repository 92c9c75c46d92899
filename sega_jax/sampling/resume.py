"""Durable runs: a sampler's state on disk every few steps, from which the run goes on bit for bit.

A run's folder holds its latest state, ``step-000012/{run.json, state/}``: the request it belongs to, and the leaves of
the state's pytree as an Orbax checkpoint.  A state appears whole or not at all, and its predecessor goes away only
after that.  Any `Sampler` can be saved, as its state is all that the next step needs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.errors import CheckpointError
from converters.files import flush, remove_leftovers, staged
from sega_jax.sampling import states
from sega_jax.sampling.sampler import State

try:
    import fcntl
except ImportError:  # Windows: two runs on one folder are then not kept apart
    fcntl = None

Request = Mapping[str, Any]
_STEP = re.compile(r"step-(\d{6})")
_PART = re.compile(r"batch-\d{4,}")  # as `Pipeline.generate` calls the parts of a run
_LEFT = re.compile(r"\.(step-\d{6})\.partial-[0-9a-f]{16}")  # of a process that was killed while it saved
_CLAIMED: dict[Path, int] = {}  # folders that this process has locked, with the descriptor that holds the lock


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
        probe = self.folder / f".{secrets.token_hex(8)}.probe"
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
        found = [entry for entry in self.folder.iterdir() if states.is_state(entry)]
        return sorted(int(match[1]) for entry in found if (match := _STEP.fullmatch(entry.name)))

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
            self._claim()
            return 0, state
        self._refuse_other(steps[-1], request)
        self._claim()
        return steps[-1], states.read(self._folder(steps[-1]), steps[-1], state)

    def look(self) -> None:
        """What can be said before anything is computed of a state that `Pipeline.generate` will meet here.

        Raises:
            CheckpointError: any state without ``resume``, or one of another request.
        """
        for part in (self, *(self.part(entry.name) for entry in _parts(self.folder))):
            steps = part.saved()
            if steps:
                part._refuse_other(steps[-1], self.request)

    def clear_own(self) -> None:
        """`clear`, if what is there was made for this very request; for a run that made the same without going on."""
        if request_of(self.folder) is not None or _parts(self.folder):
            with contextlib.suppress(CheckpointError):
                replace(self, resume=True).look()
                self.clear()

    def _refuse_other(self, step: int, request: Request | None) -> None:
        folder = self._folder(step)
        if not self.resume:
            raise CheckpointError(
                f"{self.folder}: holds the state of a run that was interrupted after step {step}; go on with it "
                "by --resume (resume=True), or remove the folder"
            )
        made_for = states.read_request(folder)
        wanted = json.loads(json.dumps(request))
        different = [k for k in dict.fromkeys([*wanted, *made_for]) if wanted.get(k) != made_for.get(k)]
        if different:
            raise CheckpointError(
                f"{folder}: is of another run ({', '.join(different)} differ); remove it, or change --out"
            )

    def after(self, step: int, total: int, request: Request, state: State) -> None:
        """To be called after every step; ``step`` steps of ``total`` are done.

        Raises:
            Stopped: if it was time to stop.
            CheckpointError: the state cannot be saved; the last one that could is left.
        """
        stopping = self.stop()
        try:
            if stopping or step % self.every == 0 or step == total:
                self._save(step, request, state)
        except CheckpointError:
            _release(self.folder.absolute())
            raise
        if stopping or step == total:
            _release(self.folder.absolute())
        if stopping:
            raise Stopped(self.folder, step)

    def clear(self) -> None:
        """Removes the states, and the folder unless something else is in it; for when what the run made is safe."""
        remove_states(self.folder)

    def _claim(self) -> None:
        """Keeps other processes from this folder until it is cleared or this process ends.

        Raises:
            CheckpointError: another process has it.
        """
        path = self.folder.absolute()
        if fcntl is None:
            return
        _release(path)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise CheckpointError(
                f"{self.folder}: another run is at work on it; wait for it, or choose another --out"
            ) from None
        _CLAIMED[path] = descriptor

    def _folder(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _save(self, step: int, request: Request, state: State) -> None:
        before = self.saved()
        final = self._folder(step)
        try:
            with staged(final, overwrite=states.is_state(final)) as stage:
                folder = stage / final.name
                folder.mkdir()
                states.write(folder, step, request, state)
                flush(folder)
        except Exception as error:  # Orbax reports a full disk as whatever its storage layer raises
            kept = f"the state after step {before[-1]} is left" if before else "no earlier state is there"
            reason = states.reason(error)
            raise CheckpointError(
                f"{self.folder}: the state after step {step} cannot be saved: {reason}; {kept}.  Free some space or "
                "write elsewhere, then go on with --resume"
            ) from error
        for old in before:
            if old != step:
                states.remove(self._folder(old))


def _parts(folder: Path) -> list[Path]:
    """Folders of the parts of a run."""
    if not folder.is_dir():
        return []
    return sorted(entry for entry in folder.iterdir() if _PART.fullmatch(entry.name) and entry.is_dir())


def _release(folder: Path) -> None:
    if folder in _CLAIMED:
        os.close(_CLAIMED.pop(folder))


def remove_states(folder: Path) -> None:
    """Removes what runs have written into a run's folder, and the folder unless something else is in it."""
    if not folder.is_dir() or folder.is_symlink():
        return
    for entry in folder.iterdir():
        if _PART.fullmatch(entry.name):
            remove_states(entry)
        elif _STEP.fullmatch(entry.name):
            states.remove(entry)
        elif left := _LEFT.fullmatch(entry.name):
            remove_leftovers(folder / left[1])
    _release(folder.absolute())
    with contextlib.suppress(OSError):  # somebody's files are in it
        folder.rmdir()


def request_of(folder: Path) -> Request | None:
    """What the latest state in a run's folder, or in one of its parts, was made for; None where there is none."""
    if not folder.is_dir():
        return None
    for part in (folder, *_parts(folder)):
        steps = Checkpoint(part, 1).saved()
        if steps:
            try:
                return states.read_request(part / f"step-{steps[-1]:06d}")
            except CheckpointError:
                return None
    return None


def digest(arrays: Any) -> str | None:
    """SHA-256 of a pytree of arrays, for a request; None for none."""
    leaves = jax.tree.leaves(arrays)
    total = hashlib.sha256()
    for leaf in leaves:
        array = np.ascontiguousarray(leaf)
        total.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return total.hexdigest() if leaves else None


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
