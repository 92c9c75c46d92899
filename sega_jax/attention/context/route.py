"""Attention calls on a mesh: which scheme serves them, and how.

``joint``: dense attention of one sharded stream and replicated ones, of which one may have lengths per sample (masked
text), every token rotated where it lies.  Served by
`ulysses`, `ring`, or their product, in that order of preference: an all-to-all moves each token once, a ring moves the
keys past every device, so Ulysses is taken while padding the heads to a multiple of the devices wastes at most an
eighth; else the product with the largest common divisor of heads and devices, which is the ring where that is 1.

Everything else (windows, groups, block maps, several key sets) is served by Ulysses' exchange alone: every device
then holds whole streams for its share of the heads and runs the calls as a single device would, so any layout works
that works without a mesh, as long as there are no more context devices than heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from sega_jax.attention.context.ring import ring
from sega_jax.attention.context.sharded import Sharded, split_heads
from sega_jax.attention.context.ulysses import ulysses
from sega_jax.attention.kernels.contract import Request, choose
from sega_jax.layouts.streams import Call, Table, Tokens
from sega_jax.positional.rope import rotate
from sega_jax.sharding.mesh import CONTEXT, DATA, TENSOR
from sega_jax.sharding.split import Split, pad_axis

SCHEMES = ("ulysses", "ring", "product")
PADDING = 1 / 8  # share of padded heads up to which Ulysses is preferred
RING_BYTES = 2**26  # float32 partial results of a ring that are in flight at once, per array

Streams = Mapping[str, jax.Array]
Local = Callable[[Streams, Streams, Streams, tuple[Call, ...], str], dict[str, jax.Array]]


def split_backend(backend: str) -> tuple[str, str]:
    """``"scheme+kernel"``, ``"scheme"`` or ``"kernel"`` to (scheme, kernel), ``"auto"`` for what is left out."""
    scheme, plus, kernel = backend.partition("+")
    if plus:
        if scheme not in ("auto", *SCHEMES):
            raise ValueError(f"context scheme {scheme!r} is unknown; known: auto, {', '.join(SCHEMES)}")
        return scheme, kernel
    return (backend, "auto") if backend in SCHEMES else ("auto", backend)


def choose_scheme(heads: int, devices: int, *, joint: bool, scheme: str = "auto") -> tuple[str, int]:
    """The scheme, and by how many of the context ``devices`` it divides the heads.

    Args:
        heads: per tensor shard, those of the keys; query heads go with them.
        devices: on the context axis.
        joint: whether the calls are dense attention of one sharded stream.
        scheme: a name, or ``"auto"``.

    Raises:
        ValueError: a scheme that cannot serve, with the reason and what to use.
    """
    wasted = split_heads(heads, devices) / heads - 1
    common = math.gcd(heads, devices)
    if devices == 1:
        if scheme != "auto":
            raise ValueError(f"context scheme {scheme!r}: the mesh's context axis has one device, leave the scheme out")
        return "ulysses", 1
    if scheme == "auto":
        uneven = "product" if common > 1 else "ring"
        scheme = uneven if joint and wasted > PADDING else "ulysses"
    if scheme != "ulysses" and not joint:
        raise ValueError(
            f"context scheme {scheme!r} serves dense attention only; this layout has windows, groups, block maps or "
            "causal attention: use 'ulysses', or leave the scheme out"
        )
    if scheme == "ulysses" and devices > heads:
        other = "use 'ring' or 'product'" if joint else "put the other devices on the data or tensor axis"
        raise ValueError(
            f"context scheme 'ulysses' gives every device whole heads: {heads} heads per tensor shard cannot occupy "
            f"{devices} context devices; {other}"
        )
    if scheme == "product" and common == 1:
        raise ValueError(
            f"context scheme 'product' divides the heads by a common divisor with the devices; {heads} heads and "
            f"{devices} context devices have none: use 'ring'"
        )
    return scheme, {"ulysses": devices, "ring": 1, "product": common}[scheme]


def is_joint(calls: tuple[Call, ...], split: Split, streams: Streams) -> bool:
    """Whether the calls are one softmax of all tokens of all streams over each other, one stream of them sharded."""
    if len(calls) != 1 or len(calls[0].sets) != 1 or set(calls[0].reduce) != {"scatter"}:
        return False
    keys = calls[0].sets[0]
    names = [t.stream for t in keys.queries]
    whole = all(t.index is None and (t.table is None or t.table.cos.shape[1] == 1) for t in (*keys.queries, *keys.keys))
    sharded = [name for name in names if split.count(name) is not None]
    ragged = [t for t in keys.keys if t.length is not None]
    masked = len(ragged) <= 1 and all(t.stream not in sharded and t.length.ndim == 1 for t in ragged)
    plain = keys.block_map is None and not keys.causal and masked
    return (
        plain and whole and names == [t.stream for t in keys.keys] and len(sharded) == 1 and set(names) == set(streams)
    )


def attend_split(
    q: Streams, k: Streams, v: Streams, calls: tuple[Call, ...], split: Split, scheme: str, kernel: str, local: Local
) -> dict[str, jax.Array]:
    """`attend` on a mesh; arguments as there, sharded streams padded.

    Args:
        split: where the streams lie.
        scheme: context scheme, or ``"auto"``.
        kernel: local kernel, or ``"auto"``.
        local: attention over whole streams on one device.

    Raises:
        ValueError: heads that the tensor axis does not divide, or a scheme that cannot serve.
    """
    heads, tensor = next(iter(k.values())).shape[2], split.mesh.shape[TENSOR]
    if heads % tensor:
        raise ValueError(f"mesh: tensor={tensor} does not divide {heads} attention heads (of keys); use a divisor")
    joint = is_joint(calls, split, q)
    scheme, degree = choose_scheme(heads // tensor, split.context, joint=joint, scheme=scheme)
    if joint and split.context > 1:
        return _joint(q, k, v, calls, split, degree, kernel)
    return _by_heads(q, k, v, calls, split, kernel, local)


# -- dense -------------------------------------------------------------------------------------------------------------


def _two_axes(mesh: Mesh, degree: int) -> Mesh:
    """The mesh with its context axis as ``ring`` x ``heads``, the latter of ``degree`` devices."""
    data, context, tensor = mesh.devices.shape
    devices = mesh.devices.reshape(data, context // degree, degree, tensor)
    return Mesh(devices, (DATA, "ring", "heads", TENSOR), axis_types=(AxisType.Auto,) * 4)


def _head_chunks(tokens: int, heads: int, group: int, width: int) -> int:
    """Into how many groups a ring cuts ``heads`` key heads, each for ``group`` query heads, so that its float32 partial
    results stay below `RING_BYTES`."""
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    return next((n for n in divisors if tokens * (heads // n) * group * width * 4 <= RING_BYTES), heads)


def _joint(q, k, v, calls, split: Split, degree: int, kernel: str) -> dict[str, jax.Array]:
    keys = calls[0].sets[0]
    names = [t.stream for t in keys.queries]
    image = next(name for name in names if split.count(name) is not None)
    lengths = {t.stream: t.length for t in keys.keys if t.length is not None}
    text = sorted((name for name in names if name != image), key=lambda name: name in lengths)  # a length hides the end
    batch, padded, heads, width = q[image].shape
    mesh = _two_axes(split.mesh, degree)
    along, rows, context = ("ring", "heads"), split.rows(batch), split.context
    kv_heads = k[image].shape[2]
    local_heads = kv_heads // split.mesh.shape[TENSOR]

    streams = {name: P(rows, along if name == image else None, TENSOR) for name in names}
    tables, table_specs = [], []
    for side in (keys.queries, keys.keys):
        for tokens in side:
            table, spec = _whole_table(tokens, split, rows, along)
            tables.append(table)
            table_specs.append(spec)

    def run(request: Request):
        return choose(request, kernel)[0].run(request)

    def shard(q, k, v, tables, lengths):
        def pair(x, tables) -> Sharded:
            x = {name: _turn(x[name], table) for name, table in zip(names, tables, strict=True)}
            return Sharded(jnp.concatenate([x[image][:, :0], *(x[name] for name in text)], axis=1), x[image])

        count = len(names)
        qkv = pair(q, tables[:count]), pair(k, tables[count:]), pair(v, [None] * count)
        options = {"run": run, "scale": width**-0.5, "total": split.count(image)}
        for name, length in lengths.items():
            whole = sum(k[other].shape[1] for other in text if other != name)
            length = whole + jnp.minimum(length, k[name].shape[1])
            options["text_length"] = jnp.broadcast_to(length, q[image].shape[:1])
        if degree == context:
            out = ulysses(*qkv, axis="heads", **options)
        else:
            shared = padded // context * degree, split_heads(local_heads, degree) // degree
            inner = partial(ring, axis="ring", head_chunks=_head_chunks(*shared, heads // kv_heads, width))
            out = inner(*qkv, **options) if degree == 1 else ulysses(*qkv, axis="heads", inner=inner, **options)
        cuts = np.cumsum([q[name].shape[1] for name in text])
        parts = jnp.split(out.text, cuts, axis=1)[:-1]
        return {image: out.image, **dict(zip(text, parts, strict=True))}

    of_samples = {name: P(rows) if x.shape[0] > 1 else P() for name, x in lengths.items()}
    specs = streams, streams, streams, table_specs, of_samples
    mapped = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=streams, check_vma=False)
    return mapped(dict(q), dict(k), dict(v), tables, lengths)


def _whole_table(tokens: Tokens, split: Split, rows: str | None, along: tuple[str, ...]) -> tuple[Any, Any]:
    """The table of all tokens of a stream, padded as the stream, and its partition."""
    if tokens.table is None:
        return None, None
    length = split.padded(tokens.stream, tokens.table.cos.shape[2])
    cos, sin = (pad_axis(x, 2, length) for x in tokens.table[:2])
    magnitude = tokens.table.magnitude
    sharded = along if split.count(tokens.stream) is not None else None
    specs = [P(*_lead(x, rows), sharded, _head(x)) for x in (cos, sin)]
    return Table(cos, sin, magnitude), Table(*specs, P(*_lead(magnitude, rows), None, _head(magnitude)))


def _lead(x: jax.Array, rows: str | None) -> tuple[str | None, None]:
    """Partition of a table's samples and groups."""
    return (rows if x.shape[0] > 1 else None), None


def _head(x: jax.Array) -> str | None:
    return TENSOR if x.shape[3] > 1 else None


def _turn(x: jax.Array, table: Table | None) -> jax.Array:
    if table is None:
        return x
    magnitude = table.magnitude
    return rotate(x, (table.cos * magnitude)[:, 0], (table.sin * magnitude)[:, 0])


# -- everything else ---------------------------------------------------------------------------------------------------


def _leaf_spec(path: tuple, leaf: Any, rows: str | None) -> P:
    """Partition of one array of the calls: samples over the data axis, heads of tables over the tensor axis."""
    names = [key.name for key in path if hasattr(key, "name")]
    sample = rows if leaf.ndim and leaf.shape[0] > 1 else None
    if "table" in names:
        return P(sample, None, None, _head(leaf))
    if "length" in names or ("index" in names and leaf.ndim > 1):
        return P(sample)
    return P()


def _by_heads(q, k, v, calls, split: Split, kernel: str, local: Local) -> dict[str, jax.Array]:
    batch, _, key_heads, _ = next(iter(k.values())).shape
    rows, context = split.rows(batch), split.context
    flat, structure = jax.tree_util.tree_flatten_with_path(calls)
    specs = [_leaf_spec(path, leaf, rows) for path, leaf in flat]
    # What is known now (block maps, indices) stays a constant inside, as kernels plan with it.
    given = [i for i, (_, leaf) in enumerate(flat) if not (isinstance(leaf, np.ndarray) and specs[i] == P())]
    of_heads = {i for i in given if specs[i] != P() and len(specs[i]) == 4 and specs[i][3] == TENSOR}

    def shard(q, k, v, leaves):
        here = jax.lax.axis_index(CONTEXT)
        local_heads = key_heads // split.mesh.shape[TENSOR]

        def padded_heads(heads: int) -> int:  # query heads go where their keys go
            return split_heads(local_heads, context) * (heads // local_heads)

        def own_heads(x: jax.Array, axis: int) -> jax.Array:
            padded = padded_heads(x.shape[axis])
            share = padded // context
            return jax.lax.dynamic_slice_in_dim(pad_axis(x, axis, padded), here * share, share, axis)

        def exchange(name: str, x: jax.Array) -> jax.Array:
            if context == 1 or split.count(name) is None:
                return own_heads(x, 2) if context > 1 else x[:, : split.count(name)]
            x = pad_axis(x, 2, padded_heads(x.shape[2]))
            return jax.lax.all_to_all(x, CONTEXT, split_axis=2, concat_axis=1, tiled=True)[:, : split.count(name)]

        def back(name: str, x: jax.Array, heads: int) -> jax.Array:
            x = pad_axis(x, 1, split.padded(name, x.shape[1]))
            if context == 1:
                return x
            if split.count(name) is None:
                return jax.lax.all_gather(x, CONTEXT, axis=2, tiled=True)[:, :, :heads]
            return jax.lax.all_to_all(x, CONTEXT, split_axis=1, concat_axis=2, tiled=True)[:, :, :heads]

        known = [leaf for _, leaf in flat]
        for i, leaf in zip(given, leaves, strict=True):
            known[i] = own_heads(leaf, 3) if i in of_heads and context > 1 else leaf
        heads = next(iter(q.values())).shape[2]
        whole = ({name: exchange(name, x) for name, x in part.items()} for part in (q, k, v))
        out = local(*whole, jax.tree.unflatten(structure, known), kernel)
        return {name: back(name, x, heads) for name, x in out.items()}

    streams = {name: split.spec(name, batch, heads=True) for name in q}
    queried = {t.stream for call in calls for t in call.sets[0].queries}
    mapped = jax.shard_map(
        shard,
        mesh=split.mesh,
        in_specs=(streams, streams, streams, [specs[i] for i in given]),
        out_specs={name: streams[name] for name in queried},
        check_vma=False,
    )
    return mapped(dict(q), dict(k), dict(v), [flat[i][1] for i in given])
