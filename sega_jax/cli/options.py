"""What the verbs share: how options show in the help, and the options that choose a model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro


def option(metavar: str, default: str = "") -> Any:
    """An option whose help shows ``metavar`` and, in words, what is used when it is not given."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})" if default else "")


def shell(text: str | os.PathLike[str]) -> str:
    """Text as one word of a shell."""
    import shlex

    return shlex.quote(os.fspath(text))


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which checkpoint."""

    model: Annotated[str | None, option("MODEL", "nano, the embedded demo")] = None
    """Diffusers folder, hub id owner/name, or nano.  A hub token comes from HF_TOKEN or `hf auth login`."""
    revision: Annotated[str | None, option("REV", "main")] = None
    """Branch, tag or commit on the hub."""
    cache_dir: Annotated[Path | None, option("DIR", "HF_HUB_CACHE")] = None
    """Folder of hub downloads."""
    local_files_only: Annotated[bool, option("", "off")] = False
    """Use what is downloaded already; as HF_HUB_OFFLINE=1."""

    def hub(self, revision: str | None = None) -> dict[str, Any]:
        """Arguments for `sega_jax.weights.hub.resolve`."""
        return {
            "revision": self.revision or revision,
            "cache_dir": self.cache_dir,
            "local_files_only": self.local_files_only,
        }
