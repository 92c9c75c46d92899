"""One training loop for everything: pure step, EMA, checkpoints with exact resume.

The batch and the random key of a step depend on (seed, step) alone, so a run that was killed and resumed gives the
same bits as one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import load_file
from safetensors.numpy import save as serialise

from converters.files import atomic_path

Tree = Any
Loss = Callable[[Tree, Tree, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
Step = Callable[["TrainState", Tree], tuple["TrainState", dict[str, jax.Array]]]


class TrainState(NamedTuple):
    """Everything a run continues from: step (int32 scalar), parameters, their moving average, optimizer state."""

    step: jax.Array
    params: Tree
    ema: Tree
    optimizer: Tree


def create(params: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, jax.tree.map(jnp.copy, params), optimizer.init(params))


def warmup_stable_decay(peak: float, *, warmup: int, total: int, decay: int) -> optax.Schedule:
    """Learning rate that climbs for ``warmup`` steps, stays, and falls linearly to zero in the last ``decay``.

    The plateau makes a run easy to prolong or to end early: only ``total`` changes, and it may on resume.
    """
    if warmup + decay > total:
        raise ValueError(f"warmup {warmup} + decay {decay} exceed the {total} steps in total")
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, decay),
        ],
        [warmup, total - decay],
    )


def make_step(
    loss: Loss, optimizer: optax.GradientTransformation, *, seed: int, ema_decay: float, trainable: Tree | None = None
) -> Step:
    """A jitted ``step(state, batch) -> (state, metrics)`` that donates the state.

    Args:
        loss: ``loss(params, batch, key) -> (scalar, metrics)``.
        optimizer: an optax transformation.
        seed: of the key; step ``n`` uses ``fold_in(key(seed), n)``.
        ema_decay: of the moving average, reached gradually: ``min(ema_decay, (1 + n) / (10 + n))``.
        trainable: tree of bools like the parameters; False freezes. None trains everything.
    """

    def step(state: TrainState, batch: Tree) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, batch, key)
        if trainable is not None:
            gradients = jax.tree.map(lambda keep, g: g if keep else jnp.zeros_like(g), trainable, gradients)
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
            if trainable is not None:  # after the optimizer, which may decay weights
                updates = jax.tree.map(lambda keep, u: u if keep else jnp.zeros_like(u), trainable, updates)
            params = optax.apply_updates(state.params, updates)
            norm = optax.tree.norm(gradients)
        n = state.step.astype(jnp.float32)
        keep = jnp.minimum(jnp.float32(ema_decay), (1.0 + n) / (10.0 + n))
        ema = jax.tree.map(lambda old, new: old * keep + new * (1.0 - keep), state.ema, params)
        metrics = {"loss": value, "gradient_norm": norm, **metrics}
        return TrainState(state.step + 1, params, ema, optimizer_state), metrics

    return jax.jit(step, donate_argnums=0)


def save(path: Path, state: Tree) -> None:
    """Any tree of arrays as one safetensors file, which appears whole or not at all."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    arrays = {jax.tree_util.keystr(where): np.array(leaf, order="C") for where, leaf in leaves}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_bytes(serialise(arrays))


def restore(path: Path, like: Tree, part: str = "") -> Tree:
    """A tree written by `save`, in the structure of ``like``; with ``part``, such as ``".ema"``, that branch of it.

    Raises:
        ValueError: if names, shapes or dtypes differ from those of ``like``.
    """
    arrays = {name.removeprefix(part): x for name, x in load_file(path).items() if name.startswith(part)}
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(where) for where, _ in leaves]
    if set(names) != set(arrays):
        differing = sorted(set(names) ^ set(arrays))
        raise ValueError(f"{path}: {len(differing)} tensors differ from this run's, such as {differing[:3]}")
    for name, (_, leaf) in zip(names, leaves, strict=True):
        if arrays[name].shape != leaf.shape or arrays[name].dtype != leaf.dtype:
            raise ValueError(f"{path}: {name} is {arrays[name].shape} {arrays[name].dtype}, expected {leaf.shape}")
    return jax.tree.unflatten(structure, [jnp.asarray(arrays[name]) for name in names])


def fit(
    state: TrainState,
    step: Step,
    batches: Callable[[int], Tree],
    total: int,
    *,
    checkpoint: Path | None = None,
    every: int = 200,
    report: Callable[[str], None] = print,
    seconds: float | None = None,
) -> TrainState:
    """Train from ``state.step`` to ``total``, resuming from ``checkpoint`` where that file exists.

    Args:
        state: the state before the first step.
        step: from `make_step`.
        batches: the batch of a step, a pure function of its number.
        total: steps in all, those before a resume included.
        checkpoint: file written every ``every`` steps and at the end.
        every: also the number of steps a reported line averages over.
        report: receives one line of text at a time.
        seconds: stop after this time, at the next multiple of ``every``.
    """
    if checkpoint is not None and checkpoint.exists():
        state = restore(checkpoint, state)
    begin = last = time.perf_counter()
    history: list[dict[str, jax.Array]] = []
    for number in range(int(state.step), total):
        state, metrics = step(state, batches(number))
        history.append(metrics)
        if (number + 1) % every and number + 1 != total:
            continue
        means = {name: np.mean([float(entry[name]) for entry in history]) for name in metrics}
        now = time.perf_counter()
        values = " ".join(f"{name} {value:.4f}" for name, value in means.items())
        report(f"step {number + 1}/{total} {values} {(now - last) / len(history):.3f} s/step")
        history, last = [], now
        if checkpoint is not None:
            save(checkpoint, state)
        if seconds is not None and now - begin > seconds:
            break
    return state
