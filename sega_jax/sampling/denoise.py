"""One denoising step: spectrum, ropes, calls, model, guidance.  Pure, traced in everything that is not a shape.

`predict` is the whole step up to the velocity and `euler` the update.  They are compiled once per (shape, batch,
method class): sigma, guidance, spectra and the method's numbers are traced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import ArrayLike

from sega_jax import positional as pe
from sega_jax.geometry import Grid, RopeSpec
from sega_jax.layouts.blocks import Leaf
from sega_jax.layouts.streams import Content, Layout, bind, ordered
from sega_jax.models.denoiser import StepInputs
from sega_jax.models.packing import Packing
from sega_jax.sampling.keys import key_of, pinned, words
from sega_jax.sharding.mesh import DATA, latent_sharding, put, sharding
from sega_jax.sharding.rules import gathered


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Conditioning:
    """What the model is asked for.

    Attributes:
        arrays: encoded prompts by name, a row per picture: ``"text"`` [B, T, text_dim] is the text stream's tokens, the
            others are the family's own, such as a pooled vector [B, D].
        scales: f32 scalars that the network itself reads, such as ``"guidance"`` where it was distilled.
        negative: arrays to steer away from (true classifier-free guidance), named as ``arrays``; or None.
        true_guidance: scale of true guidance, f32 scalar; with ``negative`` only.
    """

    arrays: Mapping[str, Leaf]
    scales: Mapping[str, Leaf] = field(default_factory=dict)
    negative: Mapping[str, Leaf] | None = None
    true_guidance: Leaf = None

    @property
    def text_tokens(self) -> int:
        """Length of the text stream."""
        return self.arrays["text"].shape[1]

    def rows(self) -> Mapping[str, Leaf]:
        """The arrays of all model rows: with a negative prompt its rows follow the others'."""
        if self.negative is None:
            return self.arrays
        return {name: jnp.concatenate([x, self.negative[name]]) for name, x in self.arrays.items()}

    def inputs(self, streams: Mapping[str, jax.Array], sigma: jax.Array, arrays: Mapping[str, Leaf]) -> StepInputs:
        """An evaluation's inputs.

        Args:
            streams: tokens of every stream of the layout.
            sigma: f32 scalar.
            arrays: of `rows`, or more rows of the kind.
        """
        count = len(arrays["text"])
        scales = {name: jnp.broadcast_to(value, (count,)) for name, value in self.scales.items()}
        extras = {name: x for name, x in arrays.items() if name != "text"}
        return StepInputs(streams, jnp.broadcast_to(sigma, (count,)), extras | scales)


SQUARES = Packing()  # of two by two latent pixels, as most families have them
Combine = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def classifier_free(positive: jax.Array, negative: jax.Array, scale: jax.Array) -> jax.Array:
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598) of tokens [B, N, C] with and without the prompt."""
    return negative + scale * (positive - negative)


def _twice(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, x])


def _filled(x: jax.Array, rows: int) -> jax.Array:
    """The last row repeated until there are ``rows``."""
    return jnp.pad(x, ((0, rows - x.shape[0]), *((0, 0),) * (x.ndim - 1)), mode="edge")


Latents = jax.Array | Mapping[str, jax.Array]  # one canvas [B, H, W, C], or canvases by name


def _canvases(latents: Latents) -> Mapping[str, jax.Array]:
    return latents if isinstance(latents, Mapping) else {"image": latents}


def largest(latents: Latents) -> jax.Array:
    """The canvas with most pixels."""
    return max(_canvases(latents).values(), key=lambda x: x.shape[1] * x.shape[2])


def _per_sample(change: Callable[[jax.Array], jax.Array], rope: pe.Rope, batch: int) -> pe.Rope:
    """``change`` of the arrays of a rope that have one row per sample."""

    def one(x: jax.Array) -> jax.Array:
        return change(x) if x.ndim > 1 and x.shape[0] == batch and batch > 1 else x

    return jax.tree.map(one, rope)


Ropes = dict[str, dict[str, pe.Rope]]


def _phases(
    method: pe.Method,
    layout: Layout,
    grid: Grid,
    canvases: Mapping[str, jax.Array],
    whole: jax.Array,
    probe: jax.Array,
    sigma: jax.Array,
    step: jax.Array,
    state: Any,
) -> tuple[Ropes, dict[str, Any]]:
    """The ropes of every grid of a layout, and the method's next memory, from the spectrum of packed latents.

    Args:
        canvases: packed latents by canvas, f32 [B, N, C]; ``whole``: those of the largest.
        probe: see `Denoiser.probe`.
        Other arguments as of `predict`.
    """
    ropes, new_state = {}, {}
    for name, rope_grid in layout.grids(grid).items():
        canvas = canvases.get(name, whole)
        seen = rope_grid if rope_grid.tokens == canvas.shape[1] else grid  # windows: the statistic is the canvas's
        spectrum = pe.statistic(method, canvas, seen, probe)
        memory = None if state is None else state[name]
        signals = pe.Signals(sigma=sigma, spectrum=spectrum, step=step, state=memory)
        ropes[name] = pe.ropes_of(method, rope_grid, signals)
        new_state[name] = pe.next_state(method, rope_grid, signals)
    return ropes, new_state


@dataclass(frozen=True)
class _Rows:
    """What a network is given, a row per picture or two: to be repeated for guidance and filled for a mesh."""

    tokens: Mapping[str, jax.Array]
    content: Content
    ropes: Ropes

    def changed(self, change: Callable[[jax.Array], jax.Array], rows: int) -> _Rows:
        """``change`` of all that has one row per sample, of which there are ``rows``."""
        return _Rows(
            {name: change(x) for name, x in self.tokens.items()},
            jax.tree.map(lambda x: change(x) if x.shape[0] == rows > 1 else x, self.content),
            {n: {k: _per_sample(change, rope, rows) for k, rope in r.items()} for n, r in self.ropes.items()},
        )


@partial(jax.jit, static_argnames=("graphdef", "layout", "grid", "dtype", "backend", "mesh", "packing", "combine"))
def predict(
    params: nnx.State,
    method: pe.Method,
    latents: Latents,
    sigma: jax.Array,
    conditioning: Conditioning,
    step: jax.Array,
    state: Any,
    content: Content,
    *,
    graphdef: nnx.GraphDef,
    layout: Layout,
    grid: Grid,
    dtype: str,
    backend: str = "auto",
    mesh: Mesh | None = None,
    packing: Packing = SQUARES,
    combine: Combine = classifier_free,
) -> tuple[Latents, Any]:
    """Velocity ``noise - clean`` at one noise level, and the method's next state.

    Args:
        params: of the network, a `Denoiser`.
        method: positional method, in traceable form (`positional.traceable`).
        latents: model-scale latents, f32 [B, H, W, C], or a layout's canvases of them by name.
        sigma: noise level, f32 scalar.
        conditioning: prompts and guidance.
        step: i32 scalar, index of the step.
        state: the method's memory by the name of the layout's grid, or None.
        content: what of the layout is traced, or None.
        graphdef: structure of the network.
        layout: where tokens sit and whom they see.
        grid: token grid.
        dtype: of activations.
        backend: attention kernel.
        mesh: devices; the parameters lie there (`sharding.rules.shardings`).
        packing: latents to tokens.
        combine: predictions with and without the prompt to one, tokens [B, N, C] and the scale.
    """
    model = gathered(nnx.merge(graphdef, params), mesh)
    batch = largest(latents).shape[0]
    canvases = {name: packing.pack(x.astype(jnp.float32)) for name, x in _canvases(latents).items()}
    whole = packing.pack(largest(latents).astype(jnp.float32))
    ropes, new_state = _phases(method, layout, grid, canvases, whole, model.probe(), sigma, step, state)

    rows = _Rows(ordered(layout, grid, layout.enter(canvases, content)), content, ropes)
    arrays = conditioning.rows()
    guided = conditioning.negative is not None
    if guided:
        rows = rows.changed(_twice, batch)
    asked = count = arrays["text"].shape[0]
    if mesh is not None and count % mesh.shape[DATA]:
        count += -count % mesh.shape[DATA]
        fill = partial(_filled, rows=count)
        arrays, rows = {name: fill(x) for name, x in arrays.items()}, rows.changed(fill, asked)
    tokens = {"text": arrays["text"], **rows.tokens}
    streams = model(
        conditioning.inputs({name: x.astype(dtype) for name, x in tokens.items()}, sigma, arrays),
        bind(layout.calls(grid, rows.content), rows.ropes),
        streams=layout.streams(),
        backend=backend,
        mesh=mesh,
        given=layout.given(rows.content) if hasattr(layout, "given") else None,
    )
    streams = {name: x[:asked].astype(jnp.float32) for name, x in streams.items()}
    if guided:
        scale = conditioning.true_guidance
        streams = {name: combine(x[:batch], x[batch:], scale) for name, x in streams.items()}
    sides = {name: packing.tokens(*x.shape[1:3]) for name, x in _canvases(latents).items()}
    left = layout.leave(ordered(layout, grid, streams, inverse=True), canvases, content)
    velocity = {name: packing.unpack(x, *sides[name]) for name, x in left.items()}
    if mesh is not None:
        velocity = {
            name: jax.lax.with_sharding_constraint(x, latent_sharding(mesh, x.shape)) for name, x in velocity.items()
        }
        new_state = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, sharding(mesh)), new_state)
    return (velocity if isinstance(latents, Mapping) else velocity["image"]), new_state


@jax.jit
def euler(latents: ArrayLike, velocity: ArrayLike, sigma: ArrayLike, sigma_next: ArrayLike) -> jax.Array:
    """One Euler step of the flow, ``x + (sigma_next - sigma) * velocity``, float32."""
    return latents + (sigma_next - sigma) * velocity


@jax.jit
def add_noise(clean: ArrayLike, noise: ArrayLike, sigma: ArrayLike) -> jax.Array:
    """``(1 - sigma) * clean + sigma * noise``, float32: where an image-to-image run starts."""
    return (1 - sigma) * clean + sigma * noise


@partial(jax.jit, static_argnames=("shape", "number"))
def _noise(seeds: jax.Array, indices: jax.Array, shape: tuple[int, ...], number: int) -> jax.Array:
    def one(seed: jax.Array, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key_of(seed), index)
        return jax.random.normal(jax.random.fold_in(key, number) if number else key, shape, jnp.float32)

    return jax.vmap(one)(seeds, indices)


def initial_noise(
    seed: int | Sequence[int], indices: Sequence[int], shape: tuple[int, int, int], number: int = 0
) -> jax.Array:
    """Gaussian latents f32 [len(indices), *shape]; each depends on (seed, image index, number) and on nothing else.

    Args:
        seed: of all of them, or one for each index; up to 64 bits.
        indices: image indices, below 2**32.
        shape: of one.
        number: 0 is where a run starts; stages that add noise again take others.
    """
    seeds = np.broadcast_to(words(seed), (len(indices), 2))
    with pinned():
        return _noise(jnp.asarray(seeds), jnp.asarray(indices, jnp.uint32), shape, number)


Watcher = Callable[[Latents, jax.Array], None]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextlib.contextmanager
def watched(watcher: Watcher | None) -> Iterator[None]:
    """Within the block, every evaluation of a model is told: its latents and their noise level."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def _check_arguments(latents: Any, sigma: Any, conditioning: Conditioning) -> None:
    """Complains about arguments of `Velocity` whose shapes disagree, before a compiler does."""
    shape = jnp.shape(latents)
    if len(shape) != 4 or shape[1] % 2 or shape[2] % 2:
        raise ValueError(f"latents of shape {shape}: expected [batch, height, width, channels], even sides")
    if jnp.shape(sigma) != ():
        raise ValueError(f"sigma of shape {jnp.shape(sigma)}: expected a scalar, the noise level of the whole batch")
    named = dict(conditioning.arrays)
    if conditioning.negative is not None:
        named |= {f"negative {name}": array for name, array in conditioning.negative.items()}
    for name, array in named.items():
        if jnp.shape(array)[:1] != shape[:1]:
            raise ValueError(
                f"conditioning: {name} of shape {jnp.shape(array)} for latents of a batch of {shape[0]}; expected one "
                "row for each (encode as many prompts, or repeat the row)"
            )


@dataclass(frozen=True)
class Velocity:
    """The model as a pure function ``f(params, latents, sigma, conditioning) -> velocity``.

    Vmappable, differentiable in reverse mode (`jax.grad`, `jax.vjp`, also of ``params``), and exactly what
    `Pipeline.generate` steps with: an Euler loop over it reproduces its latents bit for bit.  Attention kernels define
    their own backward pass, which JAX cannot run forwards: `jax.jvp` takes a pipeline of ``backend="reference"``.
    """

    graphdef: nnx.GraphDef
    method: pe.Method
    layout: Layout
    rope: RopeSpec
    dtype: str
    backend: str = "auto"
    mesh: Mesh | None = None
    packing: Packing = SQUARES
    combine: Combine = classifier_free

    def grid_of(self, height: int, width: int, text_tokens: int) -> Grid:
        """The token grid of latents of these sides."""
        return self.rope.grid(*self.packing.tokens(height, width), text_tokens)

    def grid(self, latents: Latents, conditioning: Conditioning) -> Grid:
        """The token grid of these latents, or of the largest of several canvases."""
        canvas = largest(latents)
        return self.grid_of(canvas.shape[1], canvas.shape[2], conditioning.text_tokens)

    def _statics(self, latents: Latents, conditioning: Conditioning) -> dict[str, Any]:
        """What `predict` is compiled for besides shapes."""
        return {
            "graphdef": self.graphdef,
            "layout": self.layout,
            "grid": self.grid(latents, conditioning),
            "dtype": self.dtype,
            "backend": self.backend,
            "mesh": self.mesh,
            "packing": self.packing,
            "combine": self.combine,
        }

    def initial_state(self, latents: Latents, conditioning: Conditioning) -> Any:
        """The positional method's memory before the first step, by grid of the layout; None for methods without."""
        grids = self.layout.grids(self.grid(latents, conditioning))
        rows = largest(latents).shape[0]
        return {name: pe.initial_state(self.method, grid, rows) for name, grid in grids.items()}

    def advance(self, params, latents, sigma, conditioning, step=0, state=None, content=None) -> tuple[Latents, Any]:
        """Velocity and the method's next state.

        For methods that remember or read the step index, and for layouts with several canvases or traced ``content``
        (see `layouts.streams.Layout`); other arguments as in `predict`.
        """
        sigma, step = jnp.asarray(sigma, jnp.float32), jnp.asarray(step, jnp.int32)
        method = pe.traceable(self.method)
        if self.mesh is not None:
            latents = jax.tree.map(lambda x: put(x, latent_sharding(self.mesh, x.shape)), latents)
            method, sigma, step, conditioning, state, content = jax.tree.map(
                partial(put, where=sharding(self.mesh)), (method, sigma, step, conditioning, state, content)
            )
        made = predict(
            params,
            method,
            latents,
            sigma,
            conditioning,
            step,
            state,
            content,
            **self._statics(latents, conditioning),
        )
        watcher = _watcher.get()
        if watcher is not None:
            watcher(latents, sigma)
        return made

    def lower(self, params: nnx.State, latents: jax.ShapeDtypeStruct, conditioning: Conditioning) -> Any:
        """What `advance` would compile for arguments of these shapes, lowered (`jax.stages.Lowered`)."""
        state = self.initial_state(latents, conditioning)
        small = pe.traceable(self.method), jnp.float32(1), jnp.int32(0), state
        if self.mesh is not None:
            where = sharding(self.mesh)
            small = jax.tree.map(partial(put, where=where), small)
            latents = jax.ShapeDtypeStruct(
                latents.shape, latents.dtype, sharding=latent_sharding(self.mesh, latents.shape)
            )
            conditioning = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), conditioning)
        method, sigma, step, state = small
        return predict.lower(
            params,
            method,
            latents,
            sigma,
            conditioning,
            step,
            state,
            None,
            **self._statics(latents, conditioning),
        )

    def __call__(self, params: nnx.State, latents: jax.Array, sigma: Any, conditioning: Conditioning) -> jax.Array:
        """Velocity f32 [B, H, W, C] at latents f32 [B, H, W, C] and sigma (scalar in [0, 1]).

        Raises:
            ValueError: latents, sigma and conditioning that do not belong together.
        """
        _check_arguments(latents, sigma, conditioning)
        return self.advance(params, latents, sigma, conditioning)[0]

    def with_method(self, method: pe.Method) -> Velocity:
        """The same function under another positional method."""
        return replace(self, method=method)
