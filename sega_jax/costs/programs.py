"""The programs of a picture (encoders, a step of every stage, decode), lowered with abstract weights and counted."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from sega_jax import positional as pe
from sega_jax.costs import closed_form, jaxpr
from sega_jax.costs.roofline import roofline
from sega_jax.costs.targets import Target
from sega_jax.decoding.decode import decode_latents
from sega_jax.families.base import Parts
from sega_jax.families.registry import abstract_conditioning, family_named
from sega_jax.geometry import Grid
from sega_jax.models.abstract import Component
from sega_jax.sampling.sampler import Stage


@dataclass(frozen=True)
class Program:
    """One compiled program; bytes, operations and seconds of one device and one run.

    Attributes:
        name: stage.
        how: how it is served.
        runs: how often, per picture of a batch.
        parameters, inputs, outputs, temporaries: bytes the program holds; inputs without parameters.
        peak: all of them at once, from the compiler.
        estimate: of the bytes beside parameters, from closed forms; ``sent``: of the bytes to other devices.
        flops, bytes: operations, and traffic to memory, an even share of all devices'.
        collectives: bytes sent to other devices, by kind.
        seconds: roofline of one run, None without a data sheet; ``bound``: what holds it up.
        compiled: whether the compiler was asked; ``compile_seconds``: what that took.
        failure: what the compiler said instead.
        notes: what a reader of the counts should know.
    """

    name: str
    how: str
    runs: int
    parameters: int
    inputs: int = 0
    outputs: int = 0
    temporaries: int = 0
    peak: int = 0
    estimate: int = 0
    sent: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    collectives: Mapping[str, int] = field(default_factory=dict)
    seconds: float | None = None
    bound: str | None = None
    compiled: bool = False
    compile_seconds: float = 0.0
    failure: str | None = None
    notes: tuple[str, ...] = ()


# -- one program -------------------------------------------------------------------------------------------------------


def _on(where: Any, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=where)


@dataclass(frozen=True)
class Place:
    """Where a plan's arrays lie: a mesh, one device, or nowhere (only to be counted)."""

    target: Target
    mesh: Mesh | None

    @property
    def everywhere(self) -> Any:
        if self.mesh is not None:
            return NamedSharding(self.mesh, PartitionSpec())
        return SingleDeviceSharding(self.target.devices[0]) if self.target.devices else None

    def params(self, component: Component) -> nnx.State:
        """A component's abstract parameters, sharded by the rules."""
        if self.mesh is None:
            return jax.tree.map(lambda x: _on(self.everywhere, x.shape, x.dtype), component.params)
        from sega_jax.sharding.rules import shardings

        where = shardings(component.params, self.mesh)
        return jax.tree.map(lambda x, s: _on(s, x.shape, x.dtype), component.params, where)

    def latents(self, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        if self.mesh is None:
            return _on(self.everywhere, shape, dtype)
        from sega_jax.sharding.mesh import latent_sharding

        return _on(latent_sharding(self.mesh, tuple(shape)), shape, dtype)

    def array(self, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        return _on(self.everywhere, shape, dtype)

    def context(self):
        """Makes what is traced choose for the target's devices."""
        foreign = self.target.devices and self.target.name != "local"
        return jax.default_device(self.target.devices[0]) if foreign else nullcontext()


_USED = re.compile(r"[Uu]sed ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm|requires ([\d.]+)([KMGT])i?B")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _failure(error: Exception) -> tuple[str, int]:
    """What a compiler's complaint says in a line, and the memory it would need (0 where it does not say)."""
    text = str(error)
    found = _USED.search(text)
    if found:
        amount, unit = (found[1], found[2]) if found[1] else (found[5], found[6])
        return "the compiler ran out of the device's memory", int(float(amount) * _UNITS[unit])
    return text.strip().splitlines()[0][:300] if text.strip() else type(error).__name__, 0


def _compiled(program: Program, place: Place, lower: Callable[[], Any], compile_: bool) -> Program:
    """The program with the compiler's figures."""
    if not compile_ or not place.target.devices:
        return replace(program, peak=program.parameters + program.estimate)
    begun = time.perf_counter()
    try:
        with place.context():
            compiled = lower().compile()
    except jax.errors.JaxRuntimeError as error:
        said, needed = _failure(error)
        seconds = time.perf_counter() - begun
        return replace(program, compiled=True, compile_seconds=seconds, failure=said, peak=needed)
    seconds = time.perf_counter() - begun
    memory = compiled.memory_analysis()
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes
    temporaries = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    sent = jaxpr.hlo_collectives(compiled.as_text(), place.target.count) if place.mesh is not None else {}
    return replace(
        program,
        inputs=max(0, arguments - program.parameters),
        outputs=outputs,
        temporaries=temporaries,
        peak=max(arguments, program.parameters) + outputs + temporaries,  # unused weights are no arguments, but there
        collectives=sent,
        compiled=True,
        compile_seconds=seconds,
    )


def _counted(program: Program, counts: jaxpr.Counts, target: Target) -> Program:
    flops, moved = counts.flops / target.count, counts.bytes / target.count
    return replace(program, flops=flops, bytes=moved, notes=counts.notes)


def timed(program: Program, target: Target) -> Program:
    """The program with its roofline, where the target's rates are known."""
    if target.capacity is None:
        return program
    sent = sum(program.collectives.values()) if program.compiled else program.sent
    line = roofline(target.capacity, program.flops, program.bytes, sent)
    return replace(program, seconds=line.seconds, bound=line.bound)


# -- the stages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """What is planned, and where: the model's outline, a grid, and the closed forms of the whole."""

    parts: Parts
    place: Place
    grid: Grid
    batch: int
    guided: bool
    dtype: str
    closed: closed_form.Estimate
    sizes: Mapping[str, int]
    scheme: str
    compile_: bool

    @property
    def rows(self) -> int:
        return 2 * self.batch if self.guided else self.batch


def encode(r: Picture) -> Program:
    """The text encoders, all prompts of a batch."""
    parts, place = r.parts, r.place
    family = family_named(parts.family)
    arguments = (
        {name: place.params(encoder) for name, encoder in parts.encoders.items()},
        {name: place.array((r.rows, count), jnp.int32) for name, count in family.token_counts(parts).items()},
    )
    graphdefs = tuple((name, encoder.graphdef) for name, encoder in parts.encoders.items())
    statics = {"graphdefs": graphdefs, "dtype": r.dtype}
    names = " and ".join(sorted((name.upper() for name in parts.encoders), reverse=True))
    program = Program("encode", names, 1, r.closed.encoders, estimate=r.closed.encode)
    program = _counted(program, jaxpr.count(lambda *a: family.encode(*a, **statics), *arguments), place.target)
    return _compiled(program, place, lambda: family.encode.lower(*arguments, **statics), r.compile_)


def step(r: Picture, stage: Stage) -> Program:
    """One denoising step of a stage, as its velocity advances."""
    parts, place = r.parts, r.place

    def canvas(shape: Sequence[int]) -> jax.ShapeDtypeStruct:
        return place.latents((r.batch, *shape))

    several = isinstance(stage.latents, Mapping)
    latents = {name: canvas(shape) for name, shape in stage.latents.items()} if several else canvas(stage.latents)
    scalar = place.array((), jnp.float32)
    conditioning = abstract_conditioning(
        parts, place.array, rows=r.batch, dtype=r.dtype, guided=r.guided, tokens=r.grid.text_tokens
    )
    velocity = replace(stage.velocity, mesh=place.mesh)
    if not place.target.devices:  # only counted, which is the same for every kernel; ours want their device
        velocity = replace(velocity, backend="xla")
    method = jax.tree.map(lambda x: place.array(jnp.shape(x), jnp.result_type(x)), pe.traceable(velocity.method))
    state = jax.eval_shape(velocity.initial_state, latents, conditioning)
    state = jax.tree.map(lambda x: place.array(x.shape, x.dtype), state)
    content = jax.tree.map(
        lambda x: place.array((r.batch if x.shape[:1] == (1,) else x.shape[0], *x.shape[1:]), x.dtype), stage.content
    )
    number = place.array((), jnp.int32)
    arguments = (place.params(parts.transformer), method, latents, scalar, conditioning, number, state, content)

    def run(params, method, latents, sigma, conditioning, step, state, content):
        traced = replace(velocity, method=method)
        return traced.advance(params, latents, sigma, conditioning, step, state, content)

    how = f"{velocity.layout.name}, {pe.describe(velocity.method)}, {stage.velocity.backend} kernel"
    if r.place.mesh is not None:
        how += ", " + " x ".join(f"{n} {name}" for name, n in r.place.mesh.shape.items() if n > 1)
    height, width, _ = max(stage.latents.values(), key=math.prod) if several else stage.latents
    factor = parts.vae_config.factor
    closed = closed_form.estimate(parts, factor * height, factor * width, rows=r.rows, sizes=r.sizes, scheme=r.scheme)
    program = Program(stage.name, how, stage.steps, closed.transformer, estimate=closed.step, sent=closed.sent)
    with place.context():
        counts = jaxpr.count(run, *arguments)
    program = _counted(program, counts, place.target)
    return _compiled(program, place, lambda: jax.jit(run).lower(*arguments), r.compile_)


def decode(r: Picture, mode: str) -> Program:
    """The decode of one picture: ``plain``, ``sharded`` or ``strips``, by `closed_form.Estimate.decode_how`."""
    parts, place, config = r.parts, r.place, r.parts.vae_config
    shape = (1, *parts.latent_shape(r.grid))
    whole = jax.ShapeDtypeStruct(shape, jnp.float32)
    statics = {"graphdef": parts.vae.graphdef, "config": config, "dtype": r.dtype}
    with place.context():
        counts = jaxpr.count(lambda p, x: decode_latents(p, x, **statics), parts.vae.params, whole)
    names = {"plain": "whole", "sharded": "exact, rows over all devices", "strips": "exact, in strips over the host"}
    program = Program("decode", names[mode], r.batch, r.closed.vae, estimate=r.closed.decode)
    if mode == "strips":  # one device works
        return _strips(_counted(program, counts, replace(place.target, count=1)), r)
    program = _counted(program, counts, place.target)
    if mode == "plain":
        arguments = (place.params(parts.vae), place.array(shape, jnp.float32))
        return _compiled(program, place, lambda: decode_latents.lower(*arguments, **statics), r.compile_)
    if place.mesh is None:
        return _compiled(program, place, lambda: None, False)
    from sega_jax.decoding.rows import decode_slabs

    devices, axes = place.mesh.size, tuple(place.mesh.axis_names)
    filled = (1, shape[1] + -shape[1] % devices, *shape[2:])
    latents = _on(NamedSharding(place.mesh, PartitionSpec(None, axes)), filled, r.dtype)
    vae = nnx.merge(parts.vae.graphdef, jax.tree.map(lambda x: place.array(x.shape, x.dtype), parts.vae.params))
    return _compiled(
        program,
        place,
        lambda: decode_slabs.lower(vae, latents, mesh=place.mesh, axes=axes, height=shape[1]),
        r.compile_,
    )


def _strips(program: Program, r: Picture) -> Program:
    if not r.compile_ or not r.place.target.devices:
        return replace(program, peak=program.parameters + program.estimate)
    from sega_jax.decoding.strips import plan_strips

    begun = time.perf_counter()
    vae = nnx.merge(r.parts.vae.graphdef, r.parts.vae.params)
    height, width = r.grid.pixels
    with r.place.context():
        stages = plan_strips(vae, height, width, dtype=r.dtype, device=r.place.target.devices[0])
    largest = max(stages, key=lambda stage: stage.peak)
    return replace(
        program,
        how=f"{program.how}; widest: {largest.name}",
        inputs=largest.calls * largest.arguments,
        outputs=largest.calls * largest.outputs,
        temporaries=largest.temporaries,
        peak=program.parameters + largest.peak,
        compiled=True,
        compile_seconds=time.perf_counter() - begun,
    )
