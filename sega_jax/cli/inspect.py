"""``sega-jax inspect``: what a file or folder holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from converters.files import expanded
from sega_jax.cli.options import option


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Say what a checkpoint, latents file or image holds, from names and headers alone."""

    path: Annotated[tyro.conf.Positional[Path], option("PATH")]
    """Folder, .safetensors or .gguf file, or image."""
    json: Annotated[bool, option("", "off")] = False
    """Report as JSON on standard output."""

    def run(self) -> dict:
        """The report of `converters.inspect.inspect` as a dictionary, and ``ok``: nothing in it is damaged.

        Raises:
            CheckpointError: nothing is there, or neither a checkpoint nor an image.
        """
        from converters.inspect import inspect

        report = inspect(expanded(self.path))
        return {**report.to_dict(), "ok": not any(part.problem for part in report.parts)}

    def show(self, result: dict) -> str:
        """The report for people."""
        from converters.inspect import inspect

        del result
        return str(inspect(expanded(self.path)))
