"""Mixed resolution: tokens of several sizes in one sequence, every query asking on its own grid (CRPA).

Level 0 is the finest grid; a token of level ``l`` covers ``2**l`` fine tokens per side.  One attention call per level
of the queries: keys of all levels take positions in units of that level's grid, and finer keys are thinned to the one
at each cell's top left corner, so that every difference of positions is an integer, as in training (Wu et al., arXiv
2511.19778).

Which cells are refined is traced, so a new region compiles nothing; how many tokens there is room for is static.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.geometry import Grid
from sega_jax.layouts.blocks import Leaf
from sega_jax.layouts.streams import Call, Content, KeySet, Stream, Tokens

Array = jax.Array | np.ndarray
Positions = Literal["aligned", "pi-lr", "pi-hr", "stretched"]

LONGEST = 3.0  # boxes of up to this aspect ratio fit the room that is kept for the band around them


def level_name(level: int) -> str:
    """Name of a level's canvas and grid."""
    return f"level{level}"


# -- masks -------------------------------------------------------------------------------------------------------
#
# ``refined[l - 1]`` is bool [b, H / 2**l, W / 2**l]: cells of level l that finer tokens replace.  Nested: a cell of
# level l can be refined only where its cell of level l + 1 is.


def up(mask: Array, times: int = 2) -> Array:
    """Each cell of the last two axes repeated ``times`` x ``times``."""
    return mask.repeat(times, -2).repeat(times, -1)


def pool_any(mask: np.ndarray) -> np.ndarray:
    """2 x 2 cells to one, True if any is."""
    *lead, height, width = mask.shape
    return mask.reshape(*lead, height // 2, 2, width // 2, 2).any((-3, -1))


def dilate(mask: Array, radius: int) -> Array:
    """Grown by ``radius`` cells in a square neighbourhood of the last two axes; outside counts as False."""
    if radius == 0:
        return mask
    mask = jnp.asarray(mask)
    size = (1,) * (mask.ndim - 2) + (2 * radius + 1,) * 2
    return jax.lax.reduce_window(mask, False, jax.lax.bitwise_or, size, (1,) * mask.ndim, "SAME")


def erode(mask: Array, radius: int) -> Array:
    """Shrunk by ``radius`` cells; outside counts as True."""
    return mask if radius == 0 else ~dilate(~jnp.asarray(mask), radius)


def _grown(refined: Sequence[Array], pads: tuple[int, int]) -> list[Array]:
    return [dilate(jnp.asarray(mask), -(-pads[0] // 2)) for mask in refined]


def _shrunk(refined: Sequence[Array], pads: tuple[int, int]) -> list[Array]:
    return [erode(jnp.asarray(mask), pads[1]) for mask in refined]


def core(refined: Sequence[Array]) -> list[Array]:
    """Per level the tokens that are the picture's content, bool [b, H_l, W_l]; together they tile the plane."""
    return present(refined, (0, 0))


def present(refined: Sequence[Array], pads: tuple[int, int]) -> list[Array]:
    """Per level the tokens that exist: the core and a band of context around it, the paper's boundary expansion.

    The paper gives the band's width; that it is square and cut off at the border of the picture is our choice.

    Args:
        refined: masks of levels 1, 2, ...
        pads: width of the band in tokens: of the finer level, outwards; of the coarser level, inwards.
    """
    whole = [*(up(mask) for mask in _grown(refined, pads)), jnp.ones_like(jnp.asarray(refined[-1]))]
    gone = _shrunk(refined, pads)
    return [whole[0], *(a & ~b for a, b in zip(whole[1:], gone, strict=True))]


@partial(jax.jit, static_argnames=("pads",))
def band_counts(refined: tuple[Array, ...], pads: tuple[int, int]) -> jax.Array:
    """i32 [levels - 1, 2]: most cells after growing and fewest after shrinking, over the batch."""
    rows = [
        jnp.stack([grown.sum((1, 2)).max(), shrunk.sum((1, 2)).min()])
        for grown, shrunk in zip(_grown(refined, pads), _shrunk(refined, pads), strict=True)
    ]
    return jnp.stack(rows).astype(jnp.int32)


# -- layout ------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Arrangement:
    """Traced content of a `Mixed` layout; every array has a leading axis of the batch size or 1.

    Attributes:
        index: per level i32 [b, capacity], raster index of each token on its level's grid; cells of the next coarser
            level in raster order, row by row inside; H_l * W_l past the last token.
        keys: per level i32 [b, room], which tokens of the sequence its queries see, valid ones first.
        key_count: per level i32 [b], number of valid ones.
    """

    index: tuple[Leaf, ...]
    keys: tuple[Leaf, ...]
    key_count: tuple[Leaf, ...]


@dataclass(frozen=True)
class Mixed:
    """Text and one image stream ``[level 0 | level 1 | ...]``; canvases and grids are named by `level_name`.

    Made by `Mixed.sized`.

    Attributes:
        capacity: tokens per level there is room for.
        room: image keys per level of queries there is room for.
        ragged: whether fewer tokens than that may be there.
        positions: ``"aligned"``: CRPA.  The others are single-map baselines, one call in which everyone sees
            everyone: ``"pi-lr"`` in units of the coarsest grid, ``"pi-hr"`` of the finest, ``"stretched"`` as the
            latter, with the positional method asked for a grid that much larger than trained (NTK or YaRN over
            fine positions).
        text: ``"fine"`` or ``"coarse"``: the group in which text asks.
        pads: see `present`.
    """

    capacity: tuple[int, ...]
    room: tuple[int, ...]
    ragged: bool
    positions: Positions = "aligned"
    text: Literal["fine", "coarse"] = "fine"
    pads: tuple[int, int] = (0, 0)
    name: str = "mixed"

    @classmethod
    def sized(
        cls,
        counts: Sequence[int],
        shape: tuple[int, int],
        *,
        fewest: Sequence[int] | None = None,
        pads: tuple[int, int] = (0, 0),
        allowance: int = 0,
        positions: Positions = "aligned",
        text: Literal["fine", "coarse"] = "fine",
    ) -> Mixed:
        """A layout with room for regions of a budget.

        Args:
            counts: refined cells of levels 1, 2, ...
            shape: tokens of the finest grid.
            fewest: as ``counts``, of the sample of a batch that has fewest.
            pads: width of the bands; 0, 0 needs no room to spare.
            allowance: 0 has room for the band of one box of aspect ratio up to 3; each one more doubles the
                perimeter there is room for.
            positions, text: see the class.
        """
        cells = [shape[0] * shape[1] // 4**level for level in range(1, len(counts) + 1)]
        fewest = counts if fewest is None else fewest
        grown = [cls.bound(n, total, pads, allowance)[0] for n, total in zip(counts, cells, strict=True)]
        shrunk = [cls.bound(n, total, pads, allowance)[1] for n, total in zip(fewest, cells, strict=True)]
        whole = [*(4 * n for n in grown), cells[-1]]
        capacity = [whole[0], *(a - b for a, b in zip(whole[1:], shrunk, strict=True))]
        room = [cells[-1] + 3 * sum(grown[level:]) for level in range(len(capacity))]
        if positions != "aligned":
            room = [sum(capacity)] * len(capacity)
        ragged = pads != (0, 0) or tuple(counts) != tuple(fewest)
        return cls(tuple(capacity), tuple(room), ragged, positions, text, pads)

    @staticmethod
    def bound(count: int, cells: int, pads: tuple[int, int], allowance: int) -> tuple[int, int]:
        """(most, fewest) cells of a region of ``count`` cells after growing and after shrinking."""
        if count in (0, cells):
            return count, count
        half = math.sqrt(count) * (math.sqrt(LONGEST) + 1 / math.sqrt(LONGEST)) * 2**allowance
        out, inwards = -(-pads[0] // 2), pads[1]
        grown = math.ceil(count + 2 * out * half + 4 * out**2 if out else count)
        shrunk = math.floor(count - 2 * inwards * half if inwards else count)
        return min(grown, cells), max(shrunk, 0)

    @classmethod
    def fitting(cls, refined: Sequence[Array], shape: tuple[int, int], **options) -> Mixed:
        """The layout of least allowance that holds these regions; looks at their content.

        Args:
            refined: bool [b, H_l, W_l] per refined level.
            shape: tokens of the finest grid.
            options: as in `sized`.
        """
        pads = options.get("pads", (0, 0))
        masks = tuple(jnp.asarray(mask) for mask in refined)
        counts = [np.asarray(mask).sum((1, 2)) for mask in masks]
        most, fewest = [int(n.max()) for n in counts], [int(n.min()) for n in counts]
        needed = np.asarray(band_counts(masks, pads))
        cells = [shape[0] * shape[1] // 4**level for level in range(1, len(masks) + 1)]
        allowance = 0
        while not all(
            grown <= cls.bound(high, total, pads, allowance)[0] and shrunk >= cls.bound(low, total, pads, allowance)[1]
            for high, low, total, (grown, shrunk) in zip(most, fewest, cells, needed, strict=True)
        ):
            allowance += 1
        return cls.sized(most, shape, fewest=fewest, allowance=allowance, **options)

    @property
    def levels(self) -> int:
        return len(self.capacity)

    @property
    def tokens(self) -> int:
        """Image tokens of the sequence, with the room that is kept."""
        return sum(self.capacity)

    @property
    def single(self) -> int | None:
        """Level whose units all positions are in, of a single-map baseline."""
        return {"aligned": None, "pi-lr": self.levels - 1, "pi-hr": 0, "stretched": 0}[self.positions]

    @property
    def groups(self) -> tuple[int, ...]:
        """Levels that have queries, finest first."""
        return tuple(level for level, n in enumerate(self.capacity) if n)

    @property
    def plain(self) -> int | None:
        """The level that has all tokens, where there is only one: an ordinary dense step."""
        return self.groups[0] if len(self.groups) == 1 and self.single is None else None

    def pairs(self, text_tokens: int) -> int:
        """Query-key pairs of one attention layer: per group its queries times the keys it sees, with the room kept."""
        if self.single is not None:
            return (self.tokens + text_tokens) ** 2
        asking = {g: self.capacity[g] for g in self.groups}
        asking[self._text_group()] += text_tokens
        return sum(n * (self.room[g] + text_tokens) for g, n in asking.items())

    def _text_group(self) -> int:
        return self.groups[0 if self.text == "fine" else -1]

    # -- the layout's protocol -----------------------------------------------------------------------------------

    def streams(self) -> tuple[Stream, ...]:
        return Stream("text", "text"), Stream("image", "image")

    def level_grid(self, grid: Grid, level: int) -> Grid:
        """The grid of a level; ``grid`` is the finest."""
        return replace(grid, height=grid.height >> level, width=grid.width >> level)

    def grids(self, grid: Grid) -> dict[str, Grid]:
        if grid.spec.ids != "corner" or grid.spec.text_ids == "diagonal":
            raise ValueError(
                f"crpa: position ids are {grid.spec.ids!r} with text at {grid.spec.text_ids!r}; only 'corner' ids are "
                "implemented, with text off the picture's axes"
            )
        if self.positions == "stretched":
            small = self.level_grid(grid, self.levels - 1)
            return {level_name(0): replace(grid, spec=replace(grid.spec, trained=(small.height, small.width)))}
        levels = self.groups if self.single is None else (self.single,)
        return {level_name(level): self.level_grid(grid, level) for level in levels}

    def enter(self, canvases: Mapping[str, jax.Array], content: Content) -> dict[str, jax.Array]:
        parts = [_take(canvases[level_name(level)], content.index[level]) for level in self.groups]
        return {"image": jnp.concatenate(parts, axis=1)}

    def leave(
        self, streams: Mapping[str, jax.Array], canvases: Mapping[str, jax.Array], content: Content
    ) -> dict[str, jax.Array]:
        """Canvases are zero where a level has no token."""
        out, start = {name: jnp.zeros_like(x) for name, x in canvases.items()}, 0
        for level in self.groups:
            name = level_name(level)
            rows = streams["image"][:, start : start + self.capacity[level]]
            out[name] = _put(rows, content.index[level], out[name].shape[1])
            start += self.capacity[level]
        return out

    def positions_in(self, grid: Grid, content: Arrangement, unit: int) -> jax.Array:
        """Rotary positions of the sequence in units of a level's grid: f32 [b, L, axes].

        The paper's ``p_k^(q) = S_q / S_k p_k``, where S grows with resolution.
        """
        parts = []
        for level in self.groups:
            width = grid.width >> level
            cells = jnp.stack([content.index[level] // width, content.index[level] % width], -1)
            parts.append(cells.astype(jnp.float32) * 2.0 ** (level - unit))
        places = jnp.concatenate(parts, axis=1)
        own = dict(zip(grid.spec.spatial, (places[..., 0], places[..., 1]), strict=True))
        rest = (jnp.full_like(places[..., 0], value) for value in grid.origin)
        return jnp.stack([own.get(axis, value) for axis, value in enumerate(rest)], -1)

    def calls(self, grid: Grid, content: Content) -> tuple[Call, ...]:
        words = grid.ids()["text"]
        calls = []
        groups = self.groups if self.single is None else (self.single,)
        start = 0
        for group in groups:
            unit = level_name(group)
            places = self.positions_in(grid, content, group)
            text = Tokens("text", (unit, "text"), words)
            rows = None
            asking = (0, self.tokens)
            if self.single is None:
                asking = (start, start + self.capacity[group])
                start = asking[1]
            if len(groups) > 1:
                rows = np.arange(*asking, dtype=np.int32)
            queries = (Tokens("image", (unit, "image"), places[:, asking[0] : asking[1]], rows),)
            if grid.text_tokens and (self.single is not None or group == self._text_group()):
                queries = (text, *queries)
            seen, length = None, None
            if self.ragged or self.room[group] != self.tokens:
                seen = content.keys[group]
                places = jnp.take_along_axis(places, jnp.minimum(seen, self.tokens - 1)[..., None], 1)
            if self.ragged:
                length = content.key_count[group]
            keys = (Tokens("image", (unit, "image"), places, seen, length=length),)
            if grid.text_tokens:
                keys = (text, *keys)
            calls.append(Call((KeySet(queries, keys),), ("scatter",) * len(queries)))
        return tuple(calls)


def _take(tokens: jax.Array, index: Array) -> jax.Array:
    """[B, N, C] at i32 [B or 1, n] -> [B, n, C]; zeros past the end."""
    if index.shape[0] == 1:
        return tokens.at[:, index[0]].get(mode="fill", fill_value=0)
    return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(tokens, jnp.asarray(index))


def _put(rows: jax.Array, index: Array, length: int) -> jax.Array:
    """Inverse of `_take`: zeros where nothing is written."""
    empty = jnp.zeros((length, rows.shape[-1]), rows.dtype)
    index = jnp.broadcast_to(jnp.asarray(index), (rows.shape[0], index.shape[-1]))
    return jax.vmap(lambda x, i: empty.at[i].set(x, mode="drop"))(rows, index)


def _cell_order(height: int, width: int, coarsest: bool) -> np.ndarray:
    """Raster indices of a level's grid in the order of the sequence."""
    raster = np.arange(height * width, dtype=np.int32).reshape(height, width)
    if coarsest:
        return raster.reshape(-1)
    return raster.reshape(height // 2, 2, width // 2, 2).transpose(0, 2, 1, 3).reshape(-1)


def _first(mask: jax.Array, size: int) -> jax.Array:
    """Positions of True in [b, n], ascending: i32 [b, size], n past the last one."""
    find = partial(jnp.nonzero, size=size, fill_value=mask.shape[1])
    return jax.vmap(lambda row: find(row)[0])(mask).astype(jnp.int32)


@partial(jax.jit, static_argnames=("layout",))
def arrange(refined: tuple[Array, ...], layout: Mixed) -> Arrangement:
    """Tokens and keys of regions; truncated without notice where they exceed the layout's room (`Mixed.fitting`).

    Args:
        refined: bool [b, H_l, W_l] per refined level.
        layout: how much room there is.
    """
    exists = present(refined, layout.pads)
    grown = [None, *_grown(refined, layout.pads)]
    index, valid = [], []
    for level, mask in enumerate(exists):
        height, width = mask.shape[1:]
        order = _cell_order(height, width, level == layout.levels - 1)
        found = _first(mask.reshape(mask.shape[0], -1)[:, order], layout.capacity[level])
        index.append(jnp.append(order, np.int32(height * width))[found])
        valid.append(mask)

    def seen(picked: Sequence[jax.Array]) -> jax.Array:  # per level bool [b, H, W] -> [b, L]
        flat = [m.reshape(m.shape[0], -1) for m in picked]
        pairs = zip(flat, index, strict=True)
        taken = [jax.vmap(lambda m, i: m.at[i].get(mode="fill", fill_value=False))(m, i) for m, i in pairs]
        return jnp.concatenate(taken, axis=1)

    keys, counts = [], []
    for group in range(layout.levels):
        picked = seen(exists if layout.single is not None else _keys_of(group, exists, grown))
        keys.append(_first(picked, layout.room[group]))
        counts.append(picked.sum(1).astype(jnp.int32))
    return Arrangement(tuple(index), tuple(keys), tuple(counts))


def _keys_of(group: int, exists: Sequence[jax.Array], grown: Sequence[jax.Array | None]) -> list[jax.Array]:
    """Per level the tokens that queries of ``group`` see: every place once, at their own level where it has a token.

    Without bands this is the paper's stride sampling.  What is seen of a band is our choice: no place counts twice in a
    softmax.
    """
    picked = []
    for level, mask in enumerate(exists):
        if level < group:
            picked.append(jnp.zeros_like(mask))
        elif level == group:
            picked.append(mask)
        else:
            picked.append(mask & ~grown[level])
    if group:
        inside = up(grown[group + 1]) if group + 1 < len(exists) else jnp.ones_like(exists[group])
        missing = inside & ~exists[group]
        for level in range(group - 1, -1, -1):
            stride = 2 ** (group - level)
            has = exists[level][:, ::stride, ::stride] & missing
            picked[level] = picked[level].at[:, ::stride, ::stride].set(has)
            missing &= ~has
    return picked
