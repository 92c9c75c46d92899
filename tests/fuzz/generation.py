"""Entries of generation: pictures and their records, rows of prompts, expressions, states, tokenisers, configurations.

Damage to a seed that is sound; everything goes through the door a user's file goes through, up to where weights would
be read.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from converters.errors import CheckpointError
from tests.fuzz.harness import Entry
from tests.fuzz.mutators import json_bytes, mutate_bytes, mutate_folder, mutate_json, mutate_safetensors, mutate_text

ARGUMENTS = (ValueError, TypeError)
FILES = (*ARGUMENTS, CheckpointError, OSError)
NAMES = (
    "os:abort", "sega", "none()", "ntk(strength=2.0)", "yarn()+temperature()", "dense", "crpa", "crpa(levels=3)",
    "scale-dit", "scalediff", "auto:0.3", "auto:0.3:os:abort", "center:0.5", "box:0,0,16,16", "mask:in.png", "nano",
    "native", "clamp", "64", "64x64", "64,128", "64 positional=os:abort, 128 tau=0.5", "{seed}.png", "in.png", "exact",
    "/dev/zero", "somebody/model", "in.latents.safetensors",
)  # fmt: skip
RECORD = {
    "prompt": "a red circle", "negative_prompt": None, "width": 64, "height": 64, "steps": 2, "guidance": None,
    "true_guidance": None, "seed": 0, "image_index": 0, "positional": "none()", "layout": "dense", "mu": "clamp",
    "strength": None, "dtype": "float32", "backend": "auto", "model": "nano", "revision": None, "transformer": None,
    "init_image": None, "init_latents": None, "embeddings": None, "vae": "auto", "batch_size": 1,
}  # fmt: skip
ROW = {"prompt": "a red circle", "size": "64", "steps": 2, "seed": 1, "out": "a.png", "positional": "ntk()"}


@functools.cache
def _pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)


def _imports() -> None:
    """What is slow to import, and a device, before inputs are timed."""
    from sega_jax.cli.decode import Decode
    from sega_jax.cli.generate import Generate

    os.environ["SEGA_JAX_CACHE"] = "off"
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = Path.cwd()
    Generate(prompt="a red circle", size="64", steps=1, dry_run=True, out="/tmp/fuzzed.png").run()
    del Decode
    os.chdir(folder)


def _dry_run(folder: Path, **options) -> None:
    from sega_jax.cli.generate import Generate

    os.chdir(folder)
    Generate(dry_run=True, **options).run()


# -- pictures and records ------------------------------------------------------------------------------------------


def _make_record(rng: Random, folder: Path) -> Path:
    from sega_jax.media.images import Image

    record = mutate_json(rng, RECORD, NAMES)
    path = folder / f"in{rng.choice(('.png', '.jpg', '.webp'))}"
    try:
        Image(_pixels(), record if isinstance(record, dict) else {"sega_jax": record}).save(path)
    except (ValueError, TypeError):  # what no picture can hold, such as NaN
        Image(_pixels(), RECORD).save(path)
    return path


def _run_record(path: Path) -> None:
    _dry_run(path.parent, from_image=Path(path.name))


RECORDS = Entry(_make_record, _run_record, FILES, _imports)


def _make_picture(rng: Random, folder: Path) -> Path:
    from sega_jax.media.images import Image

    path = folder / f"in{rng.choice(('.png', '.jpg', '.webp'))}"
    Image(_pixels(), RECORD).save(path)
    path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    return path


def _run_picture(path: Path) -> None:
    from sega_jax.media.images import load_image, load_mask, read_metadata

    failures = []
    for read in (read_metadata, load_mask, lambda p: load_image(p, (32, 32))):
        try:
            read(path)
        except ValueError as error:
            failures.append(error)
    if failures:
        raise failures[0]


PICTURES = Entry(_make_picture, _run_picture, ARGUMENTS, _imports)


# -- rows ----------------------------------------------------------------------------------------------------------


def _make_rows(rng: Random, folder: Path) -> Path:
    from sega_jax.cli.generation.requests import ROW_SCHEMA

    rows = [mutate_json(rng, ROW, (*NAMES, *ROW_SCHEMA)) for _ in range(rng.randint(1, 3))]
    (folder / "rows.jsonl").write_bytes(b"\n".join(json_bytes(rng, row) for row in rows))
    return folder / "rows.jsonl"


def _run_rows(path: Path) -> None:
    _dry_run(path.parent, prompts=Path(path.name))


PROMPTS = Entry(_make_rows, _run_rows, FILES, _imports)


# -- expressions ---------------------------------------------------------------------------------------------------

_TEXTS = {
    "positional": ("sega", "ntk(strength=dype(scale=2.0))+sega_magnitude(alpha=0.2)", "yarn()+temperature()"),
    "layout": ("crpa(levels=3, fine=0.2)", "scale-dit(mask='paper', flow=0.5)", "scalediff(jitter=True)", "dense"),
    "regions": ("center:0.3", "box:0,0,16,16+center:0.1", "auto:0.5|auto:0.2", "mask:in.png"),
    "ladder": ("64, 128 positional=sega layout=dense, 256 tau=0.5 gamma=none",),
    "size": ("64", "64x128"),
    "mu": ("clamp", "1.15"),
    "out": ("{seed}-{index:03d}-{prompt_slug}.png", "a.webp"),
    "mesh": ("data=1,context=4,tensor=2", "auto"),
    "lora": ("x.safetensors:0.5",),
}


def _make_text(rng: Random, folder: Path) -> tuple[str, str]:
    del folder
    kind = rng.choice(tuple(_TEXTS))
    words = (*NAMES, *(text for texts in _TEXTS.values() for text in texts), "dype(", "strength=", "tau=", "|", "+")
    return kind, mutate_text(rng, rng.choice(_TEXTS[kind]), words)


def _run_text(given: tuple[str, str]) -> None:
    from converters.lora.factors import parse_lora
    from sega_jax import positional as pe
    from sega_jax.cli import outputs
    from sega_jax.cli.generation.requests import parse_mu, parse_size
    from sega_jax.sampling import rungs
    from sega_jax.sampling.regions import parse_regions
    from sega_jax.sampling.registry import get_layout
    from sega_jax.sharding.mesh import resolve_mesh

    kind, text = given
    match kind:
        case "positional":
            method = pe.get(text, imports=False)
            assert pe.get(str(method), imports=False) == method
        case "layout":
            get_layout(text)
        case "regions":
            parse_regions(text, imports=False)
        case "ladder":
            assert rungs.parse(rungs.text_of(rungs.parse(text))) == rungs.parse(text)
        case "size":
            parse_size(text)
        case "mu":
            parse_mu(text)
        case "out":
            outputs.check_pattern(text, (".png", ".webp"), "out")
            values = dict.fromkeys(outputs.FIELDS[:5], 7) | {"prompt_slug": "a-red-circle"}
            assert len(str(outputs.expand(text, 3, values))) < len(text) + 10_000
        case "mesh":
            resolve_mesh(text)
        case "lora":
            parse_lora(text)


EXPRESSIONS = Entry(_make_text, _run_text, ARGUMENTS, _imports)


# -- states --------------------------------------------------------------------------------------------------------

_REQUEST = {"pictures": [RECORD]}


def _state() -> dict:
    return {"x": jnp.ones((1, 8, 8, 16)), "key": jax.random.key(1), "done": np.int64(2), "memory": {"image": None}}


@functools.cache
def _saved_state() -> Path:
    import tempfile

    from sega_jax.sampling.resume import Checkpoint

    folder = Path(tempfile.mkdtemp()) / "out.state"
    checkpoint = Checkpoint(folder, 1)
    checkpoint.start(_REQUEST, _state())
    checkpoint.after(2, 2, _REQUEST, _state())
    return folder


def _setup_states() -> None:
    _imports()
    _saved_state()


def _make_state(rng: Random, folder: Path) -> Path:
    from sega_jax.sampling import states

    made = Path(shutil.copytree(_saved_state(), folder / "out.state"))
    mutate_folder(rng, made)
    step = made / "step-000002"
    if rng.random() < 0.6 and (step / "state").is_dir():  # whoever makes a state also makes its digest
        try:
            run = json.loads((step / "run.json").read_text())
            run["sha256"] = states._digest(step / "state")
            (step / "run.json").write_text(json.dumps(run))
        except (OSError, ValueError, TypeError, AttributeError):
            pass
    return made


def _run_state(folder: Path) -> None:
    from sega_jax.sampling.resume import Checkpoint, remove_states, request_of

    request_of(folder)
    try:
        Checkpoint(folder, 1, resume=True).start(_REQUEST, _state())
    finally:
        remove_states(folder)


STATES = Entry(_make_state, _run_state, (CheckpointError,), _setup_states)


# -- folders of a model --------------------------------------------------------------------------------------------


def _nano() -> Path:
    from sega_jax.weights.hub import resolve

    return resolve("nano")


def _make_tokenizer(rng: Random, folder: Path) -> Path:
    name = rng.choice(("tokenizer", "tokenizer_2"))
    made = Path(shutil.copytree(_nano() / name, folder / name))
    mutate_folder(rng, made)
    return made


def _run_tokenizer(folder: Path) -> None:
    from sega_jax.models.tokenize import load_clip_tokenizer, load_t5_tokenizer

    load = load_clip_tokenizer if folder.name == "tokenizer" else load_t5_tokenizer
    tokenizer = load(folder, 32)
    tokenizer(["a red circle", "", "é" * 50])
    tokenizer.truncated("a red circle " * 20)
    tokenizer.unknown_words("a red zebra")


TOKENIZERS = Entry(_make_tokenizer, _run_tokenizer, (CheckpointError,), _imports)


def _make_model(rng: Random, folder: Path) -> Path:
    made = folder / "model"
    small = shutil.ignore_patterns("*.safetensors", "tokenizer.json", "vocab.json", "merges.txt", "*.md")
    shutil.copytree(_nano(), made, ignore=small)
    mutate_folder(rng, made)
    return made


def _run_model(folder: Path) -> None:
    _dry_run(folder.parent, prompt="a red circle", model="./model")


MODELS = Entry(_make_model, _run_model, FILES, _imports)


# -- arrays --------------------------------------------------------------------------------------------------------


def _make_latents(rng: Random, folder: Path) -> Path:
    record = mutate_json(rng, RECORD | {"output": "a.png"}, NAMES) if rng.random() < 0.5 else RECORD
    try:
        text = json.dumps(record)
        text.encode()
    except (ValueError, UnicodeEncodeError):
        text = json.dumps(RECORD)
    shape = rng.choice(((1, 16, 8, 8), (1, 16, 64)))
    data = save({"latents": np.ones(shape, np.float32)}, metadata={"sega_jax": text})
    path = folder / "in.latents.safetensors"
    path.write_bytes(mutate_safetensors(rng, data) if rng.random() < 0.7 else data)
    return path


def _decoding_without_arithmetic() -> None:
    """The autoencoder is read once, and what it would compute is left out: no file can change how it is computed."""
    from sega_jax.decoding import decode
    from sega_jax.families import registry

    _imports()
    registry.load_vae = functools.cache(registry.load_vae)
    decode.decode_with = lambda _vae, config, latents, **_options: np.zeros(
        (1, latents.shape[1] * config.factor, latents.shape[2] * config.factor, 3), np.float32
    )


def _run_latents(path: Path) -> None:
    from sega_jax.cli.decode import Decode

    os.chdir(path.parent)
    Decode(latents=Path(path.name)).run()


DECODE = Entry(_make_latents, _run_latents, FILES, _decoding_without_arithmetic)


def _make_embeddings(rng: Random, folder: Path) -> Path:
    config = json.loads((_nano() / "transformer" / "config.json").read_text())
    text = np.zeros((1, 4, config["joint_attention_dim"]), np.float32)
    pooled = np.zeros((1, config["pooled_projection_dim"]), np.float32)
    data = save({"text": text, "pooled": pooled, "latents": np.ones((1, 16, 8, 8), np.float32)})
    path = folder / "e.safetensors"
    path.write_bytes(mutate_safetensors(rng, data) if rng.random() < 0.9 else data)
    return path


def _run_embeddings(path: Path) -> None:
    _dry_run(path.parent, prompt="a", size="64", embeddings=Path(path.name), init_latents=Path(path.name))


EMBEDDINGS = Entry(_make_embeddings, _run_embeddings, FILES, _imports)
