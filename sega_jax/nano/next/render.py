"""Truth for `nano`: a scene drawn at any canvas size.

Structure (place and size of the objects) scales with the canvas, textures keep their periods in pixels, and edges are
antialiased over one pixel.  So the true distribution is known at every resolution: at twice the side an object is twice
as large and carries twice as many stripes.

Textures lie on the canvas, not on the objects.  Those of the ground, and dots, repeat with every token, so a token need
not know where it is to draw them.  Stripes and checks repeat every two tokens, and which of the two comes first is
drawn by lot: neighbours have to agree.  The first kind survives a rescaling of positions, the second does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sega_jax.nano.next.grammar import Scene

FINE, COARSE = 16.0, 32.0  # pixels: periods of one and of two tokens
DARK = 0.4  # the second colour of an object's texture is this fraction of the first
GROUND_DARK = 0.72  # the same for the ground
DOT_RADIUS = 5.5  # pixels
SPECK_RADIUS = 4.5
LINE, JOINT = 6.0, 4.0  # widths of the lines of a lined and of a tiled ground, in pixels

OBJECT_RGB = {
    "red": (220, 50, 47),
    "orange": (245, 140, 30),
    "yellow": (245, 215, 50),
    "green": (60, 165, 75),
    "blue": (50, 95, 210),
    "purple": (140, 60, 175),
}
BACKGROUND_RGB = {
    "white": (240, 240, 240),
    "grey": (150, 150, 150),
    "pink": (245, 170, 200),
    "blue": (50, 95, 210),
    "green": (60, 165, 75),
}
ANCHORS = {  # centres of the objects as fractions of (width, height)
    "centre": ((0.5, 0.5),),
    "left": ((0.28, 0.5),),
    "right": ((0.72, 0.5),),
    "top": ((0.5, 0.28),),
    "bottom": ((0.5, 0.72),),
    "row": ((0.26, 0.5), (0.74, 0.5)),
    "column": ((0.5, 0.26), (0.5, 0.74)),
    "group": ((0.5, 0.26), (0.26, 0.74), (0.74, 0.74)),
}
RADIUS = {1: (0.21, 0.25), 2: (0.17, 0.20), 3: (0.16, 0.19)}  # by number of objects, of the shorter side
JITTER = 0.02  # of each side


@dataclass(frozen=True)
class Geometry:
    """Where the objects lie, in pixels.

    Attributes:
        centres: (x, y) of each object.
        radius: half the extent of every object.
        shift: which half of their period stripes and checks begin with, down and across: 0 or 1.
    """

    centres: tuple[tuple[float, float], ...]
    radius: float
    shift: tuple[int, int]


def geometry(scene: Scene, height: int, width: int, rng: np.random.Generator | None = None) -> Geometry:
    """Centres and radius for a canvas; ``rng`` draws jitter and shift, None gives the middle of their ranges."""
    dx, dy, size, *lots = rng.random(5) if rng is not None else (0.5, 0.5, 0.5, 0.0, 0.0)
    least, most = RADIUS[scene.count]
    return Geometry(
        centres=tuple(
            ((x + JITTER * (2 * dx - 1)) * width, (y + JITTER * (2 * dy - 1)) * height) for x, y in ANCHORS[scene.place]
        ),
        radius=(least + (most - least) * size) * min(height, width),
        shift=(int(lots[0] >= 0.5), int(lots[1] >= 0.5)),
    )


def signed_distance(shape: str, u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the outline in pixels, negative inside; every shape spans ``2 radius`` in both directions.

    Args:
        shape: a word of `grammar.SHAPES`.
        u, v: pixel offsets from the centre, to the right and downwards, broadcastable.
        radius: half the extent in pixels.
    """
    if shape == "circle":
        return np.hypot(u, v) - radius
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - radius
    if shape == "diamond":
        return (np.abs(u) + np.abs(v) - radius) / np.sqrt(2.0)
    if shape == "triangle":
        return np.maximum(v - radius, (2 * np.abs(u) - v - radius) / np.sqrt(5.0))
    if shape == "cross":
        arm = 0.36 * radius
        long, wide = np.maximum(np.abs(u) - radius, np.abs(v) - arm), np.maximum(np.abs(u) - arm, np.abs(v) - radius)
        return np.minimum(long, wide)
    raise ValueError(f"unknown shape {shape!r}")


def _band(t: np.ndarray, period: float, width: float) -> np.ndarray:
    """1 in bands of ``width`` pixels around the middle of every period, antialiased."""
    return np.clip(width / 2 - np.abs(np.mod(t, period) - period / 2) + 0.5, 0.0, 1.0)


def _discs(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    distance = np.hypot(np.mod(x, FINE) - FINE / 2, np.mod(y, FINE) - FINE / 2)
    return np.clip(radius - distance + 0.5, 0.0, 1.0)


def darkness(texture: str, x: np.ndarray, y: np.ndarray, shift: tuple[int, int] = (0, 0)) -> np.ndarray:
    """How much of each pixel has the dark colour of an object's or a ground's texture, in [0, 1].

    Args:
        texture: a word of `grammar.TEXTURES` or `grammar.GROUNDS`.
        x, y: pixel centres counted from the corner of the canvas, broadcastable.
        shift: see `Geometry`.
    """
    shape = np.broadcast_shapes(x.shape, y.shape)
    half = COARSE / 2
    # Bands sit on whole tokens: the middle of a period is half a token from where a band would lie.
    down = _band(y + half * (shift[0] + 0.5), COARSE, half)
    across = _band(x + half * (shift[1] + 0.5), COARSE, half)
    match texture:
        case "plain":
            return np.zeros(shape, np.float32)
        case "stripes":
            return np.broadcast_to(down, shape)
        case "checks":
            return across * (1 - down) + down * (1 - across)
        case "dots":
            return _discs(x, y, DOT_RADIUS)
        case "lined":
            return np.broadcast_to(_band(x, FINE, LINE), shape)
        case "tiled":
            return np.maximum(_band(x, FINE, JOINT), _band(y, FINE, JOINT))
        case "speckled":
            return _discs(x, y, SPECK_RADIUS)
    raise ValueError(f"unknown texture {texture!r}")


def render(scene: Scene, height: int, width: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """The scene as pixels.

    Args:
        scene: what to draw.
        height, width: canvas in pixels.
        rng: source of the position and size jitter and of the shift; None draws the mean geometry.

    Returns:
        uint8 [height, width, 3].
    """
    return draw(scene, geometry(scene, height, width, rng), np.arange(height), np.arange(width))


def draw(scene: Scene, place: Geometry, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The pixels at ``rows`` x ``columns`` (integer indices) of the canvas ``place`` was made for, uint8 [R, C, 3]."""
    x = (columns.astype(np.float32) + np.float32(0.5))[None, :]
    y = (rows.astype(np.float32) + np.float32(0.5))[:, None]
    distances = [
        signed_distance(scene.shape, x - np.float32(a), y - np.float32(b), place.radius) for a, b in place.centres
    ]
    inside = np.clip(0.5 - np.minimum.reduce(distances), 0.0, 1.0)[..., None]
    shade = 1.0 - (1.0 - DARK) * darkness(scene.texture, x, y, place.shift)[..., None]
    tone = 1.0 - (1.0 - GROUND_DARK) * darkness(scene.ground, x, y)[..., None]
    ink = np.asarray(OBJECT_RGB[scene.colour], np.float32) * shade
    paper = np.asarray(BACKGROUND_RGB[scene.background], np.float32) * tone
    return np.rint(paper + inside * (ink - paper)).astype(np.uint8)


def crop(rng: np.random.Generator, scene: Scene, canvas: tuple[int, int], side: int) -> np.ndarray:
    """A ``side`` x ``side`` window of a canvas (height, width), near an object; uint8 [side, side, 3].

    Its corner lies on the grid of latent pixels, as every picture's does.
    """
    place = geometry(scene, *canvas, rng)
    centre = place.centres[rng.integers(len(place.centres))]
    reach = 1.3 * place.radius
    corner = [
        8 * int(np.clip(round(at + rng.uniform(-reach, reach) - side / 2), 0, length - side) // 8)
        for at, length in ((centre[1], canvas[0]), (centre[0], canvas[1]))
    ]
    return draw(scene, place, corner[0] + np.arange(side), corner[1] + np.arange(side))


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 pixels as float32 in [-1, 1], the range of the VAE."""
    return image.astype(np.float32) / 127.5 - 1.0


def to_uint8(image: np.ndarray) -> np.ndarray:
    """float pixels in [-1, 1] (clipped) as uint8."""
    return np.rint((np.clip(np.asarray(image, np.float32), -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
