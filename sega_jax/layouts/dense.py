"""Dense attention: text and image in one softmax, everyone sees everyone."""

from __future__ import annotations

from dataclasses import dataclass

from sega_jax.geometry import Grid
from sega_jax.layouts.streams import Call, Content, KeySet, TextAndImage, Tokens


@dataclass(frozen=True)
class Dense(TextAndImage):
    """The layout the models were trained with."""

    name: str = "dense"

    def grids(self, grid: Grid) -> dict[str, Grid]:
        return {"image": grid}

    def calls(self, grid: Grid, content: Content = None) -> tuple[Call, ...]:
        del content
        ids = grid.ids()
        tokens = tuple(Tokens(stream, ("image", stream), ids[stream]) for stream in ("text", "image"))
        return (Call((KeySet(tokens, tokens),), ("scatter", "scatter")),)
