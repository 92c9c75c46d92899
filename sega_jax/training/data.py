"""Latents of rendered scenes, encoded once, and batches of them that depend on (seed, step) alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sega_jax.models.flux import PACKING
from sega_jax.models.tokenize import TextTokenizer
from sega_jax.models.vae import Vae
from sega_jax.nano import grammar, render
from sega_jax.nano import model as nano
from sega_jax.training.flow_matching import Batch, calls_for

CLIP_TRAIN_LENGTH = 24  # no caption is longer, and causality hides the rest from the pooled vector
CAPTION_DROP = 0.05
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
    Bucket(8, 8, 6000),
    Bucket(12, 12, 3000),
    Bucket(9, 12, 640),
    Bucket(12, 9, 640),
)


@dataclass(frozen=True)
class Phase:
    """A stretch of training: which buckets, with which share of the steps, at which batch size."""

    steps: int
    batch: int
    shares: tuple[tuple[str, float], ...]


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

    Each step draws its bucket by the phase's shares, then pictures, wordings and dropped captions, from a generator
    seeded with (seed, step).
    """
    clip_ids = caption_ids(clip, CLIP_TRAIN_LENGTH)
    t5_ids = caption_ids(t5, t5.length)
    ends = np.cumsum([phase.steps for phase in phases])
    opened: dict[str, tuple] = {}

    def bucket(name: str) -> tuple:
        if name not in opened:
            rows, columns = (int(side) for side in name.split("x"))
            opened[name] = (
                np.load(folder / f"{name}.npy", mmap_mode="r"),
                np.load(folder / f"{name}.scenes.npy"),
                jnp.float32(nano.shift_mu(rows * columns)),
                jax.tree.map(jnp.asarray, calls_for(rows, columns)),
            )
        return opened[name]

    def batch(step: int) -> Batch:
        phase = phases[int(np.searchsorted(ends, step, side="right"))]
        rng = np.random.default_rng((seed, step))
        names, shares = zip(*phase.shares, strict=True)
        tokens, scenes, mu, calls = bucket(names[rng.choice(len(names), p=np.asarray(shares) / sum(shares))])
        rows = rng.integers(len(tokens), size=phase.batch)
        captions = np.where(rng.random(phase.batch) < CAPTION_DROP, len(clip_ids) - 1, scenes[rows])
        wordings = rng.integers(clip_ids.shape[1], size=phase.batch)
        return Batch(
            jnp.asarray(tokens[rows].astype(np.float32)),
            jnp.asarray(clip_ids[captions, wordings]),
            jnp.asarray(t5_ids[captions, wordings]),
            mu,
            calls,
        )

    return batch, int(ends[-1])
