"""C++ that comes with the package, compiled for the very processor that runs it and kept in the user's cache.

Compiled at first use, in seconds, by the machine's own compiler: so it may use every instruction that this processor
has, and no wheel has to be built per platform.  What was compiled is tried out in a process of its own before it is
kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import jaxlib

from sega_jax.runtime.cache import cache_folder
from sega_jax.runtime.private import is_kept, keep, private_folder

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread", "-w")
COMPILERS = ("c++", "g++", "clang++")
MACHINES = ("x86_64", "AMD64")

logger = logging.getLogger(__name__)


class ToolchainError(RuntimeError):
    """Why nothing could be compiled here, and what to do."""


def compiler() -> list[str]:
    """The command that compiles C++: ``$CXX``, else the first of the usual names that is there.

    Raises:
        ToolchainError: none is there, or this is no machine that the sources are written for.
    """
    if platform.machine() not in MACHINES or sys.platform == "win32":
        raise ToolchainError(f"it is written for x86-64 under Linux and macOS, this is {platform.platform()}")
    asked = os.environ.get("CXX")
    if asked:
        command = shlex.split(asked)
        if shutil.which(command[0]) is None:
            raise ToolchainError(f"CXX={asked}: no such command")
        return command
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise ToolchainError("there is no C++ compiler; install g++ or clang++, or name one in CXX")


def _processor() -> str:
    """What decides which instructions ``-march=native`` means."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags"))))
    except OSError:
        return platform.processor()


def _asked(command: list[str], what: str, folder: str) -> str:
    """A command's output; it runs in ``folder``, since the user's may hold anything."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=folder)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"{what}: {error}") from error
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if "error" in line.lower()]
        reason = lines[0].strip() if lines else f"exit code {done.returncode}"
        raise ToolchainError(f"{what}: {reason}")
    return done.stdout


# Loaded by itself: a library that crashes when its processor check runs must not take the user's process along.
# -I: neither the folder it runs in nor the environment says what is imported.
_TRIAL = ("-I", "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1]).sega_has_tiles()")


def _built(command: list[str], folder: str) -> Path:
    """Compiled and tried out, in an empty folder of this process."""
    logger.info("compiling the attention kernel for this processor")
    made = Path(folder) / "attention.so"
    _asked([*command, "-o", str(made)], f"{command[0]} cannot compile it", folder)
    _asked([sys.executable, *_TRIAL, str(made)], "what was compiled does not run here", folder)
    return made


def _kept() -> Path | None:
    """The folder of compiled kernels, private to the user; None where nothing is to be kept or can be."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        return private_folder(folder / "kernels")
    except OSError as error:
        logger.warning("the attention kernel cannot be kept: %s", error)
        return None


def library(*extra: str) -> ctypes.CDLL:
    """The compiled kernel, from the cache if it is there as it was written.

    Args:
        extra: further flags of the compiler.

    Raises:
        ToolchainError: it cannot be compiled here.
    """
    command = [*compiler(), *FLAGS, *extra, "-isystem", jax.ffi.include_dir(), str(SOURCES / "attention.cc")]
    told = _asked([*command[:1], "--version"], f"{command[0]} does not run", os.sep)
    parts = [path.read_text() for path in sorted([*SOURCES.glob("*.cc"), *SOURCES.glob("*.h")])]
    parts += [*command, told, jaxlib.__version__, _processor()]
    name = f"attention-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"
    folder = _kept()
    if folder is not None and is_kept(folder / name):
        with contextlib.suppress(OSError):  # of another processor, with a folder shared between machines
            return ctypes.CDLL(str(folder / name))
    with tempfile.TemporaryDirectory() as temporary:  # once loaded, its file is not needed any more
        made = _built(command, temporary)
        if folder is not None:
            try:
                keep(folder / name, made.read_bytes())
                return ctypes.CDLL(str(folder / name))
            except OSError as error:
                logger.warning("the attention kernel cannot be kept in %s (%s)", folder, error)
        return ctypes.CDLL(str(made))


def once(function: Callable) -> Callable:
    """``function()``, worked out a single time however many threads ask."""
    lock, results = threading.Lock(), []

    @functools.wraps(function)
    def known():
        with lock:
            if not results:
                results.append(function())
            return results[0]

    return known


def look() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or None and the reason."""
    try:
        return library(), None
    except ToolchainError as error:
        return None, str(error)


attention = once(look)
