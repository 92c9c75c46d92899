"""Latents of rendered scenes, encoded once, and batches of them that depend on (seed, step) alone."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sega_jax.models.flux import PACKING
from sega_jax.models.tokenize import TextTokenizer
from sega_jax.models.vae import Vae
from sega_jax.nano import model as nano
from sega_jax.nano.next import grammar, render
from sega_jax.training.flow_matching import Batch

CLIP_TRAIN_LENGTH = 24  # no caption is longer, and causality hides the rest from the pooled vector
CAPTION_DROP = 0.08
_CHUNK = 32


@dataclass(frozen=True)
class Bucket:
    """Pictures of one token grid."""

    rows: int
    columns: int
    count: int

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.columns}"


BUCKETS = (
    Bucket(12, 12, 3200),
    Bucket(9, 16, 1200),
    Bucket(16, 9, 1200),
    Bucket(8, 18, 800),
    Bucket(18, 8, 800),
    Bucket(16, 16, 4800),
    Bucket(12, 20, 960),
    Bucket(20, 12, 960),
    Bucket(10, 24, 640),
    Bucket(24, 10, 640),
)
Shares = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Family:
    """Token grids of one token count, which may share a batch: names of buckets and their shares of its pictures."""

    share: float
    shares: Shares


@dataclass(frozen=True)
class Phase:
    """A stretch of training: which families, with which share of the steps each, at which batch size."""

    steps: int
    batch: int
    families: tuple[Family, ...]


# Sides from 128 to 384 pixels and aspect ratios up to 2.4: positions up to 23 are seen in rows and in columns.
SMALL = (("12x12", 0.4), ("9x16", 0.18), ("16x9", 0.18), ("8x18", 0.12), ("18x8", 0.12))
NOMINAL = (("16x16", 1.0),)
OBLONG = (("12x20", 0.3), ("20x12", 0.3), ("10x24", 0.2), ("24x10", 0.2))


def encode_bucket(vae: Vae, bucket: Bucket, folder: Path, seed: int = 0) -> None:
    """Render and encode a bucket into ``folder``: float16 tokens [count, N, C] and scene numbers, once.

    Picture ``i`` of a bucket depends on (seed, grid, i) alone; files that exist are kept.
    """
    tokens_path, scenes_path = folder / f"{bucket.name}.npy", folder / f"{bucket.name}.scenes.npy"
    if tokens_path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    encode = nnx.jit(lambda vae, x: PACKING.pack(vae.config.normalize(vae.encode(x)[0])).astype(jnp.float16))
    side = nano.PIXELS_PER_TOKEN
    parts, numbers = [], np.empty(bucket.count, np.int32)
    for start in range(0, bucket.count, _CHUNK):
        images = []
        for i in range(start, start + _CHUNK):
            rng = np.random.default_rng((seed, bucket.rows, bucket.columns, i))
            number = int(rng.integers(len(grammar.TRAINING_SCENES)))
            if i < bucket.count:
                numbers[i] = number
            images.append(
                render.render(grammar.TRAINING_SCENES[number], bucket.rows * side, bucket.columns * side, rng)
            )
        parts.append(np.asarray(encode(vae, jnp.asarray(render.to_float(np.stack(images))))))
    np.save(scenes_path, numbers)
    partial = tokens_path.with_name(tokens_path.name + ".partial.npy")
    np.save(partial, np.concatenate(parts)[: bucket.count])
    os.replace(partial, tokens_path)


def caption_ids(tokenizer: TextTokenizer, length: int) -> np.ndarray:
    """Ids of every wording of every training scene, and of the empty caption in a last row.

    Returns:
        int32 [scenes + 1, templates, length].
    """
    templates = range(len(grammar.TEMPLATES))
    texts = [grammar.caption(scene, t) for scene in grammar.TRAINING_SCENES for t in templates]
    ids = tokenizer([*texts, *([""] * len(templates))])
    if np.any(ids[:, length:] != tokenizer.pad_id):
        raise ValueError(f"captions longer than {length} tokens")
    return ids[:, :length].reshape(-1, len(templates), length)


def batches(
    folder: Path,
    phases: Sequence[Phase],
    *,
    clip: TextTokenizer,
    t5: TextTokenizer,
    seed: int = 0,
) -> tuple[Callable[[int], Batch], int]:
    """``batch(step)`` over encoded buckets, and the number of steps of all phases.

    Each step draws a family by the phase's shares, then for every picture its bucket, and pictures, wordings and
    dropped captions, from a generator seeded with (seed, step).
    """
    clip_ids = caption_ids(clip, CLIP_TRAIN_LENGTH)
    t5_ids = caption_ids(t5, t5.length)
    ends = np.cumsum([phase.steps for phase in phases])

    @functools.cache
    def bucket(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows, columns = (int(side) for side in name.split("x"))
        tokens = np.load(folder / f"{name}.npy", mmap_mode="r")
        return tokens, np.load(folder / f"{name}.scenes.npy"), nano.grid(rows, columns).ids()["image"]

    def batch(step: int) -> Batch:
        phase = phases[int(np.searchsorted(ends, step, side="right"))]
        rng = np.random.default_rng((seed, step))
        family = phase.families[_pick(rng, [family.share for family in phase.families])]
        names, shares = zip(*family.shares, strict=True)
        drawn = [bucket(names[_pick(rng, shares)]) for _ in range(phase.batch)]
        rows = [int(rng.integers(len(tokens))) for tokens, _, _ in drawn]
        scenes = np.asarray([scenes[row] for (_, scenes, _), row in zip(drawn, rows, strict=True)])
        captions = np.where(rng.random(phase.batch) < CAPTION_DROP, len(clip_ids) - 1, scenes)
        wordings = rng.integers(clip_ids.shape[1], size=phase.batch)
        tokens = np.stack([tokens[row] for (tokens, _, _), row in zip(drawn, rows, strict=True)])
        return Batch(
            jnp.asarray(tokens.astype(np.float32)),
            jnp.asarray(clip_ids[captions, wordings]),
            jnp.asarray(t5_ids[captions, wordings]),
            jnp.float32(nano.shift_mu(tokens.shape[1])),
            jnp.asarray(np.stack([positions for _, _, positions in drawn])),
        )

    return batch, int(ends[-1])


def _pick(rng: np.random.Generator, shares: Sequence[float]) -> int:
    return int(rng.choice(len(shares), p=np.asarray(shares) / sum(shares)))
