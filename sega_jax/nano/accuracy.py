"""Prompt accuracy of a text-to-image function on nano's world: draw unseen scenes, read the pictures back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np

from sega_jax.nano import check, grammar
from sega_jax.nano.grammar import Scene

Generate = Callable[[Sequence[str], int], Sequence[np.ndarray]]


def unseen_prompts(count: int, seed: int = 0) -> list[tuple[Scene, str]]:
    """Scenes that training held out, each in one wording; the same list for a seed everywhere."""
    rng = np.random.default_rng((seed, count))
    drawn = [grammar.sample(rng, unseen=True) for _ in range(count)]
    return [(scene, grammar.sample_caption(scene, rng)) for scene in drawn]


def accuracy(generate: Generate, count: int = 200, *, seed: int = 0, batch: int = 10) -> dict[str, float]:
    """Share of pictures that show what was asked.

    Args:
        generate: ``generate(prompts, first)`` gives uint8 [H, W, 3] pictures of any one size; ``first`` is the number
            of the first prompt, to seed the noise with.
        count: prompts.
        seed: of the prompts.
        batch: prompts per call.

    Returns:
        Per attribute, and under ``all`` for pictures right in every attribute.
    """
    cases = unseen_prompts(count, seed)
    names = [field.name for field in fields(Scene)]
    right = dict.fromkeys((*names, "all"), 0)
    for first in range(0, count, batch):
        part = cases[first : first + batch]
        pictures = generate([text for _, text in part], first)
        for (scene, _), picture in zip(part, pictures, strict=True):
            matches = check.read(picture).matches(scene)
            for name, match in (*matches.items(), ("all", all(matches.values()))):
                right[name] += match
    return {name: total / count for name, total in right.items()}
