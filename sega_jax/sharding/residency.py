"""Where weights wait: on the device all the time, or on the host until their stage runs.

Text encoders, transformer and autoencoder work one after the other, so a device needs to hold one of them at a time.
Idle weights lie in the host's pinned memory, from which a device fetches them at the speed of its bus; where a backend
has no such memory, in the ordinary memory of the CPU backend.
"""

from __future__ import annotations

from typing import Literal

import jax
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from sega_jax.sharding.rules import Shardings, param_sharding

Residency = Literal["all", "offload"]
PINNED = "pinned_host"


def _active(param: nnx.Variable, mesh: Mesh | None) -> Sharding:
    return SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else param_sharding(param, mesh)


def _idle(where: Sharding) -> Sharding:
    device = next(iter(where.addressable_devices))
    if any(memory.kind == PINNED for memory in device.addressable_memories()):
        return where.with_memory_kind(PINNED)
    return SingleDeviceSharding(jax.local_devices(backend="cpu")[0])


def places(residency: Residency, mesh: Mesh | None) -> Shardings | None:
    """Where a checkpoint's parameters go, as `weights.load.fill` asks for it; None is the default device.

    Raises:
        ValueError: another residency.
    """
    if residency == "offload":
        return lambda _path, param: _idle(_active(param, mesh))
    if residency != "all":
        raise ValueError(f"residency={residency!r}: expected 'all' or 'offload'")
    return None if mesh is None else lambda _path, param: _active(param, mesh)


def fetched(params: nnx.State, residency: Residency, mesh: Mesh | None) -> nnx.State:
    """Parameters on their devices: as they are, or copies that go away with the last reference to them."""
    if residency == "all":
        return params
    return jax.tree.map(
        lambda param: param.replace(jax.device_put(param[...], _active(param, mesh))),
        params,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
