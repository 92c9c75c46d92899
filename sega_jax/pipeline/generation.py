"""`Pipeline.generate` from its arguments on: prompts, plans, what pictures start from, and the batches of a run."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, get_args

import jax
import numpy as np

from sega_jax.decoding.decode import VaeMode
from sega_jax.decoding.preview import LinearPreview
from sega_jax.media.images import Image
from sega_jax.media.latents import load_latents
from sega_jax.media.photos import cut, mask_of, photo, photo_size
from sega_jax.pipeline.arguments import called, numbers_in, one_of, per_prompt, several, shown, text, whole
from sega_jax.pipeline.planning import Plan
from sega_jax.pipeline.records import INPUTS, origin
from sega_jax.pipeline.results import Clock, Progress, Result, progress_bar
from sega_jax.pipeline.samplers import check_mask
from sega_jax.sampling.crpa import CoarseMixedFine
from sega_jax.sampling.denoise import Conditioning, watched
from sega_jax.sampling.keys import chosen_seed
from sega_jax.sampling.resume import Checkpoint, digest
from sega_jax.sampling.sampler import Euler, Noise, Sampler, State
from sega_jax.sharding.mesh import laid, to_host

if TYPE_CHECKING:
    from sega_jax.pipeline.pipeline import Pipeline

logger = logging.getLogger(__name__)

OnStep = Callable[[Progress], None]
OnLatents = Callable[[np.ndarray, list[dict]], None]


@dataclass(frozen=True)
class Request:
    """The arguments of `Pipeline.generate`, as given; their meaning stands there.

    Attributes:
        options: those that `planning.plan` takes, the same for every prompt.
        inputs: those of `records.INPUTS`.
        Other fields as the arguments of their names.
    """

    prompt: Any
    negative_prompt: Any
    seed: Any
    num_images: Any
    image_indices: Any
    batch_size: Any
    options: Mapping[str, Any]
    inputs: Mapping[str, Any]
    decode: bool = True
    vae: VaeMode = "auto"
    on_step: OnStep | None = None
    on_latents: OnLatents | None = None
    checkpoint: Checkpoint | None = None
    progress: bool = False


@dataclass(frozen=True)
class Job:
    """One picture: ``row`` of the prompt it belongs to, image ``index``, ``number`` among all pictures."""

    number: int
    row: int
    index: int


@dataclass(frozen=True)
class Started:
    """What pictures start from, loaded, and what their records say of it."""

    source: np.ndarray | None = None  # f32 [1, H, W, 3] in [-1, 1]
    mask: np.ndarray | None = None  # bool [H, W], True where the picture may change
    given: np.ndarray | None = None  # f32 [pictures, h, w, C]
    embeddings: Mapping[str, Any] | None = None
    said: Mapping[str, dict[str, Any] | None] = field(default_factory=dict)

    def record(self, job: Job) -> dict[str, dict[str, Any] | None]:
        """For `records.picture_fields`."""
        rows = {"init_latents": job.number, "embeddings": job.row}
        return {name: said and {**said, "row": rows.get(name)} for name, said in self.said.items()}


def prompts_of(request: Request) -> tuple[list[str], list[str | None], list[int]]:
    """Prompts, and the negative prompt and seed of each.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    given = request.prompt
    if not isinstance(given, str | Sequence | np.ndarray) or isinstance(given, bytes):
        raise TypeError(f"prompt={shown(given)}: expected a string, or a list of them; got {type(given).__name__}")
    prompts = [given] if isinstance(given, str) else several("prompt", given)
    prompts = [text("prompt", prompt) for prompt in prompts]
    if not prompts:
        raise ValueError("prompt=[]: expected at least one prompt")
    negatives = per_prompt("negative_prompt", request.negative_prompt, len(prompts))
    negatives = [None if negative is None else text("negative_prompt", negative) for negative in negatives]
    if None in negatives and any(negative is not None for negative in negatives):
        raise ValueError("negative_prompt: given for some prompts only; give '' where there is nothing to avoid")
    if isinstance(request.seed, str) or np.ndim(request.seed) == 0:
        return prompts, negatives, [chosen_seed(request.seed)] * len(prompts)
    seeds = [chosen_seed(seed) for seed in per_prompt("seed", request.seed, len(prompts))]
    return prompts, negatives, seeds


def jobs_of(request: Request, prompts: int) -> list[Job]:
    """Every picture of the request, prompt by prompt.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    indices = list(range(whole("num_images", request.num_images)))
    if request.image_indices is not None:
        indices = several("image_indices", request.image_indices)
        indices = [whole("image_indices", index, 0, 2**32 - 1) for index in indices]
        if not indices:
            raise ValueError("image_indices=[]: expected at least one image index")
    pairs = [(row, index) for row in range(prompts) for index in indices]
    return [Job(number, row, index) for number, (row, index) in enumerate(pairs)]


def generate(pipe: Pipeline, request: Request) -> Result:
    """The pictures of a request; see `Pipeline.generate`."""
    _check_kinds(request)
    prompts, negatives, seeds = prompts_of(request)
    jobs = jobs_of(request, len(prompts))
    size = whole("batch_size", request.batch_size)
    inputs, options = request.inputs, request.options
    image = inputs.get("init_image")
    _check_inputs(inputs, options)
    options = {**options, "photo": None if image is None else photo_size(image)}
    plans = [
        pipe.plan(text, negative_prompt=negative, seed=seed, num_images=len(jobs) // len(prompts), **options)
        for text, negative, seed in zip(prompts, negatives, seeds, strict=True)
    ]
    started = _started(pipe, plans[0], inputs, len(jobs))
    run = _Run(pipe, request, plans, started)
    conditioning = run.encoded(prompts, negatives)
    samplers = {seeds[0]: run.sampler(plans[0])}
    # Where more than the first noise is drawn, pictures of several seeds cannot share a model call.
    shared = started.source is None and isinstance(samplers[seeds[0]], Euler)
    groups = [jobs] if shared else [list(group) for _, group in groupby(jobs, lambda job: seeds[job.row])]
    for group in groups:
        seed, plan = seeds[group[0].row], plans[group[0].row]
        sampler = samplers[seed] = samplers.get(seed) or run.sampler(plan)
        for first in range(0, len(group), size):
            batch = group[first : first + size]
            run.make(sampler, batch, min(size, len(group)), conditioning)
    return run.result()


def _check_kinds(request: Request) -> None:
    """Complains about arguments that would not be looked at before the first steps are made."""
    one_of("vae", request.vae, get_args(VaeMode))
    for name in ("on_step", "on_latents"):
        called(name, getattr(request, name))
    if request.checkpoint is not None and not isinstance(request.checkpoint, Checkpoint):
        raise TypeError(f"checkpoint={shown(request.checkpoint)}: expected a sega_jax.sampling.resume.Checkpoint")
    for name in ("decode", "progress"):
        if not isinstance(getattr(request, name), bool | np.bool_):
            raise TypeError(f"{name}={shown(getattr(request, name))}: expected True or False")
    embeddings = request.inputs.get("embeddings")
    if embeddings is not None:
        if not isinstance(embeddings, Mapping):
            raise TypeError(f"embeddings={shown(embeddings)}: expected a dictionary of arrays by name")
        for name, array in embeddings.items():
            if numbers_in(f"embeddings: {name}", array).ndim < 2:
                raise ValueError(f"embeddings: {name} of shape {np.shape(array)}: expected a row for each prompt")


def _check_inputs(inputs: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    if inputs.get("init_image") is None:
        for name, value in (("strength", options.get("strength")), ("mask", inputs.get("mask"))):
            if value is not None:
                raise ValueError(f"{name}={value if name == 'strength' else '…'}: only with init_image")
    elif inputs.get("init_latents") is not None:
        raise ValueError("init_image and init_latents are both given; the run can start from one of them")


def started_of(plan: Plan, image: Any, mask: Any) -> Started:
    """A photo and its mask, brought to the size of a plan."""
    height, width = plan.first_size
    source = None if image is None else photo(image, (width, height), plan.fit)[None]
    if mask is None:
        return Started(source)
    check_mask(plan)
    return Started(source, mask_of(mask, photo_size(image), (width, height), plan.fit))


def _started(pipe: Pipeline, plan: Plan, inputs: Mapping[str, Any], count: int) -> Started:
    """The inputs of a run, loaded and checked against its plan."""
    height, width = plan.first_size
    image, latents = inputs.get("init_image"), inputs.get("init_latents")
    started = started_of(plan, image, inputs.get("mask"))
    if latents is not None:
        latents = load_latents(latents)[0] if isinstance(latents, str | os.PathLike) else latents
        latents = numbers_in("init_latents", latents)
        expected = (count, *pipe.latent_shape(pipe.grid(height, width)))
        if latents.shape != expected:
            raise ValueError(f"init_latents {latents.shape}: this request needs {expected} [B, h, w, C]")
    said = {name: origin(inputs.get(name)) for name in INPUTS}
    return replace(started, given=latents, embeddings=inputs.get("embeddings"), said=said)


class _Run:
    """A request under way, and what it has made so far."""

    def __init__(self, pipe: Pipeline, request: Request, plans: list[Plan], started: Started):
        self.pipe, self.request, self.plans, self.started = pipe, request, plans, started
        self._timings = {"encode": 0.0, "denoise": 0.0, "decode": 0.0}
        self._clock = Clock(self._timings)
        self._latents: list[np.ndarray] = []
        self._images: list[Image] = []
        self._records: list[dict] = []
        self._levels: list[np.ndarray] = []
        self._preview: LinearPreview | None = None

    def encoded(self, prompts: list[str], negatives: list[str | None]) -> Conditioning:
        """The conditioning of all prompts."""
        made = self.pipe.encoded(prompts, negatives, self.plans[0], self.started.embeddings)
        self._clock.stop("encode", made)
        return made

    def sampler(self, plan: Plan) -> Sampler:
        """How the pictures of a plan come about."""
        options = self.request.options
        given = options["positional"]
        method = plan.positional if isinstance(given, str) and given == "auto" else given
        return self.pipe.sampler(
            plan,
            method,
            options["layout"],
            self.started.source,
            options["regions"],
            self.request.vae,
            self.started.mask,
        )

    def make(self, sampler: Sampler, batch: list[Job], rows: int, conditioning: Conditioning) -> None:
        """Pictures of one model call of ``rows`` rows; the last job fills those that are left over."""
        request, started = self.request, self.started
        padded = batch + [batch[-1]] * (rows - len(batch))
        noise = Noise(tuple(self.plans[job.row].seed for job in padded), tuple(job.index for job in padded))
        if started.given is not None:
            noise = replace(noise, given=started.given[np.asarray([job.number for job in padded])])
        records = [self._record(job, rows) for job in batch]
        state = self._denoise(sampler, noise, conditioning_rows(conditioning, [job.row for job in padded]), padded)
        made = to_host(sampler.latents(state))[: len(batch)]
        if isinstance(sampler, CoarseMixedFine):
            shown = sampler.levels_map(state)
            self._levels.append(np.broadcast_to(shown, (rows, *shown.shape[1:]))[: len(batch)])
        del state
        self._clock.stop("denoise")
        if request.on_latents is not None:
            request.on_latents(made, records)
        self._latents.append(made)
        self._records += records
        if request.decode:
            pixels = self.pipe.decode(made, vae=request.vae)
            for job, picture, record in zip(batch, pixels, records, strict=True):
                self._images.append(Image(finished(picture, self.plans[job.row], started), record))
            self._clock.stop("decode")

    def _record(self, job: Job, rows: int) -> dict:
        plan, request = self.plans[job.row], self.request
        return self.pipe.record(plan, job.index, inputs=self.started.record(job), vae=request.vae, batch_size=rows)

    def _denoise(self, sampler: Sampler, noise: Noise, conditioning: Conditioning, jobs: list[Job]) -> State:
        pipe, checkpoint = self.pipe, self.request.checkpoint
        state, done = sampler.start(noise, conditioning), 0
        asked: dict = {}
        if checkpoint is not None:
            place = pipe.place()
            asked = checkpoint.request or {
                "pictures": [
                    {k: v for k, v in pipe.record(self.plans[job.row], job.index).items() if k not in place}
                    for job in jobs
                ],
                "given": digest((noise.given, self.started.source, self.started.embeddings)),
            }
            checkpoint = checkpoint.part(f"batch-{jobs[0].number:04d}")
            done, state = checkpoint.start(asked, state)
        state, params = laid(state, pipe.mesh), pipe.params
        seen: list = []  # what the last step began with: latents and their noise level
        watcher = None if self.request.on_step is None else lambda *call: seen.__setitem__(slice(None), call)
        with progress_bar(self.request.progress, sampler.steps, done) as advance, watched(watcher):
            for index in range(done, sampler.steps):
                begun = time.perf_counter()
                state = sampler.step(params, state, conditioning, index)
                if self.request.on_step is not None or self.request.progress:
                    jax.block_until_ready(state)
                if self.request.on_step is not None:
                    self._tell(sampler, state, index, time.perf_counter() - begun, seen)
                advance()
                if checkpoint is not None:
                    checkpoint.after(index + 1, sampler.steps, asked, state)
        return state

    def _tell(self, sampler: Sampler, state: State, index: int, seconds: float, seen: list) -> None:
        latents, sigma = sampler.seen(state, index)
        clean = clean_estimate(latents, sigma, *seen)
        self.request.on_step(Progress(index + 1, sampler.steps, seconds, latents, sigma, clean, self._look))

    def _look(self, latents: jax.Array) -> np.ndarray:
        if self._preview is None:
            self._preview = self.pipe.linear_preview()
        return self._preview(latents)

    def result(self) -> Result:
        """All that was made."""
        levels = np.concatenate(self._levels) if self._levels else None
        return Result(self._images, np.concatenate(self._latents), self._records, self._timings, levels)


def clean_estimate(latents: jax.Array, sigma: float, before: Any, level: jax.Array) -> jax.Array:
    """What a step took the clean latents to be, f32 [B, h, w, C]: where the line it went along meets noise level 0.

    Args:
        latents, sigma: what it left, and its noise level.
        before, level: what it began with; of several canvases (layouts of mixed resolution) the finest counts.
    """
    finest = max(before.values(), key=lambda x: x.shape[1]) if isinstance(before, Mapping) else before
    return latents - sigma * (latents - finest) / (sigma - level)


def finished(pixels: np.ndarray, plan: Plan, started: Started) -> np.ndarray:
    """The picture of a plan from what the autoencoder gave, f32 [H, W, 3] in [-1, 1].

    What a mask keeps is the photo's own, and the whole is cut to the size that was asked for.
    """
    if started.mask is not None:
        pixels = np.where(started.mask[..., None], pixels, started.source[0])
    return pixels if plan.shown is None else cut(pixels, plan.shown)


def conditioning_rows(conditioning: Conditioning, rows: list[int]) -> Conditioning:
    """The conditioning of a batch; scalars are shared."""
    at = np.asarray(rows)
    return jax.tree.map(lambda x: x[at] if x.ndim else x, conditioning)
