"""Jobs: one picture each, with its full record and its files; grouped so that each class of them compiles once."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.errors import CheckpointError
from converters.files import expanded
from converters.reading.formats import open_tensors
from sega_jax import positional as pe
from sega_jax.cli import outputs
from sega_jax.cli.generation.requests import INCIDENTAL, FileRow, Request
from sega_jax.families.base import Outline
from sega_jax.families.registry import family_named
from sega_jax.media.images import read_metadata
from sega_jax.media.latents import load_latents
from sega_jax.media.photos import photo_size
from sega_jax.pipeline import planning
from sega_jax.pipeline.generation import Started, started_of
from sega_jax.pipeline.records import file_digest, picture_fields
from sega_jax.sampling.crpa import Crpa
from sega_jax.sampling.registry import get_layout
from sega_jax.sampling.scale_dit import Guided


class State(Enum):
    """What there is to do for a job."""

    NEW = "to make"
    LATENTS = "to decode: an interrupted run left its latents"
    DONE = "exists, same request: skipped"


@dataclass(frozen=True)
class Job:
    """One picture.

    Attributes:
        number: position among all pictures, in the order of rows.
        request: its row.
        index: image index within the row.
        plan: the request with the defaults of the model.
        record: metadata, less what is known only when it is made (`requests.INCIDENTAL`).
        out: image file.
        latents: latents file.
        state: what is there already.
    """

    number: int
    request: Request
    index: int
    plan: planning.Plan
    record: dict
    out: Path
    latents: Path
    state: State = State.NEW

    @property
    def overlay(self) -> Path:
        """Picture of the regions, beside the image; for layouts with regions."""
        return self.out.with_name(f"{self.out.stem}.regions.png")

    @property
    def keeps_latents(self) -> bool:
        """Whether the latents were asked for, and stay."""
        return self.request.save_latents is not None


digest = lru_cache(maxsize=64)(file_digest)  # a run reads files more than once


def _pinned(given: FileRow | None, name: str, where: str, row: int | None = None) -> FileRow | None:
    """The file with its digest filled in.

    Raises:
        ValueError: the file is not the one its digest is of.
    """
    if given is None:
        return None
    found = digest(given.file)
    if given.sha256 not in (None, found):
        raise ValueError(f"{where}{name}={given.file!r} has changed since the picture was made; give --{_flag(name)}")
    return FileRow(given.file, row if given.row is None else given.row, found)


def _flag(name: str) -> str:
    return name.replace("_", "-")


@lru_cache(maxsize=4)
def _tensors(path: str) -> dict[str, np.ndarray]:
    with open_tensors(expanded(path)) as source:
        return {name: source.read(name) for name in source.keys()}  # noqa: SIM118  not a mapping


def embeddings(request: Request, outline: Outline) -> dict[str, np.ndarray] | None:
    """The request's row of its embeddings file, each array with a leading dimension of 1.

    Raises:
        CheckpointError: a missing array, or one of another model.
    """
    if request.embeddings is None:
        return None
    path, row = request.embeddings.file, request.embeddings.row or 0
    arrays = _tensors(path)
    shapes = dict(family_named(outline.family).conditioning_spec(outline))
    if request.negative_prompt is not None:
        shapes |= {f"negative_{name}": shape for name, shape in shapes.items()}
    for name, expected_shape in shapes.items():
        width, rank = expected_shape[-1], len(expected_shape) + 1
        if name not in arrays:
            raise CheckpointError(f"{path}: no array {name!r}; it holds {', '.join(sorted(arrays)) or 'nothing'}")
        shape = arrays[name].shape
        if len(shape) != rank or shape[-1] != width:
            expected = ["rows", "tokens", width] if rank == 3 else ["rows", width]
            raise CheckpointError(f"{path}: {name} has shape {list(shape)}; this model needs {expected}")
        if row >= shape[0]:
            raise CheckpointError(f"{path}: {name} has {shape[0]} rows; row {row} (from 0) is asked for")
    found = {name: arrays[name][row : row + 1] for name in shapes}
    for name, array in found.items():
        if 0 in array.shape or not np.isfinite(array.astype(np.float32)).all():
            raise CheckpointError(f"{path}: {name} of row {row} is empty, or holds NaN or infinity")
    return found


def _check_embedding_rows(requests: Sequence[Request]) -> list[Request]:
    """Requests with the row of their embeddings: a file shared by several has one row for each."""
    shared = [r for r in requests if r.embeddings is not None and r.embeddings.row is None]
    by_file: dict[str, list[Request]] = {}
    for request in shared:
        by_file.setdefault(request.embeddings.file, []).append(request)
    rows: dict[int, int] = {}
    for file, users in by_file.items():
        arrays = _tensors(file)
        count = len(arrays["text"]) if "text" in arrays and arrays["text"].ndim else len(users)
        if count != len(users):
            raise CheckpointError(f"{file}: {count} rows of embeddings for {len(users)} prompts; expected as many")
        rows |= {request.row: i for i, request in enumerate(users)}
    result = []
    for request in requests:
        if request.row in rows:
            request = replace(request, embeddings=replace(request.embeddings, row=rows[request.row]))
        given = request.embeddings
        if given is not None and request.negative_prompt is None and "negative_text" in _tensors(given.file):
            request = replace(request, negative_prompt="")
        result.append(request)
    return result


def given_latents(job: Job, outline: Outline) -> np.ndarray | None:
    """The job's initial latents f32 [1, h, w, C], if its request has a file of them.

    Raises:
        CheckpointError: too few of them, or of another size.
    """
    source = job.request.init_latents
    if source is None:
        return None
    height, width = job.plan.first_size
    latents = _latents(source.file, height, width)
    grid = outline.rope.grid_for_pixels(height, width)
    expected = outline.latent_shape(grid)
    if latents.shape[1:] != expected:
        raise CheckpointError(
            f"{source.file}: latents {list(latents.shape[1:])} [h, w, C]; {width}x{height} needs {list(expected)}"
        )
    row = job.record["init_latents"]["row"]
    if row >= len(latents):
        raise CheckpointError(f"{source.file}: holds {len(latents)} latents; number {row} (from 0) is asked for")
    return latents[row : row + 1]


@lru_cache(maxsize=4)
def _latents(path: str, height: int, width: int) -> np.ndarray:
    return load_latents(expanded(path), height=height, width=width)[0]


@lru_cache(maxsize=64)
def method_of(positional: str) -> pe.Method:
    """The method of a name; one object per name, so that a method of your own compiles once."""
    return pe.get(positional)


def forget() -> None:
    """Empties the caches of files and methods, which another run may find changed."""
    for cached in (digest, _tensors, _latents, method_of):
        cached.cache_clear()


def make_jobs(
    requests: Sequence[Request], outline: Outline, run: dict[str, Any], guidance_lora: dict[str, Any] | None = None
) -> list[Job]:
    """Every picture of the requests, planned, with its files named.

    Args:
        requests: in the order of rows.
        outline: of the model.
        run: fields of the record that all share (`records.model_fields`).
        guidance_lora: what the LoRA of layout scale-dit says about itself; None without one.

    Raises:
        ValueError, TypeError, CheckpointError: for the first request that cannot be served.
    """
    requests = _check_embedding_rows(requests)
    several = sum(len(request.indices) for request in requests) > 1
    jobs: list[Job] = []
    for request in requests:
        width, height = request.size or (None, None)
        where = f"{request.where}: " if request.where else ""
        try:
            plan = planning.plan(
                outline,
                request.prompt,
                negative_prompt=request.negative_prompt,
                width=width,
                height=height,
                steps=request.steps,
                guidance=request.guidance,
                true_guidance=request.true_guidance,
                seed=request.seed,
                num_images=len(request.indices),
                positional=request.positional,
                layout=request.layout,
                regions=request.regions,
                mu=request.mu,
                strength=request.strength,
                ladder=request.ladder,
                photo=None if request.init_image is None else photo_size(expanded(request.init_image.file)),
                fit=request.fit,
                guidance_lora=guidance_lora,
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}{error}") from error
        try:
            method_of(plan.positional)
        except ValueError:  # made by a factory: its own name leads nowhere, the name it was asked for does
            plan = replace(plan, positional=request.positional)
        embeddings(request, outline)
        for position, index in enumerate(request.indices):
            files = {
                name: value and asdict(value)
                for name, value in (
                    ("init_image", _pinned(request.init_image, "init_image", where)),
                    ("mask", _pinned(request.mask, "mask", where)),
                    ("init_latents", _pinned(request.init_latents, "init_latents", where, position)),
                    ("embeddings", _pinned(request.embeddings, "embeddings", where)),
                )
            }
            if request.mask is not None:
                try:
                    started(request, plan)
                except ValueError as error:
                    raise ValueError(f"{where}{error}") from error
            record = picture_fields(plan, index, run, files, request.vae)
            values = {
                "seed": plan.seed,
                "index": index,
                "row": request.row,
                "width": record["width"],
                "height": record["height"],
                "prompt_slug": outputs.slug(plan.prompt),
            }
            within = position if len(request.indices) > 1 else None
            among = len(jobs) if several else None
            out = outputs.expand(request.out, within if "out" in request.own else among, values)
            if request.save_latents is None:
                latents = outputs.latents_beside(out)
            else:
                number = within if "save_latents" in request.own else among
                latents = outputs.expand(request.save_latents, number, values)
            job = Job(len(jobs), request, index, plan, record, out, latents)
            given_latents(job, outline)
            jobs.append(job)
    outputs.check_distinct([job.out for job in jobs], "out")
    outputs.check_distinct([job.latents for job in jobs], "save-latents")
    outputs.check_folders([path for job in jobs for path in (job.out, job.latents)])
    return jobs


def started(request: Request, plan: planning.Plan) -> Started:
    """The photo and the mask of a request, at the size of its plan."""
    files = (None if given is None else expanded(given.file) for given in (request.init_image, request.mask))
    return started_of(plan, *files)


def look(job: Job, overwrite: bool) -> Job:
    """The job with what its files say about its state.

    Raises:
        FileExistsError: something else lies there, and ``overwrite`` is off.
    """
    if overwrite:
        return job
    if job.plan.regions is not None and job.overlay.exists():
        _check_overlay(job)
    if job.out.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; give a file name", str(job.out))
    if job.out.exists():
        try:
            found = read_metadata(job.out)
        except (ValueError, OSError) as error:
            raise FileExistsError(
                f"{job.out} exists and is not this picture ({error}); give another --out, or --overwrite"
            ) from error
        different = outputs.differences(job.record, found, INCIDENTAL)
        if different:
            fields = ", ".join(different)
            raise FileExistsError(f"{job.out} exists and was made differently ({fields}); change --out or --overwrite")
        if not job.keeps_latents:
            return replace(job, state=State.DONE)
    if job.latents.exists():
        try:
            _, found = load_latents(job.latents)
        except CheckpointError as error:
            raise FileExistsError(f"{job.latents} is in the way ({error}); remove it, or give --overwrite") from error
        different = outputs.differences(job.record, found, (*INCIDENTAL, *outputs.OF_LATENTS))
        if different:
            raise FileExistsError(
                f"{job.latents} holds the latents of another run ({', '.join(different)}); finish it with "
                f"`sega-jax decode {job.latents}`, remove it, or give --overwrite"
            )
        return replace(job, state=State.DONE if job.out.exists() else State.LATENTS)
    return job


def _check_overlay(job: Job) -> None:
    """Refuses to replace a picture of regions that is not this picture's."""
    try:
        different = outputs.differences(job.record, read_metadata(job.overlay), INCIDENTAL)
    except (ValueError, OSError) as error:
        raise FileExistsError(
            f"{job.overlay} exists and is not of this picture ({error}); give another --out, or --overwrite"
        ) from error
    if different:
        raise FileExistsError(
            f"{job.overlay} exists and shows the regions of another picture ({', '.join(different)}); give another "
            "--out, or --overwrite"
        )


def of_one_request(job: Job) -> bool:
    """Whether a model call can hold pictures of this job's request only.

    So it is where a call has one picture to start from, or draws noise besides the first by one seed: the stages of a
    ladder, the small picture of scale-dit, what crpa draws to rewind.
    """
    if job.request.init_image is not None or job.plan.ladder is not None:
        return True
    layout = get_layout(job.plan.layout)
    return isinstance(layout, Guided) or (isinstance(layout, Crpa) and layout.switch == "rewind")


def call_key(job: Job) -> tuple:
    """Jobs with one key can be rows of one model call."""
    plan = job.plan
    tied = job.request.row if of_one_request(job) else None
    return (class_key(job, 0), plan.steps, plan.guidance, plan.true_guidance, plan.positional, plan.mu, plan.strength,
            plan.regions, text_tokens(job), tied)  # fmt: skip


def text_tokens(job: Job) -> int | None:
    """Tokens of precomputed text embeddings; None for the model's own length."""
    given = job.request.embeddings
    return None if given is None else _tensors(given.file)["text"].shape[1]


def class_key(job: Job, batch: int) -> tuple:
    """What one compiled program serves: sizes, batch, structure of the method, guided or not."""
    plan = job.plan
    structure = jax.tree.structure(pe.traceable(method_of(plan.positional)))
    guided = plan.negative_prompt is not None
    mixed = plan.estimate and plan.estimate.layout
    sizes = None if plan.ladder is None else tuple((r.width, r.height, r.layout, r.positional) for r in plan.ladder)
    return plan.height, plan.width, batch, str(structure), guided, plan.layout, mixed, text_tokens(job), sizes


@dataclass(frozen=True)
class Batch:
    """Jobs of one model call; ``size`` rows are computed, the last job repeated to fill them."""

    jobs: tuple[Job, ...]
    size: int
    key: tuple


def batches(jobs: Sequence[Job], size: int, *, fill: bool = False) -> list[Batch]:
    """Jobs in model calls of at most ``size`` rows, calls of one compile class next to each other.

    Args:
        jobs: in order.
        size: rows per call; a group of fewer jobs gets a smaller call, unless ``fill``.
        fill: always compute ``size`` rows.
    """
    groups: dict[tuple, list[Job]] = {}
    for job in jobs:
        groups.setdefault(call_key(job), []).append(job)
    by_class: dict[tuple, list[Batch]] = {}
    for members in groups.values():
        rows = size if fill else min(size, len(members))
        key = class_key(members[0], rows)
        made = [Batch(tuple(members[i : i + rows]), rows, key) for i in range(0, len(members), rows)]
        by_class.setdefault(key, []).extend(made)
    return [batch for group in by_class.values() for batch in group]
