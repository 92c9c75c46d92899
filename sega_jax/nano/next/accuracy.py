"""Prompt accuracy of a text-to-image function on nano's world: draw unseen scenes, read the pictures back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sega_jax.nano.next import check, grammar
from sega_jax.nano.next.grammar import Scene

Generate = Callable[[Sequence[str], int], Sequence[np.ndarray]]


def unseen_prompts(count: int, seed: int = 0) -> list[tuple[Scene, str]]:
    """Scenes that training held out, each in one wording; the same list for a seed everywhere."""
    rng = np.random.default_rng((seed, count))
    drawn = [grammar.sample(rng, unseen=True) for _ in range(count)]
    return [(scene, grammar.sample_caption(scene, rng)) for scene in drawn]


def scores(generate: Generate, count: int = 200, *, seed: int = 0, batch: int = 10) -> dict[str, list[bool]]:
    """What is right in each picture.

    Args:
        generate: ``generate(prompts, first)`` gives uint8 [H, W, 3] pictures of any one size; ``first`` is the number
            of the first prompt, to seed the noise with.
        count: prompts.
        seed: of the prompts.
        batch: prompts per call.

    Returns:
        One value per picture for every attribute, and under ``composition``, ``detail`` and ``all`` (`check.Reading`).
    """
    cases = unseen_prompts(count, seed)
    found: dict[str, list[bool]] = {}
    for first in range(0, count, batch):
        part = cases[first : first + batch]
        pictures = generate([text for _, text in part], first)
        for (scene, _), picture in zip(part, pictures, strict=True):
            for name, right in check.read(picture).scores(scene).items():
                found.setdefault(name, []).append(right)
    return found
