"""``sega-jax convert``: a checkpoint in another layout or type, proven equal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from converters.files import expanded
from sega_jax.cli.options import option


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a checkpoint in another layout or type; appears whole or not at all.

    Reads diffusers pipelines and components, Black Forest Labs and ComfyUI single files, and Orbax folders.
    """

    source: Annotated[tyro.conf.Positional[Path], option("SOURCE")]
    """Folder or .safetensors file."""
    destination: Annotated[tyro.conf.Positional[Path], option("DESTINATION")]
    """Folder; a file for --to bfl of one component."""
    to: Annotated[Literal["orbax", "diffusers", "bfl"], option("LAYOUT")]
    """orbax, diffusers, or bfl (single files)."""
    dtype: Annotated[Literal["bf16", "f16", "f32", "fp8", "int8"] | None, option("TYPE", "each tensor's own")] = None
    """bf16, f16 or f32; for --to bfl also fp8 and int8: block matrices in eight bits with scales, for ComfyUI."""
    verify: Annotated[bool, option("", "off")] = False
    """Read the output back and compare every parameter with the source, bit for bit or within exact rounding."""
    verify_forward: Annotated[bool, option("", "off")] = False
    """Also compare every block's output with the modules of diffusers and transformers (needs the extra parity)."""
    lora: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, option("FILE[:WEIGHT]", "none")] = ()
    """Merge a LoRA of any dialect into the weights; may be given several times."""
    base: Annotated[Path | None, option("FOLDER", "none")] = None
    """Pipeline folder that gives tokenisers and scheduler to a single file."""
    max_shard_size: Annotated[str, option("SIZE", "10GB")] = "10GB"
    """Largest file of a diffusers component."""
    allow_nonfinite: Annotated[bool, option("", "off")] = False
    """With --verify: report NaN and infinity instead of refusing them."""
    ignore_unknown: Annotated[bool, option("", "off")] = False
    """Leave out what of a LoRA fits nothing: unknown keys, components and blocks the checkpoint lacks."""
    trust_pickle: Annotated[bool, option("", "off")] = False
    """Read .pt and .ckpt files, with torch's weights-only loader."""
    overwrite: Annotated[bool, option("", "off")] = False
    """Replace an existing destination."""
    json: Annotated[bool, option("", "off")] = False
    """Report as JSON on standard output."""

    def run(self) -> dict:
        """The report that is stored beside the output.

        Raises:
            CheckpointError: the source cannot be used, the destination cannot be written, or verification failed.
            ValueError: arguments.
        """
        from converters.convert import convert

        level = "forward" if self.verify_forward else "exact" if self.verify else None
        return convert(
            expanded(self.source),
            expanded(self.destination),
            to=self.to,
            dtype=self.dtype,
            verify=level,
            overwrite=self.overwrite,
            base=self.base and expanded(self.base),
            loras=self.lora,
            ignore_unknown=self.ignore_unknown,
            max_shard_size=self.max_shard_size,
            allow_nonfinite=self.allow_nonfinite,
            progress=not self.json,
            trust_pickle=self.trust_pickle,
        )

    def show(self, result: dict) -> str:
        """The report for people."""
        from converters.report import summary

        return summary(result)
