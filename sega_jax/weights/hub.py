"""From a model name to a folder on disk: the embedded demo, a local path, or the Hugging Face hub.

Only the files a pipeline needs are fetched, and what cannot work (no access, no disk, no network) is said before
anything large is downloaded.  `huggingface_hub` is imported when a hub name is resolved, and honours ``HF_HOME``,
``HF_HUB_CACHE``, ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path, PurePosixPath

from converters.errors import CheckpointError
from converters.files import expanded
from converters.reading.detect import Kind, detect
from converters.reading.formats import choose_weights, read_pipeline, weight_paths

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SMALL_FILES = (".json", ".txt", ".model", ".jinja")  # configurations, vocabularies, sentencepiece, chat templates
DISK_MARGIN = 512 * 2**20  # bytes left free after a download


def resolve(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    components: Sequence[str] | None = None,
    weights: bool = True,
    endpoint: str | None = None,
) -> Path:
    """The folder (or single file) of a model, downloading it if necessary.

    Args:
        model: ``"nano"`` (the embedded demo; write ``./nano`` for a folder of that name), an existing folder or
            ``.safetensors`` file, which is used as it is, or a hub id ``owner/name``.
        revision: branch, tag or commit on the hub.
        token: hub token; ``None`` uses the one saved by ``hf auth login``, ``False`` sends none.
        cache_dir: hub cache; default ``HF_HUB_CACHE`` or ``HF_HOME``/hub.
        local_files_only: use the cache only (also switched on by ``HF_HUB_OFFLINE=1``).
        components: names in ``model_index.json`` to fetch; default all.
        weights: False fetches configurations and vocabularies only, which is enough to plan.
        endpoint: address of the hub; default ``HF_ENDPOINT`` or huggingface.co.

    Raises:
        CheckpointError: nothing usable there, no access, no network and no cached copy, or too little disk.
        ValueError: neither a path nor a hub id, or a component the model does not have.
    """
    name = os.fspath(model)
    if name == "nano" and isinstance(model, str):
        return _embedded()
    path = expanded(name)
    if name and path.exists():
        return _local(path)
    if not isinstance(model, str) or not _HUB_ID.fullmatch(name):
        raise ValueError(
            f"model {name!r}: no such folder or file, and not a hub id of the form 'owner/name'; "
            "give a path, a hub id, or 'nano' for the embedded demo"
        )
    return _Hub(name, revision, token, cache_dir, local_files_only, endpoint, weights).folder(components)


def _embedded() -> Path:
    path = Path(str(resources.files("sega_jax.nano") / "checkpoint"))
    if not (path / "model_index.json").is_file():
        raise CheckpointError(f"the embedded demo model is missing from this installation ({path}); reinstall sega-jax")
    return path


def _local(path: Path) -> Path:
    layout = detect(path)
    if layout.kind in (Kind.OTHER, Kind.PICKLE):
        raise CheckpointError(
            f"{path} exists but is not a checkpoint: {layout.description}. Expected a diffusers folder with "
            "model_index.json, a component folder, or a .safetensors file"
        )
    return path


def _size(count: int) -> str:
    value = float(count)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _is_small(file: str) -> bool:
    return file.endswith(_SMALL_FILES) and ".index." not in file


def needed_files(
    available: Collection[str], components: Mapping[str, tuple[str, str]], where: str
) -> dict[str, list[str]]:
    """Which of a repository's files each component needs.

    Args:
        available: all file names in the repository, with ``/``.
        components: component name -> (library, class).
        where: the repository's name, for errors.

    Returns:
        Component name -> files: configurations and vocabularies lying directly in its folder, and one set of
        safetensors weights.  Nothing from the root but ``model_index.json``, which is not listed.

    Raises:
        CheckpointError: a component has no files, or no usable weights.
    """
    folders: dict[str, list[str]] = {}
    for file in available:
        pure = PurePosixPath(file)
        if len(pure.parts) == 2:
            folders.setdefault(pure.parts[0], []).append(pure.name)
    chosen = {}
    for name in components:
        names = folders.get(name, [])
        if not names:
            raise CheckpointError(f"{where}: model_index.json names {name!r} but the repository has no such folder")
        weights = choose_weights(names, f"{where}/{name}")
        files = [file for file in names if _is_small(file)]
        if weights is not None:
            files += [*weights.files, *([weights.index] if weights.index else [])]
        elif "config.json" in names:
            raise CheckpointError(f"{where}/{name}: has a config.json but no safetensors weights")
        chosen[name] = [f"{name}/{file}" for file in sorted(files)]
    return chosen


def _select(components: Mapping[str, tuple[str, str]], wanted: Sequence[str] | None, where: str):
    if wanted is None:
        return dict(components)
    if unknown := sorted(set(wanted) - components.keys()):
        raise ValueError(f"{where} has no component {', '.join(unknown)}; it has {', '.join(components)}")
    return {name: components[name] for name in components if name in wanted}


class _Hub:
    """One repository at one revision."""

    def __init__(self, repo, revision, token, cache_dir, local_files_only, endpoint, weights):
        import huggingface_hub
        from huggingface_hub import constants

        self.hub = huggingface_hub
        self.repo, self.revision, self.token, self.endpoint = repo, revision, token, endpoint
        self.cache_dir = expanded(cache_dir if cache_dir is not None else constants.HF_HUB_CACHE)
        self.offline = local_files_only or constants.HF_HUB_OFFLINE
        self.weights = weights
        self.where = repo if revision is None else f"{repo} at {revision}"

    def folder(self, components: Sequence[str] | None) -> Path:
        if self.offline:
            return self._cached(components)
        try:
            return self._online(components)
        except (ConnectionError, TimeoutError) as exc:
            try:
                path = self._cached(components)
            except CheckpointError:
                raise CheckpointError(
                    f"{self.where}: the hub cannot be reached ({exc}) and there is no complete copy in "
                    f"{self.cache_dir}; check the network, or give a folder"
                ) from exc
            logger.warning("%s: the hub cannot be reached (%s); using the cached copy in %s", self.where, exc, path)
            return path

    # -- with a network --

    def _online(self, components: Sequence[str] | None) -> Path:
        api = self.hub.HfApi(endpoint=self.endpoint, token=self.token, library_name="sega-jax")
        info = self._ask(api.model_info, self.repo, revision=self.revision, files_metadata=True)
        sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
        if "model_index.json" not in sizes:
            raise CheckpointError(
                f"{self.where}: no model_index.json, so not a diffusers pipeline; it holds "
                f"{', '.join(sorted(sizes)[:8]) or 'nothing'}. Use the repository in diffusers layout, or download a "
                "single file yourself and give its path"
            )
        # The index (a few hundred bytes) is fetched first: it says what else is needed, and shows whether files
        # of a gated repository may be read at all.
        folder = self._fetch_index()
        commit = folder.name
        named = _select(read_pipeline(folder), components, self.repo)
        chosen = needed_files(sizes, named, self.repo)
        if not self.weights:
            chosen = {name: [file for file in group if _is_small(file)] for name, group in chosen.items()}
        files = ["model_index.json", *(file for group in chosen.values() for file in group)]
        missing = {name: [file for file in group if not self._has(file, commit)] for name, group in chosen.items()}
        total = sum(sizes[file] for group in missing.values() for file in group)
        if total:
            parts = [f"{name} {_size(sum(sizes[f] for f in group))}" for name, group in missing.items() if group]
            logger.info("%s: fetching %s to %s (%s)", self.where, _size(total), self.cache_dir, ", ".join(parts))
            self._check_disk(total)
        self._fetch(files, commit)
        if lost := [file for file in files if not (folder / file).is_file()]:
            # The hub client answers a connection lost midway with whatever the cache holds.
            raise ConnectionError(f"{len(lost)} files did not arrive, {lost[0]} first")
        return folder

    def _has(self, file: str, commit: str) -> bool:
        found = self.hub.try_to_load_from_cache(self.repo, file, cache_dir=self.cache_dir, revision=commit)
        return isinstance(found, str)

    def _check_disk(self, total: int) -> None:
        place = self.cache_dir.absolute()
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if total + DISK_MARGIN > free:
            raise CheckpointError(
                f"{self.where} needs {_size(total)} more in {self.cache_dir}, where {_size(free)} are free and "
                f"{_size(DISK_MARGIN)} must remain; free some space, or choose another disk with cache_dir= or HF_HOME"
            )

    def _fetch_index(self) -> Path:
        """Fetches ``model_index.json``; its folder is the snapshot, named by the commit."""
        file = self._ask(
            self.hub.hf_hub_download,
            self.repo,
            "model_index.json",
            revision=self.revision,
            **self._options(),
        )
        return Path(file).parent

    def _fetch(self, files: Sequence[str], commit: str) -> None:
        patterns = [glob.escape(file) for file in files]
        self._ask(self.hub.snapshot_download, self.repo, revision=commit, allow_patterns=patterns, **self._options())

    def _options(self) -> dict:
        return {
            "cache_dir": self.cache_dir,
            "token": self.token,
            "endpoint": self.endpoint,
            "library_name": "sega-jax",
        }

    def _ask(self, call, *args, **kwargs):
        """A hub call with its failures in our words; `ConnectionError` if the hub gave no answer."""
        from huggingface_hub import errors

        try:
            return call(*args, **kwargs)
        except errors.LocalEntryNotFoundError as exc:
            # What the client raises when a file's headers cannot be had, for whatever reason; the cause knows.
            if isinstance(exc.__cause__, errors.HfHubHTTPError):
                raise self._refused(exc.__cause__) from exc
            raise ConnectionError(str(exc)) from exc
        except errors.HfHubHTTPError as exc:
            raise self._refused(exc) from exc
        except errors.HTTPError as exc:  # httpx's: no connection, time-out, broken transfer
            raise ConnectionError(f"{type(exc).__name__}: {exc}") from exc
        except OSError as exc:
            raise CheckpointError(f"{self.repo}: the download to {self.cache_dir} failed ({exc})") from exc

    def _refused(self, exc: Exception) -> CheckpointError:
        """The error for an answer of the hub that is not the file."""
        from huggingface_hub import constants, errors

        page = f"{self.endpoint or constants.ENDPOINT}/{self.repo}"
        login = "log in with `hf auth login` or pass token="
        if isinstance(exc, errors.GatedRepoError):
            return CheckpointError(f"{self.repo} is gated: accept its licence on {page}, then {login}")
        if isinstance(exc, errors.RevisionNotFoundError):
            return CheckpointError(f"{self.repo} has no revision {self.revision!r}; see {page}/commits/main")
        if isinstance(exc, errors.RepositoryNotFoundError):
            return CheckpointError(
                f"{self.repo}: no such repository on the hub, or it is private. Check the spelling; if it is "
                f"private, {login}"
            )
        status = exc.response.status_code
        if status in (401, 403):
            return CheckpointError(
                f"{self.repo}: the hub refuses access (HTTP {status}): accept the licence on {page} if there is "
                f"one, then {login} with a token that may read it"
            )
        return CheckpointError(f"{self.repo}: the hub answered HTTP {status}; try again later ({exc})")

    # -- from the cache --

    def _cached(self, components: Sequence[str] | None) -> Path:
        why = f"{self.where}: offline (local_files_only or HF_HUB_OFFLINE=1) and"
        remedy = "run once with a network, or give a folder"
        found = self.hub.try_to_load_from_cache(
            self.repo, "model_index.json", cache_dir=self.cache_dir, revision=self.revision
        )
        if not isinstance(found, str):
            raise CheckpointError(f"{why} not in the cache {self.cache_dir}; {remedy}")
        folder = Path(found).parent
        for name in _select(read_pipeline(folder), components, self.repo):
            try:
                self._check_component(folder / name)
            except CheckpointError as exc:
                raise CheckpointError(f"{why} the cached copy is incomplete: {exc}; {remedy}") from exc
        return folder

    def _check_component(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is missing")
        if self.weights and (folder / "config.json").is_file():
            weight_paths(folder)


def commit_of(model: str, folder: Path) -> str | None:
    """The commit of a model that came from the hub (its snapshot folder bears it), None for one on disk."""
    return folder.name if folder.parent.name == "snapshots" and not expanded(model).exists() else None
