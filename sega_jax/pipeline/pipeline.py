"""Text to image: encode, denoise, decode; the Python API."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from converters.files import expanded
from sega_jax import __version__
from sega_jax import positional as pe
from sega_jax.attention.context.route import SCHEMES
from sega_jax.decoding.decode import TILE, VaeMode, decode_with, encode_image
from sega_jax.decoding.preview import LinearPreview
from sega_jax.decoding.tiles import encode_tiled
from sega_jax.families.base import Family, Parts
from sega_jax.families.registry import family_named, family_of, load_parts
from sega_jax.geometry import Grid
from sega_jax.layouts.streams import Layout
from sega_jax.media.photos import Fit
from sega_jax.models.abstract import Component
from sega_jax.models.adapters import attach, from_lora, guidance_settings
from sega_jax.models.quantized import Weights, check_weights
from sega_jax.models.vae import sample_posterior
from sega_jax.pipeline.arguments import dtype_name, per_prompt, quoted
from sega_jax.pipeline.generation import Request
from sega_jax.pipeline.generation import generate as run_request
from sega_jax.pipeline.planning import Plan
from sega_jax.pipeline.planning import plan as make_plan
from sega_jax.pipeline.records import model_fields, picture_fields
from sega_jax.pipeline.results import Progress, Result
from sega_jax.pipeline.samplers import sampler_of
from sega_jax.runtime.cache import use_compilation_cache
from sega_jax.sampling.crpa import Crpa
from sega_jax.sampling.denoise import Conditioning, Velocity
from sega_jax.sampling.keys import key_of, pinned, words
from sega_jax.sampling.registry import get_layout
from sega_jax.sampling.resume import Checkpoint
from sega_jax.sampling.rungs import Rung
from sega_jax.sampling.sampler import Noise, Sampler
from sega_jax.sampling.scale_dit import Guided
from sega_jax.sampling.schedule import MuPolicy
from sega_jax.sharding.mesh import TENSOR, describe, resolve_mesh
from sega_jax.sharding.residency import Residency, fetched, places
from sega_jax.sharding.rules import place as place_parameters
from sega_jax.weights.hub import commit_of, resolve
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
        revision: commit of a model from the hub.
        transformer: what took the place of the folder's transformer.
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
    revision: str | None = None
    transformer: str | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] = "nano",
        *,
        dtype: Any = None,
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
            dtype: ``"bfloat16"`` or ``"float32"``, or a dtype such as ``jnp.bfloat16``, for parameters and activations;
                default float32 on CPU, where bfloat16 gains nothing, and bfloat16 elsewhere.
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
        dtype = default_dtype() if dtype is None else dtype_name(dtype)
        check_weights(weights)
        use_compilation_cache()
        folder = resolve(model, **hub)
        other = None if transformer is None else expanded(os.fspath(transformer))
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
        return cls(
            parts,
            os.fspath(model),
            dtype,
            backend,
            merged,
            mesh,
            context,
            residency,
            weights=weights,
            revision=commit_of(os.fspath(model), folder),
            transformer=None if transformer is None else os.fspath(transformer),
        )

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
        settings = guidance_settings(expanded(spec.file))
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
        negative_prompt: str | Sequence[str] | None = None,
        guidance: float | None = None,
        true_guidance: float | None = None,
    ) -> Conditioning:
        """Prompts to conditioning; one negative prompt for all, or one for each; guidance defaults as in `plan`."""
        parts = self.parts
        encoders = {name: self._fetched(encoder) for name, encoder in parts.encoders.items()}
        graphdefs = tuple((name, encoder.graphdef) for name, encoder in encoders.items())
        params = {name: encoder.params for name, encoder in encoders.items()}
        reader = parts.tokenizers[self.family.prompt_encoder]

        def embed(texts: Sequence[str]) -> dict[str, jax.Array]:
            for text in dict.fromkeys(texts):
                unknown = reader.unknown_words(text)
                if unknown:
                    logger.warning("words this model has never seen: %s", quoted(", ".join(unknown)))
                lost = reader.truncated(text)
                if lost:
                    logger.warning("the prompt is cut at %d tokens; ignored: %s", reader.length, quoted(lost))
            ids = {name: tokenizer(list(texts)) for name, tokenizer in parts.tokenizers.items()}
            return self.family.encode(params, ids, graphdefs=graphdefs, dtype=self.dtype)

        avoided = None if negative_prompt is None else per_prompt("negative_prompt", negative_prompt, len(prompts))
        return self.condition(
            embed(prompts),
            negative=None if avoided is None else embed(avoided),
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
        key = jax.random.fold_in(key_of(words(seed)), 2**31)  # apart from every image index
        with pinned():
            drawn = sample_posterior(jnp.asarray(mean), jnp.asarray(logvar), key)
        return self.parts.vae_config.normalize(drawn)

    def linear_preview(self) -> LinearPreview:
        """What turns clean latents into small pictures; fitted to this autoencoder, which takes a moment."""

        def encode(images: np.ndarray) -> jax.Array:
            return self.parts.vae_config.normalize(jnp.asarray(self.posterior(images)[0]))

        return LinearPreview.fit(encode, self.parts.vae_config.factor)

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
        negative_prompt: str | Sequence[str] | None = None,
        width: int | None = None,
        height: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        true_guidance: float | None = None,
        seed: int | str | Sequence[int | str] = 0,
        num_images: int = 1,
        image_indices: Sequence[int] | None = None,
        batch_size: int = 1,
        positional: str | pe.Method = "auto",
        layout: str | Layout | Crpa | Guided = "dense",
        regions: Any = None,
        mu: MuPolicy | None = None,
        init_image: Any = None,
        fit: Fit | None = None,
        mask: Any = None,
        strength: float | None = None,
        ladder: str | Sequence[Rung] | None = None,
        init_latents: str | os.PathLike[str] | np.ndarray | None = None,
        embeddings: Mapping[str, np.ndarray] | None = None,
        decode: bool = True,
        vae: VaeMode = "auto",
        on_step: Callable[[Progress], None] | None = None,
        on_latents: Callable[[np.ndarray, list[dict]], None] | None = None,
        checkpoint: Checkpoint | None = None,
        progress: bool = False,
    ) -> Result:
        """Pictures for one or more prompts.

        Args:
            prompt: text, or several.
            negative_prompt: text to steer away from, one for all prompts or one for each; switches on true
                classifier-free guidance (two model rows).
            width, height: pixels; default the size of ``init_image``, else the trained size.
            steps: model evaluations; default by recipe.
            guidance: distilled guidance, for checkpoints that take it.
            true_guidance: scale of classifier-free guidance, with ``negative_prompt``.
            seed: of all pictures, or one for each prompt, of up to 64 bits; picture ``i`` of a prompt uses the key
                folded with ``i``.  -1 or ``"random"`` draws one, which the record states.
            num_images: pictures per prompt.
            image_indices: the image indices to make instead of ``range(num_images)``.
            batch_size: pictures per model call; changes speed and memory, not pictures (up to rounding).
            positional: preset, expression, ``module:name``, method object, or ``"auto"``: plain at or below the
                trained size, YaRN above (for nano PI with SEGA magnitudes).
            layout: ``"dense"``; ``"crpa"`` for high resolution in ``regions`` only (`sampling.crpa.Crpa`);
                ``"scale-dit"``, a small picture first, then the large one in windows (`sampling.scale_dit.Guided`); or
                ``"scalediff"``, which climbs to sizes above the trained one by a ladder (`layouts.scalediff`);
                options as in ``"crpa(levels=3, fine=0.2)"`` or ``"scalediff(jitter=True)"``.
            regions: with ``crpa``, what to refine: an expression such as ``"center:0.3"``, ``"box:0,0,512,512"``,
                ``"mask:FILE"`` or ``"auto:0.3"`` (the default), a list of them, or a bool array [H, W] of any size
                (`sampling.regions`).
            mu: ``"clamp"``, ``"native"`` or a number; see `Schedule.mu`.
            init_image: picture to start from, noised to ``strength``: a file, a Pillow image, an `Image`, or an array
                [H, W, 3] of uint8, or of floats in [-1, 1] or, where none is negative, in [0, 1].
            fit: how ``init_image`` is brought to a size of another shape: ``"crop"``, ``"pad"`` or ``"stretch"``
                (`media.photos.photo`); refused without.  ``"crop"`` also makes sizes that are no whole tokens, from
                the next larger ones.
            mask: where ``init_image`` may change, white; elsewhere the picture stays as it is, pixel by pixel: a file,
                a Pillow image, or an array [H, W] of bool, uint8 or floats in [0, 1], of the size of ``init_image``.
            strength: share of the steps to run from ``init_image``, in (0, 1]; default 0.6.
            ladder: sizes to climb, as in ``"1024,2048 positional=sega layout=dense,4096"`` (see `sampling.rungs`):
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
            progress: whether to show a bar on standard error.

        Returns:
            A `Result`.

        Raises:
            ValueError, TypeError: for the first argument that cannot be served, with value and remedy.
        """
        options = {
            "width": width,
            "height": height,
            "steps": steps,
            "guidance": guidance,
            "true_guidance": true_guidance,
            "positional": positional,
            "layout": layout,
            "mu": mu,
            "strength": strength,
            "regions": regions,
            "ladder": ladder,
            "fit": fit,
        }
        inputs = {"init_image": init_image, "mask": mask, "init_latents": init_latents, "embeddings": embeddings}
        request = Request(
            prompt,
            negative_prompt,
            seed,
            num_images,
            image_indices,
            batch_size,
            options,
            inputs,
            decode=decode,
            vae=vae,
            on_step=on_step,
            on_latents=on_latents,
            checkpoint=checkpoint,
            progress=progress,
        )
        return run_request(self, request)

    def sampler(
        self,
        plan: Plan,
        method: str | pe.Method,
        layout: str | Layout | Crpa | Guided,
        source: np.ndarray | None = None,
        regions: Any = None,
        vae: VaeMode = "auto",
        mask: np.ndarray | None = None,
    ) -> Sampler:
        """How the pictures of a plan come about.

        Args:
            plan: the request.
            method: positional method; an object of one's own compiles once.
            layout: as in `generate`.
            source: picture f32 [1, H, W, 3] to start from, with a plan that has a strength or a ladder.
            regions: with ``crpa``; default the plan's.
            vae: how to decode between the stages of a ladder.
            mask: bool [H, W], where ``source`` may change; default everywhere.
        """
        return sampler_of(self, plan, method, layout, source, regions, vae, mask)

    def encoded(
        self,
        prompts: Sequence[str],
        negatives: Sequence[str | None],
        plan: Plan,
        embeddings: Mapping[str, np.ndarray] | None = None,
    ) -> Conditioning:
        """The conditioning of a plan's prompts, encoded or, where ``embeddings`` has it, taken from there.

        Raises:
            ValueError: embeddings that lack something, or are of other prompts or another model.
        """
        guidance, scale = plan.guidance, plan.true_guidance
        avoiding = negatives[0] is not None
        if embeddings is None:
            avoid = [*negatives] if avoiding else None
            return self.encode(prompts, negative_prompt=avoid, guidance=guidance, true_guidance=scale)
        names = list(self.family.conditioning_spec(self.parts))
        needed = names + [f"negative_{name}" for name in names] * avoiding
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

    def model_fields(self) -> dict[str, Any]:
        """What a record says of this pipeline."""
        return model_fields(
            model=self.source,
            revision=self.revision,
            transformer=self.transformer,
            dtype=self.dtype,
            backend=self.backend,
            weights=self.weights,
            loras=self.loras,
        )

    def record(
        self,
        plan: Plan,
        index: int,
        *,
        inputs: Mapping[str, Mapping[str, Any] | None] | None = None,
        vae: VaeMode = "auto",
        batch_size: int = 1,
    ) -> dict:
        """Metadata of picture ``index`` of a plan made by this pipeline, enough to repeat it.

        Args:
            plan: of the picture.
            index: image index.
            inputs: what it starts from (`records.origin`); default noise.
            vae: how it is decoded.
            batch_size: rows of the model call it comes from.
        """
        fields = picture_fields(plan, index, self.model_fields(), inputs or {}, vae)
        return {**fields, "batch_size": batch_size, **self.place()}

    def place(self) -> dict[str, str]:
        """What besides the request may change a picture by rounding: package, JAX, device and mesh."""
        return {**versions(), **({"mesh": describe(self.mesh)} if self.mesh is not None else {})}


def versions() -> dict[str, str]:
    """What besides the request may change a picture by rounding: package, JAX and device."""
    return {"sega_jax": __version__, "jax": jax.__version__, "device": jax.devices()[0].device_kind}


def velocity(pipe: Pipeline, positional: str | pe.Method = "none", layout: str | Layout = "dense") -> Velocity:
    """The pure face of a pipeline: ``f(pipe.params, latents, sigma, conditioning) -> velocity``."""
    return pipe.velocity(positional, layout)
