"""Entries of `converters`: whatever inspects, opens, converts or merges a file."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random

import gguf
import numpy as np
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

from converters.components import open_checkpoint
from converters.convert import convert
from converters.errors import CheckpointError
from converters.inspect import inspect
from converters.lora import DIALECTS, convert_lora, read_lora
from converters.verify import fingerprint
from tests.converters.conftest import CONFIGS, component, pipeline, state
from tests.fuzz.harness import Entry
from tests.fuzz.mutators import Mutator, mutate_bytes, mutate_folder, mutate_json_file

WIDTH = 48
RECORD = {"prompt": "a cat", "seed": 1, "positional": "ntk(strength=2.0)", "layout": "dense", "steps": 4}


# -- sound inputs, made once for a process ---------------------------------------------------------------------------


@cache
def _home() -> Path:
    home = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    return home


@cache
def _components() -> dict[str, Path]:
    home = _home()
    folders = {name: component(home / f"component-{name}", name) for name in CONFIGS}
    return folders | {"pipeline": pipeline(home / "pipeline")}


@cache
def _singles() -> dict[str, Path]:
    home, found = _home(), {}
    bundle = {f"model.diffusion_model.{key}": value for key, value in state("transformer", "bfl").items()}
    bundle |= {f"vae.{key}": value for key, value in state("vae", "diffusers").items()}
    for name, tensors in (("transformer", state("transformer", "bfl")), ("vae", state("vae", "diffusers")),
                          ("t5", state("text_encoder_2")), ("bundle", bundle)):  # fmt: skip
        found[name] = home / f"{name}.safetensors"
        save_file(tensors, found[name], metadata={"format": "pt"})
    convert(found["transformer"], home / "fp8.safetensors", to="bfl", dtype="fp8", progress=False)
    convert(found["transformer"], home / "int8.safetensors", to="bfl", dtype="int8", progress=False)
    return found | {"fp8": home / "fp8.safetensors", "int8": home / "int8.safetensors"}


@cache
def _orbax() -> dict[str, Path]:
    made = {}
    for name in ("vae", "text_encoder"):
        made[name] = _home() / f"orbax-{name}"
        convert(_components()[name], made[name], to="orbax", progress=False)
    return made


@cache
def _gguf() -> Path:
    path = _home() / "flux.gguf"
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_name("FLUX.1")
    writer.add_array("comfy.gguf.orig_shape.img_in.weight", [WIDTH, 16])
    for name, value in state("transformer", "bfl", np.float32).items():
        if value.ndim == 2 and value.shape[1] % 32 == 0:
            raw = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, value.astype(np.float16) if "bias" in name else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@cache
def _loras() -> dict[str, Path]:
    home, rng = _home(), np.random.default_rng(0)

    def pair(stem, rows, down="lora_A.weight", up="lora_B.weight"):
        return {f"{stem}.{down}": rng.standard_normal((2, WIDTH)).astype(np.float32),
                f"{stem}.{up}": rng.standard_normal((rows, 2)).astype(np.float32)}  # fmt: skip

    kohya = ("lora_down.weight", "lora_up.weight")
    fused = "double_blocks.0.img_attn.qkv"
    tensors = {
        "diffusers": pair("transformer.transformer_blocks.0.attn.to_q", WIDTH)
        | pair("transformer.single_transformer_blocks.1.proj_mlp", 4 * WIDTH)
        | pair("text_encoder.text_model.encoder.layers.0.mlp.fc1", 32),
        "kohya": pair("lora_unet_single_blocks_1_linear1", 7 * WIDTH, *kohya)
        | {"lora_unet_single_blocks_1_linear1.alpha": np.array(1.0, np.float32)},
        "comfy": pair(f"diffusion_model.{fused}", 3 * WIDTH, *kohya)
        | {f"diffusion_model.{fused}.diff_b": np.ones(3 * WIDTH, np.float32),
           "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff": np.ones(16, np.float32)},
        "control": pair(fused, 3 * WIDTH) | {f"{fused}.lora_B.bias": np.ones(3 * WIDTH, np.float32),
                                             "double_blocks.0.img_attn.norm.query_norm.scale": np.ones(16, np.float32)},
        "xlabs": pair("double_blocks.0.processor.qkv_lora1", 3 * WIDTH, "down.weight", "up.weight"),
    }  # fmt: skip
    settings = {"lora_alpha": 4, "r": 2, "alpha_pattern": {"to_q": 2}, "init_lora_weights": True, "use_rslora": True}
    headers = {
        "diffusers": {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in settings.items()})},
        "kohya": {"ss_network_alpha": "1", "ss_network_dim": "2", "ss_network_args": '{"algo": "locon"}'},
    }
    for name, found in tensors.items():
        (home / f"lora-{name}").mkdir()
        save_file(found, home / f"lora-{name}" / "x.safetensors", metadata=headers.get(name, {"format": "pt"}))
    (home / "lora-peft").mkdir()
    plain = pair("base_model.model.transformer_blocks.0.attn.to_q", WIDTH)
    save_file(plain, home / "lora-peft" / "adapter_model.safetensors")
    (home / "lora-peft" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    convert_lora(home / "lora-kohya" / "x.safetensors", home / "lora-orbax", to="orbax")
    return {name: home / f"lora-{name}" for name in (*tensors, "peft", "orbax")}


@cache
def _pictures() -> Path:
    folder = _home() / "pictures"
    folder.mkdir()
    info, exif = PngImagePlugin.PngInfo(), Image.Exif()
    info.add_itxt("sega_jax", json.dumps(RECORD))
    exif[0x8769] = {0x9286: b"ASCII\0\0\0" + json.dumps({"sega_jax": RECORD}).encode()}
    Image.new("RGB", (9, 7)).save(folder / "a.png", pnginfo=info)
    for suffix in ("jpg", "webp"):
        Image.new("RGB", (9, 7)).save(folder / f"a.{suffix}", exif=exif)
    latents = {"latents": np.zeros((1, 16, 4, 6), np.float32)}
    save_file(latents, folder / "latents.safetensors", metadata={"sega_jax": json.dumps(RECORD)})
    return folder


# -- inputs ----------------------------------------------------------------------------------------------------------

WAYS: dict[str, Mutator] = {".zarray": mutate_json_file, "_METADATA": mutate_json_file}


def _damaged(rng: Random, folder: Path, source: Path) -> Path:
    """A copy of a file or folder with damage; now and then without, so that the way to a result is walked too."""
    target = folder / source.name
    if source.is_dir():
        shutil.copytree(source, target)
        if rng.random() > 0.02:
            mutate_folder(rng, target, WAYS)
        return target
    home = folder / "home"
    home.mkdir()
    shutil.copyfile(source, home / source.name)
    if rng.random() > 0.02:
        mutate_folder(rng, home, WAYS)
    return home / source.name


def _any_of(*seeds: Callable[[], dict[str, Path] | Path]) -> Callable[[Random, Path], Path]:
    def make(rng: Random, folder: Path) -> Path:
        found = rng.choice(seeds)()
        sources = list(found.values()) if isinstance(found, dict) else [found]
        return _damaged(rng, folder, rng.choice(sources))

    return make


def _configurations(rng: Random, folder: Path) -> Path:
    """A checkpoint whose JSON alone is damaged."""
    source = rng.choice([*_components().values(), *_orbax().values()])
    target = folder / source.name
    shutil.copytree(source, target)
    files = sorted(path for path in target.rglob("*") if path.suffix == ".json" or path.name in WAYS)
    for path in rng.sample(files, min(len(files), rng.choice((1, 1, 2)))):
        path.write_bytes(mutate_json_file(rng, path.read_bytes()))
    return target


def _of_pictures(rng: Random, folder: Path) -> Path:
    source = rng.choice(sorted(_pictures().iterdir()))
    target = folder / source.name
    target.write_bytes(mutate_bytes(rng, source.read_bytes()))
    return target


def _of_anything(rng: Random, folder: Path) -> Path:
    seeds = (_components, _singles, _orbax, _loras, _gguf)
    return (_of_pictures if rng.random() < 0.3 else _any_of(*seeds))(rng, folder)


# -- what is done with them ------------------------------------------------------------------------------------------


def _inspect(path: Path) -> None:
    report = inspect(path)
    str(report)
    json.dumps(report.to_dict())


def _open(path: Path) -> None:
    with open_checkpoint(path) as opened:
        for part in opened.parts.values():
            for tensor in part.tensors:
                np.array(part.source.view(tensor.source))


def _convert(path: Path) -> None:
    rng = Random(f"{path.name} {path.stat().st_size if path.exists() else 0}")  # follows from the input alone
    target = rng.choice(("orbax", "diffusers", "bfl"))
    dtype = rng.choice((None, None, "bf16", "f16", "fp8") if target == "bfl" else (None, "bf16", "f16"))
    convert(path, path.parent / "out", to=target, dtype=dtype, verify="exact", workers=1, progress=False)
    fingerprint(path.parent / "out")


def _lora(path: Path) -> None:
    file = path / "x.safetensors"
    for lenient in (False, True):
        lora = read_lora(file if file.exists() else path, ignore_unknown=lenient)
        lora.deltas()
    dialect = DIALECTS[len(lora.deltas()) % len(DIALECTS)]
    convert_lora(file if file.exists() else path, path.parent / "out", to=dialect, ignore_unknown=True)
    read_lora(path.parent / "out", ignore_unknown=True)


def _setup(*seeds: Callable[[], object]) -> Callable[[], object]:
    """Makes the seeds before the first input, whose budget their making would exceed."""
    return lambda: [seed() for seed in seeds]


FILES = (CheckpointError,)
_ALL = (_components, _singles, _orbax, _loras, _gguf, _pictures)
INSPECT = Entry(_of_anything, _inspect, FILES, _setup(*_ALL))
OPEN = Entry(_any_of(_components, _singles), _open, FILES, _setup(_components, _singles))
CONVERT = Entry(_any_of(_components, _singles, _orbax), _convert, FILES, _setup(_components, _singles, _orbax))
LORA = Entry(_any_of(_loras), _lora, FILES, _setup(_loras))
GGUF = Entry(_any_of(_gguf), _open, FILES, _setup(_gguf))
ORBAX = Entry(_any_of(_orbax), _open, FILES, _setup(_orbax))
CONFIGURATION = Entry(_configurations, _open, FILES, _setup(_components, _orbax))
