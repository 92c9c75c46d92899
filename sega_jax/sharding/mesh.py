"""Device meshes: axes ``data`` (pictures), ``context`` (image tokens) and ``tensor`` (heads and hidden channels).

Meshes have automatic axes: arrays carry their sharding, the compiler inserts the communication, and what must not be
left to it (attention) runs in `jax.shard_map`.  One device needs no mesh at all: everywhere ``mesh=None`` means the
default device, and the programs are then the ones without any of this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA, CONTEXT, TENSOR = AXES = ("data", "context", "tensor")


def make_mesh(
    devices: Sequence[jax.Device] | None = None, *, data: int = 1, context: int | None = None, tensor: int = 1
) -> Mesh:
    """A mesh over devices.

    Args:
        devices: default: all devices of all processes.
        data: devices along the batch.
        context: devices along the image tokens; default: what is left.
        tensor: devices along heads and hidden channels.

    Raises:
        ValueError: sizes that are not positive or do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    for name, size in (("data", data), ("context", context), ("tensor", tensor)):
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"mesh: {name}={size!r}; expected a positive whole number")
    if context is None:
        context = max(1, len(devices) // (data * tensor))
    if data * context * tensor != len(devices):
        raise ValueError(
            f"mesh: data={data} x context={context} x tensor={tensor} are {data * context * tensor} devices, "
            f"there are {len(devices)}"
        )
    return jax.make_mesh((data, context, tensor), AXES, devices=devices, axis_types=(AxisType.Auto,) * 3)


def parse_sizes(text: str) -> dict[str, int]:
    """``"data=1,context=4,tensor=2"`` to sizes; axes may be left out.

    Raises:
        ValueError: another axis, an axis twice, or a size that is no positive whole number.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES or not size.isascii() or not size.isdigit() or int(size) < 1:
            raise ValueError(f"mesh={text!r}: {part!r}; expected 'auto' or sizes such as data=1,context=4,tensor=2")
        if name in sizes:
            raise ValueError(f"mesh={text!r}: {name} is given twice")
        sizes[name] = int(size)
    return sizes


def choose_sizes(devices: int, *, batch: int = 1) -> dict[str, int]:
    """A mesh for ``devices``: whole pictures per device as far as the batch divides, image tokens for the rest.

    Parameters are sharded over all of them in either case (`rules`), and attention copes with any head count, so the
    tensor axis, whose sums are the most expensive communication, stays 1.
    """
    data = math.gcd(devices, batch)
    return {"data": data, "context": devices // data, "tensor": 1}


def resolve_mesh(mesh: Mesh | str | None, *, batch: int = 1) -> Mesh | None:
    """The mesh of an option: a mesh as it is; ``"auto"``, all devices under `choose_sizes`; sizes, parsed.

    Sizes whose product is below the number of local devices take the first ones.  None, and a mesh of one device
    asked for by ``"auto"``, is None: no mesh.

    Raises:
        ValueError: a text that cannot be read, more devices than there are, or a mesh with other axes.
    """
    if mesh is None or isinstance(mesh, Mesh):
        if mesh is not None and tuple(mesh.axis_names) != AXES:
            raise ValueError(
                f"mesh axes {mesh.axis_names}: expected {AXES}; sega_jax.sharding.mesh.make_mesh makes one"
            )
        return mesh
    devices = jax.devices()
    if mesh.strip() == "auto":
        return None if len(devices) == 1 else make_mesh(devices, **choose_sizes(len(devices), batch=batch))
    sizes = {"data": 1, "tensor": 1, **parse_sizes(mesh)}
    if "context" in sizes and jax.process_count() == 1:
        needed = math.prod(sizes.values())
        if needed > len(devices):
            raise ValueError(f"mesh={mesh!r}: needs {needed} devices, there are {len(devices)}")
        devices = devices[:needed]
    return make_mesh(devices, **sizes)


def describe(mesh: Mesh | None) -> str | None:
    """The mesh as `parse_sizes` reads it."""
    return None if mesh is None else ",".join(f"{name}={size}" for name, size in mesh.shape.items())


def sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """A sharding of the leading dimensions over ``axes``."""
    return NamedSharding(mesh, PartitionSpec(*axes))


def latent_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Where latents [B, H, W, C] lie: samples over ``data``, rows over ``context``, as far as these divide."""
    data, context = (
        axis if size % mesh.shape[axis] == 0 else None for axis, size in zip((DATA, CONTEXT), shape, strict=False)
    )
    return sharding(mesh, data, context)


def put(x: jax.typing.ArrayLike, where: NamedSharding) -> jax.Array:
    """``x``, the same in every process, onto the devices of a sharding; each process holds what its devices need."""
    if isinstance(x, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(x, where)
    if where.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, where)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def laid(state: Any, mesh: Mesh | None) -> Any:
    """A sampler's state on the mesh: arrays of four dimensions as latents, others everywhere; None leaves it alone."""
    if mesh is None:
        return state

    def one(x: Any) -> Any:
        if not isinstance(x, jax.Array) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return put(x, latent_sharding(mesh, x.shape) if x.ndim == 4 else sharding(mesh))

    return jax.tree.map(one, state)


def to_host(x: jax.Array) -> np.ndarray:
    """``x`` whole, in every process."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        from jax.experimental.multihost_utils import process_allgather

        return np.asarray(process_allgather(x, tiled=True))
    return np.asarray(x)
