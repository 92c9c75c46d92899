"""A faster start: the step is compiled while the weights are read.

Compilation needs shapes, not numbers, so it runs in a thread of its own from the moment the first picture is planned.
JAX keeps what it lowered and compiled, in memory and in the persistent cache, and the first step finds it there.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sega_jax import positional as pe
from sega_jax.families.registry import abstract_conditioning, skeleton
from sega_jax.models.abstract import Component
from sega_jax.models.quantized import Weights
from sega_jax.pipeline.pipeline import Pipeline
from sega_jax.pipeline.planning import Plan
from sega_jax.sampling.sampler import Euler
from sega_jax.sharding.rules import shardings

logger = logging.getLogger(__name__)


def outline(
    model: str | Path,
    *,
    dtype: str,
    transformer: Path | None = None,
    weights: Weights = "full",
    hub: dict[str, Any],
    **options: Any,
) -> Pipeline:
    """A pipeline with shapes for weights, as `Pipeline.from_pretrained` would load it.

    Args:
        options: ``backend``, ``mesh`` (resolved), ``context``, ``residency`` of `Pipeline`.
    """
    parts = skeleton(model, dtype, transformer=transformer, weights=weights, **hub)
    mesh = options.get("mesh")
    if mesh is not None:
        params = parts.transformer.params
        shapes = jax.tree.map(
            lambda p, where: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=where), params, shardings(params, mesh)
        )
        parts = replace(parts, transformer=Component(parts.transformer.graphdef, shapes))
    return Pipeline(parts, str(model), dtype, weights=weights, **options)


def compile_step(pipe: Pipeline, plan: Plan, method: pe.Method, *, batch: int, text_tokens: int | None = None) -> bool:
    """Compiles the denoising step of a plan.

    Args:
        pipe: loaded, or an `outline`.
        plan: the request.
        method: its positional method, the very object that the run will use.
        batch: pictures per model call.
        text_tokens: of precomputed embeddings; default the model's own.

    Returns:
        Whether there was something to compile: samplers of several stages compile as they go.
    """
    sampler = pipe.sampler(plan, method, plan.layout)
    if not isinstance(sampler, Euler):
        return False
    parts = pipe.parts

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    conditioning = abstract_conditioning(
        parts, array, rows=batch, dtype=pipe.dtype, guided=plan.negative_prompt is not None, tokens=text_tokens
    )
    latents = array((batch, *sampler.shape), "float32")
    sampler.velocity.lower(parts.transformer.params, latents, conditioning).compile()
    return True


def ahead(work: Any, *arguments: Any, **options: Any) -> Future:
    """Runs ``work`` in a thread; a failure is left for the run itself to meet, with its own words."""

    def attempt() -> Any:
        try:
            return work(*arguments, **options)
        except Exception as error:
            logger.debug("nothing was compiled ahead: %s", error)
            return None

    executor = ThreadPoolExecutor(1)
    future = executor.submit(attempt)
    executor.shutdown(wait=False)
    return future
