"""What to plan for: devices by name, whether they are here or not, with their memory and rates."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import jax

from sega_jax.costs import topologies

ALL_TARGETS = (
    "v5e:2x4", "v5e:4x4", "v5p:2x2x1", "v6e:2x2", "v6e:2x4", "tpu7x:2x2x1", "h100:1", "h100:8", "h200:1", "h200:8",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """Devices to plan for.

    Attributes:
        name: as asked for.
        count: number of devices.
        platform: ``"tpu"``, ``"gpu"`` or ``"cpu"``.
        memory: bytes of one device; of a CPU, of the host.
        capacity: rates, where they are known.
        devices: to compile for; empty where that is not possible.
        missing: why it is not.
    """

    name: str
    count: int
    platform: str
    memory: int
    capacity: topologies.Capacity | None
    devices: tuple[jax.Device, ...] = ()
    missing: str | None = None

    @property
    def chip(self) -> str:
        return self.name.partition(":")[0]


def host_memory() -> int:
    """Bytes of host memory that are available."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _known_chip(device: jax.Device) -> topologies.Capacity | None:
    kind = device.device_kind.lower().replace(" ", "")
    names = {"tpuv5lite": "v5e", "tpuv5": "v5p", "tpuv6lite": "v6e", "tpu7x": "tpu7x", "h100": "h100", "h200": "h200"}
    chip = next((chip for name, chip in names.items() if name in kind), None)
    return None if chip is None else topologies.capacity(chip)


def find_target(name: str) -> Target:
    """The target of a name such as ``"v6e:2x4"``, ``"h100:8"`` or ``"local"``.

    Raises:
        ValueError: a name that `topologies.devices` does not know.
    """
    if name == "local":
        devices = tuple(jax.devices())
        platform = {"cuda": "gpu", "rocm": "gpu"}.get(devices[0].platform, devices[0].platform)
        known = _known_chip(devices[0])
        limit = (devices[0].memory_stats() or {}).get("bytes_limit") if platform != "cpu" else host_memory()
        if limit is None:
            limit = known.memory_bytes if known else host_memory()
        return Target(name, len(devices), platform, int(limit), known, devices)
    known = topologies.capacity(name)
    if ":" not in name:
        raise ValueError(f"target={name!r}: expected an arrangement too, such as {name}:1 or {name}:2x4")
    sides = [int(side) for side in name.partition(":")[2].split("x")]
    count = math.prod(sides) * (2 if name.startswith("tpu7x") else 1)  # a chip of two devices
    try:
        devices, missing = tuple(topologies.devices(name)), None
    except ModuleNotFoundError as error:
        devices, missing = (), str(error)
    except Exception as error:  # compiler plugins raise what they like
        if isinstance(error, ValueError):
            raise
        devices, missing = (), f"the compiler for {name} does not start: {error}"
    return Target(name, len(devices) or count, known.platform, known.memory_bytes, known, devices, missing)
