"""How a model's streams lie on a mesh: image tokens over ``context``, text replicated there, rows over ``data``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sega_jax.sharding.mesh import CONTEXT, DATA, TENSOR


@dataclass(frozen=True)
class Split:
    """Streams on a mesh.

    Attributes:
        mesh: devices.
        tokens: name and true token count of every stream whose tokens are sharded; arrays of such a stream are padded
            at the end to a multiple of the context axis.
    """

    mesh: Mesh
    tokens: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, mesh: Mesh | None, tokens: Mapping[str, int]) -> Split | None:
        """The split of streams with these token counts; None without a mesh."""
        return None if mesh is None else cls(mesh, tuple(sorted(tokens.items())))

    @property
    def context(self) -> int:
        return self.mesh.shape[CONTEXT]

    def count(self, name: str) -> int | None:
        """True token count of a sharded stream; None for a replicated one."""
        return dict(self.tokens).get(name)

    def padded(self, name: str, length: int) -> int:
        """Length of a stream's arrays, given its true length."""
        return length if self.count(name) is None else length + -length % self.context

    def rows(self, batch: int) -> str | None:
        """Mesh axis of the batch: none where it does not divide."""
        return DATA if batch % self.mesh.shape[DATA] == 0 else None

    def spec(self, name: str, batch: int, *, heads: bool = False) -> PartitionSpec:
        """Partition of a stream [B, N, C], or with ``heads`` [B, N, H, D]."""
        along = None if self.count(name) is None else CONTEXT
        return PartitionSpec(self.rows(batch), along, *([TENSOR] if heads else []))

    def hold(self, name: str, x: jax.Array) -> jax.Array:
        """A padded stream [B, N, C], told where it lies."""
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(name, x.shape[0])))

    def enter(self, name: str, x: jax.Array) -> jax.Array:
        """A stream [B, N, C] padded and laid on the mesh."""
        return self.hold(name, pad_axis(x, 1, self.padded(name, x.shape[1])))

    def leave(self, name: str, x: jax.Array) -> jax.Array:
        """A stream without its padding."""
        return x[:, : self.count(name)]


def pad_axis(x: jax.Array, axis: int, length: int) -> jax.Array:
    """``x`` with zeros behind it up to ``length`` along ``axis``."""
    missing = length - x.shape[axis]
    return x if missing == 0 else jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])
