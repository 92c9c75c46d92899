"""Streams and calls: where a token sits, and whom it sees.

A sequence is a dict of named streams (text, image, low-resolution image, ...), kept as separate arrays
``[B, N, H, D]`` through all blocks.  A layout describes attention as a static tuple of `Call`s over a traced
pytree of positions and indices; models hand over un-rotated q, k, v and never see positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from sega_jax.geometry import Grid
from sega_jax.layouts.blocks import BlockMap, Leaf
from sega_jax.positional.rope import Rope, magnitudes, phases

StreamKind = Literal["text", "image"]
Reduction = Literal["scatter", "mean"]
Content = Any  # a pytree of arrays: what of a layout is traced


@dataclass(frozen=True)
class Stream:
    """How a model treats one stream.

    Attributes:
        name: key in the dict of streams.
        kind: which of the model's embedder and double-block weights it uses.
        sigma: the stream's own noise level, or None for the sampler's (Scale-DiT's clean stream has 0).
        adapter: what the model's adapters (`models.lora`) change for this stream, if it has any: ``"all"``,
            ``"attention"`` (queries, keys and values only), or None for nothing.
    """

    name: str
    kind: StreamKind
    sigma: float | None = None
    adapter: Literal["all", "attention"] | None = None


class Table(NamedTuple):
    """Rotation of the tokens of a call: ``cos, sin`` f32 [b, g, n, h, D/2], ``magnitude`` f32 [b, 1, 1, h, D/2].

    ``b``, ``g`` and ``h`` are 1 wherever the rotation does not depend on sample, group or head.
    """

    cos: jax.Array
    sin: jax.Array
    magnitude: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tokens:
    """One stream's share of a call.

    Attributes:
        stream: name of the stream.
        rope: ``(grid, kind)``, which of the step's ropes turns these tokens; None leaves them un-rotated.
        ids: positions on that grid, f32 [n, axes], [b, n, axes] or [b, groups, n, axes].
        index: which tokens of the stream, i32 [n], [b, n] or [b, groups, n]; None takes all in order.
            An index equal to the stream's length is padding: a zero token on input, dropped on output.
        table: the rotation (`Table`), once `bind` has met positions and ropes.
        length: i32 [b] or [b, groups], how many of these tokens are seen as keys; they come first, what is behind them
            is padding, whose own output is nobody's.  None is all.
    """

    stream: str = field(metadata={"static": True})
    rope: tuple[str, str] | None = field(default=None, metadata={"static": True})
    ids: Leaf = None
    index: Leaf = None
    table: Leaf = None
    length: Leaf = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeySet:
    """Queries and keys of one softmax, or of one part of it.

    Attributes:
        queries: streams asking, concatenated in this order.
        keys: streams answering, concatenated in this order.  Under a block map or causally, which count them, only the
            last may have a length.
        block_map: which key blocks each query block visits; None is all.
        causal: the ``i``-th query sees only the first ``i + 1`` keys; without a block map.
    """

    queries: tuple[Tokens, ...]
    keys: tuple[Tokens, ...]
    block_map: BlockMap | None = None
    causal: bool = field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Call:
    """One attention call: key sets over the same query tokens, merged by log-sum-exp.

    Attributes:
        sets: key sets; all name the same query streams and indices (positions may differ).
        reduce: per query stream, ``"scatter"`` writes each output row to its token, ``"mean"`` averages what a
            token's questions got: over the groups where every group asks with the whole stream, else over the
            rows of the index that name it.
        groups_at_once: gather and compute this many groups at a time (it divides their number), so that keys shared
            by many groups are not all copied at once; None is all.
    """

    sets: tuple[KeySet, ...]
    reduce: tuple[Reduction, ...] = field(metadata={"static": True})
    groups_at_once: int | None = field(default=None, metadata={"static": True})


@runtime_checkable
class Layout(Protocol):
    """Where tokens sit and whom they see, for a geometry.

    The object itself is static (hashable, part of what is compiled): names, sizes, capacities.  Whatever may change
    without compiling again (regions, jitter offsets, cached tokens) is ``content``, a pytree of arrays handed to
    `Velocity.advance` with every step; each of its arrays has a leading axis of the batch size or of 1, and is
    repeated with the batch under true guidance.  Layouts without any are called with None.  A layout that draws its
    content anew for every step has ``draw(key, grid) -> content`` (see `draw`).

    A layout may have ``order(grid) -> {stream: i32 [N]}``, the order in which the model is to hold a stream's tokens
    and in which `calls` counts them; `enter` and `leave` are around it (see `ordered`).

    A layout may have ``given(content) -> {stream: KeysValues}``, keys and values of streams that are asked but not
    computed, [layers, B, N, heads, head_dim].

    A canvas is a whole picture of latents; a sampler's latents are one array (the canvas ``"image"``) or a dict of
    canvases by name, of which the largest one has the step's grid.
    """

    name: str

    def streams(self) -> tuple[Stream, ...]: ...

    def grids(self, grid: Grid) -> dict[str, Grid]:
        """Grids that positional encodings are asked for; a call's tokens name one of them.

        Statistics of the latent are measured on the canvas of that name, or on the only one.
        """
        ...

    def enter(self, canvases: Mapping[str, jax.Array], content: Content) -> Mapping[str, jax.Array]:
        """Canvases as tokens, row by row [B, H W, C], to the model's image streams [B, N, C]."""
        ...

    def leave(
        self, streams: Mapping[str, jax.Array], canvases: Mapping[str, jax.Array], content: Content
    ) -> Mapping[str, jax.Array]:
        """Image streams to canvases as tokens, shaped as ``canvases`` (names may be left out): `enter` turned round."""
        ...

    def calls(self, grid: Grid, content: Content) -> tuple[Call, ...]: ...


class TextAndImage:
    """The part of a `Layout` of two streams, text and the whole image, whose canvas is the image stream as it is."""

    def streams(self) -> tuple[Stream, ...]:
        return Stream("text", "text"), Stream("image", "image")

    def enter(self, canvases: Mapping[str, jax.Array], content: Content) -> Mapping[str, jax.Array]:
        del content
        return canvases

    def leave(
        self, streams: Mapping[str, jax.Array], canvases: Mapping[str, jax.Array], content: Content
    ) -> Mapping[str, jax.Array]:
        del canvases, content
        return streams


def ordered(
    layout: Layout, grid: Grid, streams: Mapping[str, jax.Array], inverse: bool = False
) -> dict[str, jax.Array]:
    """Streams [B, N, C] in the order that the layout's calls count, or back; as they are where it asks for none."""
    orders = layout.order(grid) if hasattr(layout, "order") else {}
    orders = {name: np.argsort(order) if inverse else order for name, order in orders.items()}
    return {name: x[:, orders[name]] if name in orders else x for name, x in streams.items()}


def draw(layout: Layout, key: jax.Array, grid: Grid) -> Content:
    """The content of one step of a layout that draws it; None for the others."""
    return layout.draw(key, grid) if hasattr(layout, "draw") else None


def _table(rope: Rope, ids: ArrayLike) -> Table:
    ids = jnp.asarray(ids)
    ids = ids[:, None] if ids.ndim == 3 else ids.reshape(*(1,) * (4 - ids.ndim), *ids.shape)  # [b, g, n, axes]

    def sample_and_head(x: jax.Array) -> jax.Array:  # [pairs] | [b, pairs] | [b, h, pairs] -> [b, h, pairs]
        if x.ndim > 3:
            raise ValueError(f"a rope has at most batch and head axes before the pairs, got shape {x.shape}")
        return x.reshape(1, 1, -1) if x.ndim == 1 else x.reshape(x.shape[0], -1, x.shape[-1])

    turned = phases(Rope(tuple(sample_and_head(f) for f in rope.frequencies), ()), ids)  # [b', h, b, g, n, pairs]
    rope_batch, heads, id_batch = turned.shape[:3]
    if rope_batch > 1 and id_batch > 1:
        turned = jnp.stack([turned[i, :, i] for i in range(id_batch)])
    else:
        turned = jnp.moveaxis(turned, 2, 1).reshape(rope_batch * id_batch, heads, *turned.shape[3:])
    turned = jnp.moveaxis(turned, 1, 3)  # [b, g, n, h, pairs]
    magnitude = sample_and_head(magnitudes(rope))[:, None, None]
    return Table(jnp.cos(turned), jnp.sin(turned), magnitude)


def bind(
    calls: tuple[Call, ...],
    ropes: Mapping[str, Mapping[str, Rope]],
    lengths: Mapping[str, ArrayLike] | None = None,
) -> tuple[Call, ...]:
    """Positions and this step's ropes become rotation tables, once per step for all blocks.

    Args:
        calls: a layout's calls.
        ropes: grid name -> stream kind -> `Rope`, as the positional method returned it for that grid.
        lengths: stream -> i32 [B], its tokens that are no padding; they come first (masked prompts of several
            lengths).  Wherever the stream is a key, what is behind them is not seen.

    Raises:
        ValueError: a layout that picks tokens of a stream with lengths, or sets lengths of its own there.
    """
    known: dict[tuple[tuple[str, str], int], Table] = {}  # queries and keys usually share their ids

    def tokens(t: Tokens) -> Tokens:
        if t.rope is None:
            return replace(t, ids=None)
        slot = (t.rope, id(t.ids))
        if slot not in known:
            grid, kind = t.rope
            known[slot] = _table(ropes[grid][kind], t.ids)
        return replace(t, ids=None, table=known[slot])

    def seen(t: Tokens) -> Tokens:
        if lengths is None or t.stream not in lengths:
            return t
        if t.index is not None or t.length is not None:
            raise ValueError(
                f"stream {t.stream!r} has lengths per sample, so it can be a key only whole and in order; this layout "
                "picks some of its tokens"
            )
        return replace(t, length=lengths[t.stream])

    def key_set(s: KeySet) -> KeySet:
        return replace(s, queries=tuple(map(tokens, s.queries)), keys=tuple(seen(tokens(t)) for t in s.keys))

    return tuple(replace(call, sets=tuple(map(key_set, call.sets))) for call in calls)
