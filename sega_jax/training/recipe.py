"""How nano is made: autoencoder, latents, generator, export.  Every stage resumes from files in one work folder."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

from sega_jax.models.abstract import initialize
from sega_jax.models.tokenize import load_clip_tokenizer, load_t5_tokenizer
from sega_jax.models.vae import Vae, VaeConfig
from sega_jax.nano import grammar, render, vocabulary
from sega_jax.nano import model as nano
from sega_jax.training import autoencoder, data, fast_products, flow_matching, loop
from sega_jax.training.data import Bucket, Phase

Report = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run gives.

    Attributes:
        seed: of initialisation, data and noise.
        vae_stages: (steps, batch, side of the crops in pixels).
        vae_rate: peak learning rate of the autoencoder.
        rate, adam_rate: peak learning rates of the generator, of the hidden kernels (Muon) and of the rest (Adam).
        kl_weight: of the autoencoder's KL term.
        buckets: pictures to encode.
        phases: what the generator sees, in order.
        decay: share of the generator's steps over which the learning rate falls to zero.
        ema_decay: of the generator's weights.
        measured: pictures per size for the latent statistics and the autoencoder's PSNR.
    """

    seed: int = 0
    vae_stages: tuple[tuple[int, int, int], ...] = ((2400, 8, 64), (400, 2, 128), (300, 1, 256))
    vae_rate: float = 2e-3
    kl_weight: float = 1e-4
    buckets: tuple[Bucket, ...] = data.BUCKETS
    phases: tuple[Phase, ...] = (
        Phase(3200, 32, (("8x8", 1.0),)),
        Phase(5600, 32, (("12x12", 0.72), ("9x12", 0.1), ("12x9", 0.1), ("8x8", 0.08))),
    )
    rate: float = 2.5e-3
    adam_rate: float = 1.5e-3
    warmup: int = 100
    decay: float = 0.12
    ema_decay: float = 0.998
    measured: int = 24

    @classmethod
    def smoke(cls) -> Recipe:
        """A toy of a minute or two that runs through every stage and learns nothing."""
        return cls(
            vae_stages=((6, 2, 64), (2, 1, 128)),
            buckets=(Bucket(4, 4, 16),),
            phases=(Phase(6, 4, (("4x4", 1.0),)),),
            warmup=2,
            measured=2,
        )


def train_vae(recipe: Recipe, folder: Path, report: Report = print) -> Vae:
    """The trained autoencoder, with latent statistics in its configuration; resumes from ``folder``."""
    module = initialize(nano.build_vae, recipe.seed)
    graph, params = nnx.split(module)
    total = sum(steps for steps, _, _ in recipe.vae_stages)
    rate = loop.warmup_stable_decay(recipe.vae_rate, warmup=min(50, total // 4), total=total, decay=int(total * 0.4))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.98))
    loss = autoencoder.vae_loss(graph, kl_weight=recipe.kl_weight)
    step = loop.make_step(loss, optimizer, seed=recipe.seed, ema_decay=0.99)
    state, end = loop.create(params, optimizer), 0
    for steps, batch, side in recipe.vae_stages:
        end += steps
        images = autoencoder.crops(recipe.seed, batch, side)
        state = loop.fit(state, step, images, end, checkpoint=folder / "vae.safetensors", every=50, report=report)
    vae = nnx.merge(graph, state.ema)
    statistics = folder / "vae.json"
    if not statistics.exists():
        side = [tokens * nano.PIXELS_PER_TOKEN for tokens in nano.TRAINED]
        rng = np.random.default_rng((recipe.seed, 1))
        images = [render.render(grammar.sample(rng), *side, rng) for _ in range(recipe.measured)]
        config = autoencoder.with_latent_statistics(nano.VAE, vae, np.stack(images))
        quality = autoencoder.psnr(vae, images)
        content = {"scaling_factor": config.scaling_factor, "shift_factor": config.shift_factor, "psnr": quality}
        statistics.write_text(json.dumps(content))
        report(f"autoencoder {content}")
    vae.config = vae_config(folder)
    return vae


def vae_config(folder: Path) -> VaeConfig:
    """nano's autoencoder configuration with the statistics measured after training."""
    content = json.loads((folder / "vae.json").read_text())
    return dataclasses.replace(nano.VAE, scaling_factor=content["scaling_factor"], shift_factor=content["shift_factor"])


def encode(recipe: Recipe, folder: Path, report: Report = print) -> None:
    """Latents of every bucket, into ``folder/latents``; finished buckets are kept."""
    vae = train_vae(recipe, folder, report)
    for bucket in recipe.buckets:
        begin = time.perf_counter()
        data.encode_bucket(vae, bucket, folder / "latents", recipe.seed)
        report(f"encoded {bucket.count} pictures of {bucket.name} tokens in {time.perf_counter() - begin:.0f} s")


def initial_generator(seed: int) -> tuple[dict[str, nnx.GraphDef], dict[str, nnx.State]]:
    """Transformer and text encoders before training, as graph definitions and parameters."""
    with nnx.use_eager_sharding(False):
        modules = nnx.jit(lambda key: nano.build_generator(nnx.Rngs(key)))(jax.random.key(seed))
    fast_products.prepare(modules.values())
    return flow_matching.split(modules)


def train_generator(
    recipe: Recipe, folder: Path, report: Report = print, seconds: float | None = None, every: int = 100
) -> dict[str, nnx.Module]:
    """Transformer and text encoders (moving average), by pipeline folder name; resumes from ``folder``.

    The state is saved and the loss reported every ``every`` steps; ``seconds`` ends the run early.
    """
    vocabulary.write_clip(folder / "tokenizer")
    vocabulary.write_t5(folder / "tokenizer_2")
    batch, total = data.batches(
        folder / "latents",
        recipe.phases,
        clip=load_clip_tokenizer(folder / "tokenizer", vocabulary.CLIP_LENGTH),
        t5=load_t5_tokenizer(folder / "tokenizer_2", vocabulary.T5_LENGTH),
        seed=recipe.seed,
    )
    graphs, params = initial_generator(recipe.seed)
    rate, adam_rate = (
        loop.warmup_stable_decay(peak, warmup=recipe.warmup, total=total, decay=int(total * recipe.decay))
        for peak in (recipe.rate, recipe.adam_rate)
    )
    optimizer = flow_matching.muon(rate, adam_rate)
    step = loop.make_step(flow_matching.generator_loss(graphs), optimizer, seed=recipe.seed, ema_decay=recipe.ema_decay)
    state = loop.fit(
        loop.create(params, optimizer),
        step,
        batch,
        total,
        checkpoint=folder / "generator.safetensors",
        every=every,
        report=report,
        seconds=seconds,
    )
    return {name: nnx.merge(graph, state.ema[name]) for name, graph in graphs.items()}
