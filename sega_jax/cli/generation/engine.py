"""Making the pictures of a list of jobs: encode, denoise, keep the latents, decode, save."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from converters.files import expanded
from sega_jax.cli import outputs
from sega_jax.cli.console import Phase, progress_bar, say
from sega_jax.cli.generation import jobs as J
from sega_jax.cli.generation.jobs import Batch, Job, State
from sega_jax.cli.generation.previews import Previews
from sega_jax.media.images import Image
from sega_jax.media.latents import load_latents, save_latents
from sega_jax.pipeline.generation import Started, finished
from sega_jax.pipeline.pipeline import Pipeline, Progress
from sega_jax.pipeline.planning import regions_map
from sega_jax.runtime.cache import keep_compiled
from sega_jax.sampling.regions import get_regions, overlay
from sega_jax.sampling.resume import Checkpoint, never, stop_on_sigterm

CACHED_PROMPTS = 64


def checkpoint_of(batch: Batch, every: int, resume: bool, stop: Callable[[], bool] = never) -> Checkpoint:
    """Where the state of a batch is saved: under the name of its first picture."""
    rows = filled(batch)
    request = {"pictures": [job.record for job in rows]}
    return Checkpoint(outputs.state_beside(batch.jobs[0].out), every, resume, stop, request)


def filled(batch: Batch) -> list[Job]:
    """The jobs of a batch, the last repeated until there is one for every row."""
    return [*batch.jobs, *[batch.jobs[-1]] * (batch.size - len(batch.jobs))]


class Engine:
    """A loaded model at work on jobs.

    Attributes:
        timings: seconds per stage.
        classes: compile classes seen so far.
        undecoded: latents files whose pictures are not finished, for the message of an interruption.
    """

    def __init__(
        self,
        pipe: Pipeline,
        total: int,
        every: int | None = None,
        resume: bool = False,
        previews: Previews | None = None,
    ):
        """``every``: steps between saves of a run's state, None for none; ``resume``: go on from what is there."""
        self.pipe = pipe
        self._every, self._resume, self._previews = every, resume, previews
        self.timings = {"encode": 0.0, "denoise": 0.0, "decode": 0.0}
        self.classes: set[tuple] = set()
        self.undecoded: list[Path] = []
        self._total = total
        self._levels: dict[int, np.ndarray] = {}  # of jobs with regions
        self._done = 0
        self._encode = lru_cache(maxsize=CACHED_PROMPTS)(self._encode_prompt)

    # -- conditioning --------------------------------------------------------------------------------------------

    def _encode_prompt(self, prompt: str, negative: str | None) -> dict[str, Any]:
        made = self.pipe.encode([prompt], negative_prompt=negative)
        negative = {} if made.negative is None else made.negative
        return {**made.arrays, **{f"negative_{name}": x for name, x in negative.items()}}

    def _embeddings(self, rows: Sequence[Job]) -> dict[str, Any]:
        """Encoded prompts of a batch: one at a time, so that a prompt's embedding does not depend on its company."""
        parts = []
        for job in rows:
            given = J.embeddings(job.request, self.pipe.parts)
            parts.append(self._encode(job.plan.prompt, job.plan.negative_prompt) if given is None else given)
        return {name: jnp.concatenate([jnp.asarray(part[name]) for part in parts]) for name in parts[0]}

    # -- stages --------------------------------------------------------------------------------------------------

    def run(self, batch: Batch) -> None:
        """All pictures of a batch, to their files."""
        if batch.jobs[0].state is State.LATENTS:
            for job in batch.jobs:
                latents, found = load_latents(job.latents)
                say(f"{job.latents}: latents of an interrupted run, only to be decoded")
                temporary = found.get(outputs.TEMPORARY) is True
                self._finish(job, latents, {k: v for k, v in found.items() if k not in outputs.OF_LATENTS}, temporary)
            return
        begun = time.perf_counter()
        rows = filled(batch)
        with Phase("encoding the prompt"):
            embeddings = self._embeddings(rows)
        self.timings["encode"] += time.perf_counter() - begun
        self._draw_regions(batch)
        with contextlib.ExitStack() as stack:
            checkpoint = None
            if self._every is not None:
                # Unlike elsewhere, SIGTERM lets the step end; whatever follows the denoising can be cut off.
                stop = stack.enter_context(stop_on_sigterm())
                checkpoint = checkpoint_of(batch, self._every, self._resume, stop)
            latents = self._denoise(batch, rows, embeddings, checkpoint)
        records = [{**job.record, "batch_size": batch.size, **self.pipe.place()} for job in batch.jobs]
        for job, one, record in zip(batch.jobs, latents, records, strict=False):
            extra = {"output": job.out.name} | ({} if job.keeps_latents else {outputs.TEMPORARY: True})
            save_latents(job.latents, one[None], {**record, **extra})
            self.undecoded.append(job.latents)
        if checkpoint is not None:
            checkpoint.clear()
        else:
            checkpoint_of(batch, 1, False).clear_own()
        for job, one, record in zip(batch.jobs, latents, records, strict=False):
            self._finish(job, one[None], record, not job.keeps_latents)
        keep_compiled()

    def _denoise(
        self, batch: Batch, rows: Sequence[Job], embeddings: dict[str, Any], checkpoint: Checkpoint | None
    ) -> np.ndarray:
        first = rows[0]
        plan = first.plan
        options: dict[str, Any] = {}
        if J.of_one_request(first):
            options |= {"seed": plan.seed, "image_indices": [job.index for job in rows], "vae": first.request.vae}
            if first.request.init_image is not None:
                options |= {"init_image": expanded(first.request.init_image.file), "strength": plan.strength}
                options |= {"fit": plan.fit}
                if first.request.mask is not None:
                    options["mask"] = expanded(first.request.mask.file)
            elif first.request.init_latents is not None:
                options["init_latents"] = np.concatenate([self._start(job) for job in rows])
            if plan.ladder is not None:
                options["ladder"] = plan.ladder
            embeddings = {name: array[:1] for name, array in embeddings.items()}
            prompts = [plan.prompt]
        else:
            options["init_latents"] = np.concatenate([self._start(job) for job in rows])
            prompts = [job.plan.prompt for job in rows]
        if plan.guidance is not None:
            options["guidance"] = plan.guidance
        if plan.negative_prompt is not None:
            options |= {"negative_prompt": plan.negative_prompt, "true_guidance": plan.true_guidance}

        done = self._done + len(batch.jobs)
        count = f"{self._done + 1}" if done == self._done + 1 else f"{self._done + 1}-{done}"
        label = f"image {count} of {self._total}"
        bar = phase = None
        if batch.key in self.classes:
            bar = progress_bar(plan.evaluations(first.request.init_image is not None), label)
        else:
            self.classes.add(batch.key)
            several = f", batch of {batch.size}" if batch.size > 1 else ""
            phase = Phase(f"compiling for {plan.width}x{plan.height}{several}, cached for the next time")

        def on_step(progress: Progress) -> None:
            nonlocal bar
            if self._previews is not None:
                self._previews(progress)
            if bar is None:  # the first step compiles, so the bar and its speed start after it
                phase.end()
                bar = progress_bar(progress.total, label, progress.index)
            else:
                bar.update()

        begun = time.perf_counter()
        try:
            result = self.pipe.generate(
                prompts,
                width=plan.width,
                height=plan.height,
                steps=plan.steps,
                batch_size=batch.size,
                positional=J.method_of(plan.positional),
                layout=plan.layout,
                regions=plan.regions,
                mu=plan.mu,
                embeddings=embeddings,
                decode=False,
                on_step=on_step,
                checkpoint=checkpoint,
                **options,
            )
        finally:
            if phase is not None:
                phase.end()
            if bar is not None:
                bar.close()
        self.timings["denoise"] += time.perf_counter() - begun
        self._done = done
        if result.levels is not None:
            self._levels |= {job.number: levels for job, levels in zip(batch.jobs, result.levels, strict=False)}
        return result.latents

    def _draw_regions(self, batch: Batch) -> None:
        """Pictures of regions that are known before the run, on grey."""
        for job in batch.jobs:
            if job.plan.regions is None or get_regions(job.plan.regions).automatic is not None:
                continue
            levels = regions_map(self.pipe.grid(job.plan.height, job.plan.width), job.plan)
            grey = np.zeros((job.plan.height, job.plan.width, 3), np.float32)
            Image(overlay(grey, levels), job.record).save(job.overlay)
            say(f"regions of {job.out}: {job.overlay}")

    def _start(self, job: Job) -> np.ndarray:
        given = J.given_latents(job, self.pipe.parts)
        if given is not None:
            return given
        return np.asarray(self.pipe.noise(job.plan.seed, *job.plan.first_size, [job.index]))

    def _finish(self, job: Job, latents: np.ndarray, record: dict, temporary: bool) -> None:
        if job.latents not in self.undecoded:
            self.undecoded.append(job.latents)
        begun = time.perf_counter()
        with Phase(f"decoding {job.out}"):
            pixels = self.pipe.decode(latents, vae=job.request.vae)
            if job.number in self._levels:
                Image(overlay(pixels[0], self._levels.pop(job.number)), record).save(job.overlay)
            started = Started() if job.request.mask is None else J.started(job.request, job.plan)
            # last, since its being there says that all is
            Image(finished(pixels[0], job.plan, started), record).save(job.out)
        self.timings["decode"] += time.perf_counter() - begun
        self.undecoded.remove(job.latents)
        if temporary and not job.keeps_latents:
            job.latents.unlink(missing_ok=True)
