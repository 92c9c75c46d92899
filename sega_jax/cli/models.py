"""``sega-jax models``: the model families and checkpoints that run, and what has been run of them."""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import asdict, dataclass
from typing import Annotated

from sega_jax.cli.options import option


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the families and checkpoints that run: licence, trained size, defaults, what has been run where."""

    json: Annotated[bool, option("", "off")] = False
    """Table as JSON on standard output."""

    def run(self) -> dict:
        """``models``: one dictionary per checkpoint."""
        from sega_jax.families.registry import FAMILIES

        return {
            "models": [
                {"family": family.name, **asdict(checkpoint)}
                for family in FAMILIES.values()
                for checkpoint in family.checkpoints
            ]
        }

    def show(self, result: dict) -> str:
        """The table for people."""
        width = min(shutil.get_terminal_size((100, 24)).columns, 120)
        parts = []
        for model in result["models"]:
            side = "x".join(str(pixels) for pixels in model["trained"])
            lines = [f"{model['model']}  (family {model['family']}, trained at {side})"]
            for label, text in (
                ("licence", model["licence"]),
                ("defaults", model["defaults"]),
                ("run so far", model["checked"]),
            ):
                head = f"    {label:<11} "
                lines += textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * len(head))
            parts.append("\n".join(lines))
        return "\n\n".join(parts)
