"""The least time that a chip's data sheet allows, and where it goes."""

from __future__ import annotations

from dataclasses import dataclass

from sega_jax.costs.topologies import Capacity

ASSUMPTIONS = (
    "dense bfloat16 peak, full memory bandwidth and all links of the data sheet; computation, memory and links overlap "
    "completely; elementwise work is free.  No program reaches it: attention kernels are published at 35 to 90 % of "
    "the peak (v6e about 35 %, H100 about 70 %, v5p about 90 %)"
)


@dataclass(frozen=True)
class Roofline:
    """Seconds of one device's work if one resource alone held it up."""

    compute: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.links)

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(("compute", "memory", "links"), key=lambda name: getattr(self, name))


def roofline(capacity: Capacity, flops: float, moved: float, sent: float) -> Roofline:
    """Least times on one device.

    Args:
        capacity: of the device.
        flops, moved, sent: operations, bytes to and from memory, and bytes to other devices, of one device.
    """
    return Roofline(flops / capacity.flops, moved / capacity.memory_bandwidth, sent / capacity.interconnect_bandwidth)
