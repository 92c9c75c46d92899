"""The caption grammar of `nano`: one textured object on a plain background, said in several ways.

A `Scene` is the meaning, a caption one of its wordings.  `sample` draws a scene, `caption` words it, `parse` reads a
caption back.  Some scenes are `held_out`: training never sees them in any wording, so prompts made from them are
unseen compositions.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import product

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "cross")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
TEXTURES = ("plain", "stripes", "checks", "dots")
PLACES = ("centre", "left", "right", "top", "bottom")
BACKGROUNDS = ("white", "grey", "pink", "blue", "green")

_ADJECTIVES = {"plain": "plain", "stripes": "striped", "checks": "checked", "dots": "dotted"}
_WHERE = {
    "centre": "in the centre",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
_SYNONYMS = {"center": "centre", "middle": "centre", "gray": "grey"}
_FILLERS = ("a", "an", "the", "with", "on", "in", "at", "background")
_HELD_OUT_ONE_IN = 20

TEMPLATES = (
    "{a} {colour} {shape} {with_texture} {where}, {background} background",
    "{a} {adjective} {colour} {shape} {where}, {background} background",
    "{a} {adjective} {colour} {shape} {where} on {a_background} background",
    "{background} background, {a} {colour} {shape} {with_texture} {where}",
    "on {a_background} background, {a} {adjective} {colour} {shape} {where}",
    "{colour} {shape}, {texture}, {place}, {background} background",
)


@dataclass(frozen=True)
class Scene:
    """What a caption means; every field is a word of the tuple named like it in this module."""

    shape: str
    colour: str
    texture: str
    place: str
    background: str

    def __post_init__(self) -> None:
        vocabulary = (SHAPES, COLOURS, TEXTURES, PLACES, BACKGROUNDS)
        for value, words in zip(astuple(self), vocabulary, strict=True):
            if value not in words:
                raise ValueError(f"{value!r} is not one of {', '.join(words)}")
        if self.colour == self.background:
            raise ValueError(f"a {self.colour} object cannot be seen on a {self.background} background")


def scenes() -> Iterator[Scene]:
    """Every scene of the grammar."""
    for shape, colour, texture, place, background in product(SHAPES, COLOURS, TEXTURES, PLACES, BACKGROUNDS):
        if colour != background:
            yield Scene(shape, colour, texture, place, background)


def held_out(scene: Scene) -> bool:
    """Whether training must not see this scene (one in twenty, by a fixed hash)."""
    return zlib.crc32(" ".join(astuple(scene)).encode()) % _HELD_OUT_ONE_IN == 0


TRAINING_SCENES = tuple(scene for scene in scenes() if not held_out(scene))
UNSEEN_SCENES = tuple(scene for scene in scenes() if held_out(scene))


def sample(rng: np.random.Generator, *, unseen: bool = False) -> Scene:
    """A scene, uniform over the training scenes or over the held-out ones."""
    pool = UNSEEN_SCENES if unseen else TRAINING_SCENES
    return pool[rng.integers(len(pool))]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def caption(scene: Scene, template: int = 0) -> str:
    """The scene in the wording of ``TEMPLATES[template]``."""
    pattern = TEMPLATES[template]
    adjective = _ADJECTIVES[scene.texture]
    text = pattern.format(
        a=_article(adjective if "{adjective}" in pattern else scene.colour),
        a_background=f"{_article(scene.background)} {scene.background}",
        colour=scene.colour,
        shape=scene.shape,
        texture=scene.texture,
        with_texture="" if scene.texture == "plain" else f"with {scene.texture}",
        adjective=adjective,
        place=scene.place,
        where=_WHERE[scene.place],
        background=scene.background,
    )
    return re.sub(r"\s+", " ", text).strip()


def sample_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the wordings of ``scene``."""
    return caption(scene, int(rng.integers(len(TEMPLATES))))


def words() -> list[str]:
    """Every word a caption can contain, sorted."""
    known = {*SHAPES, *COLOURS, *TEXTURES, *PLACES, *BACKGROUNDS, *_ADJECTIVES.values(), *_FILLERS}
    return sorted(known)


def _split(text: str) -> list[str]:
    return re.findall(r"[^\s,.;:!?]+", text.lower())


def unknown_words(text: str) -> list[str]:
    """Words of ``text`` that nano has never seen, in order; an empty list means that it can be understood."""
    known = set(words())
    return [word for word in _split(text) if word not in known]


def parse(text: str) -> Scene | None:
    """The scene a caption means, or None where it is not a sentence of the grammar.

    The background is the colour word before "background"; a missing texture means plain, a missing place the centre.
    "center", "middle" and "gray" are read as their synonyms.
    """
    tokens = [_SYNONYMS.get(word, word) for word in _split(text)]
    if unknown_words(" ".join(tokens)) or tokens.count("background") != 1:
        return None
    at = tokens.index("background")
    background = tokens[at - 1] if at else ""
    rest = tokens[: max(at - 1, 0)] + tokens[at + 1 :]
    nouns = {adjective: texture for texture, adjective in _ADJECTIVES.items()}
    rest = [nouns.get(word, word) for word in rest]
    found = [[word for word in rest if word in group] for group in (SHAPES, COLOURS, TEXTURES, PLACES)]
    shape, colour, texture, place = found[0], found[1], found[2] or ["plain"], found[3] or ["centre"]
    if background not in BACKGROUNDS or any(len(group) != 1 for group in (shape, colour, texture, place)):
        return None
    if colour[0] == background or any(word in BACKGROUNDS and word not in COLOURS for word in rest):
        return None
    return Scene(shape[0], colour[0], texture[0], place[0], background)
