"""Operations, bytes and collective traffic of a program, from its jaxpr; traffic also from compiled HLO.

The compiler's own analysis counts the body of a loop once and a kernel as nothing.  Here the body of a scan counts as
often as it runs, and an attention kernel counts what `attention.kernels.contract.cost` says.  Conventions:

* Figures are totals over all devices: the inside of a `jax.shard_map` counts once per device of its mesh.  What the
  partitioner replicates outside of one (the text stream, usually) counts once.
* ``flops`` are those of matrix units: contractions, convolutions and kernels, a multiply-add counted as two.
* ``bytes`` are operands and results of those, of gathers, scatters, sorts and collectives, each read or written once
  per execution; elementwise work is taken to be fused into them.  So it is a lower bound of the traffic to memory.
* ``collectives`` are bytes that leave a device, by bandwidth-optimal algorithms among n devices: all-to-all and
  reduce-scatter ``(n - 1) / n`` of a device's operand, all-gather ``n - 1`` times it, all-reduce ``2 (n - 1) / n`` of
  it, a permutation all of it.
* A loop whose length is not known counts once, a conditional as its dearest branch; both are named in ``notes``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend import core

from sega_jax.attention.kernels.contract import read_cost

_MOVERS = ("gather", "scatter", "scatter-add", "sort", "dynamic_update_slice", "fft")


@dataclass(frozen=True)
class Counts:
    """What a program does, over all devices; see the module for the conventions."""

    flops: int = 0
    bytes: int = 0
    collectives: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.flops + other.flops,
            self.bytes + other.bytes,
            dict(Counter(self.collectives) + Counter(other.collectives)),
            tuple(dict.fromkeys(self.notes + other.notes)),
        )

    def __mul__(self, times: int) -> Counts:
        collectives = {kind: times * count for kind, count in self.collectives.items()}
        return Counts(times * self.flops, times * self.bytes, collectives, self.notes)

    @property
    def collective_bytes(self) -> int:
        """Bytes of all kinds of collectives."""
        return sum(self.collectives.values())


def count(function: Callable, *arguments: Any) -> Counts:
    """What ``function(*arguments)`` does; arguments may be abstract (`jax.ShapeDtypeStruct`).

    Nothing is computed or compiled.
    """
    return count_jaxpr(jax.make_jaxpr(function)(*arguments))


def count_jaxpr(jaxpr: core.ClosedJaxpr | core.Jaxpr) -> Counts:
    """What a jaxpr does."""
    return _count(getattr(jaxpr, "jaxpr", jaxpr), {})


# -- jaxpr -------------------------------------------------------------------------------------------------------------


def _count(jaxpr: core.Jaxpr, axes: Mapping[str, int]) -> Counts:
    total = Counts()
    for eqn in jaxpr.eqns:
        total = total + _equation(eqn, axes)
    return total


def _size(*variables: Any) -> int:
    """Bytes of values; those without an array (tokens, references) have none."""
    total = 0
    for variable in variables:
        aval = variable.aval
        if hasattr(aval, "shape") and hasattr(aval, "dtype") and hasattr(aval.dtype, "itemsize"):
            total += math.prod(aval.shape) * aval.dtype.itemsize
    return total


def _equation(eqn: Any, axes: Mapping[str, int]) -> Counts:
    name, params = eqn.primitive.name, eqn.params
    moved = _size(*eqn.invars, *eqn.outvars)
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
        return Counts(2 * math.prod(eqn.outvars[0].aval.shape) * depth, moved)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        per_output = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
        return Counts(2 * math.prod(eqn.outvars[0].aval.shape) * per_output, moved)
    if name.startswith("custom_vjp") and (kernel := read_cost(str(eqn.source_info.name_stack))) is not None:
        return Counts(kernel.flops, kernel.bytes)
    if name in _TRAFFIC:
        return _collective(name, eqn, axes)
    if name == "pallas_call":
        estimate = params.get("cost_estimate")
        if estimate is None:
            return Counts(notes=("a kernel without a cost estimate counts as nothing",))
        return Counts(int(estimate.flops), int(estimate.bytes_accessed))
    if name in _MOVERS:
        return Counts(0, moved)
    if name == "cond":
        branches = [_count(branch.jaxpr, axes) for branch in params["branches"]]
        dearest = max(branches, key=lambda counts: (counts.flops, counts.bytes))
        even = all(branch.flops == dearest.flops for branch in branches)
        return dearest + Counts(notes=() if even else ("a conditional counts as its dearest branch",))
    if name == "while":
        inside = _count(params["body_jaxpr"].jaxpr, axes)
        nothing = inside.flops == inside.bytes == inside.collective_bytes == 0
        return inside + Counts(notes=() if nothing else ("a loop of unknown length counts once",))
    if name == "scan":
        return _count(params["jaxpr"].jaxpr, axes) * params["length"]
    if name == "shard_map":
        mesh = dict(params["mesh"].shape)
        manual = params.get("manual_axes", mesh)
        devices = math.prod(mesh[axis] for axis in manual)
        return _count(_plain(params["jaxpr"]), {**axes, **mesh}) * devices
    total = Counts()
    for inner in _inner(params):
        total = total + _count(inner, axes)
    return total


def _plain(jaxpr: Any) -> core.Jaxpr:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _inner(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
    """The program of a call: of `jit`, `checkpoint`, `custom_jvp` and the like; derivative rules are thunks."""
    for value in params.values():
        if hasattr(_plain(value), "eqns"):
            yield _plain(value)


# -- collectives -------------------------------------------------------------------------------------------------------

_TRAFFIC: dict[str, tuple[str, Callable[[int, int, int], float]]] = {
    # primitive: kind, bytes out of a device given its operand, its result and the number of devices
    "all_to_all": ("all-to-all", lambda operand, result, n: operand * (n - 1) / n),
    "all_gather": ("all-gather", lambda operand, result, n: operand * (n - 1)),
    "all_gather_invariant": ("all-gather", lambda operand, result, n: operand * (n - 1)),
    "reduce_scatter": ("reduce-scatter", lambda operand, result, n: operand * (n - 1) / n),
    "psum": ("all-reduce", lambda operand, result, n: 2 * operand * (n - 1) / n),
    "psum_invariant": ("all-reduce", lambda operand, result, n: 2 * operand * (n - 1) / n),
    "psum2": ("all-reduce", lambda operand, result, n: 2 * operand * (n - 1) / n),
    "pmax": ("all-reduce", lambda operand, result, n: 2 * operand * (n - 1) / n),
    "pmin": ("all-reduce", lambda operand, result, n: 2 * operand * (n - 1) / n),
    "ppermute": ("collective-permute", lambda operand, result, n: operand if n > 1 else 0),
}


def _collective(name: str, eqn: Any, axes: Mapping[str, int]) -> Counts:
    named = eqn.params.get("axis_name", eqn.params.get("axes", ()))
    named = named if isinstance(named, (tuple, list)) else (named,)
    devices = math.prod(axes.get(axis, 1) for axis in named if isinstance(axis, str))
    kind, traffic = _TRAFFIC[name]
    operand, result = _size(*eqn.invars), _size(*eqn.outvars)
    sent = round(traffic(operand, result, devices))
    return Counts(0, operand + result if sent else 0, {kind: sent} if sent else {})


_BYTES = {"pred": 1, "s4": 1, "u4": 1, "bf16": 2, "f16": 2}
_SHAPE = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|async_execution_thread_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_OPERATION = re.compile(r"(?:^|\s)([a-z][a-z0-9\-]*)\(")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[(\d+),(\d+)\])")
_MESH_GROUPS = re.compile(r"replica_groups=@?mesh\w*\[([^\]]*)\] ?\{([^}]*)\}")
_HLO: dict[str, str] = {
    "all-to-all": "all_to_all",
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-reduce": "psum",
    "collective-permute": "ppermute",
    "ragged-all-to-all": "all_to_all",
}


def _hlo_bytes(shapes: str) -> list[int]:
    found = []
    for kind, sides in _SHAPE.findall(shapes):
        digits = re.search(r"\d+", kind)
        width = _BYTES.get(kind) or (int(digits[0]) // 8 if digits else 0)
        found.append(width * math.prod(int(side) for side in sides.split(",") if side))
    return found


def hlo_collectives(text: str, devices: int) -> dict[str, int]:
    """Bytes that leave **one** device, by kind of collective, from a compiled program's text.

    This sees what the partitioner added: gathers of sharded weights, reductions of sharded contractions.

    Args:
        text: ``compiled.as_text()``, partitioned, so that shapes are of one device.
        devices: how many devices a collective without groups is over.
    """
    bodies: dict[str, list[str]] = {}
    entry, current = None, None
    for line in text.splitlines():
        opened = _COMPUTATION.match(line)
        if opened and not line.startswith(" "):
            current = opened[2]
            bodies[current] = []
            entry = current if opened[1] else entry
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            bodies[current].append(instruction[1])
    known: dict[str, Counter] = {}

    def visit(name: str) -> Counter:
        if name not in known:
            known[name] = Counter()  # HLO does not recurse
            total = Counter()
            for line in bodies.get(name, ()):
                total += _hlo_line(line, devices)
                inner = _CALLED.findall(line)
                for names in _BRANCHES.findall(line):
                    inner += [part.strip().lstrip("%") for part in names.split(",")]
                times = _times(line, bodies)
                for other in inner:
                    total += Counter({kind: times * size for kind, size in visit(other).items()})
            known[name] = total
        return known[name]

    return dict(visit(entry)) if entry is not None else {}


def _times(line: str, bodies: Mapping[str, list[str]]) -> int:
    """How often an instruction runs what it calls: for a loop, what the compiler found, or what it counts up to."""
    if trips := _TRIPS.search(line):
        return int(trips[1])
    condition = re.search(r"\bwhile\(.*condition=%?([\w.\-]+)", line)
    if condition is None:
        return 1
    limits = _LIMIT.findall(" ".join(bodies.get(condition[1], ())))
    return int(limits[0]) if len(limits) == 1 else 1


def _group_size(line: str, devices: int) -> int:
    """Devices that take part in a collective together."""
    if named := _MESH_GROUPS.search(line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    groups = _GROUPS.search(line)
    if groups is None:
        return devices
    return len(groups[1].split(",")) if groups[1] else int(groups[3]) if groups[3] else devices


def _hlo_line(line: str, devices: int) -> Counter:
    operation = _OPERATION.search(line)
    kind = operation[1].removesuffix("-start") if operation else ""
    if kind not in _HLO:
        return Counter()
    n = _group_size(line, devices)
    if kind == "collective-permute":
        n = max(n, 2)
    shapes = _hlo_bytes(line[: operation.start()])
    if operation[1].endswith("-start"):  # (operands, results, contexts): the larger of a pair is one side of it
        shapes = [size for size in shapes if size > 8]
        shapes = shapes[len(shapes) // 2 :] if kind != "all-reduce" else shapes
        if kind == "collective-permute":
            shapes = shapes[:1]
    result = sum(shapes)
    operand = result // n if kind == "all-gather" else result * n if kind == "reduce-scatter" else result
    _, traffic = _TRAFFIC[_HLO[kind]]
    return Counter({kind: round(traffic(operand, result, n))})
