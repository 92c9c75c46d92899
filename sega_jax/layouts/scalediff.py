"""ScaleDiff's neighborhood patch attention: small query patches, each seeing one window of native size.

The image is cut into patches of half the native sides, which do not overlap; a patch asks the window of native size
around it, pushed back inside at the borders.  Text is seen by every patch and asks every window; its answers are
averaged (ScaleDiff, arXiv 2510.25818, and its code for FLUX, KSH00906/ScaleDiff).

Image positions are those of the whole canvas.  A window's text stands at the window's first token, which puts every
text-image and image-image distance into the trained range.  RoPE is relative, so instead of turning the text keys
anew for every window the queries are turned by their position *inside* their window when they ask the text: nothing
is computed per window except the text's own questions.

Two paths give the same numbers:

* ``blocks``: tokens in patch order through the whole model, windows as a block map over tiles of a quarter of the
  native sides.  Nothing is gathered.  Serves everything but jitter.
* ``windows``: a row of windows at a time gathered into dense calls, with traced offsets, so one compilation serves all
  draws of the jitter, and kernels without block maps can serve it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.geometry import Grid
from sega_jax.layouts.blocks import BlockMap, from_blocks
from sega_jax.layouts.streams import Call, Content, KeySet, TextAndImage, Tokens

Path = Literal["auto", "blocks", "windows"]
Starts = np.ndarray | jax.Array


@dataclass(frozen=True)
class Axis:
    """Patches and windows along one axis, in tokens.

    Attributes:
        tokens: of the canvas.
        patch: queries of a patch; ``tokens`` is a multiple of it.
        keys: keys of a window.
    """

    tokens: int
    patch: int
    keys: int

    @property
    def tile(self) -> int:
        """Every window starts at a multiple of this, without jitter."""
        return self.patch // 2

    def starts(self, offset: int | jax.Array | None = None) -> tuple[Starts, Starts]:
        """First query of every patch and first key of its window, i32 each.

        Args:
            offset: jitter in 0…patch (may be traced); there is one patch more then, and the first and last may
                reach beyond the canvas.  None: no jitter.
        """
        count = self.tokens // self.patch + (offset is not None)
        queries = np.arange(count, dtype=np.int32) * self.patch
        if offset is not None:
            queries = queries - offset
        clip = jnp.clip if isinstance(queries, jax.Array) else np.clip
        return queries, clip(queries + (self.patch - self.keys) // 2, 0, self.tokens - self.keys)


def axis(tokens: int, native: int, kv_mult: float | int = 1.0, name: str = "side") -> Axis:
    """Patches and windows of a side.

    Args:
        tokens: of the side.
        native: tokens of the trained side; patches have half of it.
        kv_mult: keys of a window over ``native``, a multiple of one half, at least 1; never more than there are.
        name: of the side, for complaints.

    Raises:
        ValueError: a side that is no multiple of half the native one, or shorter than it.
    """
    if native < 4 or native % 4:
        raise ValueError(f"window={native} tokens ({name}): expected a multiple of 4, of which patches are halves")
    if tokens < native or tokens % (native // 2):
        near = max(native, round(tokens / (native // 2)) * (native // 2))
        raise ValueError(
            f"{name} of {tokens} tokens: patches of half a window of {native} need a multiple of {native // 2} and at "
            f"least {native}; try {near} tokens, another window, or layout='dense'"
        )
    return Axis(tokens, native // 2, min(tokens, round(kv_mult * native)))


@dataclass(frozen=True)
class Neighborhood(TextAndImage):
    """Neighborhood patch attention.

    Attributes:
        window: native tokens per side (rows, columns), multiples of 4; None is the family's trained grid.
        kv_mult: side of the key window over ``window``'s, a multiple of one half, at least 1.  Above 1 distances leave
            the trained range, and a positional method may stretch them: it is asked for the window's grid.
        jitter: shift the patches by up to one patch per axis, drawn anew at every step; hides seams.  Off in the
            published evaluation.  Takes the path ``windows``.
        path: see the module; ``auto`` is ``blocks`` unless there is jitter.
    """

    window: tuple[int, int] | None = None
    kv_mult: float | int = 1.0
    jitter: bool = False
    path: Path = "auto"

    def __post_init__(self):
        if self.window is not None and (len(self.window) != 2 or min(self.window) < 4):
            raise ValueError(f"window={self.window}: expected tokens per side (rows, columns), multiples of 4")
        object.__setattr__(self, "kv_mult", float(self.kv_mult))
        if self.kv_mult < 1 or 2 * self.kv_mult % 1:
            raise ValueError(f"kv_mult={self.kv_mult}: expected 1, 1.5, 2, …")
        if self.path not in ("auto", "blocks", "windows"):
            raise ValueError(f"path={self.path!r}: expected auto, blocks or windows")
        if self.jitter and self.path == "blocks":
            raise ValueError("path='blocks' with jitter: jittered windows do not fall on tiles; use path='windows'")

    @property
    def name(self) -> str:
        """``scalediff``, or with the options that differ from the defaults: ``scalediff(jitter=True)``."""
        given = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"scalediff({', '.join(given)})" if given else "scalediff"

    def axes(self, grid: Grid) -> tuple[Axis, Axis]:
        """Patches and windows of rows and of columns.

        Raises:
            ValueError: the grid does not divide into patches, see `axis`.
        """
        native = self.window or grid.spec.trained
        return (
            axis(grid.height, native[0], self.kv_mult, "height"),
            axis(grid.width, native[1], self.kv_mult, "width"),
        )

    def grids(self, grid: Grid) -> dict[str, Grid]:
        """The window's grid: what positional methods see, plain RoPE wherever it is no larger than the trained one."""
        rows, columns = self.axes(grid)
        return {"window": grid.spec.grid(rows.keys, columns.keys, grid.text_tokens)}

    @property
    def by_blocks(self) -> bool:
        """Whether the path is ``blocks``."""
        return self.path == "blocks" or (self.path == "auto" and not self.jitter)

    def order(self, grid: Grid) -> dict[str, np.ndarray]:
        """Patch order for the path ``blocks``; the other takes the image row by row."""
        return {"image": patch_order(*self.axes(grid))} if self.by_blocks else {}

    def draw(self, key: jax.Array, grid: Grid) -> Content:
        """Content of one step: jitter ``{"offsets": i32 [1, 2]}``, uniform on 0…patch with both ends; None without."""
        if not self.jitter:
            return None
        limits = jnp.asarray([side.patch + 1 for side in self.axes(grid)], jnp.int32)
        return {"offsets": jax.random.randint(key, (1, 2), 0, limits[None], jnp.int32)}

    def calls(self, grid: Grid, content: Content = None) -> tuple[Call, ...]:
        """Attention calls.

        Args:
            grid: of the whole canvas.
            content: as `draw` gives it; None is no jitter.
        """
        if self.by_blocks:
            return _block_calls(grid, *self.axes(grid))
        return _window_calls(grid, *self.axes(grid), None if content is None else content["offsets"][0])


def _rope(stream: str) -> tuple[str, str]:
    return "window", stream


def _corner_ids(grid: Grid, ids: np.ndarray, rows: Starts, columns: Starts) -> Starts:
    """Ids [n, axes] moved to every window's first token: [windows, n, axes]."""
    numbers = jnp if isinstance(rows, jax.Array) else np
    down, across = (x.reshape(-1).astype(np.float32) for x in numbers.meshgrid(rows, columns, indexing="ij"))
    return ids[None] + _shift(grid, down, across)[:, None]


def _shift(grid: Grid, rows: Starts, columns: Starts) -> Starts:
    """Rows and columns f32 [...] as ids [..., axes], 0 on the other axes."""
    numbers = jnp if isinstance(rows, jax.Array) else np
    given = dict(zip(grid.spec.spatial, (rows, columns), strict=True))
    return numbers.stack([given.get(a, numbers.zeros_like(rows)) for a in range(len(grid.spec.dims))], -1)


# -- blocks ------------------------------------------------------------------------------------------------------


def patch_order(rows: Axis, columns: Axis) -> np.ndarray:
    """Tokens in patch order: i32 [N], patch by patch, tile by tile inside (2 x 2), raster inside."""
    number = np.arange(rows.tokens * columns.tokens, dtype=np.int32)
    number = number.reshape(-1, 2, rows.tile, columns.tokens // columns.patch, 2, columns.tile)
    return number.transpose(0, 3, 1, 4, 2, 5).reshape(-1)


def window_map(rows: Axis, columns: Axis, queries: int) -> BlockMap:
    """Windows as a block map: one row of ``queries`` queries per patch, key blocks are tiles in `patch_order`."""
    across = columns.tokens // columns.patch
    (_, top), (_, left) = rows.starts(), columns.starts()
    y = (top // rows.tile)[:, None] + np.arange(rows.keys // rows.tile)  # [patch rows, tile rows]
    x = (left // columns.tile)[:, None] + np.arange(columns.keys // columns.tile)
    y, x = y[:, None, :, None], x[None, :, None, :]
    block = 4 * (y // 2 * across + x // 2) + 2 * (y % 2) + x % 2
    block = block.reshape(len(top) * len(left), -1)
    pattern = np.full((len(block), 4 * len(block)), -1)
    np.put_along_axis(pattern, block, 0, axis=1)
    side = rows.tile * columns.tile
    return from_blocks(pattern, np.zeros((0, queries, side), bool), queries, side)


@lru_cache(maxsize=16)
def _block_calls(grid: Grid, rows: Axis, columns: Axis) -> tuple[Call, ...]:
    ids, order = grid.ids(), patch_order(rows, columns)
    (a, top), (b, left) = rows.starts(), columns.starts()
    patches = len(a) * len(b)
    image = Tokens("image", _rope("image"), ids["image"][order])
    pixels = KeySet((image,), (image,), window_map(rows, columns, rows.patch * columns.patch))
    if not grid.text_tokens:
        return (Call((pixels,), ("scatter",)),)
    # where a query stands inside its window, in patch order
    y, x = order // columns.tokens, order % columns.tokens
    inside = ids["image"][order]
    inside = inside - _shift(grid, *(s.astype(np.float32) for s in (top[y // rows.patch], left[x // columns.patch])))
    words = Tokens("text", _rope("text"), ids["text"])
    prompt = KeySet((Tokens("image", _rope("image"), inside),), (words,))
    # the text's questions, once per window, from the window's first token
    each = np.tile(np.arange(grid.text_tokens, dtype=np.int32), patches)
    moved = _corner_ids(grid, ids["text"], top, left).reshape(-1, len(grid.spec.dims))
    asking = Tokens("text", _rope("text"), moved, each)
    still = Tokens("text", _rope("text"), np.tile(ids["text"], (patches, 1)), each)
    return (
        Call((pixels, prompt), ("scatter",)),
        Call(
            (KeySet((asking,), (image,), window_map(rows, columns, grid.text_tokens)), KeySet((still,), (words,))),
            ("mean",),
        ),
    )


# -- windows -----------------------------------------------------------------------------------------------------


def _tokens_of(rows: Starts, columns: Starts, sides: tuple[int, int], canvas: tuple[int, int]) -> Starts:
    """Tokens of rectangles by their first rows and columns: i32 [rectangles, n]; those off the canvas are padding."""
    y = rows[:, None] + np.arange(sides[0], dtype=np.int32)[None]
    x = columns[:, None] + np.arange(sides[1], dtype=np.int32)[None]
    y, x = y[:, None, :, None], x[None, :, None, :]
    numbers = jnp if isinstance(y, jax.Array) else np
    inside = (y >= 0) & (y < canvas[0]) & (x >= 0) & (x < canvas[1])
    token = numbers.where(inside, y * canvas[1] + x, canvas[0] * canvas[1])
    return token.reshape(len(rows) * len(columns), sides[0] * sides[1])


def _window_calls(grid: Grid, rows: Axis, columns: Axis, offsets: jax.Array | None) -> tuple[Call, ...]:
    u, v = (None, None) if offsets is None else (offsets[0], offsets[1])
    (a, top), (b, left) = rows.starts(u), columns.starts(v)
    canvas = (grid.height, grid.width)
    queries = _tokens_of(a, b, (rows.patch, columns.patch), canvas)
    keys = _tokens_of(top, left, (rows.keys, columns.keys), canvas)
    ids = grid.ids()
    image_ids = np.concatenate([ids["image"], np.zeros_like(ids["image"][:1])])  # the last row serves padding
    if isinstance(queries, jax.Array):
        image_ids = jnp.asarray(image_ids)
    words = ()
    if grid.text_tokens:
        words = (Tokens("text", _rope("text"), _corner_ids(grid, ids["text"], top, left)[None]),)
    asking = (*words, Tokens("image", _rope("image"), image_ids[queries][None], queries[None]))
    answering = (*words, Tokens("image", _rope("image"), image_ids[keys][None], keys[None]))
    reduce = ("mean",) * len(words) + ("scatter",)
    return (Call((KeySet(asking, answering),), reduce, groups_at_once=len(b)),)
