"""``sega-jax methods``: the positional methods, their sources and what to know about them."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from typing import Annotated

import tyro

from sega_jax.cli.options import option


@dataclass(frozen=True, kw_only=True)
class Methods:
    """List the positional methods: sources, licence and patent notes, what to cite."""

    name: Annotated[tyro.conf.Positional[str | None], option("NAME", "all")] = None
    """One preset, in full."""
    bibtex: Annotated[bool, option("", "off")] = False
    """Print BibTeX entries instead."""
    json: Annotated[bool, option("", "off")] = False
    """Table as JSON on standard output."""

    def run(self) -> dict:
        """``methods``: one dictionary per preset.

        Raises:
            ValueError: for an unknown name.
        """
        from sega_jax.positional.methods import methods

        known = {row.preset: row for row in methods()}
        if self.name is not None and self.name not in known:
            raise ValueError(f"unknown method {self.name!r}; known: {', '.join(known)}")
        chosen = known.values() if self.name is None else [known[self.name]]
        return {"methods": [{**asdict(row), "bibtex": row.bibtex} for row in chosen]}

    def show(self, result: dict) -> str:
        """The table for people."""
        from sega_jax.positional.methods import BIBTEX, format_methods

        if self.bibtex:
            return "\n\n".join(BIBTEX[key] for key in dict.fromkeys(k for m in result["methods"] for k in m["cite"]))
        width = min(shutil.get_terminal_size((100, 24)).columns, 120)
        text = format_methods(width, details=True)
        if self.name is None:
            return text
        sections = text.split("\n\n")
        return next(section for section in sections if section.split(maxsplit=1)[0] == self.name)
