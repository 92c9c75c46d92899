"""What can be known before the first step: whether every picture can be saved, and what earlier runs left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.files import expanded
from sega_jax.cli import outputs
from sega_jax.cli.generation.jobs import Job, State
from sega_jax.cli.generation.requests import INCIDENTAL, Request
from sega_jax.cli.targets import check_names, check_targets
from sega_jax.media.images import check_saveable, decoded
from sega_jax.media.latents import load_latents
from sega_jax.sampling.resume import remove_states, request_of

MOST_PICTURES = 100_000  # of one run
_SPARE = 1_000  # bytes that versions, device and mesh add to a record


def check_count(requests: Sequence[Request]) -> None:
    """Refuses more pictures than one run makes.

    Raises:
        ValueError: with the number.
    """
    count = sum(len(request.indices) for request in requests)
    if count > MOST_PICTURES:
        raise ValueError(f"{count} pictures: expected at most {MOST_PICTURES} in one run; split the prompts")


@lru_cache(maxsize=256)
def _check_picture(path: str) -> None:
    with decoded(expanded(path)):
        pass


def forget() -> None:
    """Pictures may have changed since the last run."""
    _check_picture.cache_clear()


def check_jobs(jobs: Sequence[Job]) -> None:
    """Refuses jobs whose pictures could not be made or saved, whatever lies at their places.

    Raises:
        ValueError, TypeError: for the first of them, with the line of its row.
    """
    check_names(path for job in jobs for path in _targets(job))
    owners: dict[Path, str] = {}
    for job in jobs:
        where = f"{job.request.where}: " if job.request.where else ""
        try:
            if job.request.init_image is not None:
                _check_picture(job.request.init_image.file)
            check_saveable(job.out, job.plan.width, job.plan.height, job.record, _SPARE)
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"{where}{error}") from error
        for path in _targets(job):
            place = path.parent.resolve() / path.name
            if place in owners and owners[place] != str(job.number):
                raise ValueError(f"{where}{path} is a file of another picture too; use {{row}} and {{index}} in --out")
            if place in owners:
                raise ValueError(f"{where}{path} would be two files of one picture; give another name")
            owners[place] = str(job.number)


def _targets(job: Job) -> tuple[Path, ...]:
    return (job.out, job.latents, *((job.overlay,) if job.plan.regions is not None else ()))


def check_places(jobs: Iterable[Job], *, states: bool, look_only: bool) -> None:
    """Refuses files that cannot be written; to be asked for jobs that are not done.

    Args:
        jobs: to be made or decoded.
        states: whether the run saves its state beside the pictures.
        look_only: see `targets.check_targets`.

    Raises:
        OSError: for the first of them.
    """
    jobs = list(jobs)
    check_targets([path for job in jobs for path in _targets(job)], look_only=look_only)
    for job in jobs if states else ():
        folder = outputs.state_beside(job.out)
        if folder.is_dir():
            check_targets([folder / "run.json"], look_only=look_only)
        elif folder.exists():
            raise FileExistsError(f"{folder} is in the way: states of the run are saved in a folder of this name")


# -- what earlier runs left ----------------------------------------------------------------------------------------


def settle(jobs: Sequence[Job], *, look_only: bool) -> list[Job]:
    """Jobs as they are once what a killed run left behind is taken into account.

    Of a run that was killed after its last step, between saving latents and tidying up, the state is removed where all
    its pictures have latents; where some have none the whole batch goes on from the state.  Latents that were kept
    until their picture was decoded go where the picture is there.

    Args:
        jobs: with what lies at their places.
        look_only: nothing is removed.
    """
    jobs = list(jobs)
    for number, job in enumerate(jobs):
        if job.state is State.NEW:
            continue
        mates = _mates(job, jobs)
        if any(mate.state is State.NEW for mate in mates):
            jobs = [replace(j, state=State.NEW) if j in mates and j.state is State.LATENTS else j for j in jobs]
        elif mates and not look_only:
            remove_states(outputs.state_beside(job.out))
        job = jobs[number]
        if job.state is State.DONE and not job.keeps_latents and not look_only and is_temporary(job):
            job.latents.unlink()
    return jobs


def _mates(job: Job, jobs: Sequence[Job]) -> list[Job]:
    """The jobs of the batch whose state lies beside this job's picture; none where there is no such state."""
    request = request_of(outputs.state_beside(job.out))
    pictures = [] if request is None else request.get("pictures", [])
    if not isinstance(pictures, list) or not pictures or not _same(job, pictures[0]):
        return []
    return [mate for mate in jobs if any(_same(mate, picture) for picture in pictures)]


def _same(job: Job, record: Any) -> bool:
    return isinstance(record, dict) and not outputs.differences(job.record, record, INCIDENTAL)


def is_temporary(job: Job) -> bool:
    """Whether the latents that lie at a job's place are its own, kept only until they were decoded."""
    if not job.latents.is_file():
        return False
    try:
        _, found = load_latents(job.latents)
    except CheckpointError:
        return False
    return found.get(outputs.TEMPORARY) is True and not outputs.differences(
        job.record, found, (*INCIDENTAL, *outputs.OF_LATENTS)
    )
