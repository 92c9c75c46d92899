"""What a picture takes on hardware that need not be here: compiled ahead of time, counted, and held against capacity.

    from sega_jax.plan import plan
    report = plan("flux-dev", size=(6144, 6144), target="v6e:2x4")
    report["fits"], report["programs"]

The encoders, one denoising step of every stage and the decode are lowered with abstract weights and compiled for the
target; memory is the compiler's own analysis, operations are counted from the program (`sega_jax.counting`), traffic
between devices from the compiled text.  Where the compiler for a target is not installed, closed forms
(`sega_jax.estimate`) and the roofline remain.
"""

from __future__ import annotations

import logging
import math
import os
import re
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from sega_jax import counting, estimate, planning, topologies
from sega_jax import positional as pe
from sega_jax.families import Component, Outline, Parts
from sega_jax.layouts.streams import Layout
from sega_jax.pipeline import Pipeline
from sega_jax.roofline import ASSUMPTIONS, roofline
from sega_jax.sampling.denoise import Conditioning
from sega_jax.sampling.sampler import Stage
from sega_jax.skeleton import skeleton, text_length
from sega_jax.stages import decode_latents, encode_text

logger = logging.getLogger(__name__)

KERNELS = {"tpu": "tpu", "gpu": "hopper", "cpu": "xla"}  # what a plan compiles; `auto` asks the devices that are here
ALL_TARGETS = (
    "v5e:2x4", "v5e:4x4", "v5p:2x2x1", "v6e:2x2", "v6e:2x4", "tpu7x:2x2x1", "h100:1", "h100:8", "h200:1", "h200:8",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """Devices to plan for.

    Attributes:
        name: as asked for.
        count: number of devices.
        platform: ``"tpu"``, ``"gpu"`` or ``"cpu"``.
        memory: bytes of one device; of a CPU, of the host.
        capacity: rates, where they are known.
        devices: to compile for; empty where that is not possible.
        missing: why it is not.
    """

    name: str
    count: int
    platform: str
    memory: int
    capacity: topologies.Capacity | None
    devices: tuple[jax.Device, ...] = ()
    missing: str | None = None

    @property
    def chip(self) -> str:
        return self.name.partition(":")[0]


def host_memory() -> int:
    """Bytes of host memory that are available."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _known_chip(device: jax.Device) -> topologies.Capacity | None:
    kind = device.device_kind.lower().replace(" ", "")
    names = {"tpuv5lite": "v5e", "tpuv5": "v5p", "tpuv6lite": "v6e", "tpu7x": "tpu7x", "h100": "h100", "h200": "h200"}
    chip = next((chip for name, chip in names.items() if name in kind), None)
    return None if chip is None else topologies.capacity(chip)


def find_target(name: str) -> Target:
    """The target of a name such as ``"v6e:2x4"``, ``"h100:8"`` or ``"local"``.

    Raises:
        ValueError: a name that `topologies.devices` does not know.
    """
    if name == "local":
        devices = tuple(jax.devices())
        platform = {"cuda": "gpu", "rocm": "gpu"}.get(devices[0].platform, devices[0].platform)
        known = _known_chip(devices[0])
        limit = (devices[0].memory_stats() or {}).get("bytes_limit") if platform != "cpu" else host_memory()
        if limit is None:
            limit = known.memory_bytes if known else host_memory()
        return Target(name, len(devices), platform, int(limit), known, devices)
    known = topologies.capacity(name)
    if ":" not in name:
        raise ValueError(f"target={name!r}: expected an arrangement too, such as {name}:1 or {name}:2x4")
    sides = [int(side) for side in name.partition(":")[2].split("x")]
    count = math.prod(sides) * (2 if name.startswith("tpu7x") else 1)  # a chip of two devices
    try:
        devices, missing = tuple(topologies.devices(name)), None
    except ModuleNotFoundError as error:
        devices, missing = (), str(error)
    except Exception as error:  # compiler plugins raise what they like
        if isinstance(error, ValueError):
            raise
        devices, missing = (), f"the compiler for {name} does not start: {error}"
    return Target(name, len(devices) or count, known.platform, known.memory_bytes, known, devices, missing)


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
class _Place:
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


def _compiled(program: Program, place: _Place, lower: Callable[[], Any], compile_: bool) -> Program:
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
    sent = counting.hlo_collectives(compiled.as_text(), place.target.count) if place.mesh is not None else {}
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


def _counted(program: Program, counts: counting.Counts, target: Target) -> Program:
    flops, moved = counts.flops / target.count, counts.bytes / target.count
    return replace(program, flops=flops, bytes=moved, notes=counts.notes)


def _timed(program: Program, target: Target) -> Program:
    if target.capacity is None:
        return program
    sent = sum(program.collectives.values()) if program.compiled else program.sent
    line = roofline(target.capacity, program.flops, program.bytes, sent)
    return replace(program, seconds=line.seconds, bound=line.bound)


# -- the stages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    parts: Parts
    place: _Place
    grid: Any
    batch: int
    guided: bool
    dtype: str
    closed: estimate.Estimate
    sizes: Mapping[str, int]
    scheme: str
    compile_: bool

    @property
    def rows(self) -> int:
        return 2 * self.batch if self.guided else self.batch


def _encode(r: _Request) -> Program:
    parts, place = r.parts, r.place
    clip_length, t5_length = text_length(parts)
    texts = r.batch * (2 if r.guided else 1)
    arguments = (
        place.params(parts.clip),
        place.params(parts.t5),
        place.array((texts, clip_length), jnp.int32),
        place.array((texts, t5_length), jnp.int32),
    )
    statics = {"clip": parts.clip.graphdef, "t5": parts.t5.graphdef, "dtype": r.dtype}
    program = Program("encode", "T5 and CLIP", 1, r.closed.encoders, estimate=r.closed.encode)
    program = _counted(program, counting.count(lambda *a: encode_text(*a, **statics), *arguments), place.target)
    return _compiled(program, place, lambda: encode_text.lower(*arguments, **statics), r.compile_)


def _step(r: _Request, stage: Stage) -> Program:
    parts, place, config = r.parts, r.place, r.parts.transformer_config

    def canvas(shape: Sequence[int]) -> jax.ShapeDtypeStruct:
        return place.latents((r.batch, *shape))

    several = isinstance(stage.latents, Mapping)
    latents = {name: canvas(shape) for name, shape in stage.latents.items()} if several else canvas(stage.latents)
    text = place.array((r.batch, r.grid.text_tokens, config.text_dim), r.dtype)
    pooled = place.array((r.batch, config.pooled_dim), r.dtype)
    scalar = place.array((), jnp.float32)
    conditioning = Conditioning(
        text,
        pooled,
        scalar if config.guidance_embeds else None,
        (text, pooled) if r.guided else None,
        scalar if r.guided else None,
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
    step = place.array((), jnp.int32)
    arguments = (place.params(parts.transformer), method, latents, scalar, conditioning, step, state, content)

    def run(params, method, latents, sigma, conditioning, step, state, content):
        traced = replace(velocity, method=method)
        return traced.advance(params, latents, sigma, conditioning, step, state, content)

    how = f"{velocity.layout.name}, {pe.describe(velocity.method)}, {stage.velocity.backend} kernel"
    if r.place.mesh is not None:
        how += ", " + " x ".join(f"{n} {name}" for name, n in r.place.mesh.shape.items() if n > 1)
    height, width, _ = max(stage.latents.values(), key=math.prod) if several else stage.latents
    factor = parts.vae_config.factor
    closed = estimate.estimate(parts, factor * height, factor * width, rows=r.rows, sizes=r.sizes, scheme=r.scheme)
    program = Program(stage.name, how, stage.steps, closed.transformer, estimate=closed.step, sent=closed.sent)
    with place.context():
        counts = counting.count(run, *arguments)
    program = _counted(program, counts, place.target)
    return _compiled(program, place, lambda: jax.jit(run).lower(*arguments), r.compile_)


def _decode(r: _Request, mode: str) -> Program:
    parts, place, config = r.parts, r.place, r.parts.vae_config
    shape = (1, 2 * r.grid.height, 2 * r.grid.width, config.latent_channels)
    whole = jax.ShapeDtypeStruct(shape, jnp.float32)
    statics = {"graphdef": parts.vae.graphdef, "config": config, "dtype": r.dtype}
    with place.context():
        counts = counting.count(lambda p, x: decode_latents(p, x, **statics), parts.vae.params, whole)
    names = {"plain": "whole", "sharded": "exact, rows over all devices", "strips": "exact, in strips over the host"}
    program = Program("decode", names[mode], r.batch, r.closed.vae, estimate=r.closed.decode)
    if mode == "strips":  # one device works
        program = replace(_counted(program, counts, replace(place.target, count=1)))
        return _strips(program, r)
    program = _counted(program, counts, place.target)
    if mode == "plain":
        arguments = (place.params(parts.vae), place.array(shape, jnp.float32))
        return _compiled(program, place, lambda: decode_latents.lower(*arguments, **statics), r.compile_)
    if place.mesh is None:
        return _compiled(program, place, lambda: None, False)
    from sega_jax.sharding.decode import decode_slabs

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


def _strips(program: Program, r: _Request) -> Program:
    if not r.compile_ or not r.place.target.devices:
        return replace(program, peak=program.parameters + program.estimate)
    from sega_jax.sharding.strips import plan_strips

    begun = time.perf_counter()
    vae = nnx.merge(r.parts.vae.graphdef, r.parts.vae.params)
    height, width = r.grid.pixels
    with r.place.context():
        stages = plan_strips(vae, height, width, dtype=r.dtype, device=r.place.target.devices[0])
    largest = max(stages, key=lambda stage: stage.peak)
    return replace(
        program,
        how=f"{program.how}; widest: {largest.name}",
        inputs=2 * largest.arguments,
        outputs=2 * largest.outputs,
        temporaries=largest.temporaries,
        peak=program.parameters + largest.peak,
        compiled=True,
        compile_seconds=time.perf_counter() - begun,
    )


# -- the whole ---------------------------------------------------------------------------------------------------------


def plan(
    model: str | os.PathLike[str] = "nano",
    *,
    size: tuple[int, int] | None = None,
    target: str = "local",
    positional: str | pe.Method = "auto",
    layout: str | Layout = "dense",
    steps: int | None = None,
    batch_size: int = 1,
    negative_prompt: bool = False,
    mesh: str | None = None,
    context: str = "auto",
    backend: str | None = None,
    residency: str = "all",
    dtype: str = "bfloat16",
    compile: bool = True,
    transformer: Path | None = None,
    **hub: Any,
) -> dict:
    """What a picture takes on a target, and whether it fits.

    Args:
        model: see `sega_jax.skeleton.skeleton`; no weights are needed.
        size: (width, height) in pixels; default the trained size.
        target: ``"local"``, or one of `sega_jax.topologies.devices`.
        positional, layout, steps, batch_size: as of `Pipeline.generate`.
        negative_prompt: whether there is one (true classifier-free guidance: two rows per picture).
        mesh: sizes such as ``"context=4,tensor=2"``; default the one with least traffic that fits.
        context: scheme by which attention meets the context axis, as of `Pipeline`; with a mesh that has one.
        backend: attention kernel; default ours for the platform.
        residency: ``"all"`` parameters on the devices through all stages, or ``"offload"``, as of `Pipeline`.
        dtype: of parameters and activations.
        compile: False for closed forms and the roofline alone.
        transformer, hub: as of `Pipeline.from_pretrained`.

    Returns:
        A dictionary of plain values: ``fits``, ``because``, ``try``, ``programs`` (`Program`), ``resident`` bytes of
        all parameters per device, ``peak`` and ``memory`` per device, ``seconds`` per image, ``assumptions``, and
        ``host``: what planning itself took.

    Raises:
        ValueError, TypeError, CheckpointError: a request, target or mesh that cannot be served.
    """
    begun = time.perf_counter()
    parts = skeleton(os.fspath(model), dtype, transformer=transformer, **hub)
    where = find_target(target)
    width, height = (None, None) if size is None else size
    request = planning.plan(
        parts, "", width=width, height=height, steps=steps, positional=positional, layout=layout,
        num_images=batch_size, negative_prompt="" if negative_prompt else None,
    )  # fmt: skip
    rows = batch_size * (2 if negative_prompt else 1)
    sizes, closed = _mesh_sizes(mesh, parts, request, where, batch_size, rows, residency, context)
    kernel = backend or (KERNELS[where.platform] if target != "local" else "auto")
    place = _Place(where, _make_mesh(where, sizes))
    pipe = Pipeline(parts, os.fspath(model), dtype, kernel if context == "auto" else f"{context}+{kernel}")
    method = request.positional if isinstance(positional, str) else positional
    sampler = pipe.sampler(request, method, layout)
    r = _Request(parts, place, pipe.grid(request.height, request.width), batch_size, negative_prompt, dtype, closed,
                 sizes, context, compile)  # fmt: skip

    programs = [_encode(r), *(_step(r, stage) for stage in sampler.stages()), _decode(r, closed.decode_how)]
    beside = {p.name: 0 if residency == "offload" else closed.resident - p.parameters for p in programs}
    if closed.decode_how == "sharded" and _over(programs[-1], beside["decode"], where):
        programs[-1] = _decode(r, "strips")
    programs = [_timed(program, where) for program in programs]
    report = _report(request, where, sizes, closed, programs, parts, batch_size, rows, residency, beside)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    report["host"] = {
        "seconds": round(time.perf_counter() - begun, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
    }
    return {"model": os.fspath(model), "dtype": dtype, "kernel": kernel, **report}


def _mesh_sizes(text, parts, request, where: Target, batch: int, rows: int, residency: str, scheme: str):
    joint = request.layout == "dense"
    if text is None:
        return estimate.choose(
            parts, request.height, request.width, where.count,
            batch=batch, rows=rows, memory=where.memory, joint=joint, residency=residency,
        )  # fmt: skip
    from sega_jax.sharding.mesh import parse_sizes

    sizes = {**estimate.SINGLE, **parse_sizes(text)}
    if math.prod(sizes.values()) != where.count:
        raise ValueError(f"mesh={text!r}: {math.prod(sizes.values())} devices, {where.name} has {where.count}")
    return sizes, estimate.estimate(parts, request.height, request.width, rows=rows, sizes=sizes, scheme=scheme)


def _make_mesh(where: Target, sizes: Mapping[str, int]) -> Mesh | None:
    if where.count == 1 or not where.devices:
        return None
    from sega_jax.sharding.mesh import make_mesh

    return make_mesh(where.devices, **sizes)


def _over(program: Program, beside: int, where: Target) -> bool:
    return program.failure is not None or program.peak + beside > where.memory


def _report(request, where, sizes, closed, programs, parts, batch, rows, residency, beside) -> dict:
    peak, widest = max((p.peak + beside[p.name], i) for i, p in enumerate(programs))
    failed = next((p for p in programs if p.failure is not None), None)
    fits = failed is None and peak <= where.memory
    because, advice = None, []
    if not fits:
        program = failed or programs[widest]
        because = (
            f"{program.name} needs {_gb(program.peak + beside[program.name])} per device "
            f"({_gb(program.parameters + beside[program.name])} of it parameters), {where.name} has {_gb(where.memory)}"
        )
        if program.failure is not None:
            because = f"{program.name}: {program.failure}" + (f"; {because}" if program.peak else "")
        advice = estimate.remedies(
            parts, request.height, request.width, where.count, where.memory,
            batch=batch, rows=rows, kind=where.chip, residency=residency,
        )  # fmt: skip
    times = [p.seconds for p in programs]
    return {
        "size": [request.width, request.height],
        "positional": request.positional,
        "layout": request.layout,
        "steps": request.steps,
        "batch_size": batch,
        "target": where.name,
        "devices": where.count,
        "mesh": dict(sizes),
        "residency": residency,
        "compiled": all(p.compiled for p in programs),
        "missing": where.missing,
        "programs": [asdict(p) for p in programs],
        "resident": closed.resident,
        "peak": peak,
        "memory": where.memory,
        "fits": fits,
        "because": because,
        "try": advice,
        "closed_form": asdict(closed) | {"peak": closed.peak(residency)},
        "seconds": None if None in times else sum(p.seconds * p.runs for p in programs) / batch,
        "assumptions": ASSUMPTIONS,
    }


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def rank(reports: Sequence[dict], prices: Mapping[str, float] | None = None) -> list[dict]:
    """Reports in order: those that fit first, cheapest first where prices are given, else fastest.

    Args:
        prices: dollars per hour of one device, by chip (``"v6e"``) or by target (``"v6e:2x4"``, all its devices).
            Each report gets ``usd`` per image from its roofline, None where there is no price.
    """
    priced = []
    for report in reports:
        usd, chip = None, report["target"].partition(":")[0]
        if prices is not None and report["seconds"] is not None:
            hourly = prices.get(report["target"])
            if hourly is None and chip in prices:
                hourly = prices[chip] * report["devices"]
            usd = None if hourly is None else hourly * report["seconds"] / 3600
        priced.append(report | {"usd": usd} if prices is not None else report)
    key = "seconds" if prices is None else "usd"
    return sorted(priced, key=lambda r: (not r["fits"], r[key] is None, r[key] or 0.0))


def place_here(
    outline: Outline, build: Callable[[], Parts], height: int, width: int, *, batch: int = 1, rows: int = 1,
    joint: bool = True, residency: str = "all",
) -> tuple[str | None, str | None]:  # fmt: skip
    """The mesh for a picture on the devices that are here, and why it cannot be made; by closed forms alone.

    Args:
        outline: of the model; build: its `skeleton`, which takes a second, asked for only where memory may be short.
        height, width: in pixels.
        batch, rows, joint, residency: as of `estimate.choose`.

    Returns:
        The mesh as ``--mesh`` takes it, None for one device; and None, or a refusal that says what would fit.  Devices
        of a CPU share its memory, so there one is used, and refused is only what cannot be held at all: parameters that
        exceed what is available.
    """
    here = find_target("local")
    mesh, machine = None, here.platform == "cpu"
    config = outline.transformer_config
    weights = 2 * (36 * config.double_layers + 15 * config.single_layers) * config.width**2  # most of them, in bfloat16
    if machine and 8 * weights < here.memory:
        return None, None
    parts = build()
    if machine:
        closed = estimate.estimate(parts, height, width, rows=rows)
        needed, kind = closed.resident, "this machine, which"
    else:
        sizes, closed = estimate.choose(
            parts, height, width, here.count, batch=batch, rows=rows, memory=here.memory, joint=joint,
            residency=residency,
        )  # fmt: skip
        needed, kind = closed.peak(residency), "each device, which"
        if here.count > 1:
            mesh = ",".join(f"{name}={size}" for name, size in sizes.items())
    if needed <= here.memory:
        return mesh, None
    advice = [] if machine else estimate.remedies(
        parts, height, width, here.count, here.memory, batch=batch, rows=rows, kind="such devices",
        residency=residency,
    )  # fmt: skip
    remedy = f"; what would fit: {' or '.join(advice)}" if advice else ""
    return mesh, (
        f"{width}x{height} needs about {_gb(needed)} on {kind} has {_gb(here.memory)}{remedy} "
        "(sega-jax plan says where it goes)"
    )
