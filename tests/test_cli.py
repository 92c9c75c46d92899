"""The command line, mostly called in this process, at tiny sizes.

The model is the embedded demo with its transformer's weights shaken, so that every input matters however far the demo
was trained; the demo itself is used where nothing is computed.
"""

import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import sega_jax as sj
from sega_jax import cli
from sega_jax.cli import outputs
from sega_jax.hub import resolve
from sega_jax.images import read_metadata
from sega_jax.pipeline import Pipeline
from sega_jax.sampling.denoise import predict

QUICK = ("--size", "64", "--steps", "2")
PROMPT = "a red circle"
load = cache(Pipeline.from_pretrained.__func__)  # one load for all tests


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = Path(shutil.copytree(resolve("nano"), tmp_path_factory.mktemp("model") / "shaken"))
    random = np.random.default_rng(0)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    shaken = {
        name: array + random.normal(0, 0.05, array.shape).astype(array.dtype)
        for name, array in load_file(weights).items()
    }
    save_file(shaken, weights)
    return str(folder)


@pytest.fixture
def pipe(model):
    """The model through the Python API."""
    return load(
        Pipeline,
        model,
        dtype="float32",
        transformer=None,
        backend="auto",
        revision=None,
        cache_dir=None,
        local_files_only=False,
    )


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder of its own, no compilation cache, and no second load of the same model."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SEGA_JAX_CACHE", "off")
    monkeypatch.delenv("SEGA_JAX_DEBUG", raising=False)
    monkeypatch.setattr(Pipeline, "from_pretrained", classmethod(load))
    return folder


@pytest.fixture
def run(capsys):
    """Runs a command line; gives exit code, standard output and standard error."""

    def run(*words):
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def make(run, model):
    """Makes a picture and gives its result; fails if that fails."""

    def make(*words, prompt=(PROMPT,)):
        code, out, err = run("generate", *prompt, *QUICK, "--model", model, "--json", *words)
        assert code == 0, err
        return json.loads(out)

    return make


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def files():
    return sorted(entry.name for entry in Path().iterdir())


def nothing_is_loaded(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(Pipeline, "from_pretrained", refuse)


# -- making pictures ----------------------------------------------------------------------------------------------


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
    sj.pipeline.Image(pixels(path), record).save(path)


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
    save_file({"text": np.asarray(made.text), "pooled": np.asarray(made.pooled)}, "e.safetensors")
    make("--out", "encoded.png")
    make("--out", "given.png", "--embeddings", "e.safetensors", prompt=())
    np.testing.assert_array_equal(pixels("given.png"), pixels("encoded.png"))

    save_file({"text": np.asarray(made.text)[..., :-1], "pooled": np.asarray(made.pooled)}, "bad.safetensors")
    code, _, err = run("generate", "--embeddings", "bad.safetensors", "--model", model)
    assert code == 1
    tokens = made.text.shape[1]
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
    assert run("generate", "--from-image", "own.png")[0] == 0
    assert Path("own-repeat.png").read_bytes() == Path("own.png").read_bytes()


# -- many prompts -------------------------------------------------------------------------------------------------

ROWS = [
    {"prompt": "a red circle", "seed": 1},
    {"prompt": "a blue square", "size": "96x64"},
    {"prompt": "a green circle", "num_images": 2},
    {"prompt": "a red square", "size": "96x64", "seed": 2},
]


def write_rows(rows):
    Path("rows.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))


def test_rows_compile_once_per_class_and_keep_their_order(run, make):
    write_rows(ROWS)
    predict.clear_cache()
    result = make("--prompts", "rows.jsonl", prompt=())
    assert predict._cache_size() == result["classes"] == 2
    assert [image["path"] for image in result["images"]] == [f"out-00{i}.png" for i in range(5)]
    prompts = [read_metadata(image["path"])["prompt"] for image in result["images"]]
    assert prompts == ["a red circle", "a blue square", "a green circle", "a green circle", "a red square"]
    shapes = [pixels(image["path"]).shape[:2] for image in result["images"]]
    assert shapes == [(64, 64), (64, 96), (64, 64), (64, 64), (64, 96)]
    make("--out", "alone.png", "--seed", "2", "--size", "96x64", prompt=["a red square"])
    np.testing.assert_array_equal(pixels("out-004.png"), pixels("alone.png"))
    assert predict._cache_size() == 2


def test_batches_are_filled_not_recompiled(make):
    write_rows([{"prompt": PROMPT, "seed": seed} for seed in range(3)])
    predict.clear_cache()
    make("--prompts", "rows.jsonl", "--batch-size", "2", "--out", "{row}.png", prompt=())
    assert predict._cache_size() == 1
    make("--seed", "2", "--out", "alone.png")
    assert np.abs(pixels("2.png").astype(int) - pixels("alone.png")).max() <= 1
    assert read_metadata("2.png")["batch_size"] == 2


def test_a_second_run_makes_what_is_missing(run, model, monkeypatch):
    write_rows(ROWS)
    words = ("generate", "--prompts", "rows.jsonl", *QUICK, "--model", model, "--json")
    words += ("--out", "{row}-{index}-{prompt_slug}.png")
    first = json.loads(run(*words)[1])
    missing = "2-1-a-green-circle.png"
    before = Path(missing).read_bytes()
    Path(missing).unlink()
    stamps = {
        image["path"]: os.stat(image["path"]).st_mtime_ns for image in first["images"] if image["path"] != missing
    }
    code, out, err = run(*words)
    assert code == 0
    assert [image["done"] for image in json.loads(out)["images"]] == ["skipped"] * 3 + ["made", "skipped"]
    assert err.count("exists with this very record, skipped") == 4
    assert {path: os.stat(path).st_mtime_ns for path in stamps} == stamps
    assert Path(missing).read_bytes() == before
    nothing_is_loaded(monkeypatch)  # there is nothing left to do
    assert run(*words)[0] == 0


def test_another_picture_is_not_overwritten(run, make, model):
    make("--seed", "1")
    before = Path("out.png").read_bytes()
    code, _, err = run("generate", PROMPT, *QUICK, "--model", model, "--seed", "2")
    assert code == 1
    assert "out.png exists and was made differently (seed)" in err
    assert Path("out.png").read_bytes() == before
    make("--seed", "2", "--overwrite")
    assert read_metadata("out.png")["seed"] == 2
    Path("out.png").write_bytes(b"holiday")
    code, _, err = run("generate", PROMPT, *QUICK, "--model", model)
    assert code == 1
    assert "out.png exists and is not this picture" in err
    assert Path("out.png").read_bytes() == b"holiday"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a", "sise": 3}', "rows.jsonl line 3: unknown keys sise; known: prompt, negative_prompt, size"),
        ('{"prompt": "a", "steps": "3"}', "rows.jsonl line 3: steps='3': expected int"),
        ('{"prompt": "a", "steps": true}', "rows.jsonl line 3: steps=True: expected int"),
        ('{"prompt": "a", "steps": 0}', "rows.jsonl line 3: steps=0: expected a positive whole number"),
        ('{"prompt": "a", "size": 65}', "rows.jsonl line 3: height=65: must be a positive multiple of 16"),
        ('{"prompt": "a"', "rows.jsonl line 3: not valid JSON"),
        ("[1]", "rows.jsonl line 3: expected an object"),
        ("{}", "rows.jsonl line 3: no prompt"),
    ],
)
def test_bad_rows(run, monkeypatch, line, words):
    nothing_is_loaded(monkeypatch)
    Path("rows.jsonl").write_text(f'{{"prompt": "fine"}}\n\n{line}\n')
    code, _, err = run("generate", "--prompts", "rows.jsonl")
    assert code == 2
    assert words in err


def test_names():
    values = {
        "seed": 3,
        "index": 1,
        "row": 12,
        "width": 64,
        "height": 32,
        "prompt_slug": outputs.slug("Ein Ü, ein 'X'!"),
    }
    assert str(outputs.expand("{row:04d}-{prompt_slug}.png", 5, values)) == "0012-ein-u-ein-x.png"
    assert str(outputs.expand("a/b.png", 5, values)) == "a/b-005.png"
    assert str(outputs.expand("a/b.png", None, values)) == "a/b.png"
    assert outputs.slug("☃") == "untitled"
    assert len(outputs.slug("word " * 99)) <= 48


# -- interruptions ------------------------------------------------------------------------------------------------


def test_killed_while_decoding(run, make, model):
    """SIGKILL as soon as latents are on the disk; `decode` and a second `generate` both finish the picture."""
    command = [
        sys.executable,
        "-m",
        "sega_jax.cli",
        "generate",
        PROMPT,
        *QUICK,
        "--model",
        model,
        "--out",
        "killed.png",
    ]
    root = str(Path(sj.__file__).parents[1])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}, stderr=subprocess.DEVNULL)
    latents = Path("killed.latents.safetensors")
    try:
        deadline = time.monotonic() + 300
        while not latents.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    assert not Path("killed.png").exists()

    make("--out", "whole.png")
    assert run("decode", latents, "--out", "decoded.png")[0] == 0
    assert Path("decoded.png").read_bytes() == Path("whole.png").read_bytes()
    resumed = make("--out", "killed.png")
    assert resumed["images"][0]["done"] == "decoded"
    assert resumed["timings"]["denoise"] == 0
    assert Path("killed.png").read_bytes() == Path("whole.png").read_bytes()
    assert not latents.exists()


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals(run, model, monkeypatch, number, code, word):
    def decode(*_args, **_kwargs):
        os.kill(os.getpid(), number)
        time.sleep(5)

    if number == signal.SIGINT and signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler)  # a shell that runs the suite behind itself ignores it
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(Pipeline, "decode", decode)
        got, out, err = run("generate", PROMPT, *QUICK, "--model", model)
    assert (got, out) == (code, "")
    assert err.splitlines()[-1] == f"sega-jax: error: {word}"
    assert "finish this picture with: sega-jax decode out.latents.safetensors" in err
    assert "Traceback" not in err
    assert files() == ["out.latents.safetensors"]
    assert signal.getsignal(number) is before
    assert run("decode", "out.latents.safetensors")[0] == 0
    assert files() == ["out.latents.safetensors", "out.png"]


def test_latents_of_another_run_are_not_lost(run, make, model):
    make("--out", "b.png", "--save-latents", "out.latents.safetensors", "--seed", "8")
    before = Path("out.latents.safetensors").read_bytes()
    code, _, err = run("generate", PROMPT, *QUICK, "--model", model)
    assert code == 1
    assert "holds the latents of another run (seed); finish it with `sega-jax decode out.latents.safetensors`" in err
    assert Path("out.latents.safetensors").read_bytes() == before


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--steps", "-1"], "steps=-1: expected a positive whole number"),
        (["x", "--steps", "many"], "Error parsing --steps"),
        (["x", "--stepz", "3"], "Unrecognized options: --stepz, 3 (see sega-jax generate --help)"),
        (["x", "--size", "100"], "height=100: must be a positive multiple of 16 pixels; try 96"),
        (["x", "--size", "64x"], "size='64x': expected a side in pixels"),
        (["x", "--size", "0"], "size='0': expected a side in pixels"),
        (["x", "--positional", "segaa"], "unknown positional method 'segaa' (did you mean 'sega'?)"),
        (["x", "--positional", "no_such_module:f"], "positional method 'no_such_module:f'"),
        (["x", "--layout", "foo"], "layout='foo' is unknown; known: dense, crpa"),
        (["x", "--layout", "crpa(leveles=3)"], "has no option leveles; known: levels, coarse"),
        (["x", "--layout", "crpa(levels=1)"], "levels=1; expected a whole number of at least 2"),
        (["x", "--regions", "center:0.3"], "regions='center:0.3': layout='dense' has none; give layout='crpa'"),
        (["x", "--layout", "crpa", "--regions", "ball:3"], "'ball:3' is no region; expected center:SHARE"),
        (["x", "--layout", "crpa", "--regions", "center:3"], "'3' is no share of the picture above 0 and at most 1"),
        (["x", "--layout", "crpa", "--regions", "box:0,0,9999,9"], "reaches beyond the picture of"),
        (["x", "--layout", "crpa", "--regions", "mask:nowhere.png"], "cannot be read as a picture"),
        (["x", "--layout", "crpa", "--size", "144x160"], "both sides must be multiples of 32"),
        (["x", "--layout", "scale-dit(mask='K')"], "mask='K': expected 'kernel' or 'paper'"),
        (["x", "--layout", "scale-dit(colour=1)"], "unknown colour; known: "),
        (["x", "--layout", "scale-dit", "--size", "80"], "works in windows of 64 pixels; try height=64"),
        (["x", "--mu", "nan"], "mu='nan': expected native, clamp or a finite number"),
        (["x", "--strength", "0.5"], "strength=0.5: only with an init_image"),
        (["x", "--init-image", "no.png"], "init_image='no.png': no such file"),
        (["x", "--guidance", "3"], "guidance=3.0: this checkpoint has no guidance input"),
        (["x", "--true-guidance", "3"], "true_guidance=3.0: needs a negative_prompt"),
        (["x", "--seed", "-1"], "seed=-1: expected a whole number"),
        (["x", "--num-images", "0"], "num_images=0: expected a positive whole number"),
        (["x", "--batch-size", "0"], "batch_size=0: expected a positive whole number"),
        (["x", "--vae", "foo"], "invalid choice 'foo' for argument '--vae'"),
        (["x", "--out", "a.gif"], "out='a.gif': expected a name ending in .png"),
        (["x", "--out", "{foo}.png"], "out='{foo}.png': unknown field {foo}"),
        (["x", "--out", "{seed.png"], "out='{seed.png': cannot be read as a pattern"),
        (["x", "--out", "none/a.png"], "none: no such folder; create it first"),
        (["x", "--num-images", "2", "--out", "{seed}.png"], "--out gives 0.png to more than one picture"),
        (["x", "--model", "./missing"], "model './missing': no such folder or file"),
        (["x", "--transformer", "missing"], "transformer='missing': no such folder or file"),
        (["x", "--prompts", "a.jsonl"], "a prompt and --prompts are both given"),
        ([], "no prompt; give one, or --embeddings"),
    ],
)  # fmt: skip
def test_bad_arguments_fail_before_anything_loads(run, monkeypatch, words, message):
    nothing_is_loaded(monkeypatch)
    code, out, err = run("generate", *words)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("sega-jax: error: ")
    assert message in line
    assert files() == []


def test_no_verb(run):
    assert run()[::2] == (
        2,
        "sega-jax: error: Expected one of {generate, decode, convert, inspect, plan, methods, bench, doctor}. "
        "(see sega-jax --help)\n",
    )


def nano(folder):
    """A copy of the demo checkpoint to damage."""
    return Path(shutil.copytree(resolve("nano"), folder))


def refused(result):
    code, out, err = result
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("sega-jax: error: ")
    assert "Traceback" not in err
    return last


def test_truncated_weights(run, tmp_path):
    folder = nano(tmp_path / "nano")
    (weights,) = (folder / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert weights.name in refused(run("generate", PROMPT, *QUICK, "--model", folder))
    assert run("inspect", folder)[0] == 1


def test_missing_component(run, tmp_path):
    folder = nano(tmp_path / "nano")
    shutil.rmtree(folder / "vae")
    assert "vae" in refused(run("generate", PROMPT, *QUICK, "--model", folder))


def test_weights_of_another_shape(run, tmp_path):
    folder = nano(tmp_path / "nano")
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 7}))
    assert "does not match the model" in refused(run("generate", PROMPT, *QUICK, "--model", folder))


def test_folder_that_is_no_checkpoint(run, place):
    (place / "empty").mkdir()
    assert "not a checkpoint" in refused(run("generate", PROMPT, "--model", "./empty"))


def test_offline_without_a_copy(run, tmp_path):
    words = ("--model", "owner/name", "--cache-dir", tmp_path / "hub", "--local-files-only")
    message = refused(run("generate", PROMPT, *words))
    assert "offline (local_files_only or HF_HUB_OFFLINE=1) and not in the cache" in message


def test_hub_that_refuses(run, tmp_path, monkeypatch):
    from huggingface_hub import constants

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        try:
            message = refused(run("generate", PROMPT, "--model", "owner/name", "--cache-dir", tmp_path / "hub"))
        finally:
            server.shutdown()
            thread.join()
    assert "owner/name" in message
    assert "hf auth login" in message


def test_an_unforeseen_failure_is_one_line(run, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("the device\nis on fire")

    monkeypatch.setattr(Pipeline, "from_pretrained", fail)
    message = refused(run("generate", PROMPT, *QUICK))
    assert message == "sega-jax: error: RuntimeError: the device; is on fire (SEGA_JAX_DEBUG=1 shows where)"
    monkeypatch.setenv("SEGA_JAX_DEBUG", "1")
    assert "Traceback" in run("generate", PROMPT, *QUICK)[2]


# -- the other verbs ----------------------------------------------------------------------------------------------


def test_dry_run_plans_without_weights(run, monkeypatch):
    nothing_is_loaded(monkeypatch)
    words = ("generate", PROMPT, "--size", "1024x512", "--dry-run")
    code, out, _ = run(*words)
    assert code == 0
    assert "1024x512: positional pi() (auto), mu 1.15 (clamp), 20 steps" in out
    assert "source: nano model card (20 steps); beyond the trained grid: PI" in out
    assert "64 x 32 tokens, 5.33333 x 2.66667 of the trained sides" in out
    plan = json.loads(run(*words, "--json", "--mu", "native")[1])["plans"][0]
    assert plan["record"]["mu"] == "native"
    assert plan["mu_value"] == pytest.approx(0.5 + 0.65 * (2048 - 64) / (144 - 64))
    assert files() == []


def test_inspect(run, make):
    make()
    code, out, _ = run("inspect", "out.png")
    assert code == 0
    assert "PNG image, 64x64" in out
    report = json.loads(run("inspect", "out.png", "--json")[1])
    assert report["ok"]
    assert "sega_jax" in report["metadata"]
    assert "nothing: no such file or folder" in refused(run("inspect", "nothing"))


def test_methods(run):
    code, out, _ = run("methods")
    assert code == 0
    for word in ("sega-release", "dype-yarn", "arXiv:2510.20766", "patent pending", "licence"):
        assert word in out
    assert run("methods", "ntk")[1].startswith("ntk ")
    assert "dype" not in run("methods", "ntk")[1]
    assert run("methods", "yarn", "--bibtex")[1].count("@article{") == 2
    code, _, err = run("methods", "bogus")
    assert code == 2
    assert "unknown method 'bogus'; known: none, pi" in err


def test_doctor(run, monkeypatch):
    code, out, _ = run("doctor", "--json")
    assert code == 0
    findings = {finding["name"]: finding for finding in json.loads(out)["findings"]}
    assert findings["attention"]["value"]["kernel"] == "xla"
    assert findings["devices"]["value"][0]["platform"] == "cpu"
    assert findings["packages"]["value"]["jax"] == sj.pipeline.jax.__version__
    assert findings["hub"]["value"]["offline"]
    assert all(finding["state"] != "broken" for finding in findings.values())

    monkeypatch.setattr("sega_jax.hub.resolve", lambda _model: Path("nowhere"))
    code, out, _ = run("doctor")
    assert code == 1
    assert "! demo model" in out
    assert "-> reinstall sega-jax" in out
    assert out.splitlines()[-1] == "1 broken"


def test_import_is_light():
    code = "import sega_jax.cli, sys; sys.exit(bool({'tyro', 'jax', 'flax', 'huggingface_hub'} & set(sys.modules)))"
    root = str(Path(sj.__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}).returncode == 0
