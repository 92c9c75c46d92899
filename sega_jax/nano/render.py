"""Truth for `nano`: a scene drawn at any canvas size.

Structure (place and size of the object) scales with the canvas, texture keeps its period of `PERIOD` pixels, and
edges are antialiased over one pixel.  So the true distribution is known at every resolution: at twice the side the
object is twice as large and carries twice as many stripes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sega_jax.nano.grammar import Scene

PERIOD = 24.0  # pixels; 1.5 tokens of 16 px, so neighbouring tokens must agree on the phase
DARK = 0.4  # the second colour of a texture is this fraction of the first
DOT_RADIUS = 7.5  # pixels

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
ANCHORS = {  # centre of the object as fractions of (width, height)
    "centre": (0.5, 0.5),
    "left": (0.28, 0.5),
    "right": (0.72, 0.5),
    "top": (0.5, 0.28),
    "bottom": (0.5, 0.72),
}
RADIUS = (0.20, 0.24)  # of the shorter side
JITTER = 0.02  # of each side


@dataclass(frozen=True)
class Geometry:
    """Where the object lies, in pixels."""

    x: float
    y: float
    radius: float


def geometry(scene: Scene, height: int, width: int, rng: np.random.Generator | None = None) -> Geometry:
    """Centre and radius for a canvas; ``rng`` draws the jitter, None gives the middle of its range."""
    dx, dy, size = rng.random(3) if rng is not None else (0.5, 0.5, 0.5)
    x, y = ANCHORS[scene.place]
    return Geometry(
        x=(x + JITTER * (2 * dx - 1)) * width,
        y=(y + JITTER * (2 * dy - 1)) * height,
        radius=(RADIUS[0] + (RADIUS[1] - RADIUS[0]) * size) * min(height, width),
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


def _band(t: np.ndarray) -> np.ndarray:
    return np.clip(PERIOD / 4 - np.abs(np.mod(t, PERIOD) - PERIOD / 2) + 0.5, 0.0, 1.0)


def darkness(texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How much of each pixel has the dark colour, in [0, 1]; phase zero at the object's centre."""
    if texture == "plain":
        return np.zeros(np.broadcast_shapes(u.shape, v.shape), np.float32)
    if texture == "stripes":
        return np.broadcast_to(_band(v), np.broadcast_shapes(u.shape, v.shape))
    if texture == "checks":
        across, down = _band(u), _band(v)
        return across * (1 - down) + down * (1 - across)
    if texture == "dots":
        distance = np.hypot(np.mod(u, PERIOD) - PERIOD / 2, np.mod(v, PERIOD) - PERIOD / 2)
        return np.clip(DOT_RADIUS - distance + 0.5, 0.0, 1.0)
    raise ValueError(f"unknown texture {texture!r}")


def render(scene: Scene, height: int, width: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """The scene as pixels.

    Args:
        scene: what to draw.
        height, width: canvas in pixels.
        rng: source of the position and size jitter; None draws the mean geometry.

    Returns:
        uint8 [height, width, 3].
    """
    return draw(scene, geometry(scene, height, width, rng), np.arange(height), np.arange(width))


def draw(scene: Scene, place: Geometry, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The pixels at ``rows`` x ``columns`` (integer indices) of the canvas ``place`` was made for, uint8 [R, C, 3]."""
    u = (columns.astype(np.float32) + 0.5 - np.float32(place.x))[None, :]
    v = (rows.astype(np.float32) + 0.5 - np.float32(place.y))[:, None]
    inside = np.clip(0.5 - signed_distance(scene.shape, u, v, place.radius), 0.0, 1.0)[..., None]
    shade = 1.0 - (1.0 - DARK) * darkness(scene.texture, u, v)[..., None]
    ink = np.asarray(OBJECT_RGB[scene.colour], np.float32)
    paper = np.asarray(BACKGROUND_RGB[scene.background], np.float32)
    return np.rint(paper + inside * (ink * shade - paper)).astype(np.uint8)


def crop(rng: np.random.Generator, scene: Scene, canvas: tuple[int, int], side: int) -> np.ndarray:
    """A ``side`` x ``side`` window of a canvas (height, width), near the object; uint8 [side, side, 3]."""
    place = geometry(scene, *canvas, rng)
    reach = 1.3 * place.radius
    corner = [
        int(np.clip(round(at + rng.uniform(-reach, reach) - side / 2), 0, length - side))
        for at, length in ((place.y, canvas[0]), (place.x, canvas[1]))
    ]
    return draw(scene, place, corner[0] + np.arange(side), corner[1] + np.arange(side))


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 pixels as float32 in [-1, 1], the range of the VAE."""
    return image.astype(np.float32) / 127.5 - 1.0


def to_uint8(image: np.ndarray) -> np.ndarray:
    """float pixels in [-1, 1] (clipped) as uint8."""
    return np.rint((np.clip(np.asarray(image, np.float32), -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
