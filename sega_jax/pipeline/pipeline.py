"""Text to image: encode, denoise, decode; the Python API."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sega_jax import __version__
from sega_jax import positional as pe
from sega_jax.attention.context.route import SCHEMES
from sega_jax.decoding.decode import TILE, VaeMode, decode_with, encode_image
from sega_jax.decoding.tiles import encode_tiled
from sega_jax.families.base import Family, Parts
from sega_jax.families.registry import family_named, family_of, load_parts
from sega_jax.geometry import Grid
from sega_jax.layouts.streams import Layout
from sega_jax.media.images import Image, load_image
from sega_jax.media.latents import load_latents
from sega_jax.models.abstract import Component
from sega_jax.models.adapters import attach, from_lora, guidance_settings
from sega_jax.models.quantized import Weights, check_weights
from sega_jax.models.vae import sample_posterior
from sega_jax.pipeline.planning import Plan
from sega_jax.pipeline.planning import plan as make_plan
from sega_jax.pipeline.results import Clock, Progress, Result
from sega_jax.pipeline.samplers import sampler_of
from sega_jax.runtime.cache import use_compilation_cache
from sega_jax.sampling.crpa import CoarseMixedFine, Crpa
from sega_jax.sampling.denoise import Conditioning, Velocity
from sega_jax.sampling.registry import get_layout
from sega_jax.sampling.resume import Checkpoint, digest
from sega_jax.sampling.rungs import Rung
from sega_jax.sampling.sampler import Noise, Sampler, State
from sega_jax.sampling.scale_dit import Guided
from sega_jax.sampling.schedule import MuPolicy
from sega_jax.sharding.mesh import TENSOR, describe, laid, resolve_mesh, to_host
from sega_jax.sharding.residency import Residency, fetched, places
from sega_jax.sharding.rules import place as place_parameters
from sega_jax.weights.hub import resolve
from sega_jax.weights.loras import LoraSpec, lora_specs

logger = logging.getLogger(__name__)


def default_dtype() -> str:
    """float32 on CPU, where bfloat16 gains nothing, and bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@dataclass(frozen=True)
class Pipeline:
    """A loaded text-to-image model.  Make one with `Pipeline.from_pretrained`.

    Attributes:
        parts: components and configurations.
        source: what `from_pretrained` was asked for.
        dtype: of activations and parameters.
        backend: attention kernel, or ``"auto"``.
        loras: merged into the weights; of layout scale-dit, beside them.
        mesh: devices the weights lie on and the work is shared by; None is the default device.
        context: scheme by which attention meets the mesh's context axis, or ``"auto"``.
        residency: whether weights stay on the devices or wait on the host for their stage.
        guidance_lora: what the LoRA of layout scale-dit's small stream says about itself (`with_guidance_lora`).
        weights: of the transformer: in ``dtype`` (``"full"``), or its blocks' matrices in int8.
    """

    parts: Parts
    source: str
    dtype: str
    backend: str = "auto"
    loras: tuple[LoraSpec, ...] = ()
    mesh: Mesh | None = None
    context: str = "auto"
    residency: Residency = "all"
    guidance_lora: Mapping[str, Any] | None = None
    weights: Weights = "full"

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = "nano",
        *,
        dtype: str | None = None,
        transformer: str | os.PathLike[str] | None = None,
        backend: str = "auto",
        loras: Sequence[Any] = (),
        mesh: Mesh | str | None = None,
        context: str = "auto",
        residency: Residency = "all",
        weights: Weights = "full",
        **hub: Any,
    ) -> Pipeline:
        """Load a pipeline.

        Args:
            model: a diffusers folder, a hub id, or ``"nano"`` (embedded).
            dtype: ``"bfloat16"`` or ``"float32"`` for parameters and activations; default float32 on CPU,
                where bfloat16 gains nothing, and bfloat16 elsewhere.
            transformer: transformer weights to use instead of the folder's: a component folder of diffusers or Orbax,
                or a single file of Black Forest Labs or ComfyUI.
            backend: attention kernel, or ``"auto"``.
            loras: LoRAs of any dialect to merge into the weights: paths, ``"path:weight"`` or (path, weight).
            mesh: devices to share the work: a mesh (`sega_jax.sharding.make_mesh`), ``"auto"`` for all of them, or
                sizes such as ``"data=1,context=4,tensor=2"``.  Changes pictures by rounding at most.
            context: ``"auto"``, ``"ulysses"``, ``"ring"`` or ``"product"``, see `sega_jax.attention.context.route`.
            residency: ``"all"`` keeps all weights on the devices; ``"offload"`` keeps them in host memory and fetches
                text encoders, transformer and autoencoder when their turn comes, so that a device holds one at a time.
            weights: of the transformer: ``"full"`` for ``dtype``, or ``"int8"`` for the matrices of its blocks in eight
                bits with a scale per output channel, quantised as they are read: half of bfloat16's memory, other
                pictures (needs the extra ``quant``; `sega_jax.models.quantized`).
            **hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` of `sega_jax.weights.hub.resolve`.

        Raises:
            CheckpointError: the checkpoint cannot be used.
            ValueError: an unknown dtype or model name, or int8 without qwix.
        """
        dtype = default_dtype() if dtype is None else dtype
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={dtype!r}: expected 'float32' or 'bfloat16'")
        check_weights(weights)
        use_compilation_cache()
        folder = resolve(model, **hub)
        other = None if transformer is None else Path(os.fspath(transformer)).expanduser()
        if other is not None and not other.exists():
            raise ValueError(f"transformer={str(other)!r}: no such folder or file")
        merged = lora_specs(loras)
        mesh = resolve_mesh(mesh)
        if context not in ("auto", *SCHEMES):
            raise ValueError(f"context={context!r}: expected auto, {', '.join(SCHEMES)}")
        if mesh is not None:
            heads = family_of(folder).outline(folder, other).transformer_config.heads
            if heads % mesh.shape[TENSOR]:
                raise ValueError(
                    f"mesh={describe(mesh)}: tensor={mesh.shape[TENSOR]} does not divide this model's {heads} "
                    "attention heads; use a divisor"
                )
        where = places(residency, mesh)
        parts = load_parts(folder, dtype=dtype, transformer=other, shardings=where, loras=merged, weights=weights)
        return cls(parts, os.fspath(model), dtype, backend, merged, mesh, context, residency, weights=weights)

    def with_guidance_lora(self, lora: str | os.PathLike[str] | LoraSpec) -> Pipeline:
        """This pipeline with a LoRA for the small stream of layout ``"scale-dit"``; other layouts do not see it.

        Args:
            lora: file of any dialect that `converters.lora` reads (``"file:weight"`` to weaken it).

        Raises:
            CheckpointError: not a LoRA, or not one of a guidance stream.
        """
        (spec,) = lora_specs([lora])
        old = self.parts.transformer
        module = nnx.merge(old.graphdef, old.params)
        changed = attach(module, from_lora(module, spec.read(), weight=spec.weight))
        component = Component.of(changed)
        if self.mesh is not None:
            component = replace(component, params=place_parameters(component.params, self.mesh))
        parts = replace(self.parts, transformer=component)
        settings = guidance_settings(Path(spec.file).expanduser())
        return replace(self, parts=parts, loras=(*self.loras, spec), guidance_lora=settings)

    @property
    def params(self) -> nnx.State:
        """Transformer parameters on their devices, the first argument of `sega_jax.velocity`'s function."""
        return self._fetched(self.parts.transformer).params

    def _fetched(self, component: Component) -> Component:
        """The component with its parameters on their devices, for as long as it is referred to."""
        return Component(component.graphdef, fetched(component.params, self.residency, self.mesh))

    # -- planning ------------------------------------------------------------------------------------------------

    def grid(self, height: int, width: int) -> Grid:
        """Token grid of a picture of ``height`` x ``width`` pixels.

        Raises:
            ValueError: for a side that is not a positive multiple of the token side.
        """
        return self.parts.rope.grid_for_pixels(height, width, self.parts.text_tokens)

    def plan(self, prompt: str, **request: Any) -> Plan:
        """Validate a request and fill in its defaults; see `planning.plan` for the fields."""
        if isinstance(get_layout(request.get("layout", "dense")), Guided):
            request = {**request, "guidance_lora": self.guidance_lora}
        return make_plan(self.parts, prompt, **request)

    # -- stages --------------------------------------------------------------------------------------------------

    def encode(
        self,
        prompts: Sequence[str],
        *,
        negative_prompt: str | None = None,
        guidance: float | None = None,
        true_guidance: float | None = None,
    ) -> Conditioning:
        """Prompts to conditioning; guidance defaults as in `plan`."""
        parts = self.parts
        encoders = {name: self._fetched(encoder) for name, encoder in parts.encoders.items()}
        graphdefs = tuple((name, encoder.graphdef) for name, encoder in encoders.items())
        params = {name: encoder.params for name, encoder in encoders.items()}
        reader = parts.tokenizers[self.family.prompt_encoder]

        def embed(texts: Sequence[str]) -> dict[str, jax.Array]:
            for text in dict.fromkeys(texts):
                unknown = reader.unknown_words(text)
                if unknown:
                    logger.warning("words this model has never seen: %s", ", ".join(unknown))
                lost = reader.truncated(text)
                if lost:
                    logger.warning("the prompt is cut at %d tokens; ignored: %s", reader.length, lost)
            ids = {name: tokenizer(list(texts)) for name, tokenizer in parts.tokenizers.items()}
            return self.family.encode(params, ids, graphdefs=graphdefs, dtype=self.dtype)

        return self.condition(
            embed(prompts),
            negative=None if negative_prompt is None else embed([negative_prompt] * len(prompts)),
            guidance=guidance,
            true_guidance=true_guidance,
        )

    @property
    def family(self) -> Family:
        return family_named(self.parts.family)

    def condition(
        self,
        arrays: Mapping[str, jax.Array],
        *,
        negative: Mapping[str, jax.Array] | None = None,
        guidance: float | None = None,
        true_guidance: float | None = None,
    ) -> Conditioning:
        """Conditioning from embeddings, named and shaped as the family's encoders give them, a row per picture.

        Raises:
            ValueError: for embeddings of another model.
        """
        tokens = arrays["text"].shape[1] if "text" in arrays and arrays["text"].ndim == 3 else None
        for name, expected in self.family.conditioning_spec(self.parts, tokens).items():
            if name not in arrays:
                raise ValueError(f"embeddings: {name} missing; got {sorted(arrays)}")
            if arrays[name].shape[1:] != expected:
                raise ValueError(f"{name} embeddings {arrays[name].shape}: expected {list(expected)} per picture")
        scalar = partial(jnp.asarray, dtype=jnp.float32)
        known = self.family.recipe(self.parts, self.parts.rope.grid(*self.parts.rope.trained))
        scales = self.family.scales(self.parts, known.guidance if guidance is None else guidance)
        return Conditioning(
            {name: jnp.asarray(x) for name, x in arrays.items()},
            {name: scalar(value) for name, value in scales.items()},
            negative,
            None if negative is None else scalar(known.true_guidance if true_guidance is None else true_guidance),
        )

    def noise(self, seed: int, height: int, width: int, indices: Sequence[int] = (0,)) -> jax.Array:
        """Initial latents f32 [len(indices), h, w, C]; each depends on (seed, image index) alone."""
        return Noise(seed, tuple(indices)).field(self.latent_shape(self.grid(height, width)))

    def latent_shape(self, grid: Grid) -> tuple[int, int, int]:
        """(h, w, C) of the latents of a token grid."""
        return self.parts.latent_shape(grid)

    def sigmas(self, steps: int, height: int, width: int, mu: MuPolicy = "clamp") -> np.ndarray:
        """Noise levels of a run, float32 [steps + 1]."""
        return self.parts.schedule.sigmas(steps, self.grid(height, width).tokens, mu)

    def velocity(self, positional: str | pe.Method = "none", layout: str | Layout = "dense") -> Velocity:
        """The model as a pure function; see `Velocity`."""
        layout = get_layout(layout)
        if isinstance(layout, Crpa | Guided):
            raise ValueError(f"layout={layout.name!r} is a way of sampling, not of one step; see sega_jax.sampling")
        return Velocity(
            self.parts.transformer.graphdef,
            pe.get(positional),
            layout,
            self.parts.rope,
            self.dtype,
            self.backend if self.context == "auto" else f"{self.context}+{self.backend}",
            self.mesh,
            self.parts.packing,
            self.family.combine,
        )

    def decode(self, latents: jax.Array | np.ndarray, *, vae: VaeMode = "auto") -> np.ndarray:
        """Model-scale latents f32 [B, h, w, C] to images f32 [B, 8h, 8w, 3]; see `decode_with`."""
        component = self._fetched(self.parts.vae)
        return decode_with(component, self.parts.vae_config, latents, dtype=self.dtype, mode=vae, mesh=self.mesh)

    def encode_image(self, images: np.ndarray, seed: int = 0) -> jax.Array:
        """Images f32 [B, H, W, 3] in [-1, 1] to model-scale latents f32 [B, H/8, W/8, C], the posterior sampled.

        One draw serves the whole batch, so that a row depends on its place there; `posterior` gives what does not.
        """
        mean, logvar = self.posterior(images)
        key = jax.random.fold_in(jax.random.key(seed), 2**31)  # apart from every image index
        return self.parts.vae_config.normalize(sample_posterior(jnp.asarray(mean), jnp.asarray(logvar), key))

    def posterior(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and log-variance f32 [B, H/8, W/8, C] of the autoencoder's posterior of images f32 [B, H, W, 3].

        Above 2048 x 2048 in tiles.  `normalize` of the autoencoder's configuration takes the mean to model scale.
        """
        vae = self._fetched(self.parts.vae)
        run = partial(encode_image, vae.params, graphdef=vae.graphdef, dtype=self.dtype)
        tile = TILE if images.shape[1] * images.shape[2] > 2048**2 else max(images.shape[1:3])
        return encode_tiled(run, images, factor=self.parts.vae_config.factor, tile=tile)

    # -- the whole way -------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        true_guidance: float | None = None,
        seed: int = 0,
        num_images: int = 1,
        image_indices: Sequence[int] | None = None,
        batch_size: int = 1,
        positional: str | pe.Method = "auto",
        layout: str | Layout | Crpa | Guided = "dense",
        regions: Any = None,
        mu: MuPolicy | None = None,
        init_image: str | os.PathLike[str] | np.ndarray | None = None,
        strength: float | None = None,
        ladder: str | Sequence[Rung] | None = None,
        init_latents: str | os.PathLike[str] | np.ndarray | None = None,
        embeddings: Mapping[str, np.ndarray] | None = None,
        decode: bool = True,
        vae: VaeMode = "auto",
        on_step: Callable[[Progress], None] | None = None,
        on_latents: Callable[[np.ndarray, list[dict]], None] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Result:
        """Pictures for one or more prompts.

        Args:
            prompt: text, or several.
            negative_prompt: text to steer away from; switches on true classifier-free guidance (two model rows).
            width, height: pixels; default the trained size.
            steps: model evaluations; default by recipe.
            guidance: distilled guidance, for checkpoints that take it.
            true_guidance: scale of classifier-free guidance, with ``negative_prompt``.
            seed: of all pictures; picture ``i`` of a prompt uses the key folded with ``i``.
            num_images: pictures per prompt.
            image_indices: the image indices to make instead of ``range(num_images)``.
            batch_size: pictures per model call; changes speed and memory, not pictures (up to rounding).
            positional: preset, expression, ``module:name``, method object, or ``"auto"``: plain at or below the
                trained size, YaRN above (PI for nano).
            layout: ``"dense"``; ``"crpa"`` for high resolution in ``regions`` only (`sampling.crpa.Crpa`);
                ``"scale-dit"``, a small picture first, then the large one in windows (`sampling.scale_dit.Guided`); or
                ``"scalediff"``, which climbs to sizes above the trained one by a ladder (`layouts.scalediff`);
                options as in ``"crpa(levels=3, fine=0.2)"`` or ``"scalediff(jitter=True)"``.
            regions: with ``crpa``, what to refine: an expression such as ``"center:0.3"``, ``"box:0,0,512,512"``,
                ``"mask:FILE"`` or ``"auto:0.3"`` (the default), a list of them, or a bool array [H, W] of any size
                (`sampling.regions`).
            mu: ``"clamp"``, ``"native"`` or a number; see `Schedule.mu`.
            init_image: picture to start from (path or f32 [H, W, 3] in [-1, 1]), noised to ``strength``.
            strength: share of the steps to run from ``init_image``, in (0, 1]; default 0.6.
            ladder: sizes to climb, as in ``"1024,2048 positional=sega layout=dense,4096"`` (`sega_jax.sampling.rungs`):
                the first is made from noise, or is ``init_image``; each of the others starts from the one before.
                ``layout`` and ``positional`` are those of sizes that name none; the first size is dense.
            init_latents: initial noise f32 [B, h, w, C] instead of the seed's, or a file of them.
            embeddings: precomputed arrays in place of the encoders' output, named and shaped as `encode` gives them
                (``text`` [B, T, text_dim] and what else the family has), one row per prompt; with a negative prompt
                ``negative_text`` and so on, too.
            decode: whether to decode; latents are returned in any case.
            vae: see `decode`.
            on_step: called after every step of every batch.
            on_latents: called with latents and records of a batch before it is decoded, so that they can be saved.
            checkpoint: saves the state every few steps and goes on from there (`sampling.resume`); the last state of
                every batch stays until `Checkpoint.clear`.

        Returns:
            A `Result`.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise ValueError("prompt=[]: expected at least one prompt")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: expected a positive whole number")
        if strength is not None and init_image is None:
            raise ValueError(f"strength={strength}: only with init_image")
        if init_image is not None and init_latents is not None:
            raise ValueError("init_image and init_latents are both given; the run can start from one of them")
        options = {
            "negative_prompt": negative_prompt,
            "width": width,
            "height": height,
            "steps": steps,
            "guidance": guidance,
            "true_guidance": true_guidance,
            "seed": seed,
            "num_images": num_images,
            "positional": positional,
            "layout": layout,
            "mu": mu,
            "strength": strength,
            "regions": regions,
            "ladder": ladder,
            "from_picture": init_image is not None,
        }
        plans = [self.plan(text, **options) for text in prompts]
        plan = plans[0]
        grid = self.grid(*plan.first_size)
        indices = list(range(num_images)) if image_indices is None else list(image_indices)
        jobs = [(row, index) for row in range(len(prompts)) for index in indices]
        given = None if init_latents is None else self._given_latents(init_latents, grid, len(jobs))
        source = None if init_image is None else self._source_image(init_image, plan)
        method = positional if not isinstance(positional, str) or positional != "auto" else plan.positional
        sampler = self.sampler(plan, method, layout, source, regions, vae)

        timings = {"encode": 0.0, "denoise": 0.0, "decode": 0.0}
        clock = Clock(timings)
        conditioning = self._encoded(prompts, plan, embeddings)
        clock.stop("encode", conditioning)
        latents, images, records, levels = [], [], [], []
        for first in range(0, len(jobs), batch_size):
            batch = jobs[first : first + batch_size]
            padded = batch + [batch[-1]] * (min(batch_size, len(jobs)) - len(batch))
            rows = [row for row, _ in padded]
            noise = Noise(seed, tuple(index for _, index in padded))
            if given is not None:
                chosen = [min(first + i, len(jobs) - 1) for i in range(len(padded))]
                noise = replace(noise, given=given[np.asarray(chosen)])
            durable = None
            if checkpoint is not None:
                request = checkpoint.request or {
                    "pictures": [self._request(plans[row], index) for row, index in padded],
                    "given": digest((noise.given, source, embeddings)),
                }
                durable = _Durable(checkpoint.part(f"batch-{first:04d}"), request)
            state = self._denoise(sampler, noise, _rows(conditioning, rows), on_step, durable)
            made = to_host(sampler.latents(state))[: len(batch)]
            if isinstance(sampler, CoarseMixedFine):
                shown = sampler.levels_map(state)
                levels.append(np.broadcast_to(shown, (len(padded), *shown.shape[1:]))[: len(batch)])
            del state
            clock.stop("denoise")
            record = [self.record(plans[row], index) for row, index in batch]
            if on_latents is not None:
                on_latents(made, record)
            latents.append(made)
            records += record
            if decode:
                pixels = self.decode(made, vae=vae)
                images += [Image(picture, meta) for picture, meta in zip(pixels, record, strict=True)]
                clock.stop("decode")
        return Result(images, np.concatenate(latents), records, timings, np.concatenate(levels) if levels else None)

    def sampler(
        self,
        plan: Plan,
        method: str | pe.Method,
        layout: str | Layout | Crpa | Guided,
        source: np.ndarray | None = None,
        regions: Any = None,
        vae: VaeMode = "auto",
    ) -> Sampler:
        """How the pictures of a plan come about.

        Args:
            plan: the request.
            method: positional method; an object of one's own compiles once.
            layout: as in `generate`.
            source: picture f32 [1, H, W, 3] to start from, with a plan that has a strength or a ladder.
            regions: with ``crpa``; default the plan's.
            vae: how to decode between the stages of a ladder.
        """
        return sampler_of(self, plan, method, layout, source, regions, vae)

    def _denoise(
        self,
        sampler: Sampler,
        noise: Noise,
        conditioning: Conditioning,
        on_step: Callable[[Progress], None] | None,
        durable: _Durable | None = None,
    ) -> State:
        state, done = sampler.start(noise, conditioning), 0
        params = self.params
        if durable is not None:
            done, state = durable.checkpoint.start(durable.request, state)
        state = laid(state, self.mesh)
        for index in range(done, sampler.steps):
            begun = time.perf_counter()
            state = sampler.step(params, state, conditioning, index)
            if on_step is not None:
                jax.block_until_ready(state)
                on_step(Progress(index + 1, sampler.steps, time.perf_counter() - begun))
            if durable is not None:
                durable.checkpoint.after(index + 1, sampler.steps, durable.request, state)
        return state

    def _encoded(self, prompts: Sequence[str], plan: Plan, embeddings: Mapping[str, np.ndarray] | None) -> Conditioning:
        guidance, scale = plan.guidance, plan.true_guidance
        if embeddings is None:
            return self.encode(prompts, negative_prompt=plan.negative_prompt, guidance=guidance, true_guidance=scale)
        names = list(self.family.conditioning_spec(self.parts))
        needed = names + [f"negative_{name}" for name in names] * (plan.negative_prompt is not None)
        missing = [name for name in needed if name not in embeddings]
        if missing:
            raise ValueError(f"embeddings: {', '.join(missing)} missing; got {sorted(embeddings)}")
        arrays = {name: jnp.asarray(embeddings[name]).astype(self.dtype) for name in needed}
        for name, array in arrays.items():
            if len(array) != len(prompts):
                raise ValueError(f"embeddings: {name} has {len(array)} rows for {len(prompts)} prompts")
        negative = None
        if plan.negative_prompt is not None:
            negative = {name: arrays[f"negative_{name}"] for name in names}
        return self.condition(
            {name: arrays[name] for name in names}, negative=negative, guidance=guidance, true_guidance=scale
        )

    def _given_latents(self, latents: Any, grid: Grid, count: int) -> np.ndarray:
        if isinstance(latents, (str, os.PathLike)):
            latents, _ = load_latents(latents)
        latents = np.asarray(latents, np.float32)
        expected = (count, *self.latent_shape(grid))
        if latents.shape != expected:
            raise ValueError(f"init_latents {latents.shape}: this request needs {expected} [B, h, w, C]")
        return latents

    def _source_image(self, image: Any, plan: Plan) -> np.ndarray:
        height, width = plan.first_size
        if isinstance(image, (str, os.PathLike)):
            image = load_image(image, size=(width, height))
        image = np.asarray(image, np.float32)
        if image.shape != (height, width, 3):
            raise ValueError(f"init_image {image.shape}: expected {(height, width, 3)}, float in [-1, 1]")
        return image[None]

    def record(self, plan: Plan, index: int) -> dict:
        """Metadata of picture ``index`` of a plan made by this pipeline."""
        return {
            **plan.record(index),
            "dtype": self.dtype,
            "backend": self.backend,
            "model": self.source,
            **({"weights": self.weights} if self.weights != "full" else {}),
            **({"loras": [lora.record() for lora in self.loras]} if self.loras else {}),
            **self.place(),
        }

    def _request(self, plan: Plan, index: int) -> dict:
        """The record of a picture without what changes it by rounding only."""
        place = self.place()
        return {name: value for name, value in self.record(plan, index).items() if name not in place}

    def place(self) -> dict[str, str]:
        """What besides the request may change a picture by rounding: package, JAX, device and mesh."""
        return {**versions(), **({"mesh": describe(self.mesh)} if self.mesh is not None else {})}


def versions() -> dict[str, str]:
    """What besides the request may change a picture by rounding: package, JAX and device."""
    return {"sega_jax": __version__, "jax": jax.__version__, "device": jax.devices()[0].device_kind}


@dataclass(frozen=True)
class _Durable:
    """A checkpoint and the request whose states it may hold."""

    checkpoint: Checkpoint
    request: dict


def _rows(conditioning: Conditioning, rows: list[int]) -> Conditioning:
    """The conditioning of a batch; scalars are shared."""
    at = np.asarray(rows)
    return jax.tree.map(lambda x: x[at] if x.ndim else x, conditioning)


def velocity(pipe: Pipeline, positional: str | pe.Method = "none", layout: str | Layout = "dense") -> Velocity:
    """The pure face of a pipeline: ``f(pipe.params, latents, sigma, conditioning) -> velocity``."""
    return pipe.velocity(positional, layout)
