"""Training the LoRA of Scale-DiT's small stream on frozen weights (arXiv 2510.16325).

Only the adapters are trained, in float32; the transformer stays as it was loaded.  The loss is that of flow matching
on the large picture; nothing of the small one is predicted.  The batch and the random key of a step depend on
(seed, step) alone, so a run that was killed and resumed gives the same bits as one that was not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from sega_jax import positional as pe
from sega_jax.geometry import RopeSpec
from sega_jax.layouts.scale_dit import ScaleDiT
from sega_jax.layouts.streams import bind
from sega_jax.models import adapters as lowrank
from sega_jax.models.abstract import Component
from sega_jax.models.adapters import Adapters
from sega_jax.models.denoiser import StepInputs
from sega_jax.models.flux import PACKING
from sega_jax.sampling.scale_dit import Guided, parse, steady
from sega_jax.sharding.mesh import DATA, latent_sharding, put, sharding
from sega_jax.sharding.rules import gathered
from sega_jax.training.flow_matching import flow_matching_loss, sample_sigma
from sega_jax.training.scale_dit_data import Batch

Report = Callable[[str], None]
TARGETS = {"full": lowrank.FULL, "partial": lowrank.PARTIAL}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run gives, besides its data.

    Attributes:
        layout: a ``scale-dit`` expression; its mask, windows and ``adapt`` are trained for.
        positional: positional method, one that does not follow the noise level.
        rank: of the adapters.
        targets: ``"full"`` or ``"partial"`` (without the modulation layers).
        optimizer: ``"prodigy"`` (rate 1 finds its own step) or ``"adamw"``.
        rate: learning rate; None is 1 for Prodigy and 1e-4 for AdamW.
        weight_decay, clip: of the optimizer; norm the gradient is clipped to.
        batch: pictures per micro-batch.
        accumulate: micro-batches per update.
        caption_drop: share of pictures trained with the empty caption.
        guidance: distilled guidance the model is given, where it takes it.
        steps: micro-batches in all.
        seed: of adapters, data and noise.
        remat: recompute blocks in the backward pass.
    """

    layout: str = "scale-dit"
    positional: str = "rebase(factor=10.0)"
    rank: int = 16
    targets: str = "full"
    optimizer: str = "prodigy"
    rate: float | None = None
    weight_decay: float = 0.01
    clip: float = 0.1
    batch: int = 1
    accumulate: int = 8
    caption_drop: float = 0.1
    guidance: float = 1.0
    steps: int = 8_000
    seed: int = 0
    remat: bool = True

    def __post_init__(self):
        for name in ("rank", "batch", "accumulate", "steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a positive whole number")
        for name, known in (("targets", tuple(TARGETS)), ("optimizer", ("prodigy", "adamw"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {' or '.join(known)}")
        if not 0 <= self.caption_drop <= 1:
            raise ValueError(f"caption_drop={self.caption_drop}: expected a share from 0 to 1")
        for name in ("rate", "weight_decay", "clip", "guidance"):
            value = getattr(self, name)
            if value is not None and not (np.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value}: expected a finite number of at least 0")
        self.settings()
        pe.get(self.positional)

    def settings(self) -> Guided:
        """The layout's settings, with the small stream running along."""
        settings = parse(self.layout)
        if settings.layout.low not in ("auto", "stream"):
            raise ValueError(f"layout={self.layout!r}: training needs the small stream; leave out low")
        return settings

    def windows(self) -> ScaleDiT:
        """The layout that is trained."""
        layout = self.settings().layout
        known = {name: getattr(layout, name) for name in layout.__dataclass_fields__}
        return ScaleDiT(**{**known, "low": "stream", "adapt": layout.adapt or "low"})

    def tags(self) -> dict[str, str]:
        """What the exported file says about its training, read by `models.adapters.guidance_settings`."""
        return {"layout": self.layout, "positional": self.positional, "adapt": self.windows().adapt or "low"}

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer, over micro-batches."""
        if self.optimizer == "prodigy":
            rule = optax.contrib.prodigy(
                1.0 if self.rate is None else self.rate, weight_decay=self.weight_decay, safeguard_warmup=True
            )
        else:
            rule = optax.adamw(1e-4 if self.rate is None else self.rate, weight_decay=self.weight_decay)
        chained = optax.chain(optax.clip_by_global_norm(self.clip), rule)
        return chained if self.accumulate == 1 else optax.MultiSteps(chained, self.accumulate)


class TrainState(NamedTuple):
    """Everything a run continues from: step (int32 scalar), the adapters' parameters, optimizer state."""

    step: jax.Array
    adapters: nnx.State
    optimizer: Any


Loss = Callable[[Any, nnx.State, Batch, jax.Array], jax.Array]


def guidance_loss(
    transformer: nnx.GraphDef,
    adapters: nnx.GraphDef,
    layout: ScaleDiT,
    method: pe.Method,
    rope: RopeSpec,
    *,
    dtype: str,
    guidance: float = 1.0,
    remat: bool = True,
    backend: str = "auto",
    mesh: Mesh | None = None,
) -> Loss:
    """``loss(adapters, frozen, batch, key)``: mean squared error of the large picture's velocity.

    Noise levels are ``sigmoid(normal)``, without a shift for size; the small picture is clean.  On a mesh the pictures
    of a batch lie along its data axis, their tokens along its context axis.

    Raises:
        ValueError: a positional method that follows the noise level: a batch has several.
    """
    if not steady(method, rope.grid(4 * rope.trained[0], 4 * rope.trained[1], 1)):
        raise ValueError(f"positional={pe.describe(method)}: training needs one that is the same at every noise level")

    def loss(adapted: Any, frozen: nnx.State, batch: Batch, key: jax.Array) -> jax.Array:
        model = nnx.merge(transformer, frozen)
        lowrank.attach(model, nnx.merge(adapters, adapted))
        model = gathered(model, mesh)
        rows, height, width, _ = batch.image.shape
        grid = rope.grid(*PACKING.tokens(height, width), batch.text.shape[1])
        turned = {"image": method(grid, pe.Signals(sigma=jnp.zeros(()), step=jnp.zeros((), jnp.int32)))}
        calls = bind(layout.calls(grid), turned)
        sigma_key, noise_key = jax.random.split(key)
        sigma = sample_sigma(sigma_key, rows, jnp.zeros(()))
        clean = PACKING.pack(batch.image)
        noise = jax.random.normal(noise_key, clean.shape)

        def velocity(noisy: jax.Array, sigma: jax.Array) -> jax.Array:
            tokens = {"text": batch.text, "image": noisy, "low": PACKING.pack(batch.low)}
            extras = {"pooled": batch.pooled, "guidance": jnp.full((rows,), guidance)}
            return model(
                StepInputs({name: x.astype(dtype) for name, x in tokens.items()}, sigma, extras),
                calls,
                streams=layout.streams(),
                backend=backend,
                remat=remat,
                mesh=mesh,
            )["image"]

        return flow_matching_loss(velocity, clean, noise, sigma)

    return loss


def make_step(loss: Loss, optimizer: optax.GradientTransformation, seed: int) -> Callable:
    """A jitted ``step(state, frozen, batch) -> (state, {"loss", "gradient_norm"})`` that donates the state."""

    def step(state: TrainState, frozen: nnx.State, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        value, gradients = jax.value_and_grad(loss)(state.adapters, frozen, batch, key)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.adapters)
            changed = optax.apply_updates(state.adapters, updates)
            norm = optax.tree.norm(gradients)
        return TrainState(state.step + 1, changed, optimizer_state), {"loss": value, "gradient_norm": norm}

    return jax.jit(step, donate_argnums=0)


# -- checkpoints ---------------------------------------------------------------------------------------------------


def _named(state: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(where): leaf for where, leaf in leaves}


class Checkpoints:
    """Orbax checkpoints of a run in a folder, which belongs to one recipe."""

    def __init__(self, folder: Path, recipe: Recipe):
        import orbax.checkpoint as ocp

        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "recipe.json"
        mine = json.loads(json.dumps(asdict(recipe)))
        if note.exists():
            theirs = json.loads(note.read_text())
            different = sorted(name for name in mine if name != "steps" and theirs.get(name) != mine[name])
            if different:
                told = ", ".join(f"{name}={mine[name]!r} (there {theirs.get(name)!r})" for name in different)
                raise ValueError(f"{folder} holds a run of another recipe: {told}; give another folder")
        else:
            partial = note.with_suffix(".partial")
            partial.write_text(json.dumps(mine, indent=1))
            os.replace(partial, note)
        self._args = ocp.args
        self._manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=2))

    def save(self, state: TrainState) -> None:
        """Writes a state; returns once it is on disk."""
        self._manager.save(int(state.step), args=self._args.StandardSave(_named(state)))
        self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> TrainState:
        """The newest state, or ``like`` where there is none; arrays are placed as those of ``like``."""
        newest = self._manager.latest_step()
        if newest is None:
            return like
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _named(like))
        found = self._manager.restore(newest, args=self._args.StandardRestore(abstract))
        leaves, structure = jax.tree_util.tree_flatten_with_path(like)
        return jax.tree.unflatten(structure, [found[jax.tree_util.keystr(where)] for where, _ in leaves])

    def close(self) -> None:
        self._manager.close()


# -- the run -------------------------------------------------------------------------------------------------------


def start(recipe: Recipe, transformer: Component) -> tuple[nnx.GraphDef, TrainState]:
    """Fresh adapters (their structure) and the state before the first step."""
    module = nnx.merge(transformer.graphdef, transformer.params)
    adapters = lowrank.create(module, recipe.rank, jax.random.key(recipe.seed), TARGETS[recipe.targets])
    graph, params = nnx.split(adapters)
    with jax.numpy_dtype_promotion("standard"):
        # Prodigy keeps the adapters it started from; a donated state may hold no array twice
        optimizer = jax.tree.map(jnp.copy, recipe.transformation().init(params))
    return graph, TrainState(jnp.zeros((), jnp.int32), params, optimizer)


def laid(batch: Batch, mesh: Mesh | None) -> Batch:
    """A batch on a mesh: pictures along its data axis, rows of latents along its context axis; None leaves it alone."""
    if mesh is None:
        return batch
    return Batch(*(put(x, latent_sharding(mesh, x.shape) if x.ndim == 4 else sharding(mesh, DATA)) for x in batch))


def train(
    recipe: Recipe,
    transformer: Component,
    rope: RopeSpec,
    batches: Callable[[int], Batch],
    folder: Path,
    *,
    dtype: str,
    every: int = 100,
    report: Report = print,
    seconds: float | None = None,
    mesh: Mesh | None = None,
) -> Adapters:
    """Train adapters, resuming from ``folder`` where it holds a run of this recipe.

    Args:
        recipe: of the run.
        transformer: frozen weights; they are read and never written.  With a mesh they lie on it.
        rope: rotary geometry of the model.
        batches: the batch of a step, a pure function of its number.
        folder: of checkpoints, and of ``log.jsonl`` with one line per reported stretch.
        dtype: of activations.
        every: micro-batches between reports and checkpoints.
        report: receives one line of text at a time.
        seconds: stop after this time, at the next checkpoint.
        mesh: devices; the adapters lie on all of them whole.  Another mesh gives other roundings, so a run that is to
            be the same bit for bit goes on with the mesh it began with.

    Raises:
        ValueError: a batch that the mesh's data axis does not divide.
    """
    if mesh is not None and recipe.batch % mesh.shape[DATA]:
        raise ValueError(f"batch={recipe.batch}: the mesh has data={mesh.shape[DATA]}; expected a multiple of it")
    graph, state = start(recipe, transformer)
    if mesh is not None:
        state = jax.tree.map(lambda x: put(x, sharding(mesh)), state)
    loss = guidance_loss(
        transformer.graphdef, graph, recipe.windows(), pe.get(recipe.positional), rope,
        dtype=dtype, guidance=recipe.guidance, remat=recipe.remat, mesh=mesh,
    )  # fmt: skip
    step = make_step(loss, recipe.transformation(), recipe.seed)
    checkpoints = Checkpoints(folder, recipe)
    try:
        state = checkpoints.restore(state)
        if int(state.step):
            report(f"resumed at step {int(state.step)}")
        begun = last = time.perf_counter()
        history: list[dict[str, jax.Array]] = []
        for number in range(int(state.step), recipe.steps):
            state, metrics = step(state, transformer.params, laid(batches(number), mesh))
            history.append(metrics)
            if (number + 1) % every and number + 1 != recipe.steps:
                continue
            means = {name: float(np.mean([float(entry[name]) for entry in history])) for name in metrics}
            now = time.perf_counter()
            line = {"step": number + 1, **means, "seconds_per_step": (now - last) / len(history)}
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            told = " ".join(f"{name} {value:.5g}" for name, value in line.items() if name != "step")
            report(f"step {number + 1}/{recipe.steps} {told}")
            history, last = [], now
            checkpoints.save(state)
            if seconds is not None and now - begun > seconds:
                break
    finally:
        checkpoints.close()
    return nnx.merge(graph, state.adapters)
