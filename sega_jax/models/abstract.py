"""One abstract tree per model: shapes, dtypes and logical axes, from which everything else derives.

Initialisation, checkpoint loading, sharding, ahead-of-time inputs and parameter counts all start here, so they
cannot disagree.  Paths are dotted attribute names (``double_blocks.image.query.kernel``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


@dataclass(frozen=True)
class Component:
    """A module split once into static structure and parameters, so that pure state crosses `jit`."""

    graphdef: nnx.GraphDef
    params: nnx.State

    @classmethod
    def of(cls, module: nnx.Module) -> Component:
        return cls(*nnx.split(module))


def build_abstract(build: Callable[[nnx.Rngs], Module]) -> Module:
    """The module ``build`` would make, with `jax.ShapeDtypeStruct` in place of arrays; allocates nothing."""
    with nnx.use_eager_sharding(False):
        return nnx.eval_shape(lambda: build(nnx.Rngs(0)))


def initialize(build: Callable[[nnx.Rngs], Module], seed: int = 0) -> Module:
    """The module with freshly initialised parameters, built in one compiled program."""
    with nnx.use_eager_sharding(False):
        return nnx.jit(lambda key: build(nnx.Rngs(key)))(jax.random.key(seed))


def parameters(module: nnx.Module) -> dict[str, nnx.Param]:
    """Every parameter of ``module`` by dotted path."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(str(part) for part in path): variable for path, variable in flat}


def axes(param: nnx.Param) -> tuple[str | None, ...]:
    """The logical axis names of a parameter, one per dimension."""
    return tuple(param.get_metadata()["out_sharding"])


def count(module: nnx.Module) -> int:
    """Number of scalar parameters."""
    return sum(param.size for param in parameters(module).values())
