"""Reports are made from headers; their numbers are checked against arrays built here."""

import json

import ml_dtypes
import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from safetensors.numpy import save_file

from converters.convert import convert
from converters.errors import CheckpointError
from converters.inspect import inspect
from converters.reading.formats import SafetensorsSource


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """A pipeline: a transformer in two dtypes, a scheduler, a damaged VAE, a missing encoder, a stray single file."""
    index = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for name in ("scheduler", "transformer", "vae"):
        (tmp_path / name).mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    (tmp_path / "transformer" / "config.json").write_text("{}")
    weights = {"a": np.zeros((3, 5), ml_dtypes.bfloat16), "b": np.zeros(5, np.float32)}
    save_file(weights, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    save_file({"img_in.weight": np.zeros(1000)}, tmp_path / "flux1-dev.safetensors")

    def refuse(*_args):
        pytest.fail("inspect read weights")

    monkeypatch.setattr(SafetensorsSource, "read", refuse)
    return tmp_path


def test_pipeline(pipeline):
    report = inspect(pipeline)
    parts = {part.name: part for part in report.parts}
    assert list(parts) == ["scheduler", "transformer", "vae", "text_encoder"]
    transformer = parts["transformer"]
    assert (transformer.tensors, transformer.parameters, transformer.nbytes) == (2, 20, 15 * 2 + 5 * 4)
    assert transformer.dtypes == {"BF16": 15, "F32": 5}
    assert transformer.files == ("diffusion_pytorch_model.safetensors",)
    assert parts["scheduler"].problem is None
    assert "not a complete safetensors file" in parts["vae"].problem
    assert "missing" in parts["text_encoder"].problem
    text = str(report)
    assert "BF16 75.0%, F32 25.0%" in text
    assert "problem in vae" in text
    assert "flux1-dev" not in text
    assert json.loads(json.dumps(report.to_dict()))["parts"][1]["parameters"] == 20


def test_total_adds_up(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"vae": ["d", "A"], "transformer": ["d", "B"]}))
    for name, count in (("vae", 1000), ("transformer", 234)):
        (tmp_path / name).mkdir()
        save_file({"w": np.zeros(count, np.float16)}, tmp_path / name / "diffusion_pytorch_model.safetensors")
    total = next(line for line in str(inspect(tmp_path)).splitlines() if line.startswith("  total"))
    assert total.split() == ["total", "-", "2", "1,234", "2,468", "F16", "2"]


def test_component_and_missing_weights(pipeline):
    report = inspect(pipeline / "transformer")
    assert report.kind == "component folder"
    assert report.parts[0].parameters == 20
    (pipeline / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    assert "no safetensors weights" in inspect(pipeline / "transformer").parts[0].problem


def test_latents_file(tmp_path):
    path = tmp_path / "latents.safetensors"
    save_file({"latents": np.zeros((1, 16, 4, 6), np.float32)}, path, metadata={"sega_jax": '{"seed": 1, "steps": 2}'})
    report = inspect(path)
    assert report.description == "latents [1, 16, 4, 6]"
    assert report.metadata == {"sega_jax": "JSON, 2 fields"}


def test_png(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("sega_jax", '{"seed": 1}')
    info.add_text("parameters", "a cat")
    Image.new("RGB", (7, 5)).save(tmp_path / "a.png", pnginfo=info)
    report = inspect(tmp_path / "a.png")
    assert report.description == "PNG image, 7x5, mode RGB"
    assert report.metadata == {"sega_jax": "JSON, 1 fields", "parameters": "text, 5 characters"}
    Image.new("RGB", (7, 5)).save(tmp_path / "b.jpg")
    assert "not made by sega-jax" in str(inspect(tmp_path / "b.jpg"))


def test_damaged_exif_is_no_record(tmp_path):
    Image.new("RGB", (7, 5)).save(tmp_path / "a.webp", exif=b"Exif\0\0II*\0\x08\0\0\0\x09\0")
    assert "not made by sega-jax" in str(inspect(tmp_path / "a.webp"))


def test_nothing_to_inspect(tmp_path):
    (tmp_path / "x.png").write_bytes(b"no")
    (tmp_path / "x.txt").write_bytes(b"no")
    for path, words in ((tmp_path / "x.png", "as an image"), (tmp_path / "x.txt", "not a checkpoint"), (tmp_path, "a")):
        with pytest.raises(CheckpointError, match=words):
            inspect(path)


RECORD = {"prompt": "a cat\n\x1b[2Jon a mat", "seed": 7, "positional": "ntk(strength=2.0)", "layout": "crpa",
          "steps": 20, "negative_prompt": None, "model": "nano", "sega_jax": "0.1.0"}  # fmt: skip


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".safetensors"])
def test_prompt_seed_and_method_are_shown(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".safetensors":
        save_file({"latents": np.zeros((1, 16, 4, 6), np.float32)}, path, metadata={"sega_jax": json.dumps(RECORD)})
    elif suffix == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("sega_jax", json.dumps(RECORD))
        Image.new("RGB", (7, 5)).save(path, pnginfo=info)
    else:
        exif = Image.Exif()
        exif[0x8769] = {0x9286: b"ASCII\0\0\0" + json.dumps({"sega_jax": RECORD}).encode()}
        Image.new("RGB", (7, 5)).save(path, exif=exif)
    report = inspect(path)
    expected = {name: value for name, value in RECORD.items() if value is not None and name != "sega_jax"}
    assert report.record == expected
    assert "\x1b" not in str(report)
    for line in ("  prompt: a cat  [2Jon a mat", "  seed: 7", "  positional: ntk(strength=2.0)", "  layout: crpa"):
        assert line in str(report).splitlines()


@pytest.mark.parametrize(
    "text", ["{", "[1]", "3", '{"sega_jax": 3}', "[" * 100_000, '{"seed": {"a": "' + "x" * 9000 + '"}}']
)
def test_records_that_are_none(tmp_path, text):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("sega_jax", text)
    Image.new("RGB", (7, 5)).save(tmp_path / "a.png", pnginfo=info)
    assert max(map(len, str(inspect(tmp_path / "a.png")).splitlines())) < 700


def test_folders_that_convert_reads(tmp_path, tiny):
    whole = tiny.pipeline(tmp_path / "whole")
    convert(whole, tmp_path / "singles", to="bfl", progress=False)
    report = inspect(tmp_path / "singles")
    assert {part.name for part in report.parts} == {
        "flux1.safetensors", "ae.safetensors", "clip_l.safetensors", "t5xxl.safetensors"
    }  # fmt: skip
    assert all(part.tensors and not part.problem for part in report.parts)
    (whole / "model_index.json").unlink()
    report = inspect(whole)
    assert {part.name for part in report.parts if part.tensors} == set(tiny.CONFIGS)
    (tmp_path / "singles" / "ae.safetensors").write_bytes(b"x")
    assert "not a complete safetensors file" in str(inspect(tmp_path / "singles"))
