"""Pictures by `sega-jax generate`: the Python API's, repeated from their records, started from latents and pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from sega_jax import cli
from sega_jax.media.images import Image as Picture
from sega_jax.media.images import read_metadata
from sega_jax.weights.hub import resolve
from tests.cli.helpers import PROMPT, QUICK, files, pixels


def test_generate_is_the_python_api(make, pipe):
    result = make("--seed", "7")
    expected = pipe.generate(PROMPT, width=64, height=64, steps=2, seed=7).images[0]
    # The prompt's embedding is given instead of computed, so the last bit of a pixel may differ.
    assert np.abs(pixels("out.png").astype(int) - expected.array).max() <= 1
    record = read_metadata("out.png")
    assert expected.metadata.items() <= record.items()
    assert result["images"][0]["record"].items() <= record.items()
    assert result["images"][0]["done"] == "made"
    assert set(result["timings"]) == {"encode", "denoise", "decode"}
    assert files() == ["out.png"]  # the latents are gone


@pytest.fixture
def lora(tmp_path):
    """A LoRA of the demo's transformer, in kohya's names."""
    config = json.loads((resolve("nano") / "transformer" / "config.json").read_text())
    width = config["attention_head_dim"] * config["num_attention_heads"]
    random = np.random.default_rng(0)
    tensors = {}
    for index in range(config["num_layers"]):
        stem = f"lora_unet_double_blocks_{index}_img_attn_proj"
        tensors[f"{stem}.lora_down.weight"] = random.normal(0, 1, (2, width)).astype(np.float32)
        tensors[f"{stem}.lora_up.weight"] = random.normal(0, 0.2, (width, 2)).astype(np.float32)
        tensors[f"{stem}.alpha"] = np.array(1, np.float32)
    save_file(tensors, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def test_loras_change_the_picture_and_are_repeated_from_its_record(make, run, lora):
    make("--out", "plain.png")
    make("--out", "zero.png", "--lora", f"{lora}:0")
    (made,) = make("--out", "half.png", "--lora", f"{lora}:0.25", "--lora", f"{lora}:0.25")["images"]
    assert [(entry["file"], entry["weight"]) for entry in made["record"]["loras"]] == [(str(lora), 0.25)] * 2
    assert np.array_equal(pixels("zero.png"), pixels("plain.png"))
    assert not np.array_equal(pixels("half.png"), pixels("plain.png"))
    assert "loras" not in read_metadata("plain.png")
    code, _, err = run("generate", "--from-image", "half.png", "--out", "again.png", "--json")
    assert code == 0, err
    assert np.array_equal(pixels("again.png"), pixels("half.png"))
    make("--out", "once.png", "--lora", f"{lora}:0.5")
    assert np.abs(pixels("once.png").astype(int) - pixels("half.png")).max() <= 1
    plan = run("generate", "--from-image", "half.png", "--dry-run")[1]
    assert f"LoRA {lora} with weight 0.25" in plan
    tensors = load_file(lora)
    save_file({name: np.asarray(2 * value) for name, value in tensors.items()}, lora)
    code, _, err = run("generate", "--from-image", "half.png", "--out", "changed.png")
    assert (code, "has changed since the picture was made; give --lora" in err) == (2, True)


def test_scale_dit_is_repeated_from_its_record_with_and_without_its_lora(make, run, lora):
    (free,) = make("--out", "free.png", "--layout", "scale-dit")["images"]
    assert free["record"]["layout"] == "scale-dit(low='off', flow='cosine')"
    (led,) = make("--out", "led.png", "--layout", "scale-dit", "--lora", lora)["images"]
    assert led["record"]["layout"] == "scale-dit(low='cached', adapt='flux1', flow=0.0)"
    assert [entry["file"] for entry in led["record"]["loras"]] == [str(lora)]
    assert np.any(pixels("free.png") != pixels("led.png"))
    assert run("generate", "--from-image", "led.png", "--out", "again.png")[0] == 0
    np.testing.assert_array_equal(pixels("again.png"), pixels("led.png"))
    words = ("generate", PROMPT, *QUICK, "--layout", "scale-dit", "--lora", lora)
    assert "layout scale-dit(low='cached'" in run(*words, "--dry-run")[1]
    code, _, err = run(*words, "--lora", lora)
    assert (code, "2 LoRAs with layout scale-dit" in err) == (2, True)
    Path("rows.jsonl").write_text('{"prompt": "a", "layout": "dense"}\n{"prompt": "b"}\n')
    code, _, err = run("generate", "--prompts", "rows.jsonl", *QUICK, "--layout", "scale-dit", "--lora", lora)
    assert (code, "run them apart" in err) == (2, True)


@pytest.mark.parametrize("layout", ["scale-dit", "crpa(switch='rewind')"])
def test_layouts_that_draw_more_noise_draw_it_by_seed_and_image(make, pipe, layout):
    make("--layout", layout, "--seed", "7", "--num-images", "2", "--batch-size", "2")
    beyond = {"width": 64, "height": 64, "steps": 2, "seed": 7, "layout": layout}
    for index, image in enumerate(pipe.generate(PROMPT, num_images=2, **beyond).images):
        assert np.abs(pixels(f"out-00{index}.png").astype(int) - image.array).max() <= 1


def test_loras_that_cannot_be_used_are_refused(run, lora, tmp_path):
    words = ("generate", PROMPT, *QUICK, "--lora")
    for given, message in (("missing.safetensors", "no such file"), (f"{lora}:nan", "finite"), ("", "no such file")):
        code, _, err = run(*words, given)
        assert (code, message in err) == (2, True), err
    tensors = {name.replace("blocks_0", "blocks_17"): value for name, value in load_file(lora).items()}
    save_file(tensors, tmp_path / "deep.safetensors")
    code, _, err = run(*words, tmp_path / "deep.safetensors")
    assert code == 1
    assert "does not fit" in err
    assert "has no double.image.attention_out.kernel.17" in err


def test_dataclass_is_the_command(make, model, place):
    make("--out", "a.png")
    result = cli.Generate(prompt=PROMPT, size="64", steps=2, out="b.png", model=model).run()
    assert result["images"][0]["path"] == "b.png"
    assert (place / "a.png").read_bytes() == (place / "b.png").read_bytes()


def test_without_json_paths_are_printed(run, model):
    code, out, err = run("generate", PROMPT, *QUICK, "--out", "x.webp", "--model", model)
    assert (code, out) == (0, "x.webp\n")
    assert "64x64: positional none() (auto), mu 0.5 (clamp), 2 steps" in err
    assert "at or below the trained grid: plain RoPE" in err
    assert "2/2" in err  # the bar


def test_size_is_width_x_height(make):
    make("--size", "96x64")
    with Image.open("out.png") as image:
        assert image.size == (96, 64)


def test_from_image_gives_the_same_file(run, make):
    make("--seed", "3", "--num-images", "2", "--batch-size", "2", "--negative-prompt", "blue", "--out", "{index}.png")
    code, _, err = run("generate", "--from-image", "1.png")
    assert code == 0, err
    assert Path("1-repeat.png").read_bytes() == Path("1.png").read_bytes()
    assert "warning" not in err


def test_from_image_options_override(run, make):
    make("--seed", "3")
    assert run("generate", "--from-image", "out.png", "--seed", "4", "--out", "four.png")[0] == 0
    make("--seed", "4", "--out", "same.png")
    assert Path("four.png").read_bytes() == Path("same.png").read_bytes()
    assert (pixels("four.png") != pixels("out.png")).any()


def rewrite(path, change):
    """The picture with a changed record."""
    record = read_metadata(path)
    change(record)
    Picture(pixels(path), record).save(path)


def test_from_image_refuses_a_record_with_gaps(run, make):
    make()
    rewrite("out.png", lambda record: [record.pop("seed"), record.pop("mu")])
    code, _, err = run("generate", "--from-image", "out.png")
    assert code == 2
    assert "out.png: its record lacks seed, mu" in err


def test_from_image_warns_of_other_versions(run, make):
    make()
    rewrite("out.png", lambda record: record.update(jax="0.1", device="TPU v9"))
    code, _, err = run("generate", "--from-image", "out.png", "--dry-run")
    assert code == 0
    assert "was made with jax 0.1" in err
    assert "was made with device TPU v9" in err


def test_init_image_and_its_repetition(run, make, pipe):
    make("--out", "start.png")
    make("--init-image", "start.png", "--strength", "0.5", "--num-images", "2", "--batch-size", "2")
    assert (pixels("out-000.png") != pixels("out-001.png")).any()
    expected = pipe.generate(
        PROMPT, width=64, height=64, steps=2, init_image="start.png", strength=0.5, image_indices=[1]
    )
    assert np.abs(pixels("out-001.png").astype(int) - expected.images[0].array).max() <= 1
    assert run("generate", "--from-image", "out-001.png")[0] == 0
    np.testing.assert_array_equal(pixels("out-001-repeat.png"), pixels("out-001.png"))

    make("--out", "start.png", "--overwrite", "--seed", "9")
    code, _, err = run("generate", "--from-image", "out-001.png", "--out", "again.png")
    assert code == 2
    assert "start.png' has changed since the picture was made; give --init-image" in err


def test_init_latents_as_torch_writes_them(make, pipe):
    """[B, C, H, W] of standard normal numbers, and the packed form of diffusers, are the seed's own noise."""
    make("--seed", "5", "--num-images", "2")
    noise = np.asarray(pipe.noise(5, 64, 64, [0, 1])).transpose(0, 3, 1, 2)
    save_file({"latents": np.ascontiguousarray(noise)}, "noise.safetensors")
    make("--init-latents", "noise.safetensors", "--num-images", "2", "--out", "given.png")
    rows, columns = 4, 4
    packed = noise.reshape(2, 16, rows, 2, columns, 2).transpose(0, 2, 4, 1, 3, 5).reshape(2, rows * columns, 64)
    save_file({"latents": np.ascontiguousarray(packed)}, "packed.safetensors")
    make("--init-latents", "packed.safetensors", "--num-images", "2", "--out", "packed.png")
    for index in range(2):
        np.testing.assert_array_equal(pixels(f"given-00{index}.png"), pixels(f"out-00{index}.png"))
        np.testing.assert_array_equal(pixels(f"packed-00{index}.png"), pixels(f"out-00{index}.png"))


def test_saved_latents_are_exchangeable(run, make, pipe):
    make("--save-latents", "z.safetensors")
    stored = load_file("z.safetensors")["latents"]
    assert (stored.dtype, stored.shape) == (np.float32, (1, 16, 8, 8))
    expected = pipe.generate(PROMPT, width=64, height=64, steps=2, decode=False)
    np.testing.assert_allclose(stored.transpose(0, 2, 3, 1), expected.latents, rtol=0, atol=1e-4)
    assert make("--save-latents", "z.safetensors")["images"][0]["done"] == "skipped"
    Path("z.safetensors").rename("moved.safetensors")
    assert make("--save-latents", "z.safetensors")["images"][0]["done"] == "made"  # latents that were asked for
    assert Path("z.safetensors").read_bytes() == Path("moved.safetensors").read_bytes()
    assert run("decode", "z.safetensors", "--out", "z.png")[0] == 0
    assert Path("z.png").read_bytes() == Path("out.png").read_bytes()


def test_decode_of_latents_without_a_record(run, make, model):
    make("--save-latents", "z.safetensors")
    save_file(load_file("z.safetensors"), "bare.safetensors")
    code, _, err = run("decode", "bare.safetensors")
    assert code == 2
    assert "does not say which model it is of; give --model" in err
    assert run("decode", "bare.safetensors", "--model", model)[0] == 0
    np.testing.assert_array_equal(pixels("bare.png"), pixels("out.png"))


def test_embeddings(run, make, model, pipe):
    made = pipe.encode([PROMPT])
    save_file({name: np.asarray(x) for name, x in made.arrays.items()}, "e.safetensors")
    make("--out", "encoded.png")
    make("--out", "given.png", "--embeddings", "e.safetensors", prompt=())
    np.testing.assert_array_equal(pixels("given.png"), pixels("encoded.png"))

    save_file(
        {"text": np.asarray(made.arrays["text"])[..., :-1], "pooled": np.asarray(made.arrays["pooled"])},
        "bad.safetensors",
    )
    code, _, err = run("generate", "--embeddings", "bad.safetensors", "--model", model)
    assert code == 1
    tokens = made.text_tokens
    assert f"bad.safetensors: text has shape [1, {tokens}, 127]; this model needs ['rows', 'tokens', 128]" in err


OWN_METHOD = """
from sega_jax import positional as pe

def slowed(grid, signals):
    ropes = pe.none()(grid, signals)
    return {name: rope._replace(frequencies=tuple(0.25 * f for f in rope.frequencies)) for name, rope in ropes.items()}
"""


def test_own_method(run, make, place):
    (place / "cli_test_method.py").write_text(OWN_METHOD)
    make("--out", "own.png", "--positional", "cli_test_method:slowed")
    make("--out", "plain.png")
    assert read_metadata("own.png")["positional"] == "cli_test_method:slowed"
    assert (pixels("own.png") != pixels("plain.png")).any()
    assert run("generate", "--from-image", "own.png", "--trust-code")[0] == 0  # a file names no code unless told so
    assert Path("own-repeat.png").read_bytes() == Path("own.png").read_bytes()
