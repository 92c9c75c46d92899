"""The analytic checker: what scene do these pixels show?

It reads background, place, shape, colour and texture by geometry and a Fourier spectrum, with no learned part, and
at every canvas size in the same way: texture must have its period in *pixels*, shape and place are relative to the
canvas.  `error_rate` measures it on rendered truth.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from sega_jax.nano import grammar, render
from sega_jax.nano.grammar import Scene

_INK_DISTANCE = 60.0  # RGB units between paper and ink
_MIN_IOU = 0.82
_TOLERANCE = 0.3  # a texture frequency may be off by this fraction
_MIN_DARK = 0.12  # less dark ink than this is a plain object


@dataclass(frozen=True)
class Reading:
    """What the checker saw; a field is None where nothing of the grammar matches."""

    shape: str | None
    colour: str | None
    texture: str | None
    place: str | None
    background: str | None

    def matches(self, scene: Scene) -> dict[str, bool]:
        """Per attribute, whether it is as ``scene`` says."""
        return {name: value == getattr(scene, name) for name, value in asdict(self).items()}

    def correct(self, scene: Scene) -> bool:
        """Whether every attribute is as ``scene`` says."""
        return all(self.matches(scene).values())


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]], limit: float = 80.0) -> str | None:
    distances = {name: float(np.linalg.norm(colour - np.asarray(rgb))) for name, rgb in palette.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] < limit else None


def _smooth(mask: np.ndarray, size: int = 5) -> np.ndarray:
    """Majority vote over ``size`` x ``size`` windows: removes specks, keeps the outline."""
    total = np.pad(mask.astype(np.int32), ((size // 2 + 1, size // 2),) * 2).cumsum(0).cumsum(1)
    votes = total[size:, size:] - total[:-size, size:] - total[size:, :-size] + total[:-size, :-size]
    return votes * 2 > size * size


def _extent(profile: np.ndarray, least: float) -> tuple[float, float] | None:
    (where,) = np.nonzero(profile > least)
    return (float(where[0]), float(where[-1] + 1)) if len(where) else None


def _shape(mask: np.ndarray) -> tuple[str | None, tuple[float, float, float, float] | None]:
    columns, rows = _extent(mask.sum(0), 1), _extent(mask.sum(1), 1)
    if columns is None or rows is None:
        return None, None
    x0, x1, y0, y1 = *columns, *rows
    u = (np.arange(mask.shape[1]) + 0.5 - (x0 + x1) / 2)[None, :] / ((x1 - x0) / 2)
    v = (np.arange(mask.shape[0]) + 0.5 - (y0 + y1) / 2)[:, None] / ((y1 - y0) / 2)
    overlap = {}
    for shape in grammar.SHAPES:
        inside = render.signed_distance(shape, u, v, 1.0) < 0
        overlap[shape] = (inside & mask).sum() / max((inside | mask).sum(), 1)
    best = max(overlap, key=overlap.__getitem__)
    square = 0.8 < (x1 - x0) / (y1 - y0) < 1.25
    return (best if overlap[best] > _MIN_IOU and square else None), (x0, x1, y0, y1)


def _place(box: tuple[float, float, float, float], height: int, width: int) -> str | None:
    centre = np.asarray([(box[0] + box[1]) / 2 / width, (box[2] + box[3]) / 2 / height])
    distances = {name: float(np.abs(centre - np.asarray(xy)).max()) for name, xy in render.ANCHORS.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] < 0.09 else None


def _ink(pixels: np.ndarray, background: str | None) -> tuple[str | None, np.ndarray]:
    """Colour by majority, and which pixels are dark, for [N, 3] object pixels."""
    names = [name for name in render.OBJECT_RGB if name != background]
    light = np.asarray([render.OBJECT_RGB[name] for name in names], np.float32)
    squared = (light**2).sum(1)
    # A pixel belongs to the colour whose ray from black it is closest to: shades of one colour share a ray.
    along = np.clip(pixels @ light.T / squared, 0.2, 1.1)
    error = (pixels**2).sum(1)[:, None] - 2 * along * (pixels @ light.T) + along**2 * squared
    bright = along.max(1) > 0.6
    votes = np.bincount(error[bright].argmin(1), minlength=len(names)) if bright.any() else np.zeros(len(names))
    best = int(votes.argmax())
    colour = names[best] if votes[best] > 0.6 * max(votes.sum(), 1) else None
    return colour, along[:, best] < (1 + render.DARK) / 2


def _texture(dark: np.ndarray, mask: np.ndarray) -> str | None:
    """Texture from the power spectrum of the dark/light pattern inside ``mask`` (both bool [H, W])."""
    share = dark[mask].mean()
    if share < _MIN_DARK:
        return "plain"
    size = max(4 * int(render.PERIOD), *mask.shape)
    power = np.abs(np.fft.fft2(np.where(mask, dark - share, 0.0), (size, size))) ** 2
    f = np.abs(np.fft.fftfreq(size)) * render.PERIOD
    base, zero = np.abs(f - 1) < _TOLERANCE, f < _TOLERANCE
    total = power.sum()
    if not total:  # all ink dark: no pattern
        return None
    down = power[np.ix_(base, zero)].sum() / total
    across = power[np.ix_(zero, base)].sum() / total
    diagonal = power[np.ix_(base, base)].sum() / total
    if down + across + diagonal < 0.3:
        return None
    if diagonal > down + across:
        return "checks"
    return "stripes" if down > 3 * across else ("dots" if across > 0.33 * down and share < 0.5 else None)


def read(image: np.ndarray) -> Reading:
    """The scene that ``image`` (uint8 [H, W, 3]) shows."""
    height, width = image.shape[:2]
    pixels = image.astype(np.float32)
    frame = max(min(height, width) // 32, 2)
    edges = (pixels[:frame], pixels[-frame:], pixels[:, :frame], pixels[:, -frame:])
    paper = np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)
    background = _nearest(paper, render.BACKGROUND_RGB)
    mask = _smooth(np.linalg.norm(pixels - paper, axis=-1) > _INK_DISTANCE)
    shape, box = _shape(mask)
    if box is None:
        return Reading(None, None, None, None, background)
    colour, dark_pixels = _ink(pixels[mask], background)
    dark = np.zeros_like(mask)
    dark[mask] = dark_pixels
    rows, columns = slice(int(box[2]), int(box[3])), slice(int(box[0]), int(box[1]))
    texture = _texture(dark[rows, columns], mask[rows, columns])
    return Reading(shape, colour, texture, _place(box, height, width), background)


def error_rate(height: int, width: int, count: int = 200, seed: int = 0) -> float:
    """Fraction of rendered scenes the checker misreads at a canvas size."""
    rng = np.random.default_rng(seed)
    drawn = [grammar.sample(rng) for _ in range(count)]
    return float(np.mean([not read(render.render(scene, height, width, rng)).correct(scene) for scene in drawn]))
