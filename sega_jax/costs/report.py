"""What a picture takes on hardware that need not be here: compiled ahead of time, counted, and held against capacity.

    from sega_jax.costs.report import plan
    report = plan("flux-dev", size=(6144, 6144), target="v6e:2x4")
    report["fits"], report["programs"]

The encoders, one denoising step of every stage and the decode are lowered with abstract weights and compiled for the
target; memory is the compiler's own analysis, operations are counted from the program (`sega_jax.costs.jaxpr`), traffic
between devices from the compiled text.  Where the compiler for a target is not installed, closed forms
(`sega_jax.costs.closed_form`) and the roofline remain.
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from sega_jax import positional as pe
from sega_jax.costs import closed_form, programs
from sega_jax.costs.roofline import ASSUMPTIONS
from sega_jax.costs.targets import Target, find_target
from sega_jax.families.base import Outline, Parts
from sega_jax.families.registry import skeleton
from sega_jax.layouts.streams import Layout
from sega_jax.models.quantized import Weights, check_weights
from sega_jax.pipeline import planning
from sega_jax.pipeline.pipeline import Pipeline
from sega_jax.sharding.mesh import parse_sizes

KERNELS = {"tpu": "tpu", "gpu": "hopper", "cpu": "xla"}  # what a plan compiles; `auto` asks the devices that are here


def plan(
    model: str | os.PathLike[str] = "nano",
    *,
    size: tuple[int, int] | None = None,
    target: str = "local",
    positional: str | pe.Method = "auto",
    layout: str | Layout = "dense",
    regions: Any = None,
    ladder: str | None = None,
    steps: int | None = None,
    batch_size: int = 1,
    negative_prompt: bool = False,
    mesh: str | None = None,
    context: str = "auto",
    backend: str | None = None,
    residency: str = "all",
    dtype: str = "bfloat16",
    weights: Weights = "full",
    compile: bool = True,
    transformer: Path | None = None,
    **hub: Any,
) -> dict:
    """What a picture takes on a target, and whether it fits.

    Args:
        model: see `sega_jax.families.registry.skeleton`; no weights are needed.
        size: (width, height) in pixels; default the trained size.
        target: ``"local"``, or one of `sega_jax.costs.topologies.devices`.
        positional, layout, regions, ladder, steps, batch_size: as of `Pipeline.generate`.
        negative_prompt: whether there is one (true classifier-free guidance: two rows per picture).
        mesh: sizes such as ``"context=4,tensor=2"``; default the one with least traffic that fits.  On ``"local"``
            sizes whose product is below the number of devices take the first ones.
        context: scheme by which attention meets the context axis, as of `Pipeline`; with a mesh that has one.
        backend: attention kernel; default ours for the platform.
        residency: ``"all"`` parameters on the devices through all stages, or ``"offload"``, as of `Pipeline`.
        dtype: of parameters and activations.
        weights: of the transformer, ``"full"`` or ``"int8"``, as of `Pipeline`.
        compile: False for closed forms and the roofline alone.
        transformer, hub: as of `Pipeline.from_pretrained`.

    Returns:
        A dictionary of plain values: ``fits``, ``because``, ``try``, ``programs`` (`sega_jax.costs.programs.Program`),
        ``resident`` bytes of all parameters per device, ``peak`` and ``memory`` per device, ``seconds`` per image,
        ``assumptions``, and ``host``: what planning itself took.

    Raises:
        ValueError, TypeError, CheckpointError: a request, target or mesh that cannot be served.
    """
    begun = time.perf_counter()
    check_weights(weights)
    parts = skeleton(os.fspath(model), dtype, transformer=transformer, weights=weights, **hub)
    where = find_target(target)
    if mesh is not None and target == "local":  # as `Pipeline` takes the first devices for a smaller mesh
        count = math.prod(parse_sizes(mesh).values())
        where = replace(where, count=min(count, where.count), devices=where.devices[:count])
    width, height = (None, None) if size is None else size
    request = planning.plan(
        parts, "", width=width, height=height, steps=steps, positional=positional, layout=layout,
        regions=regions, ladder=ladder, num_images=batch_size, negative_prompt="" if negative_prompt else None,
    )  # fmt: skip
    rows = batch_size * (2 if negative_prompt else 1)
    sizes, closed = _mesh_sizes(mesh, parts, request, where, batch_size, rows, residency, context)
    kernel = backend or (KERNELS[where.platform] if target != "local" else "auto")
    place = programs.Place(where, _make_mesh(where, sizes))
    pipe = Pipeline(parts, os.fspath(model), dtype, kernel if context == "auto" else f"{context}+{kernel}")
    method = request.positional if isinstance(positional, str) else positional
    sampler = pipe.sampler(request, method, layout, regions=regions)
    grid = pipe.grid(request.height, request.width)
    r = programs.Picture(parts, place, grid, batch_size, negative_prompt, dtype, closed, sizes, context, compile)

    listed = [programs.encode(r), *(programs.step(r, stage) for stage in sampler.stages())]
    listed.append(programs.decode(r, closed.decode_how))
    beside = {p.name: 0 if residency == "offload" else closed.resident - p.parameters for p in listed}
    listed = [programs.timed(program, where) for program in listed]
    report = _report(request, where, sizes, closed, listed, parts, batch_size, rows, residency, beside)
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]  # assemblers too
    report["host"] = {
        "seconds": round(time.perf_counter() - begun, 1),
        "cpu_seconds": round(sum(usage.ru_utime + usage.ru_stime for usage in usages), 1),
        "peak_bytes": max(usage.ru_maxrss for usage in usages) * 1024,
    }
    return {"model": os.fspath(model), "dtype": dtype, "weights": weights, "kernel": kernel, **report}


def _mesh_sizes(text, parts, request, where: Target, batch: int, rows: int, residency: str, scheme: str):
    joint = request.layout == "dense"
    if text is None:
        return closed_form.choose(
            parts, request.height, request.width, where.count,
            batch=batch, rows=rows, memory=where.memory, joint=joint, residency=residency,
        )  # fmt: skip
    sizes = {**closed_form.SINGLE, **parse_sizes(text)}
    if math.prod(sizes.values()) != where.count:
        raise ValueError(f"mesh={text!r}: {math.prod(sizes.values())} devices, {where.name} has {where.count}")
    return sizes, closed_form.estimate(parts, request.height, request.width, rows=rows, sizes=sizes, scheme=scheme)


def _make_mesh(where: Target, sizes: Mapping[str, int]) -> Mesh | None:
    if where.count == 1 or not where.devices:
        return None
    from sega_jax.sharding.mesh import make_mesh

    return make_mesh(where.devices, **sizes)


def _report(request, where, sizes, closed, listed, parts, batch, rows, residency, beside) -> dict:
    peak, widest = max((p.peak + beside[p.name], i) for i, p in enumerate(listed))
    failed = next((p for p in listed if p.failure is not None), None)
    fits = failed is None and peak <= where.memory
    because, advice = None, []
    if not fits:
        program = failed or listed[widest]
        because = (
            f"{program.name} needs {_gb(program.peak + beside[program.name])} per device "
            f"({_gb(program.parameters + beside[program.name])} of it parameters), {where.name} has {_gb(where.memory)}"
        )
        if program.failure is not None:
            because = f"{program.name}: {program.failure}" + (f"; {because}" if program.peak else "")
        advice = closed_form.remedies(
            parts, request.height, request.width, where.count, where.memory,
            batch=batch, rows=rows, kind=where.chip, residency=residency,
        )  # fmt: skip
    times = [p.seconds for p in listed]
    return {
        "size": [request.width, request.height],
        "positional": request.positional,
        "layout": request.layout,
        "regions": request.regions,
        "steps": request.steps,
        "batch_size": batch,
        "target": where.name,
        "devices": where.count,
        "mesh": dict(sizes),
        "residency": residency,
        "compiled": all(p.compiled for p in listed),
        "missing": where.missing,
        "programs": [asdict(p) for p in listed],
        "resident": closed.resident,
        "peak": peak,
        "memory": where.memory,
        "fits": fits,
        "because": because,
        "try": advice,
        "closed_form": asdict(closed) | {"peak": closed.peak(residency)},
        "seconds": None if None in times else sum(p.seconds * p.runs for p in listed) / batch,
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
        batch, rows, joint, residency: as of `closed_form.choose`.

    Returns:
        The mesh as ``--mesh`` takes it, None for one device; and None, or a refusal that says what would fit.  Devices
        of a CPU share its memory, so there one is used, and refused is only what cannot be held at all: parameters that
        exceed what is available.
    """
    here = find_target("local")
    mesh, machine = None, here.platform == "cpu"
    weights = 2 * outline.transformer_config.block_parameters  # most of them, in bfloat16
    if machine and 8 * weights < here.memory:
        return None, None
    parts = build()
    if machine:
        closed = closed_form.estimate(parts, height, width, rows=rows)
        needed, kind = closed.resident, "this machine, which"
    else:
        sizes, closed = closed_form.choose(
            parts, height, width, here.count, batch=batch, rows=rows, memory=here.memory, joint=joint,
            residency=residency,
        )  # fmt: skip
        needed, kind = closed.peak(residency), "each device, which"
        if here.count > 1:
            mesh = ",".join(f"{name}={size}" for name, size in sizes.items())
    if needed <= here.memory:
        return mesh, None
    advice = [] if machine else closed_form.remedies(
        parts, height, width, here.count, here.memory, batch=batch, rows=rows, kind="such devices",
        residency=residency,
    )  # fmt: skip
    remedy = f"; what would fit: {' or '.join(advice)}" if advice else ""
    return mesh, (
        f"{width}x{height} needs about {_gb(needed)} on {kind} has {_gb(here.memory)}{remedy} "
        "(sega-jax plan says where it goes)"
    )
