"""``sega-jax generate``: pictures from prompts."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from converters.errors import CheckpointError
from converters.files import expanded
from sega_jax.cli.console import Phase, quieted, say
from sega_jax.cli.generation.records import import_typed, refuse_code
from sega_jax.cli.options import ModelOptions, option, shell

GROUPS = {
    "picture": (
        "prompt", "prompts", "from_image", "negative_prompt", "size", "width", "height", "steps", "guidance",
        "true_guidance", "seed", "num_images",
    ),
    "method": ("positional", "layout", "regions", "ladder", "mu", "trust_code"),
    "start": ("init_image", "fit", "mask", "strength", "init_latents", "embeddings"),
    "model": (
        "model", "revision", "cache_dir", "local_files_only", "transformer", "lora", "dtype", "weights",
    ),
    "devices": ("batch_size", "mesh", "context", "residency", "vae"),
    "files": ("out", "save_latents", "checkpoint_every", "resume", "overwrite"),
    "output": ("dry_run", "json", "preview", "preview_every", "quiet"),
}  # fmt: skip
DEFAULT_EVERY = 10  # steps between saves with --resume alone


@dataclass(frozen=True, kw_only=True)
class Generate(ModelOptions):
    """Make pictures from a prompt, from a file of prompts, or again from a picture.

    Every picture's file holds the record of how it was made.  A run that is started again skips what is there.
    """

    prompt: Annotated[tyro.conf.Positional[str | None], option("[PROMPT]")] = None
    """What the picture shows."""
    prompts: Annotated[Path | None, option("FILE|-")] = None
    """A prompt per line, or one JSON object per line (FILE.jsonl); - is standard input.  Keys of the objects: prompt,
    negative_prompt, size, width, height, positional, layout, regions, steps, guidance, true_guidance, seed,
    num_images, mu, init_image, fit, mask, strength, ladder, init_latents, embeddings, vae, out, save_latents; each
    replaces the option of that name for its row."""
    from_image: Annotated[Path | None, option("IMAGE")] = None
    """Repeat this picture from its record; options that are given replace the record's."""
    negative_prompt: Annotated[str | None, option("TEXT", "none")] = None
    """What to steer away from; two model rows per picture (true classifier-free guidance)."""
    size: Annotated[str | None, option("PX|WIDTHxHEIGHT", "the trained size")] = None
    """Pixels: a side, or width x height in this order (2048x1024 is a wide picture)."""
    width: Annotated[int | None, option("PX")] = None
    """Instead of --size, one side; the other follows from the photo's shape, or is the trained one."""
    height: Annotated[int | None, option("PX")] = None
    """See --width."""
    positional: Annotated[
        str | None, option("METHOD", "auto: plain up to the trained size; YaRN above, PI with SEGA magnitudes for nano")
    ] = None
    """Preset (see `sega-jax methods`), expression such as "ntk(strength=2.0)+sega_magnitude()", or module:name."""
    layout: Annotated[str | None, option("LAYOUT", "dense")] = None
    """Where tokens sit and whom they see: dense; crpa (high resolution in --regions only), scalediff (windows; climbs
    to large sizes by a ladder) or scale-dit (a small picture first, then the large one in windows), with options as in
    "crpa(levels=3, fine=0.2)", "scalediff(jitter=True)" or "scale-dit(mask='paper')"; see docs/crpa.md,
    docs/scalediff.md and docs/scale-dit.md."""
    regions: Annotated[str | None, option("REGIONS", "auto:0.3 with --layout crpa")] = None
    """What crpa refines: center:SHARE, box:LEFT,TOP,WIDTH,HEIGHT (pixels or fractions), mask:FILE, auto:SHARE (by
    saliency of the coarse result); joined by +.  A picture OUT.regions.png shows them."""
    ladder: Annotated[str | None, option("SIZES", "with scalediff: up from the trained size")] = None
    """Sizes to climb, each starting from the one before: "1024,2048,4096", with options per size as in
    "1024, 2048 layout=dense positional=sega, 4096 tau=0.5 gamma=none".  With --init-image the picture takes the place
    of the first size."""
    steps: Annotated[int | None, option("N", "by model, see --dry-run")] = None
    """Model evaluations."""
    guidance: Annotated[float | None, option("SCALE", "by model")] = None
    """Distilled guidance, for models that take it (FLUX.1-dev)."""
    true_guidance: Annotated[float | None, option("SCALE", "by model")] = None
    """Scale of classifier-free guidance; with --negative-prompt."""
    seed: Annotated[int | Literal["random"] | None, option("N|random", "0")] = None
    """Seed of the noise, up to 64 bits; image i of a prompt uses the seed's key folded with i.  random (or -1) draws
    one, which the picture's record states."""
    num_images: Annotated[int | None, option("N", "1")] = None
    """Pictures per prompt."""
    batch_size: Annotated[int | None, option("N", "1")] = None
    """Pictures per model call: speed and memory; changes pictures by rounding at most."""
    mu: Annotated[str | None, option("native|clamp|NUMBER", "clamp")] = None
    """Shift of the noise schedule."""
    dtype: Annotated[Literal["float32", "bfloat16"] | None, option("DTYPE", "float32 on CPU, else bfloat16")] = None
    """Of parameters and activations: float32 or bfloat16."""
    weights: Annotated[Literal["full", "int8"] | None, option("TYPE", "full: as --dtype")] = None
    """Of the transformer: int8 keeps the matrices of its blocks in eight bits with a scale per output channel, half of
    bfloat16's memory, for slightly other pictures; needs the extra quant (pip install 'sega-jax[quant]')."""
    mesh: Annotated[str | None, option("auto|data=N,context=N,tensor=N", "all accelerators that are here")] = None
    """Devices to share the work: all of them, or so many along pictures, image tokens, and heads.  Changes pictures by
    rounding at most."""
    context: Annotated[Literal["auto", "ulysses", "ring", "product"], option("SCHEME", "auto")] = "auto"
    """How attention meets the context axis of --mesh."""
    residency: Annotated[Literal["all", "offload"], option("WHERE", "all")] = "all"
    """all keeps the weights on the device; offload keeps them in host memory and fetches text encoders, transformer and
    autoencoder when their turn comes, so that the device holds one at a time."""
    transformer: Annotated[Path | None, option("PATH", "the model's own")] = None
    """Other transformer weights: a component folder of diffusers or Orbax, or a single file of Black Forest Labs or
    ComfyUI."""
    lora: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, option("FILE[:WEIGHT]", "none")] = ()
    """Merge a LoRA of any dialect into the weights; may be given several times.  Applies to every row.  With layout
    scale-dit it is the LoRA of the small picture's stream, kept apart."""
    embeddings: Annotated[Path | None, option("FILE.safetensors")] = None
    """Precomputed text [rows, tokens, width] and pooled [rows, width], one row per prompt, instead of the text
    encoders' (and negative_text, negative_pooled)."""
    init_image: Annotated[Path | None, option("IMAGE")] = None
    """Start from this picture instead of noise; the size is its own unless --size says otherwise."""
    fit: Annotated[Literal["crop", "pad", "stretch"] | None, option("HOW", "none: shapes must agree")] = None
    """Brings --init-image to a --size of another shape: crop (what stands over), pad (black bars) or stretch.  crop
    also takes sizes that are no whole tokens, such as 1920x1080: the next larger one is made and the picture cut."""
    mask: Annotated[Path | None, option("IMAGE")] = None
    """Inpainting: white where --init-image may change; all else stays as it is, pixel by pixel."""
    strength: Annotated[float | None, option("SHARE", "0.6 with --init-image")] = None
    """Share of the steps to run from --init-image, above 0 and at most 1."""
    init_latents: Annotated[Path | None, option("FILE.safetensors")] = None
    """Initial noise instead of the seed's: a tensor `latents` [images, C, H, W] as torch writes it."""
    save_latents: Annotated[str | None, option("FILE.safetensors", "removed once decoded")] = None
    """Keep the final latents here; a pattern as --out.  Readable by torch."""
    vae: Annotated[
        Literal["auto", "plain", "exact", "tiled"] | None, option("MODE", "auto: plain while it fits, else exact")
    ] = None
    """How to decode: auto, plain, exact (strips of rows, least device memory without loss) or tiled (approximate)."""
    out: Annotated[str | None, option("FILE", "out.png; STEM-repeat.png with --from-image")] = None
    """.png, .webp or .jpg.  Fields {seed} {index} {row} {width} {height} {prompt_slug} are filled in; for several
    pictures and no field, a number is appended."""
    checkpoint_every: Annotated[int | None, option("N")] = None
    """Save the state of a run beside its picture every N steps, and on SIGTERM, which then ends the run cleanly after
    the step it is at (exit code 143)."""
    resume: Annotated[bool, option("", "off")] = False
    """Go on from a saved state, bit for bit; starts anew where there is none."""
    overwrite: Annotated[bool, option("", "off")] = False
    """Replace other files of these names."""
    trust_code: Annotated[bool, option("", "off")] = False
    """Import module:name where --prompts or the record of --from-image names it; what is typed is always imported."""
    dry_run: Annotated[bool, option("", "off")] = False
    """Print the plan; loads no weights."""
    json: Annotated[bool, option("", "off")] = False
    """Result as JSON on standard output."""
    preview: Annotated[Path | None, option("FILE")] = None
    """Show what is coming: a small picture of the clean estimate, written anew every --preview-every steps."""
    preview_every: Annotated[int | None, option("N", "1 with --preview")] = None
    """Steps between previews."""
    quiet: Annotated[bool, option("", "off")] = False
    """Neither progress nor messages; warnings and errors remain."""

    # -- API -----------------------------------------------------------------------------------------------------

    def run(self) -> dict:
        """Make the pictures.

        Returns:
            ``images`` (path, what was done, record), ``timings`` in seconds and ``classes``, the number of compile
            classes; for a dry run ``plans`` and ``classes``.

        Raises:
            ValueError, TypeError: arguments.  CheckpointError, OSError: files.
        """
        from sega_jax.cli.generation import jobs as J
        from sega_jax.cli.generation import preflight

        J.forget()
        preflight.forget()
        with quieted(self.quiet):
            record = self._source_record()
            requests = self._requests(record)
            size = self.batch_size or (record or {}).get("batch_size") or 1
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"batch_size={size}: expected a positive whole number")
            fill = record is not None and self.batch_size is None and self.num_images is None
            return self._serve(requests, record or {}, size, fill)

    def show(self, result: dict) -> str:
        """The result for people."""
        if self.dry_run:
            from sega_jax.cli.generation.show import show_plan

            return show_plan(result)
        return "\n".join(image["path"] for image in result["images"])

    # -- parts ---------------------------------------------------------------------------------------------------

    def _source_record(self) -> dict | None:
        if self.from_image is None:
            return None
        if self.prompts is not None:
            raise ValueError("--from-image and --prompts are both given; choose one")
        from sega_jax.media.images import read_metadata

        return read_metadata(self.from_image)

    def _requests(self, record: dict | None) -> list:
        from sega_jax.cli.generation import requests as R

        given: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in R.ROW_SCHEMA and value is not None:
                given[field.name] = str(value) if isinstance(value, Path) else value
        if self.transformer is not None and not expanded(self.transformer).exists():
            raise ValueError(f"transformer={str(self.transformer)!r}: no such folder or file")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: expected a positive whole number")
        for name in ("checkpoint_every", "preview_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive whole number")
        self._preview()
        if self.prompts is not None:
            if self.prompt is not None:
                raise ValueError("a prompt and --prompts are both given; choose one")
            rows = R.read_rows(expanded(self.prompts))
            import_typed(given)
            for line, row in rows:
                self._named_by_a_file(row, f"{self.prompts} line {line}")
            # Options that cannot be checked apart from the rows they are meant for are checked with each.
            return [
                R.build(R.merged(given, row), where=f"{self.prompts} line {line}", row=number, own=frozenset(row))
                for number, (line, row) in enumerate(rows)
            ]
        if record is not None:
            base = R.from_record(record, str(self.from_image), given)
            import_typed(given)
            # What is typed replaces what the file says, so that it need not be looked at.
            self._named_by_a_file({k: v for k, v in base.items() if k not in given}, str(self.from_image))
            if "ladder" in base:
                base = _without_ladder(base, given, str(self.from_image))
            index = record["image_index"]
            if not isinstance(index, int) or isinstance(index, bool) or index < 0:
                raise ValueError(f"{self.from_image}: image_index={index!r} in its record")
            if "init_latents" in given:  # one replaces the other
                base = {k: v for k, v in base.items() if k not in ("init_image", "strength")}
            if "init_image" in given:
                base.pop("init_latents", None)
            base.setdefault("out", f"{self.from_image.stem}-repeat{self.from_image.suffix}")
            indices = None if self.num_images is not None else (index,)
            return [R.build(R.merged(base, given), indices=indices)]
        import_typed(given)
        return [R.build(given)]

    def _named_by_a_file(self, values: dict[str, Any], where: str) -> None:
        """Imports what a file names as code, if that is allowed, and refuses it otherwise."""
        if self.trust_code:
            import_typed(values)
        else:
            refuse_code(values, where)

    def _resolve(self, model: str, hub: dict, own: bool, **options: Any) -> Path:
        """The model's folder; one that only a record names is not asked for on the hub."""
        from sega_jax.weights.hub import resolve

        try:
            return resolve(model, **options, **hub)
        except CheckpointError as error:
            if own:
                raise CheckpointError(
                    f"{self.from_image}: its record names the model {model}: {error}; to fetch it, give --model {model}"
                ) from error
            raise

    def _serve(self, requests: list, record: dict, size: int, fill: bool) -> dict:
        from sega_jax.cli import outputs
        from sega_jax.cli.generation import jobs as J
        from sega_jax.cli.generation import preflight, show
        from sega_jax.cli.generation.engine import checkpoint_of
        from sega_jax.families.registry import family_of
        from sega_jax.models.adapters import guidance_settings
        from sega_jax.models.quantized import check_weights
        from sega_jax.pipeline.pipeline import default_dtype, versions
        from sega_jax.pipeline.records import model_fields
        from sega_jax.weights.hub import commit_of
        from sega_jax.weights.loras import lora_specs

        model = self.model or record.get("model") or "nano"
        own = self.model is None and "model" in record  # the record's model, with its revision and transformer
        hub = self.hub(record.get("revision") if own else None)
        hub["local_files_only"] |= own
        transformer = self.transformer or (record.get("transformer") if own else None)
        other = None if transformer is None else expanded(transformer)
        if other is not None and not other.exists():
            raise ValueError(f"transformer={str(transformer)!r}: no such folder or file")
        weights = self.weights or record.get("weights") or "full"
        check_weights(weights)
        loras = lora_specs(self.lora or (record.get("loras") or () if own else ()))
        with Phase(f"looking up {model}"):
            folder = self._resolve(model, hub, own, weights=False)
        outline = family_of(folder).outline(folder, other)
        commit = commit_of(model, folder)
        run = model_fields(
            model=model,
            revision=commit,
            transformer=None if transformer is None else str(transformer),
            dtype=self.dtype or record.get("dtype") or default_dtype(),
            backend=record.get("backend") or "auto",
            weights=weights,
            loras=loras,
        )
        guiding = _guidance_lora([request.layout for request in requests], loras)
        settings = None if guiding is None else guidance_settings(expanded(guiding.file))
        preflight.check_count(requests)
        every = self.checkpoint_every or (DEFAULT_EVERY if self.resume else None)
        jobs = J.make_jobs(requests, outline, run, settings)
        preflight.check_jobs(jobs)
        jobs = preflight.settle([J.look(job, self.overwrite) for job in jobs], look_only=self.dry_run)
        unfinished = [job for job in jobs if job.state is not J.State.DONE]
        preflight.check_places(unfinished, states=every is not None, look_only=self.dry_run)
        if record:
            self._warn_of_differences(record, versions(), size, fill)
        new = [job for job in jobs if job.state is J.State.NEW]
        batches = [J.Batch((job,), 1, ()) for job in jobs if job.state is J.State.LATENTS]
        batches += J.batches(new, size, fill=fill)
        if every is not None:
            for batch in batches:
                if batch.key:
                    checkpoint_of(batch, every, self.resume).look()
        classes = len({batch.key for batch in batches if batch.key})
        if self.dry_run:
            return {"plans": [show.plan_entry(job, outline) for job in jobs], "classes": classes, **run}
        show.report(jobs)
        outputs.make_folders([path for job in jobs for path in (job.out, job.latents)])
        timings: dict[str, float] = {}
        if batches:
            from sega_jax.cli.generation.engine import Engine
            from sega_jax.pipeline.pipeline import Pipeline
            from sega_jax.sampling.resume import Stopped
            from sega_jax.sharding.mesh import describe, resolve_mesh

            chosen = self._place(new, outline, folder, other, run, size) if new else None
            mesh = resolve_mesh(self.mesh or chosen, batch=size)
            if mesh is not None:
                say(f"mesh {describe(mesh)}" + ("; --mesh names another" if self.mesh is None else ""))
            if mesh is None and self.context != "auto":
                raise ValueError(f"context={self.context!r}: one device does the work; give a --mesh of several")
            compiling = self._compile_ahead(batches, model, other, run, mesh, hub)
            with Phase(f"loading {model}"):
                pipe = Pipeline.from_pretrained(
                    model,
                    dtype=run["dtype"],
                    transformer=other,
                    backend=run["backend"],
                    **({"weights": weights} if weights != "full" else {}),
                    **({"residency": self.residency} if self.residency != "all" else {}),
                    **({"mesh": mesh, "context": self.context} if mesh is not None else {}),
                    **({"loras": loras} if loras and guiding is None else {}),
                    **{**hub, "revision": commit or hub["revision"]},
                )
                if guiding is not None:
                    pipe = pipe.with_guidance_lora(guiding)
            if compiling is not None and not compiling.done():
                with Phase("compiling, cached for the next time"):
                    compiling.result()
            engine = Engine(pipe, len(new), every, self.resume, self._preview())
            try:
                for batch in batches:
                    engine.run(batch)
            except Stopped as stopped:
                say(f"stopped after step {stopped.step}; go on with the same command and --resume")
                raise SystemExit(143) from None
            except BaseException:
                for path in engine.undecoded:
                    if path.exists():
                        say(f"latents kept; finish this picture with: sega-jax decode {shell(path)}")
                raise
            timings = {name: round(seconds, 3) for name, seconds in engine.timings.items()}
        return {"images": [show.image_entry(job) for job in jobs], "timings": timings, "classes": classes}

    def _preview(self) -> Any:
        """What is told of every step, for --preview.

        Raises:
            ValueError: --preview-every alone, or of no steps.
            FileExistsError: something else than a preview is there.
        """
        from sega_jax.cli.generation.previews import Previews

        if self.preview is None:
            if self.preview_every is not None:
                raise ValueError(f"preview_every={self.preview_every}: only with --preview")
            return None
        return Previews(expanded(self.preview), self.preview_every or 1, self.overwrite)

    def _place(
        self, jobs: list, outline: Any, folder: Path, transformer: Path | None, run: dict, size: int
    ) -> str | None:
        """The mesh for the accelerators that are here, where none is asked for.

        Raises:
            ValueError: the largest picture needs more memory than there is; says what would fit.
        """
        from sega_jax.costs.report import place_here
        from sega_jax.families.registry import skeleton

        if self.mesh is not None:
            return None
        plan = max((job.plan for job in jobs), key=lambda plan: plan.height * plan.width)
        guided = any(job.plan.negative_prompt is not None for job in jobs)
        mesh, refusal = place_here(
            outline,
            lambda: skeleton(folder, run["dtype"], transformer=transformer, weights=run.get("weights", "full")),
            plan.height,
            plan.width,
            batch=size,
            rows=2 * size if guided else size,
            joint=plan.layout == "dense",
            residency=self.residency,
        )
        if refusal is not None:
            raise ValueError(refusal)
        return mesh

    def _compile_ahead(
        self, batches: list, model: str, transformer: Path | None, run: dict, mesh: Any, hub: dict
    ) -> Any:
        """Starts to compile the first step of the run while the weights are read."""
        from sega_jax.cli.generation import jobs as J
        from sega_jax.pipeline import warmup

        first = next((batch for batch in batches if batch.key), None)
        if first is None:
            return None
        job = first.jobs[0]

        def work() -> bool:
            pipe = warmup.outline(
                model,
                dtype=run["dtype"],
                transformer=transformer,
                weights=run.get("weights", "full"),
                hub={**hub, "revision": run["revision"] or hub["revision"]},
                backend=run["backend"],
                mesh=mesh,
                context=self.context,
            )
            method = J.method_of(job.plan.positional)
            return warmup.compile_step(pipe, job.plan, method, batch=first.size, text_tokens=J.text_tokens(job))

        return warmup.ahead(work)

    def _warn_of_differences(self, record: dict, now: dict[str, str], size: int, fill: bool) -> None:
        for name, value in now.items():
            if record.get(name) != value:
                say(
                    f"warning: {self.from_image} was made with {name} {record.get(name, 'unknown')}, this is {value}: "
                    "pixels may differ by rounding"
                )
        if not fill and record.get("batch_size") != size:
            say(
                f"warning: {self.from_image} was made in a batch of {record.get('batch_size')}, this is {size}: "
                "pixels may differ by rounding"
            )
        if fill and size > 1 and re.search(r"reduce=['\"]batch", str(record.get("positional"))):
            say(f"warning: {self.from_image} depends on the other pictures of its batch, which are not repeated")


def _without_ladder(base: dict[str, Any], given: dict[str, Any], where: str) -> dict[str, Any]:
    """A record's fields without what a given ladder or size replaces.

    Raises:
        ValueError: for options that the record's ladder settles size by size.
    """
    if "ladder" in given:
        return {name: value for name, value in base.items() if name != "size"}
    if {"size", "width", "height"} & given.keys():
        return {name: value for name, value in base.items() if name != "ladder"}
    settled = [name for name in ("steps", "positional", "layout", "mu") if name in given]
    if settled:
        raise ValueError(
            f"{settled[0]}={given[settled[0]]!r}: {where} was made by a ladder, whose sizes say theirs; "
            f"change it there: --ladder {shell(base['ladder'])}"
        )
    return base


def _guidance_lora(layouts: list[str], loras: tuple) -> Any:
    """The LoRA that layout scale-dit keeps for its small stream, instead of merging it; None for other layouts."""
    from sega_jax.sampling.registry import get_layout
    from sega_jax.sampling.scale_dit import Guided

    guided = {isinstance(get_layout(layout), Guided) for layout in layouts}
    if guided != {True} and not (loras and True in guided):
        return None
    if len(guided) == 2:
        raise ValueError("--lora with rows of layout scale-dit and of others: they use it differently; run them apart")
    if len(loras) > 1:
        raise ValueError(
            f"{len(loras)} LoRAs with layout scale-dit: it takes the one of its small stream; merge the others into "
            "the weights with `sega-jax convert`"
        )
    return loras[0] if loras else None
