"""How nano is made: autoencoder, latents, generator, export.  Every stage resumes from files in one work folder."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sega_jax.models.abstract import build_abstract
from sega_jax.models.tokenize import load_clip_tokenizer, load_t5_tokenizer
from sega_jax.models.vae import Vae, VaeConfig
from sega_jax.nano import model as nano
from sega_jax.nano import vocabulary
from sega_jax.nano.next import grammar, render
from sega_jax.training import autoencoder, data, fast_products, flow_matching, loop
from sega_jax.training.data import Bucket, Family, Phase

Report = Callable[[str], None]
AUTOENCODER, STATISTICS, GENERATOR = "autoencoder.safetensors", "vae.json", "generator.safetensors"
STATE = (AUTOENCODER, STATISTICS, GENERATOR)  # all that a run goes on from


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run gives.

    Attributes:
        seed: of initialisation, data and noise.
        vae_stages: (steps, batch, side of the crops in pixels).
        vae_rate: peak learning rate of the autoencoder.
        vae_decay: share of the autoencoder's steps over which its rate falls to zero.
        rate, adam_rate: peak learning rates of the generator, of the hidden kernels (Muon) and of the rest (Adam).
        kl_weight: of the autoencoder's KL term.
        buckets: pictures to encode.
        phases: what the generator sees, in order.
        decay: share of the generator's steps over which the learning rate falls to zero.
        ema_decay: of the generator's weights.
        measured: pictures per size for the latent statistics and the autoencoder's PSNR.
    """

    seed: int = 0
    vae_stages: tuple[tuple[int, int, int], ...] = ((1100, 8, 64), (220, 2, 128), (130, 1, 256))
    vae_rate: float = 1.5e-3
    vae_decay: float = 0.45
    kl_weight: float = 1e-4
    buckets: tuple[Bucket, ...] = data.BUCKETS
    phases: tuple[Phase, ...] = (
        Phase(300, 32, (Family(1.0, (("12x12", 1.0),)),)),
        Phase(3300, 32, (Family(1.0, data.SMALL),)),
        Phase(4400, 32, (Family(0.55, data.NOMINAL), Family(0.33, data.OBLONG), Family(0.12, data.SMALL))),
    )
    rate: float = 2.0e-3
    adam_rate: float = 1.0e-3
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
            phases=(Phase(6, 4, (Family(1.0, (("4x4", 1.0),)),)),),
            warmup=2,
            measured=2,
        )


def train_vae(recipe: Recipe, folder: Path, report: Report = print) -> Vae:
    """The trained autoencoder, with latent statistics in its configuration; resumes from ``folder``.

    Training begins from the autoencoder that ships with nano.  The result is rounded to bfloat16, as it is published:
    latents can be encoded again from what is exported.
    """
    finished, statistics = folder / AUTOENCODER, folder / STATISTICS
    if not finished.exists():
        graph, params = nnx.split(autoencoder.shipped())
        average = _fit_vae(recipe, folder, graph, params, report)
        loop.save(finished, jax.tree.map(lambda x: x.astype(jnp.bfloat16), average))
    vae = _finished_vae(finished)
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


def _fit_vae(recipe: Recipe, folder: Path, graph: nnx.GraphDef, params: nnx.State, report: Report) -> nnx.State:
    total = sum(steps for steps, _, _ in recipe.vae_stages)
    decay = int(total * recipe.vae_decay)
    rate = loop.warmup_stable_decay(recipe.vae_rate, warmup=min(50, total // 4), total=total, decay=decay)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.98))
    loss = autoencoder.vae_loss(graph, kl_weight=recipe.kl_weight)
    step = loop.make_step(loss, optimizer, seed=recipe.seed, ema_decay=0.99)
    state, end = loop.create(params, optimizer), 0
    for steps, batch, side in recipe.vae_stages:
        end += steps
        images = autoencoder.crops(recipe.seed, batch, side)
        state = loop.fit(state, step, images, end, checkpoint=folder / "vae.safetensors", every=50, report=report)
    return state.ema


def _finished_vae(path: Path) -> Vae:
    graph, abstract = nnx.split(build_abstract(nano.build_vae))
    stored = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), abstract)
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float32), loop.restore(path, stored)))


def vae_config(folder: Path) -> VaeConfig:
    """nano's autoencoder configuration with the statistics measured after training."""
    content = json.loads((folder / STATISTICS).read_text())
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
    vocabulary.write_clip(folder / "tokenizer", nano.WORDS)
    vocabulary.write_t5(folder / "tokenizer_2", nano.WORDS)
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
        checkpoint=folder / GENERATOR,
        every=every,
        report=report,
        seconds=seconds,
    )
    return {name: nnx.merge(graph, state.ema[name]) for name, graph in graphs.items()}


def averaged_generator(folder: Path) -> dict[str, nnx.Module]:
    """Transformer and text encoders as the run in ``folder`` has them now: the moving average of its last state.

    Raises:
        FileNotFoundError: no step of the generator has been saved there.
    """
    path = folder / GENERATOR
    if not path.exists():
        raise FileNotFoundError(f"{path}: no state of the generator; train it first, or give --resume-from a folder")
    with nnx.use_eager_sharding(False):
        modules = nnx.eval_shape(lambda: nano.build_generator(nnx.Rngs(0)))
    graphs, abstract = flow_matching.split(modules)
    ema = loop.restore(path, abstract, part=".ema")
    return {name: nnx.merge(graph, ema[name]) for name, graph in graphs.items()}


def begin_from(source: Path, folder: Path) -> list[str]:
    """Copy the finished autoencoder and the generator's state from ``source`` into a work folder that has none.

    Latents are not among them: they are encoded again, to the same numbers on the same kind of machine.

    Returns:
        Names of the files that were copied; files that the work folder has already stay as they are.

    Raises:
        FileNotFoundError: ``source`` lacks one of them.
    """
    missing = [name for name in STATE if not (source / name).exists()]
    if missing:
        raise FileNotFoundError(f"{source}: no {', '.join(missing)}; give a folder that holds {', '.join(STATE)}")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in STATE if not (folder / name).exists()]
    for name in wanted:
        shutil.copyfile(source / name, folder / name)
    return wanted
