"""Rules: from the logical names of a parameter's dimensions to mesh axes.

Parameters are stored sharded over *all* axes, so that no device holds the whole model: ``heads``, ``mlp`` and
``vocab`` over ``tensor`` (the split of Megatron-LM, arXiv 1909.08053), ``embed`` over ``context`` and ``data`` (fully
sharded data parallelism).  A block's weights are gathered over the latter two when it runs (`gathered`, inside the
scan over blocks), one block at a time.  A mesh axis that does not divide a dimension is left out for that parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from sega_jax.sharding.mesh import CONTEXT, DATA, TENSOR, put

Module = TypeVar("Module")
Rules = Mapping[str, tuple[str, ...]]
Shardings = Callable[[str, nnx.Param], Sharding | None]  # where a parameter of this path goes

STORED: Rules = {
    "embed": (CONTEXT, DATA),
    "heads": (TENSOR,),
    "mlp": (TENSOR,),
    "vocab": (TENSOR,),
    "layers": (),  # the axis of the scan
    "norm": (),
    "conv_in": (),
    "conv_out": (),
}
COMPUTED: Rules = {**STORED, "embed": ()}


def spec(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, rules: Rules = STORED) -> PartitionSpec:
    """The partition of an array whose dimensions bear logical ``names``.

    Raises:
        ValueError: a name without a rule, or two dimensions that claim one mesh axis.
    """
    if len(names) != len(shape):
        raise ValueError(f"shape {tuple(shape)} with logical names {tuple(names)}: expected one name per dimension")
    taken: dict[str, str] = {}
    parts: list[tuple[str, ...] | None] = []
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in rules:
            raise ValueError(f"logical axis {name!r} has no rule; known: {', '.join(rules)}")
        chosen, share = [], size
        for axis in rules[name] if name is not None else ():
            if axis in taken:
                raise ValueError(
                    f"logical axes {taken[axis]!r} and {name!r} of one array both claim mesh axis {axis!r}"
                )
            taken[axis] = name
            if mesh.shape[axis] > 1 and share % mesh.shape[axis] == 0:
                chosen.append(axis)
                share //= mesh.shape[axis]
        parts.append(tuple(chosen) or None)
    return PartitionSpec(*parts)


def param_sharding(param: nnx.Variable, mesh: Mesh, rules: Rules = STORED) -> NamedSharding:
    """Where a parameter lives; one sliced by a scan lacks the leading dimensions of its names."""
    names = param.get_metadata()["out_sharding"]
    return NamedSharding(mesh, spec(names[len(names) - len(param.shape) :], param.shape, mesh, rules))


def _is_variable(x: object) -> bool:
    return isinstance(x, nnx.Variable)


def shardings(params: nnx.State, mesh: Mesh, rules: Rules = STORED) -> nnx.State:
    """The tree of shardings of a tree of parameters (arrays or `jax.ShapeDtypeStruct`)."""
    return jax.tree.map(lambda p: p.replace(param_sharding(p, mesh, rules)), params, is_leaf=_is_variable)


def place(params: nnx.State, mesh: Mesh | None) -> nnx.State:
    """Parameters onto the mesh, from the host, so that no device meets more than its share."""
    if mesh is None:
        return params
    return jax.tree.map(
        lambda p: p.replace(put(np.asarray(p[...]), param_sharding(p, mesh))), params, is_leaf=_is_variable
    )


def gathered(module: Module, mesh: Mesh | None) -> Module:
    """A module with its weights gathered for computing; traced code only.

    Stacked parameters are left as they are, for the scan over them: its body gathers one block's.
    """
    if mesh is None:
        return module

    def one(param: nnx.Variable) -> nnx.Variable:
        names = param.get_metadata()["out_sharding"]
        if names[0] == "layers" and len(param.shape) == len(names):
            return param
        return param.replace(jax.lax.with_sharding_constraint(param[...], param_sharding(param, mesh, COMPUTED)))

    return jax.tree.map(one, module, is_leaf=_is_variable)
