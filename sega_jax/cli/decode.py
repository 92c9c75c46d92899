"""``sega-jax decode``: latents to a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from converters.errors import CheckpointError
from converters.files import expanded
from sega_jax.cli.console import Phase
from sega_jax.cli.generation.records import check_record
from sega_jax.cli.options import ModelOptions, option
from sega_jax.cli.outputs import LATENTS_SUFFIX
from sega_jax.cli.targets import check_names, check_targets


@dataclass(frozen=True, kw_only=True)
class Decode(ModelOptions):
    """Decode latents: finishes an interrupted run, or shows latents that torch wrote.

    The file's record says which model to use, and becomes the picture's.  The latents are kept.
    """

    latents: Annotated[tyro.conf.Positional[Path], option("LATENTS.safetensors")]
    """File of latents [images, C, H, W]."""
    out: Annotated[str | None, option("FILE", "the name the run would have used, beside the latents")] = None
    """.png, .webp or .jpg; of several pictures, a number is appended."""
    vae: Annotated[Literal["auto", "plain", "exact", "tiled"] | None, option("MODE", "the run's, else auto")] = None
    """How to decode: auto, plain, exact (strips of rows, least device memory without loss) or tiled (approximate)."""
    overwrite: Annotated[bool, option("", "off")] = False
    """Replace files of these names."""
    json: Annotated[bool, option("", "off")] = False
    """Result as JSON on standard output."""

    def run(self) -> dict:
        """Decode and save.

        Returns:
            ``images``: path and record of each.

        Raises:
            ValueError: arguments.  CheckpointError, OSError: files.
        """
        from sega_jax.cli import outputs
        from sega_jax.decoding.decode import decode_with
        from sega_jax.families.registry import load_vae
        from sega_jax.media.images import Image, check_saveable
        from sega_jax.media.latents import load_latents
        from sega_jax.media.photos import cut_as_recorded
        from sega_jax.pipeline.pipeline import default_dtype
        from sega_jax.runtime.cache import use_compilation_cache

        if self.out is not None:
            outputs.check_pattern(self.out, (".png", ".jpg", ".jpeg", ".webp"), "out")
        latents, record = load_latents(expanded(self.latents))
        check_record(record, str(self.latents))
        name = record.get("output")
        record = {key: value for key, value in record.items() if key not in outputs.OF_LATENTS}
        model = self.model or record.get("model")
        if not model:
            raise ValueError(f"{self.latents} does not say which model it is of; give --model")
        paths = self._paths(name, len(latents), record)
        mode = self.vae or record.get("vae") or "auto"
        dtype = record.get("dtype") or default_dtype()
        use_compilation_cache()
        with Phase(f"loading the autoencoder of {model}"):
            vae, config = load_vae(self._folder(model, record), dtype)
        if latents.shape[-1] != config.latent_channels:
            raise ValueError(f"{self.latents}: {latents.shape[-1]} channels; {model} decodes {config.latent_channels}")
        record |= {"vae": mode} if record else {}
        for path in paths:
            height, width = (side * config.factor for side in latents.shape[1:3])
            check_saveable(path, width, height, record)
        outputs.make_folders(paths)
        for path, one in zip(paths, latents, strict=True):
            with Phase(f"decoding {path}"):
                pixels = decode_with(vae, config, one[None], dtype=dtype, mode=mode)
                Image(cut_as_recorded(pixels[0], record), record).save(path)
        return {"images": [{"path": str(path), "record": record} for path in paths]}

    def show(self, result: dict) -> str:
        """The result for people."""
        return "\n".join(image["path"] for image in result["images"])

    def _folder(self, model: str, record: dict) -> Path:
        """The model's folder; one that only the file names is not asked for on the hub."""
        from sega_jax.weights.hub import resolve

        if self.model:
            return resolve(model, components=["vae"], **self.hub())
        hub = {**self.hub(record.get("revision")), "local_files_only": True}
        try:
            return resolve(model, components=["vae"], **hub)
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.latents}: its record names the model {model}: {error}; to fetch it, give --model {model}"
            ) from error

    def _paths(self, name: object, count: int, record: dict) -> list[Path]:
        from sega_jax.cli import outputs

        stem = self.latents.name.removesuffix(LATENTS_SUFFIX).removesuffix(".safetensors")
        if self.out is None:
            # Only a plain name is taken from a file, and only an image's.
            plain = isinstance(name, str) and Path(name).name == name
            pattern = (
                name if plain and Path(name).suffix.lower() in (".png", ".webp", ".jpg", ".jpeg") else f"{stem}.png"
            )
            first = expanded(self.latents).with_name(pattern)
        else:
            values = {"seed": record.get("seed", 0), "index": record.get("image_index", 0), "row": 0,
                      "width": record.get("width", 0), "height": record.get("height", 0),
                      "prompt_slug": outputs.slug(str(record.get("prompt", "")))}  # fmt: skip
            first = outputs.expand(self.out, None, values)
        paths = (
            [first] if count == 1 else [first.with_name(f"{first.stem}-{i:03d}{first.suffix}") for i in range(count)]
        )
        check_names(paths)
        outputs.check_folders(paths)
        for path in paths:
            # A name that the file gives is not one that a person chose to overwrite.
            chosen = self.out is not None or path.stem == stem
            if path.exists() and not (self.overwrite and chosen):
                raise FileExistsError(
                    f"{path} exists; {'give another --out, or --overwrite' if chosen else 'give --out'}"
                )
        check_targets(paths)
        return paths
