"""The analytic checker: what scene do these pixels show?

It reads the ground, the objects, their shape, colour, place and texture by geometry, with no learned part, and at every
canvas size in the same way: textures must have their period in *pixels*, shape and place are relative to the canvas.
What it sees is scored apart as composition and as detail, since methods trade one for the other.  `error_rate` measures
it on rendered truth.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields

import numpy as np
from scipy import ndimage

from sega_jax.nano.next import grammar, render
from sega_jax.nano.next.grammar import Scene

COMPOSITION = ("shape", "colour", "place", "background")
DETAIL = ("texture", "ground", "edges")

_INK_DISTANCE = 50.0  # RGB units between an object and the tones of the ground
_GROUND_DISTANCE = 60.0
_MIN_IOU = 0.82
_MIN_AREA = 0.006  # of the canvas: smaller specks are no objects
_MIN_DARK = 0.1  # with a smaller share of dark pixels a surface is plain
_MIN_AGREEMENT = 0.82  # of a surface's pixels with its texture
_PLACE_TOLERANCE = 0.09  # of the canvas
_MIXED_DISTANCE = 40.0  # RGB units from both ground and ink: a pixel that an edge runs through
_SHARP = 2.5  # pixels


@dataclass(frozen=True)
class Reading:
    """What the checker saw; a field is None where nothing of the grammar matches.

    Attributes:
        shape, colour, texture, place, background, ground: words of the grammar; where there are several objects, those
            that all of them share.
        objects: how many there are.
        edge: mean width of the objects' edges in pixels; None without objects.
    """

    shape: str | None
    colour: str | None
    texture: str | None
    place: str | None
    background: str | None
    ground: str | None
    objects: int
    edge: float | None

    def matches(self, scene: Scene) -> dict[str, bool]:
        """Per attribute of the scene, and for ``edges`` (no wider than 2.5 pixels), whether it is as it should be."""
        right = {field.name: getattr(self, field.name) == getattr(scene, field.name) for field in fields(scene)}
        return right | {"edges": self.edge is not None and self.edge <= _SHARP}

    def scores(self, scene: Scene) -> dict[str, bool]:
        """`matches`, and whether ``composition``, ``detail`` and ``all`` of it are right."""
        right = self.matches(scene)
        groups = {"composition": COMPOSITION, "detail": DETAIL, "all": tuple(right)}
        return right | {name: all(right[key] for key in keys) for name, keys in groups.items()}

    def correct(self, scene: Scene) -> bool:
        """Whether every attribute is as ``scene`` says."""
        return self.scores(scene)["all"]


def _from_segment(pixels: np.ndarray, colour: tuple[int, int, int], dark: float) -> np.ndarray:
    """Distance in RGB of pixels [..., 3] from the line between a colour and its dark tone."""
    light = np.asarray(colour, np.float32)
    along = np.clip(pixels @ light / (light @ light), dark, 1.0)
    return np.linalg.norm(pixels - along[..., None] * light, axis=-1)


def _smooth(mask: np.ndarray, size: int = 5) -> np.ndarray:
    """Majority vote over ``size`` x ``size`` windows: removes specks, keeps the outline."""
    total = np.pad(mask.astype(np.int32), ((size // 2 + 1, size // 2),) * 2).cumsum(0).cumsum(1)
    votes = total[size:, size:] - total[:-size, size:] - total[size:, :-size] + total[:-size, :-size]
    return votes * 2 > size * size


def _extent(profile: np.ndarray) -> tuple[int, int]:
    (where,) = np.nonzero(profile > 1)
    return (int(where[0]), int(where[-1] + 1)) if len(where) else (0, 1)


def _shape(mask: np.ndarray) -> tuple[str | None, tuple[float, float]]:
    """The shape of an object's mask [H, W], and its centre (x, y) in pixels."""
    (x0, x1), (y0, y1) = _extent(mask.sum(0)), _extent(mask.sum(1))
    u = (np.arange(x0, x1) + 0.5 - (x0 + x1) / 2)[None, :] / ((x1 - x0) / 2)
    v = (np.arange(y0, y1) + 0.5 - (y0 + y1) / 2)[:, None] / ((y1 - y0) / 2)
    part, overlap = mask[y0:y1, x0:x1], {}
    for shape in grammar.SHAPES:
        inside = render.signed_distance(shape, u, v, 1.0) < 0
        overlap[shape] = (inside & part).sum() / max((inside | part).sum(), 1)
    best = max(overlap, key=overlap.__getitem__)
    square = 0.8 < (x1 - x0) / (y1 - y0) < 1.25
    return (best if overlap[best] > _MIN_IOU and square else None), ((x0 + x1) / 2, (y0 + y1) / 2)


def _place(centres: list[tuple[float, float]], height: int, width: int) -> str | None:
    """The place whose anchors these centres have, each one near."""
    found = np.asarray(sorted((x / width, y / height) for x, y in centres))
    best, nearest = None, _PLACE_TOLERANCE
    for name, anchors in render.ANCHORS.items():
        if len(anchors) != len(found):
            continue
        pairs = np.abs(found[:, None] - np.asarray(anchors)[None]).max(-1)
        matched = len(set(pairs.argmin(1))) == len(anchors)
        if matched and pairs.min(1).max() < nearest:
            best, nearest = name, float(pairs.min(1).max())
    return best


def _colour(pixels: np.ndarray, background: str | None) -> str | None:
    """Colour of object pixels [N, 3] by majority: shades of one colour share a ray from black."""
    names = [name for name in render.OBJECT_RGB if name != background]
    distances = np.stack([_from_segment(pixels, render.OBJECT_RGB[name], render.DARK) for name in names])
    votes = np.bincount(distances.argmin(0), minlength=len(names))
    best = int(votes.argmax())
    return names[best] if votes[best] > 0.6 * len(pixels) else None


def _dark(pixels: np.ndarray, colour: tuple[int, int, int], dark: float) -> np.ndarray:
    """Which pixels [..., 3] of a surface have its dark tone rather than its light one."""
    light = np.asarray(colour, np.float32)
    return pixels @ light / (light @ light) < (1 + dark) / 2


@functools.cache
def _spectra(names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Conjugate spectra of the textures over one coarse period, light -1 and dark +1."""
    t = np.arange(int(render.COARSE), dtype=np.float32) + np.float32(0.5)
    tiles = {name: 2.0 * (render.darkness(name, t[None, :], t[:, None]) > 0.5) - 1.0 for name in names}
    return {name: np.conj(np.fft.fft2(tile)) for name, tile in tiles.items()}


def _texture(dark: np.ndarray, mask: np.ndarray, names: tuple[str, ...]) -> str | None:
    """Texture of the surface ``mask``, which is dark where ``dark`` (bool [H, W]): the one with most agreement.

    Pixels are summed up by their place in a period of `render.COARSE` pixels, so a pattern of any other period comes
    out grey; the phase is free.
    """
    total = mask.sum()
    if (dark & mask).sum() < _MIN_DARK * total:
        return "plain"
    period = int(render.COARSE)
    signed = np.where(mask, np.where(dark, 1, -1), 0)
    padded = np.pad(signed, [(0, -side % period) for side in signed.shape])
    folded = padded.reshape(padded.shape[0] // period, period, -1, period).sum((0, 2))
    spectrum = np.fft.fft2(folded)
    agreement = {
        name: (1 + np.fft.ifft2(spectrum * tile).real.max() / total) / 2
        for name, tile in _spectra(tuple(name for name in names if name != "plain")).items()
    }
    best = max(agreement, key=agreement.__getitem__)
    return best if agreement[best] > _MIN_AGREEMENT else None


def _background(pixels: np.ndarray) -> tuple[str | None, np.ndarray]:
    """Colour of the ground from the frame of the picture, and every pixel's distance from its tones."""
    frame = max(min(pixels.shape[:2]) // 32, 2)
    edges = (pixels[:frame], pixels[-frame:], pixels[:, :frame], pixels[:, -frame:])
    border = np.concatenate([edge.reshape(-1, 3) for edge in edges])
    near = {
        name: (_from_segment(border, rgb, render.GROUND_DARK) < _GROUND_DISTANCE).mean()
        for name, rgb in render.BACKGROUND_RGB.items()
    }
    closest = {
        name: _from_segment(border, rgb, render.GROUND_DARK).mean() for name, rgb in render.BACKGROUND_RGB.items()
    }
    best = min(closest, key=closest.__getitem__)
    distance = _from_segment(pixels, render.BACKGROUND_RGB[best], render.GROUND_DARK)
    return (best if near[best] > 0.7 else None), distance


def _shared(values: list[str | None]) -> str | None:
    return values[0] if len(set(values)) == 1 else None


def _edge_width(pixels: np.ndarray, mask: np.ndarray, from_ground: np.ndarray, colour: str) -> float:
    """Mean width of the objects' edges: pixels between ground and ink, per pixel of outline."""
    outline = (mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum()
    from_ink = _from_segment(pixels, render.OBJECT_RGB[colour], render.DARK)
    between = (from_ground > _MIXED_DISTANCE) & (from_ink > _MIXED_DISTANCE)
    return float(between.sum() / max(outline, 1))


def read(image: np.ndarray) -> Reading:
    """The scene that ``image`` (uint8 [H, W, 3]) shows."""
    height, width = image.shape[:2]
    pixels = image.astype(np.float32)
    background, from_ground = _background(pixels)
    mask = _smooth(from_ground > _INK_DISTANCE)
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())[1:]
    (numbers,) = np.nonzero(sizes > _MIN_AREA * height * width)
    ground = None
    if background is not None:
        tones = render.BACKGROUND_RGB[background]
        bare = ~_smooth(from_ground > _INK_DISTANCE / 2, 9) & ~mask
        ground = _texture(_dark(pixels, tones, render.GROUND_DARK), bare, grammar.GROUNDS) if bare.any() else None
    if not len(numbers):
        return Reading(None, None, None, None, background, ground, 0, None)
    objects = [labels == number + 1 for number in numbers]
    shapes, centres = zip(*map(_shape, objects), strict=True)
    colour = _shared([_colour(pixels[one], background) for one in objects])
    texture = edge = None
    if colour is not None:
        dark = _dark(pixels, render.OBJECT_RGB[colour], render.DARK)
        texture = _shared([_texture(dark, one, grammar.TEXTURES) for one in objects])
        edge = _edge_width(pixels, mask, from_ground, colour)
    place = _place(list(centres), height, width)
    return Reading(_shared(list(shapes)), colour, texture, place, background, ground, len(objects), edge)


def error_rate(height: int, width: int, count: int = 200, seed: int = 0) -> float:
    """Fraction of rendered scenes the checker misreads at a canvas size."""
    rng = np.random.default_rng(seed)
    drawn = [grammar.sample(rng) for _ in range(count)]
    return float(np.mean([not read(render.render(scene, height, width, rng)).correct(scene) for scene in drawn]))
