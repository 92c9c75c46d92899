"""Dense attention: text and image in one softmax, everyone sees everyone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax

from sega_jax.geometry import Grid
from sega_jax.layouts.streams import Call, Content, KeySet, Stream, Tokens


@dataclass(frozen=True)
class Dense:
    """The layout the models were trained with."""

    name: str = "dense"

    def streams(self) -> tuple[Stream, ...]:
        return Stream("text", "text"), Stream("image", "image")

    def grids(self, grid: Grid) -> dict[str, Grid]:
        return {"image": grid}

    def enter(self, canvases: Mapping[str, jax.Array], content: Content) -> Mapping[str, jax.Array]:
        del content
        return canvases

    def leave(
        self, streams: Mapping[str, jax.Array], canvases: Mapping[str, jax.Array], content: Content
    ) -> Mapping[str, jax.Array]:
        del canvases, content
        return streams

    def calls(self, grid: Grid, content: Content = None) -> tuple[Call, ...]:
        del content
        ids = grid.ids()
        tokens = tuple(Tokens(stream, ("image", stream), ids[stream]) for stream in ("text", "image"))
        return (Call((KeySet(tokens, tokens),), ("scatter", "scatter")),)
