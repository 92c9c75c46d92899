"""``--preview``: a small picture of what is coming, written anew while a run goes on."""

from __future__ import annotations

from pathlib import Path

from sega_jax.media.images import Image, read_metadata
from sega_jax.pipeline.results import Progress

_MARK = "preview_of_step"  # in the metadata of previews, and of nothing else


class Previews:
    """Writes previews of steps to one file."""

    def __init__(self, path: Path, every: int, overwrite: bool = False):
        """``path``: of the picture; ``every``: steps between two; ``overwrite``: replace whatever is there.

        Raises:
            ValueError: a name that is no picture's.
            FileExistsError: something else than a preview is there.
        """
        self._path, self._every = path, every
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise ValueError(f"preview={str(path)!r}: expected a name ending in .png, .jpg, .jpeg, .webp")
        if path.exists() and not overwrite and not self._is_mine():
            raise FileExistsError(f"{path} exists and is no preview; give another --preview, or --overwrite")

    def _is_mine(self) -> bool:
        try:
            return _MARK in read_metadata(self._path)
        except (ValueError, OSError):
            return False

    def __call__(self, progress: Progress) -> None:
        """Shows a step, if it is its turn: the first picture of its batch."""
        if progress.index % self._every == 0 or progress.index == progress.total:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            Image(progress.preview()[0].array, {_MARK: progress.index}).save(self._path)
