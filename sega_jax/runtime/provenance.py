"""Machine, versions and commit of a measurement: what every file of ``benchmarks/`` carries beside its figures."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import jax

PACKAGES = ("sega-jax", "jax", "jaxlib", "flax", "numpy", "libtpu", "tokamax", "torch")


def processor() -> str:
    """The CPU's model name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def threads() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _commit(folder: Path) -> str | None:
    """The commit checked out in a folder, with ``+`` where tracked files differ from it; None outside of git."""
    ask = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        asked = subprocess.run(ask, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return asked.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def provenance() -> dict:
    """Where and with what something is measured: plain values, ``None`` where there is no answer.

    ``device`` is JAX's default device, ``processor`` and ``threads`` are the host's, ``load`` its load average.
    """
    return {
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "threads": threads(),
        "load": [round(x, 1) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "versions": {"python": platform.python_version()} | {p: v for p in PACKAGES if (v := _version(p))},
        "commit": _commit(Path(__file__).parent),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
