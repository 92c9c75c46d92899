"""Regions of a picture: drawn by hand, from a mask, or chosen by saliency; in the cells of a mixed layout."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from converters.files import expanded
from sega_jax.geometry import Grid
from sega_jax.layouts.crpa import dilate, pool_any, up
from sega_jax.media.images import load_mask

# clean estimate of the coarse latents f32 [B, h, w, C], its token grid -> score f32 [B, H, W], one per token
Saliency = Callable[[jax.Array, Grid], jax.Array]

FORMS = (
    "center:SHARE, box:X,Y,WIDTH,HEIGHT (pixels, or fractions of the picture), mask:FILE, auto:SHARE, autobox:SHARE; "
    "boxes, centers and masks joined by +, levels of a three-level picture from outer to inner joined by |"
)


def _share(text: str, where: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise ValueError(f"regions={where!r}: {text!r} is no share of the picture above 0 and at most 1; try 0.3")
    return share


def _number(value: float) -> str:
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _box_sides(share: float, rows: int, columns: int) -> tuple[int, int]:
    """Cells of a box of the picture's shape and this share of its area, at least one."""
    height = min(rows, max(1, round(rows * share**0.5)))
    return height, min(columns, max(1, round(share * rows * columns / height)))


@dataclass(frozen=True)
class Center:
    """A centred box of the picture's shape and ``share`` of its area."""

    share: float

    def __str__(self) -> str:
        return f"center:{_number(self.share)}"

    def cells(self, rows: int, columns: int, side: int) -> np.ndarray:
        """Bool [rows, columns]; ``side``: pixels per cell."""
        del side
        height, width = _box_sides(self.share, rows, columns)
        mask = np.zeros((rows, columns), bool)
        top, left = (rows - height) // 2, (columns - width) // 2
        mask[top : top + height, left : left + width] = True
        return mask


@dataclass(frozen=True)
class Box:
    """A rectangle: left, top, width, height in pixels, or all four in fractions of the picture."""

    left: float
    top: float
    width: float
    height: float
    fractions: bool

    def __str__(self) -> str:
        numbers = (self.left, self.top, self.width, self.height)
        return "box:" + ",".join(repr(float(n)) if self.fractions else str(int(n)) for n in numbers)

    def cells(self, rows: int, columns: int, side: int) -> np.ndarray:
        """Every cell the rectangle touches."""
        scale = (columns, rows) if self.fractions else (1 / side, 1 / side)
        left, right = self.left * scale[0], (self.left + self.width) * scale[0]
        top, bottom = self.top * scale[1], (self.top + self.height) * scale[1]
        slack = 1e-6
        if right > columns + slack or bottom > rows + slack:
            raise ValueError(
                f"regions={str(self)!r}: reaches beyond the picture of {columns * side} x {rows * side} pixels; "
                "give left, top, width, height inside it"
            )
        mask = np.zeros((rows, columns), bool)
        down = slice(int(top + slack), int(np.ceil(bottom - slack)))
        mask[down, int(left + slack) : int(np.ceil(right - slack))] = True
        return mask


@dataclass(frozen=True)
class Drawn:
    """A black and white picture of any size; white cells are refined.

    Attributes:
        source: the file's name.
        sha256: of the mask's size and bits.
        height, width, bits: the mask, packed.
    """

    source: str
    sha256: str
    height: int
    width: int
    bits: bytes

    def __str__(self) -> str:
        return f"mask:{self.source}@{self.sha256[:16]}"

    @classmethod
    def of(cls, mask: np.ndarray, source: str = "array") -> Drawn:
        """From a bool array [H, W]."""
        mask = np.asarray(mask)
        if mask.ndim != 2 or mask.dtype != bool or not mask.size:
            raise ValueError(f"regions: a mask of shape {mask.shape} and type {mask.dtype}; expected bool [H, W]")
        bits = np.packbits(mask).tobytes()
        digest = hashlib.sha256(repr(mask.shape).encode() + bits).hexdigest()
        return cls(source, digest, *mask.shape, bits)

    @classmethod
    def read(cls, path: str, sha256: str | None = None) -> Drawn:
        """From a picture file.

        Raises:
            ValueError: no such picture, or its content has another digest.
        """
        try:
            mask = load_mask(expanded(path))
        except (OSError, ValueError) as error:
            raise ValueError(f"regions='mask:{path}': cannot be read as a picture ({error}); give a PNG") from error
        drawn = cls.of(mask, path)
        if sha256 is not None and not drawn.sha256.startswith(sha256):
            raise ValueError(f"regions='mask:{path}': the file has changed since the picture was made; give --regions")
        return drawn

    def cells(self, rows: int, columns: int, side: int) -> np.ndarray:
        """Every cell with a white pixel in it."""
        del side
        count = self.height * self.width
        mask = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=count).astype(bool)
        mask = mask.reshape(self.height, self.width)
        tops, bottoms = _intervals(rows, self.height)
        lefts, rights = _intervals(columns, self.width)
        cells = np.empty((rows, columns), bool)
        for row, (top, bottom) in enumerate(zip(tops, bottoms, strict=True)):  # a mask may have 100 million pixels
            before = np.concatenate(([0], mask[top:bottom].any(0).cumsum()))
            cells[row] = before[rights] > before[lefts]
        return cells


def _intervals(cells: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """First pixel of every cell and the one behind its last, along one side; a cell has at least one pixel."""
    place = np.arange(cells)
    return place * pixels // cells, np.maximum(-(-(place + 1) * pixels // cells), 1)


@dataclass(frozen=True)
class Auto:
    """The most salient share of the picture, seen at the end of the coarse stage.

    Attributes:
        share: of the coarse cells.
        box: one box of the picture's shape instead of the best cells.
        saliency: ``"energy"`` (`energy`) or ``module:name`` of a function of one's own.
    """

    share: float
    box: bool = False
    saliency: str = "energy"

    def __str__(self) -> str:
        tail = "" if self.saliency == "energy" else f":{self.saliency}"
        return f"{'autobox' if self.box else 'auto'}:{_number(self.share)}{tail}"

    def score(self, clean: jax.Array, grid: Grid) -> jax.Array:
        """Saliency of the coarse result, f32 [B, H, W]."""
        if self.saliency == "energy":
            return energy(clean, grid)
        score = jnp.asarray(self.function()(clean, grid), jnp.float32)
        if score.shape != (clean.shape[0], grid.height, grid.width):
            raise ValueError(
                f"saliency {self.saliency!r} returned {score.shape}; expected {(len(clean), grid.height, grid.width)}"
            )
        return score

    def function(self) -> Saliency:
        """The saliency.

        Raises:
            ValueError: it cannot be imported.
        """
        if self.saliency == "energy":
            return energy
        module, _, name = self.saliency.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"regions='{self}': saliency {self.saliency!r} cannot be imported: {error}") from error

    def count(self, rows: int, columns: int) -> int:
        """Cells it takes of a grid."""
        if self.box:
            return int(np.prod(_box_sides(self.share, rows, columns)))
        return min(rows * columns, max(1, round(self.share * rows * columns)))

    def choose(self, score: jax.Array, within: jax.Array | None = None) -> jax.Array:
        """Bool [B, H, W] with `count` cells in every sample; ``within`` is contained in it."""
        if within is not None:
            score = jnp.where(within, score.max((1, 2), keepdims=True) * 2 + 1, score)
        if not self.box:
            return best_cells(score, self.count(*score.shape[1:]))
        return best_box(score, *_box_sides(self.share, *score.shape[1:]))


Shape = Center | Box | Drawn | Auto


@partial(jax.jit, static_argnames="count")
def best_cells(score: jax.Array, count: int) -> jax.Array:
    """The ``count`` highest cells of f32 [B, H, W], ties by raster order: bool [B, H, W]."""
    flat = score.reshape(score.shape[0], -1)
    _, index = jax.lax.top_k(flat, count)
    mask = jax.vmap(lambda row: jnp.zeros(flat.shape[1], bool).at[row].set(True))(index)
    return mask.reshape(score.shape)


@partial(jax.jit, static_argnames=("height", "width"))
def best_box(score: jax.Array, height: int, width: int) -> jax.Array:
    """The ``height`` x ``width`` box with the highest sum of f32 [B, H, W], the first of equals: bool [B, H, W]."""
    sums = jax.lax.reduce_window(score, 0.0, jax.lax.add, (1, height, width), (1, 1, 1), "VALID")
    best = jnp.argmax(sums.reshape(score.shape[0], -1), axis=1)
    top, left = best // sums.shape[2], best % sums.shape[2]
    rows, columns = jnp.arange(score.shape[1])[None, :], jnp.arange(score.shape[2])[None, :]
    tall = (rows >= top[:, None]) & (rows < top[:, None] + height)
    wide = (columns >= left[:, None]) & (columns < left[:, None] + width)
    return tall[:, :, None] & wide[:, None, :]


def energy(clean: jax.Array, grid: Grid) -> jax.Array:
    """Local spectral energy without the mean: the channels' variance in windows of 3 x 3 tokens, f32 [B, H, W].

    By Parseval a window's variance is the energy of its spectrum but for frequency zero.
    """
    batch, height, width, channels = clean.shape
    cells = clean.reshape(batch, grid.height, height // grid.height, grid.width, width // grid.width, channels)
    first, second = cells.mean((2, 4)), jnp.square(cells).mean((2, 4))

    def around(x: jax.Array) -> jax.Array:
        window = ((1, 3, 3, 1), (1, 1, 1, 1), "SAME")
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, *window)

    members = around(jnp.ones_like(first[..., :1]))
    return (around(second) / members - jnp.square(around(first) / members)).sum(-1)


@dataclass(frozen=True)
class Regions:
    """What to refine: shapes per level, from the outermost region to the finest; see `parse_regions`."""

    levels: tuple[tuple[Shape, ...], ...]

    def __str__(self) -> str:
        return "|".join("+".join(map(str, shapes)) for shapes in self.levels)

    @property
    def automatic(self) -> tuple[Auto, ...] | None:
        """The automatic choices, outermost first, or None for regions known beforehand."""
        if not isinstance(self.levels[-1][0], Auto):
            return None
        return tuple(shapes[0] for shapes in self.levels)

    def spread(self, refined_levels: int) -> Regions:
        """The same with a shape for every refined level: missing outer ones in geometric steps of the share.

        Raises:
            ValueError: more levels than the layout refines.
        """
        given = len(self.levels)
        if given > refined_levels:
            raise ValueError(
                f"regions={str(self)!r}: {given} levels of regions for a picture of {refined_levels + 1} levels, which "
                f"has {refined_levels}; leave some out, or raise levels in layout='crpa(levels={given + 1})'"
            )
        levels, missing, outermost = list(self.levels), refined_levels - given, self.levels[0]
        for step in range(1, missing + 1):
            grown: tuple[Shape, ...] = ()  # the inner region and a margin of one cell
            if len(outermost) == 1 and isinstance(outermost[0], (Center, Auto)):
                share = outermost[0].share ** (1 - step / (missing + 1))
                grown = (replace(outermost[0], share=share),)
            levels.insert(0, grown)
        return Regions(tuple(levels))

    def masks(self, grid: Grid) -> tuple[np.ndarray, ...]:
        """Bool [1, H_l, W_l] of levels 1, 2, ..., nested; for regions known beforehand, spread over the levels.

        Raises:
            ValueError: a region outside the picture or without a cell.
        """
        inner, out = None, []
        for level, shapes in enumerate(reversed(self.levels), 1):
            rows, columns = grid.height >> level, grid.width >> level
            mask = np.zeros((rows, columns), bool)
            for shape in shapes:
                mask |= shape.cells(rows, columns, grid.spec.pixels_per_token << level)
            if inner is not None:
                whole = pool_any(inner)
                mask |= whole if shapes else np.asarray(dilate(whole[None], 1))[0]
            if not mask.any():
                raise ValueError(f"regions={str(self)!r}: refines nothing of this picture; draw a larger region")
            out.append(mask[None])
            inner = mask
        return tuple(out)

    def choose(self, clean: jax.Array, grid: Grid) -> tuple[jax.Array, ...]:
        """Bool [B, H_l, W_l] of levels 1, 2, ... from the coarse result, for automatic regions.

        Args:
            clean: estimate of the coarsest latents, f32 [B, h, w, C].
            grid: of the coarsest tokens.
        """
        autos = self.automatic
        score = autos[-1].score(clean, grid)
        out, inner = [], None
        for place, auto in enumerate(reversed(autos)):
            inner = auto.choose(score, inner)
            out.append(up(inner, 2 ** (len(autos) - 1 - place)))
        return tuple(out)

    def counts(self, grid: Grid) -> tuple[int, ...]:
        """Refined cells of levels 1, 2, ...; ``grid`` is the finest."""
        if self.automatic is None:
            return tuple(int(mask.sum()) for mask in self.masks(grid))
        last = len(self.levels)
        return tuple(
            auto.count(grid.height >> last, grid.width >> last) * 4 ** (last - level)
            for level, auto in enumerate(reversed(self.automatic), 1)
        )


def _shape(text: str, whole: str, imports: bool) -> Shape:
    kind, _, rest = text.strip().partition(":")
    if kind == "center":
        return Center(_share(rest, whole))
    if kind in ("auto", "autobox"):
        share, _, saliency = rest.partition(":")
        if saliency and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", saliency) and saliency != "energy":
            raise ValueError(f"regions={whole!r}: saliency {saliency!r}; expected energy or module:name")
        if saliency not in ("", "energy") and not imports:
            raise ValueError(
                f"regions={whole!r}: {saliency!r} names code, and a file may not; type it yourself (--regions), or "
                "allow it with --trust-code"
            )
        return Auto(_share(share, whole), kind == "autobox", saliency or "energy")
    if kind == "mask" and rest:
        match = re.fullmatch(r"(.+)@([0-9a-f]{16})", rest)
        return Drawn.read(match[1], match[2]) if match else Drawn.read(rest)
    if kind == "box":
        parts = [part.strip() for part in rest.split(",")]
        try:
            numbers = [float(part) for part in parts]
        except ValueError:
            numbers = []
        if len(numbers) != 4 or not np.isfinite(numbers).all() or min(numbers[2:]) <= 0 or min(numbers) < 0:
            raise ValueError(
                f"regions={whole!r}: {text!r} is no box; expected box:LEFT,TOP,WIDTH,HEIGHT, sides above 0"
            )
        fractions = any("." in part or "e" in part.lower() for part in parts)
        if fractions and max(numbers) > 1:
            raise ValueError(
                f"regions={whole!r}: {text!r} mixes fractions and pixels; give four whole numbers of pixels, or four "
                "fractions of the picture from 0 to 1"
            )
        return Box(*numbers, fractions)
    raise ValueError(f"regions={whole!r}: {text!r} is no region; expected {FORMS}")


def parse_regions(text: str, *, imports: bool = True) -> Regions:
    """Regions of an expression such as ``center:0.3``, ``box:0,0,512,512+box:1024,0,512,512`` or ``auto:0.3``.

    Args:
        text: the expression.
        imports: whether a saliency ``module:name`` is allowed; not for text that comes out of a file.

    Raises:
        ValueError: anything else, with the forms there are.
    """
    levels = []
    for level in text.split("|"):
        shapes = tuple(
            _shape(part, text, imports) for part in re.split(r"\+(?=(?:center|box|mask|auto|autobox):)", level)
        )
        levels.append(shapes)
    automatic = [isinstance(shape, Auto) for shapes in levels for shape in shapes]
    if any(automatic) and (not all(automatic) or any(len(shapes) > 1 for shapes in levels)):
        raise ValueError(f"regions={text!r}: an automatic choice stands alone in its level, and then in all levels")
    shares = [shapes[0].share for shapes in levels if isinstance(shapes[0], Auto)]
    if shares != sorted(shares, reverse=True):
        raise ValueError(f"regions={text!r}: levels go from the outermost region to the finest; shares must fall")
    return Regions(tuple(levels))


def get_regions(regions: str | os.PathLike[str] | np.ndarray | Regions | Sequence[str]) -> Regions:
    """Regions from an expression, several of them to be joined, a mask as a bool array [H, W], or `Regions`.

    Raises:
        TypeError, ValueError: for anything else.
    """
    if isinstance(regions, Regions):
        return regions
    if isinstance(regions, str):
        return parse_regions(regions)
    if isinstance(regions, np.ndarray):
        return Regions(((Drawn.of(regions),),))
    if isinstance(regions, os.PathLike):
        return parse_regions(f"mask:{os.fspath(regions)}")
    if isinstance(regions, Sequence) and regions and all(isinstance(part, str) for part in regions):
        return parse_regions("+".join(regions))
    raise TypeError(f"regions={regions!r}: expected an expression ({FORMS}), a list of them, or a bool array [H, W]")


def overlay(pixels: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """A picture with its coarser tokens darkened, the more the coarser, and regions outlined.

    Args:
        pixels: f32 [H, W, 3] in [-1, 1].
        levels: int8 [h, w], level of the token at each fine place.
    """
    rows = np.arange(pixels.shape[0]) * levels.shape[0] // pixels.shape[0]
    columns = np.arange(pixels.shape[1]) * levels.shape[1] // pixels.shape[1]
    level = levels[np.ix_(rows, columns)].astype(np.int32)
    shade = 0.65 ** level.astype(np.float32)[..., None]
    out = (np.asarray(pixels, np.float32) + 1) * shade - 1
    edge = np.zeros(level.shape, bool)
    edge[1:] |= level[1:] != level[:-1]
    edge[:, 1:] |= level[:, 1:] != level[:, :-1]
    thick = max(1, max(level.shape) // 512)
    for _ in range(thick - 1):
        edge[:-1] |= edge[1:]
        edge[:, :-1] |= edge[:, 1:]
    out[edge] = (1.0, 0.2, -0.8)
    return out
