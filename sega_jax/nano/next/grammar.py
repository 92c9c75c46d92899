"""The caption grammar of `nano`: one to three textured objects on a textured ground, said in several ways.

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
# One object at a place of its own, two in a row or in a column, three as a group.
PLACES = ("centre", "left", "right", "top", "bottom", "row", "column", "group")
BACKGROUNDS = ("white", "grey", "pink", "blue", "green")
GROUNDS = ("plain", "lined", "tiled", "speckled")

COUNTS = {"row": 2, "column": 2, "group": 3}  # objects at a place; one anywhere else
_NUMBERS = {2: "two", 3: "three"}
_ADJECTIVES = {"plain": "plain", "stripes": "striped", "checks": "checked", "dots": "dotted"}
_PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
_WHERE = {
    "centre": "in the centre",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "row": "side by side",
    "column": "one above the other",
    "group": "",
}
_SYNONYMS = {"center": "centre", "middle": "centre", "gray": "grey"}
_FILLERS = ("a", "an", "the", "with", "on", "in", "at", "background", "one", "two", "three")
_HELD_OUT_ONE_IN = 20

TEMPLATES = (
    "{a} {colour} {shape} {with_texture} {where}, {ground} background",
    "{a} {adjective} {colour} {shape} {where}, {ground} background",
    "{a} {adjective} {colour} {shape} {where} on {a_ground} background",
    "{ground} background, {a} {colour} {shape} {with_texture} {where}",
    "on {a_ground} background, {a} {adjective} {colour} {shape} {where}",
    "{number} {colour} {shape}, {texture}, {place}, {ground} background",
)


@dataclass(frozen=True)
class Scene:
    """What a caption means; every field is a word of the tuple named like it in this module."""

    shape: str
    colour: str
    texture: str
    place: str
    background: str
    ground: str = "plain"

    def __post_init__(self) -> None:
        vocabulary = (SHAPES, COLOURS, TEXTURES, PLACES, BACKGROUNDS, GROUNDS)
        for value, words in zip(astuple(self), vocabulary, strict=True):
            if value not in words:
                raise ValueError(f"{value!r} is not one of {', '.join(words)}")
        if self.colour == self.background:
            raise ValueError(f"a {self.colour} object cannot be seen on a {self.background} background")

    @property
    def count(self) -> int:
        """How many objects there are."""
        return COUNTS.get(self.place, 1)


def scenes() -> Iterator[Scene]:
    """Every scene of the grammar."""
    for words in product(SHAPES, COLOURS, TEXTURES, PLACES, BACKGROUNDS, GROUNDS):
        if words[1] != words[4]:
            yield Scene(*words)


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
    first = adjective if "{adjective}" in pattern else scene.colour
    number = _NUMBERS.get(scene.count, "")
    ground = scene.background if scene.ground == "plain" else f"{scene.ground} {scene.background}"
    text = pattern.format(
        a=number or _article(first),
        number=number,
        ground=ground,
        a_ground=f"{_article(ground)} {ground}",
        colour=scene.colour,
        shape=_PLURALS[scene.shape] if number else scene.shape,
        texture=scene.texture,
        with_texture="" if scene.texture == "plain" else f"with {scene.texture}",
        adjective=adjective,
        place=_WHERE[scene.place] if number else scene.place,
        where=_WHERE[scene.place],
    )
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"(, )+", ", ", text.replace(" ,", ","))


def sample_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the wordings of ``scene``."""
    return caption(scene, int(rng.integers(len(TEMPLATES))))


def words() -> list[str]:
    """Every word a caption can contain, sorted."""
    places = [place for place in PLACES if place not in COUNTS]
    phrases = [word for phrase in _WHERE.values() for word in phrase.split()]
    groups = (SHAPES, _PLURALS.values(), COLOURS, TEXTURES, places, BACKGROUNDS, GROUNDS, _ADJECTIVES.values())
    return sorted({*phrases, *_FILLERS, *(word for group in groups for word in group)})


def _split(text: str) -> list[str]:
    return re.findall(r"[^\s,.;:!?]+", text.lower())


def unknown_words(text: str) -> list[str]:
    """Words of ``text`` that nano has never seen, in order; an empty list means that it can be understood."""
    known = set(words())
    return [word for word in _split(text) if word not in known]


def _place(text: str, shape: str, rest: list[str]) -> tuple[str | None, list[str]]:
    """The place that ``text`` names (None where it contradicts itself), and ``rest`` without the words that say so."""
    groups = [place for place in COUNTS if _WHERE[place] and _WHERE[place] in text]
    numbers = [count for count, word in _NUMBERS.items() if word in rest]
    if groups:
        phrase = _WHERE[groups[0]].split()
        rest = [word for word in rest if word not in phrase]
    places = [word for word in rest if word in PLACES] + groups
    if 3 in numbers:
        places.append("group")
    place = (places or ["centre"])[0]
    count = COUNTS.get(place, 1)
    plural = shape in _PLURALS.values()
    agrees = numbers == ([count] if count > 1 else []) and plural == (count > 1)
    return (place if agrees and len(places) < 2 else None), rest


def parse(text: str) -> Scene | None:
    """The scene a caption means, or None where it is not a sentence of the grammar.

    The background is the colour word before "background", with the word for its ground before that; a missing ground or
    texture means plain, a missing place the centre.  "center", "middle" and "gray" are read as their synonyms.
    """
    tokens = [_SYNONYMS.get(word, word) for word in _split(text)]
    if unknown_words(" ".join(tokens)) or tokens.count("background") != 1:
        return None
    at = tokens.index("background")
    background = tokens[at - 1] if at else ""
    textured = at > 1 and tokens[at - 2] in GROUNDS and tokens[at - 2] != "plain"
    ground = tokens[at - 2] if textured else "plain"
    rest = tokens[: max(at - (2 if textured else 1), 0)] + tokens[at + 1 :]
    nouns = {adjective: texture for texture, adjective in _ADJECTIVES.items()}
    rest = [nouns.get(word, word) for word in rest]
    spoken = [word for word in rest if word in SHAPES or word in _PLURALS.values()]
    if len(spoken) != 1:
        return None
    place, rest = _place(" ".join(tokens), spoken[0], rest)
    colour, texture = ([word for word in rest if word in group] for group in (COLOURS, TEXTURES))
    texture = texture or ["plain"]
    if place is None or background not in BACKGROUNDS or len(colour) != 1 or len(texture) != 1:
        return None
    wrong = [word for word in rest if word in (*BACKGROUNDS, *GROUNDS) and word not in (*COLOURS, "plain")]
    if colour[0] == background or wrong:
        return None
    shape = next(one for one, many in _PLURALS.items() if spoken[0] in (one, many))
    return Scene(shape, colour[0], texture[0], place, background, ground)
