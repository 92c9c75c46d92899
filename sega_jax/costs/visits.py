"""How much attention a layout asks for, counted from its calls."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from sega_jax.attention.kernels.contract import causal_pairs
from sega_jax.geometry import Grid
from sega_jax.layouts.streams import Call, KeySet, Layout, Tokens, draw


def _length(tokens: Tokens, sizes: Mapping[str, int]) -> int:
    return sizes[tokens.stream] if tokens.index is None else tokens.index.shape[-1]


def _groups(tokens: Tokens) -> int:
    shapes = [np.shape(x) for x in (tokens.index,) if x is not None and x.ndim > 2]
    shapes += [np.shape(x) for x in (tokens.ids,) if x is not None and x.ndim > 3]
    return max([shape[1] for shape in shapes], default=1)


def _set_pairs(keys: KeySet, sizes: Mapping[str, int]) -> int:
    asked, seen = (sum(_length(t, sizes) for t in side) for side in (keys.queries, keys.keys))
    groups = max(_groups(t) for t in (*keys.queries, *keys.keys))
    if keys.block_map is None:
        return groups * (causal_pairs(asked, seen) if keys.causal else asked * seen)
    blocks = keys.block_map
    area = np.concatenate([[blocks.block_q * blocks.block_k], np.asarray(blocks.patterns).sum((1, 2))])
    visited = np.arange(blocks.columns.shape[1])[None] < np.asarray(blocks.count)[:, None]
    return groups * int(area[np.asarray(blocks.pattern)][visited].sum())


def pairs(calls: tuple[Call, ...], sizes: Mapping[str, int]) -> int:
    """Pairs of a query and a key that it meets, over all calls; padding queries of a group count, as they cost.

    Args:
        calls: a layout's calls; a block map whose blocks reach beyond the last token counts them whole.
        sizes: stream -> tokens.
    """
    return sum(_set_pairs(keys, sizes) for call in calls for keys in call.sets)


def attention_flops(layout: Layout, grid: Grid, width: int) -> int:
    """Floating-point operations of one attention layer and sample: scores and weighted sum, two per multiply-add.

    Args:
        layout: with streams ``text`` and ``image``; a jittered one is counted with its extra windows.
        grid: of the canvas.
        width: of the model, heads times channels per head.
    """
    sizes = {"text": grid.text_tokens, "image": grid.tokens}
    content = draw(layout, jax.random.key(0), grid)
    return 4 * width * pairs(layout.calls(grid, content), sizes)
