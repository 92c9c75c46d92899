"""Scale-DiT: text as a hub, local windows, and a small clean picture as guidance (arXiv 2510.16325).

Mask P is the one drawn in the paper's figure, mask K the one its code builds for its kernel (``build_mask.ipynb`` of
PeterYYZhang/Scale-DiT).

The sequence is ``[text, image, low]``.  The image is ordered window by window (16 x 16 tokens for FLUX.1, a quarter
of the trained side elsewhere), the four times smaller stream cell by cell, one cell under each window.  Nothing of
size N x N is ever built.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.geometry import Grid
from sega_jax.layouts.blocks import BlockMap, from_blocks, from_units
from sega_jax.layouts.hilbert import ORDERS, order
from sega_jax.layouts.streams import Call, Content, KeySet, Stream, Tokens

WINDOW = 16  # side of FLUX.1's window in image tokens, a quarter of its trained side
UNIT = (128, 64)  # queries and keys of the smallest block at that window, the one the published masks are made of
QUERY_CELLS, KEY_CELLS = 8, 4  # cells of the small stream per unit
LOW = ("off", "stream", "cached", "alone", "auto")


def unit_of(window: int) -> tuple[int, int]:
    """Queries and keys of the smallest block: half a window by a quarter of one."""
    return window * window // 2, window * window // 4


def _any(cells: np.ndarray, *sides: int) -> np.ndarray:
    rows, columns = cells.shape
    cells = np.pad(cells, ((0, -rows % sides[0]), (0, -columns % sides[1])))
    rows, columns = cells.shape
    return cells.reshape(rows // sides[0], sides[0], columns // sides[1], sides[1]).any((1, 3))


def _parts(height: int, width: int, mask: str, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Units visited, closed form, in the order "windows": image over image, image over low, low over low."""
    across = width // window
    count = (height // window) * across
    number = np.arange(count)
    row, column = number // across, number % across
    groups = -(-count // KEY_CELLS)

    query_window, key_window = np.repeat(number, 2), np.repeat(number, 4)
    if mask == "paper":
        local = query_window[:, None] == key_window[None, :]
        return local, np.ones((2 * count, groups), bool), np.ones((-(-count // QUERY_CELLS), groups), bool)
    query_tile = 2 * row[query_window] + np.arange(2 * count) % 2
    key_tile = 2 * row[key_window] + np.arange(4 * count) % 4 // 2
    local = np.abs(query_tile[:, None] - key_tile[None, :]) <= 1
    local &= np.abs(column[query_window][:, None] - column[key_window][None, :]) <= 1
    group = np.arange(groups)[None, :]
    lowest = np.maximum(query_window - 1, 0)[:, None] // KEY_CELLS
    highest = np.minimum(query_window + 1, count - 1)[:, None] // KEY_CELLS
    image_low = (lowest <= group) & (group <= highest)
    # small tokens up to half a cell apart share a cell or touch across its border
    touching = np.abs(row[:, None] - row[None, :]) <= 1
    touching &= np.abs(column[:, None] - column[None, :]) <= 1
    return local, image_low, _any(touching, QUERY_CELLS, KEY_CELLS)


def units(height: int, width: int, text_tokens: int, mask: str, window: int = WINDOW) -> np.ndarray:
    """Which units (`unit_of`) are visited, bool [N / unit_q, N / unit_k], over ``[text, image, low]``.

    Args:
        height, width: image tokens, multiples of ``window``.
        text_tokens: a multiple of the units.
        mask: ``"kernel"``, what the released sampling runs (mask K expanded to whole units, the function its
            weights were used with), or ``"paper"`` (mask P, exact: windows, all text, all of the small stream).
        window: side of a window, a multiple of 4.

    Raises:
        ValueError: where a unit would straddle two streams.
    """
    unit_q, unit_k = unit_of(window)
    if height % window or width % window:
        raise ValueError(f"{height} x {width} tokens: expected multiples of {window}")
    if text_tokens % unit_q:
        raise ValueError(f"text_tokens={text_tokens}: expected a multiple of {unit_q}")
    if mask not in ("kernel", "paper"):
        raise ValueError(f"mask={mask!r}: expected 'kernel' or 'paper'")
    local, image_low, low_low = _parts(height, width, mask, window)
    text_q, text_k = text_tokens // unit_q, text_tokens // unit_k
    return np.block(
        [
            [np.ones((text_q, text_k + local.shape[1]), bool), np.zeros((text_q, image_low.shape[1]), bool)],
            [np.ones((len(local), text_k), bool), local, image_low],
            [np.full((len(low_low), text_k), mask == "paper"), np.zeros((len(low_low), local.shape[1]), bool), low_low],
        ]
    )


def block_map(height: int, width: int, text_tokens: int, mask: str, block_q: int = 128, block_k: int = 128) -> BlockMap:
    """The mask of `units` for a kernel with blocks of ``block_q`` x ``block_k`` tokens, over ``[text, image, low]``."""
    return from_units(units(height, width, text_tokens, mask), *UNIT, block_q, block_k)


# -- any order, any radius -----------------------------------------------------------------------------------------


class Places(NamedTuple):
    """Where the tokens of a stream sit, in their order: int32 [N] each; ``cell`` is the raster number of the window."""

    row: np.ndarray
    column: np.ndarray
    cell: np.ndarray


class Reach(NamedTuple):
    """A key is seen from at most this far in rows, columns and window numbers; None is from anywhere."""

    row: int | None = None
    column: int | None = None
    cell: int | None = None


def places(rows: int, columns: int, window: int, kind: str) -> Places:
    """The tokens of a grid in an order, windows numbered in raster order."""
    row, column = (x.astype(np.int32) for x in np.divmod(order(rows, columns, window, kind), columns))
    return Places(row, column, row // window * (columns // window) + column // window)


def _blocks(x: np.ndarray, size: int) -> np.ndarray:
    """[N] -> [blocks, size]; the last token is repeated to fill, which adds no place to the last block."""
    return np.pad(x, (0, -len(x) % size), mode="edge").reshape(-1, size)


def expand(queries: Places, keys: Places, reach: Reach, block_q: int, block_k: int) -> Iterator[tuple]:
    """Row by row, the key blocks that may hold a visible key, and what is visible in them.

    Yields:
        ``(columns int [n], visible bool [n, block_q, block_k])`` for every query block.
    """
    axes = [
        (_blocks(q, block_q), _blocks(k, block_k), most)
        for q, k, most in zip(queries, keys, reach, strict=True)
        if most is not None
    ]
    count = -(-len(keys.row) // block_k)
    bounds = [(q.min(1), q.max(1), k.min(1), k.max(1), most) for q, k, most in axes]
    for row in range(-(-len(queries.row) // block_q)):
        near = np.ones(count, bool)
        for q_low, q_high, k_low, k_high, most in bounds:
            near &= (k_low - q_high[row] <= most) & (q_low[row] - k_high <= most)
        (columns,) = np.nonzero(near)
        visible = np.ones((len(columns), block_q, block_k), bool)
        for q, k, most in axes:
            visible &= np.abs(q[row][None, :, None] - k[columns][:, None, :]) <= most
        yield columns, visible


def _exact(queries: Places, keys: Places, reach: Reach, block_q: int, block_k: int) -> tuple[np.ndarray, list]:
    """Pattern number of every block (-1: not visited, 0: whole), and the patterns."""
    rows = []
    known: dict[bytes, int] = {}
    patterns: list[np.ndarray] = []
    count = -(-len(keys.row) // block_k)
    for columns, visible in expand(queries, keys, reach, block_q, block_k):
        row = np.full(count, -1)
        for column, block in zip(columns, visible, strict=True):
            if block.all():
                row[column] = 0
            elif block.any():
                key = block.tobytes()
                if key not in known:
                    patterns.append(block)
                    known[key] = len(patterns)
                row[column] = known[key]
        rows.append(row)
    return np.stack(rows), patterns


def _units(queries: Places, keys: Places, reach: Reach, unit_q: int, unit_k: int) -> np.ndarray:
    """Which units hold a visible pair, bool [Q, K]."""
    result = np.zeros((-(-len(queries.row) // unit_q), -(-len(keys.row) // unit_k)), bool)
    for row, (columns, visible) in enumerate(expand(queries, keys, reach, unit_q, unit_k)):
        result[row, columns] = visible.any((1, 2))
    return result


# -- the layout ----------------------------------------------------------------------------------------------------


def _check(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}: expected {expected}")


@dataclass(frozen=True)
class ScaleDiT:
    """Streams ``[text, image, low]`` under mask K or P.

    Attributes:
        mask: ``"kernel"`` (mask K: neighbouring windows, a strip of the small stream; near-linear, what the released
            weights are run with) or ``"paper"`` (mask P: the own window, all of the small stream).
        semantics: ``"block"``, every unit with a visible pair is visible whole, as the released kernel runs;
            ``"exact"``, pair by pair.  Mask P has no partial unit where windows are contiguous.
        window: side of a window in tokens; None is a quarter of the trained side (FLUX.1: 16).
        ratio: how many times smaller the small stream is, per side.
        radius: mask K: how far an image token sees, in rows and columns; None is half a window.
        low_radius: the same for small tokens among themselves; None is half a cell, at least 1.
        ordering: order of tokens (`layouts.hilbert.order`); under ``"block"`` it is part of the function.
        low: ``"off"``, no small stream; ``"stream"``, it runs along; ``"cached"``, its keys and values are given
            (mask K, where they depend neither on the picture nor on the noise level); ``"alone"``, only the small
            stream, to make that cache.
        adapt: which streams a LoRA adapts: ``"low"``, the small one (the paper, FLUX.2); ``"flux1"``, as the
            released FLUX.1 weights: also queries, keys and values of the image, and of the text in single blocks;
            None is ``"low"``.
        block: queries and keys of a block of the kernel, multiples of the unit; None chooses.
    """

    mask: str = "kernel"
    semantics: str = "block"
    window: int | None = None
    ratio: int = 4
    radius: int | None = None
    low_radius: int | None = None
    ordering: str = "windows"
    low: str = "stream"
    adapt: str | None = None
    block: tuple[int, int] | None = None
    name: str = "scale-dit"

    def __post_init__(self):
        _check(self.mask in ("kernel", "paper"), "mask", self.mask, "'kernel' or 'paper'")
        _check(self.semantics in ("block", "exact"), "semantics", self.semantics, "'block' or 'exact'")
        _check(self.ordering in ORDERS, "ordering", self.ordering, f"one of {', '.join(ORDERS)}")
        _check(self.low in LOW, "low", self.low, f"one of {', '.join(LOW)}")
        _check(self.adapt in (None, "low", "flux1"), "adapt", self.adapt, "'low' or 'flux1'")
        _check(self.ratio >= 1, "ratio", self.ratio, "a positive whole number")
        if self.window is not None:
            _check(self.window >= 4 and self.window % 4 == 0, "window", self.window, "a positive multiple of 4")
            _check(self.window % self.ratio == 0, "window", self.window, f"a multiple of ratio={self.ratio}")
        for name in ("radius", "low_radius"):
            value = getattr(self, name)
            _check(value is None or value >= 0, name, value, "a whole number of tokens, at least 0")
        if self.low in ("cached", "alone") and self.mask != "kernel":
            raise ValueError(f"low={self.low!r} with mask='paper': there the small stream reads what changes")

    # -- geometry ----------------------------------------------------------------------------------------------

    def window_of(self, grid: Grid) -> int:
        """Side of a window on this grid."""
        if self.window is not None:
            return self.window
        window = max(4, min(grid.spec.trained) // 4 // 4 * 4)
        _check(window % self.ratio == 0, "ratio", self.ratio, f"a divisor of the window, {window} tokens")
        return window

    def low_grid(self, grid: Grid) -> Grid:
        """Token grid of the small picture."""
        return replace(grid, height=grid.height // self.ratio, width=grid.width // self.ratio)

    def check(self, grid: Grid) -> None:
        """Raises ValueError, naming the nearest size, where ``grid`` is no whole number of windows."""
        window, pixels = self.window_of(grid), grid.spec.pixels_per_token
        step = window * pixels
        for name, tokens in (("height", grid.height), ("width", grid.width)):
            if tokens % window:
                size = tokens * pixels
                below, above = size // step * step, -(-size // step) * step
                nearest = above if below == 0 or above - size < size - below else below
                raise ValueError(
                    f"{name}={size}: layout {self.name} works in windows of {step} pixels; try {name}={nearest}"
                )

    def streams(self) -> tuple[Stream, ...]:
        joint = "attention" if self.adapt == "flux1" and self.low != "off" else None
        text, image = Stream("text", "text", adapter=joint), Stream("image", "image", adapter=joint)
        low = Stream("low", "image", sigma=0.0, adapter="all")
        return {"stream": (text, image, low), "alone": (low,)}.get(self.low, (text, image))

    def grids(self, grid: Grid) -> dict[str, Grid]:
        return {"image": grid}

    def enter(self, canvases: Mapping[str, jax.Array], content: Content) -> Mapping[str, jax.Array]:
        """The image, and beside it the small picture: ``content["low"]``, packed tokens [B, N / ratio^2, C]."""
        if self.low == "stream":
            if content is None or "low" not in content:
                raise ValueError(f"layout {self.name} with low='stream': content['low'], the small picture, is missing")
            return {**canvases, "low": content["low"]}
        return canvases

    def leave(
        self, streams: Mapping[str, jax.Array], canvases: Mapping[str, jax.Array], content: Content
    ) -> Mapping[str, jax.Array]:
        del content
        return {name: streams[name] for name in canvases}

    def given(self, content: Content) -> Mapping[str, Any] | None:
        """The small stream's keys and values, from ``content["given"]`` with rows before layers."""
        if self.low != "cached":
            return None
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), content["given"])

    def calls(self, grid: Grid, content: Content = None) -> tuple[Call, ...]:
        del content
        self.check(grid)
        return _calls(self, grid)

    # -- masks -------------------------------------------------------------------------------------------------

    def reaches(self, grid: Grid) -> dict[str, Reach]:
        """How far is seen: ``"image"`` image to image, ``"low"`` image to low, ``"alone"`` low to low."""
        window = self.window_of(grid)
        if self.mask == "paper":
            return {"image": Reach(cell=0), "low": Reach(), "alone": Reach()}
        radius = window // 2 if self.radius is None else self.radius
        low = max(1, window // self.ratio // 2) if self.low_radius is None else self.low_radius
        return {"image": Reach(radius, radius), "low": Reach(cell=1), "alone": Reach(low, low)}

    def places(self, grid: Grid) -> dict[str, Places]:
        """Where the tokens of the image and of the small stream sit, in the layout's order."""
        window, low = self.window_of(grid), self.low_grid(grid)
        cell = window // self.ratio
        # windows along a curve keep their cells in raster order, as the published counts do
        low_order = "windows" if self.ordering == "hilbert-windows" else self.ordering
        return {
            "image": places(grid.height, grid.width, window, self.ordering),
            "low": places(low.height, low.width, cell, low_order),
        }

    def blocks_of(self, grid: Grid) -> tuple[int, int]:
        """Queries and keys of a kernel's block on this grid."""
        unit_q, unit_k = unit_of(self.window_of(grid))
        block_q, block_k = self.block or (max(128, unit_q), max(128, unit_k))
        _check(block_q % unit_q == 0 and block_k % unit_k == 0, "block", self.block, f"multiples of {unit_q, unit_k}")
        return block_q, block_k

    @property
    def _published(self) -> bool:
        return self.ordering == "windows" and self.radius is None and self.low_radius is None and self.ratio == 4

    def _map(self, grid: Grid, which: str, whole: int = 0) -> BlockMap:
        """Block map of ``"image"``, ``"low"`` (asked by the image), ``"image+low"`` or ``"alone"`` (asked by itself),
        after ``whole`` leading keys that all see."""
        block_q, block_k = self.blocks_of(grid)
        unit = unit_of(self.window_of(grid))
        where, reach = self.places(grid), self.reaches(grid)
        pairs = {
            "image": [("image", "image", "image")],
            "low": [("image", "low", "low")],
            "alone": [("low", "low", "alone")],
        }
        pairs["image+low"] = pairs["image"] + pairs["low"]
        if self.semantics == "block":
            if self._published:
                local, low, alone = _parts(grid.height, grid.width, self.mask, self.window_of(grid))
                closed = {"image": local, "low": low, "alone": alone}
                parts = [closed[name] for _, _, name in pairs[which]]
            else:
                parts = [_units(where[q], where[k], reach[name], *unit) for q, k, name in pairs[which]]
            everyone = np.ones((len(parts[0]), whole // unit[1]), bool)
            return from_units(np.concatenate([everyone, *parts], 1), *unit, block_q, block_k)
        numbers, patterns = [], []
        for q, k, name in pairs[which]:
            number, found = _exact(where[q], where[k], reach[name], block_q, block_k)
            numbers.append(np.where(number > 0, number + len(patterns), number))
            patterns += found
        everyone = np.zeros((len(numbers[0]), whole // block_k), int)
        distinct = np.stack(patterns) if patterns else np.zeros((0, block_q, block_k), bool)
        return from_blocks(np.concatenate([everyone, *numbers], 1), distinct, block_q, block_k)

    def __str__(self) -> str:
        given = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.name != "name" and getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(given)})" if given else self.name


@lru_cache(maxsize=32)
def _calls(layout: ScaleDiT, grid: Grid) -> tuple[Call, ...]:
    low_grid, block_k = layout.low_grid(grid), layout.blocks_of(grid)[1]
    window = layout.window_of(grid)
    ids = grid.ids()
    where = layout.places(grid)
    image_order, low_order = (
        (place.row.astype(np.int32) * g.width + place.column).astype(np.int32)
        for place, g in ((where["image"], grid), (where["low"], low_grid))
    )
    raster = order(low_grid.height, low_grid.width, window // layout.ratio, "raster")
    low_ids = ids["image"].reshape(grid.height, grid.width, -1)[:: layout.ratio, :: layout.ratio]
    low_ids = low_ids[: low_grid.height, : low_grid.width].reshape(len(raster), -1)

    text = Tokens("text", ("image", "text"), ids["text"])
    whole_image = Tokens("image", ("image", "image"), ids["image"])
    image = Tokens("image", ("image", "image"), ids["image"][image_order], image_order)
    whole_low = Tokens("low", ("image", "image"), low_ids)
    low = Tokens("low", ("image", "image"), low_ids[low_order], low_order)

    calls = []
    seen = layout.low in ("stream", "cached")
    if layout.low != "alone":
        calls.append(Call((KeySet((text,), (text, whole_image)),), ("scatter",)))
        hub = (text, whole_low) if seen and layout.mask == "paper" else (text,)
        near = (image, low) if seen and layout.mask == "kernel" else (image,)
        which = "image+low" if len(near) == 2 else "image"
        aligned = grid.text_tokens % block_k == 0 and grid.tokens % block_k == 0
        if aligned and len(hub) == 1:
            local = layout._map(grid, which, grid.text_tokens)
            sets = (KeySet((image,), (text, *near), local),)
        elif len(near) == 1 or grid.tokens % block_k == 0:
            sets = (KeySet((image,), hub), KeySet((image,), near, layout._map(grid, which)))
        else:  # blocks would straddle the streams
            parts = (KeySet((image,), (x,), layout._map(grid, n)) for x, n in ((image, "image"), (low, "low")))
            sets = (KeySet((image,), hub), *parts)
        calls.append(Call(sets, ("scatter",)))
    if layout.low in ("stream", "alone"):
        if layout.mask == "paper":
            keys = KeySet((whole_low,), (text, whole_low))
        else:
            keys = KeySet((low,), (low,), layout._map(grid, "alone"))
        calls.append(Call((keys,), ("scatter",)))
    return tuple(calls)
