"""Round trips between layouts, bit for bit, and what verification says about them."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters import stream
from converters.__main__ import main
from converters.components import open_checkpoint
from converters.convert import convert, parse_size
from converters.errors import CheckpointError, CoverageError
from converters.inspect import inspect
from converters.keymap import expand
from converters.keymaps import flux
from converters.reading.formats import open_tensors
from converters.report import summary
from converters.verify.values import fingerprint

REPOSITORY = Path(__file__).parents[2]
COMPONENTS = ("transformer", "vae", "text_encoder", "text_encoder_2")


def go(source, destination, **options):
    return convert(source, destination, progress=False, verify="exact", **options)


def component_files(folder):
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize("through", ["orbax", "bfl"])
@pytest.mark.parametrize("name", COMPONENTS)
def test_component_round_trip_is_bit_exact(tmp_path, tiny, name, through):
    source = tiny.component(tmp_path / "source", name)
    middle = tmp_path / "middle.safetensors" if through == "bfl" else tmp_path / "middle"
    there = go(source, middle, to=through)
    back = go(middle, tmp_path / "back", to="diffusers")
    assert tiny.read(*component_files(source)) == tiny.read(*component_files(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == tiny.CONFIGS[name]
    assert there["source"]["fingerprint"] == back["source"]["fingerprint"]


@pytest.mark.parametrize("through", ["orbax", "bfl"])
def test_pipeline_round_trip_is_bit_exact(tmp_path, tiny, through):
    source = tiny.pipeline(tmp_path / "source")
    go(source, tmp_path / "middle", to=through)
    base = source if through == "bfl" else None
    go(tmp_path / "middle", tmp_path / "back", to="diffusers", base=base)
    for name in COMPONENTS:
        expected, got = (tiny.read(*component_files(folder / name)) for folder in (source, tmp_path / "back"))
        assert expected == got
    for file in ("model_index.json", "scheduler/settings.json", "tokenizer_2/settings.json"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()


def comfy(tiny, path, **options):
    """A ComfyUI single file: BFL's transformer and autoencoder and both text encoders, under prefixes."""
    tensors = {}
    for name, layout, prefix in (
        ("transformer", "bfl", "model.diffusion_model."),
        ("vae", "bfl", "vae."),
        ("text_encoder", "diffusers", "text_encoders.clip_l.transformer."),
        ("text_encoder_2", "diffusers", "text_encoders.t5xxl.transformer."),
    ):
        tensors |= {prefix + key: value for key, value in tiny.state(name, layout, **options).items()}
    tensors["text_encoders.clip_l.logit_scale"] = np.array(4.6, np.float32)
    tensors["text_encoders.clip_l.transformer.text_projection.weight"] = np.ones((64, 64), np.float32)
    save_file(tensors, path)
    return tensors


def test_comfy_single_file_becomes_a_pipeline(tmp_path, tiny):
    tensors = comfy(tiny, tmp_path / "all.safetensors")
    report = go(tmp_path / "all.safetensors", tmp_path / "out", to="diffusers")
    assert report["components"]["transformer"]["config_from"] == "tensor shapes"
    # Judged by plain slicing of the source, not by the key maps.
    got = load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")
    fused = tensors["model.diffusion_model.single_blocks.1.linear1.weight"]
    for i, part in enumerate(("attn.to_q", "attn.to_k", "attn.to_v")):
        np.testing.assert_array_equal(got[f"single_transformer_blocks.1.{part}.weight"], fused[48 * i : 48 * (i + 1)])
    np.testing.assert_array_equal(got["single_transformer_blocks.1.proj_mlp.weight"], fused[144:])
    swapped = tensors["model.diffusion_model.final_layer.adaLN_modulation.1.bias"]
    np.testing.assert_array_equal(got["norm_out.linear.bias"], np.concatenate([swapped[48:], swapped[:48]]))
    vae = load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")
    query = tensors["vae.decoder.mid.attn_1.q.weight"]
    np.testing.assert_array_equal(vae["decoder.mid_block.attentions.0.to_q.weight"], query[:, :, 0, 0])
    clip = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    prefix = "text_encoders.clip_l.transformer."
    expected = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(f"{prefix}text_model.")}
    assert clip.keys() == expected.keys()
    assert all(np.array_equal(clip[key], expected[key]) for key in clip)
    assert report["components"]["text_encoder"]["left_out"] == ["text_projection.weight"]
    for name in COMPONENTS:
        inferred = json.loads((tmp_path / "out" / name / "config.json").read_text())
        shared = inferred.keys() & tiny.CONFIGS[name].keys() - {"norm_num_groups", "axes_dims_rope"}  # no tensor tells
        assert {key: inferred[key] for key in shared} == {key: tiny.CONFIGS[name][key] for key in shared}


def test_fingerprint_is_equal_over_layouts_and_changes_with_one_bit(tmp_path, tiny):
    source = tiny.component(tmp_path / "diffusers", "transformer")
    go(source, tmp_path / "orbax", to="orbax")
    go(source, tmp_path / "bfl.safetensors", to="bfl")
    bfl = load_file(tmp_path / "bfl.safetensors")
    save_file({f"model.diffusion_model.{k}": v for k, v in bfl.items()}, tmp_path / "comfy.safetensors")
    go(source, tmp_path / "sharded", to="diffusers", max_shard_size="100KB")
    assert len(component_files(tmp_path / "sharded")) > 3
    layouts = [source, tmp_path / "orbax", tmp_path / "bfl.safetensors", tmp_path / "comfy.safetensors"]
    assert len({fingerprint(path) for path in (*layouts, tmp_path / "sharded")}) == 1

    for path in ("bfl.safetensors", "orbax/double.image.attention.query.kernel.1/0.0"):
        before = (tmp_path / path).read_bytes()
        (tmp_path / path).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    wanted = fingerprint(source)
    assert fingerprint(tmp_path / "bfl.safetensors") != wanted
    assert fingerprint(tmp_path / "orbax") != wanted


@pytest.mark.parametrize(("dtype", "bound"), [("bf16", 2.0**-8), ("f16", 2.0**-11)])
def test_rounding_is_to_nearest_and_within_its_bound(tmp_path, tiny, dtype, bound):
    source = tiny.component(tmp_path / "source", "vae", dtype=np.float32)
    report = go(source, tmp_path / "out", to="diffusers", dtype=dtype)
    found = report["components"]["vae"]["verify"]
    assert found["rounded"] == found["slots"] > 0
    assert bound / 4 < found["largest_error"] <= bound
    before, after = (load_file(component_files(folder)[0]) for folder in (source, tmp_path / "out"))
    assert {value.dtype.name for value in after.values()} == {{"bf16": "bfloat16", "f16": "float16"}[dtype]}
    for name, value in before.items():
        error = np.abs(value.astype(np.float64) - after[name].astype(np.float64))
        assert np.all(error <= np.maximum(bound * np.abs(value), 2.0**-25))


def test_widening_and_back_is_the_identity(tmp_path, tiny):
    source = tiny.component(tmp_path / "source", "text_encoder_2")
    wide = go(source, tmp_path / "wide", to="orbax", dtype="f32")
    assert wide["components"]["text_encoder_2"]["verify"]["largest_error"] == 0
    go(tmp_path / "wide", tmp_path / "back", to="diffusers", dtype="bf16")
    assert tiny.read(*component_files(source)) == tiny.read(*component_files(tmp_path / "back"))


def test_values_out_of_range_are_refused(tmp_path, tiny):
    tensors = tiny.state("vae")
    tensors["decoder.conv_in.bias"][3] = 1e6
    source = tiny.component(tmp_path / "source", "vae", tensors)
    with pytest.raises(CheckpointError, match=r"decoder.conv_in.bias: values up to 9.994e\+05 do not fit in float16"):
        go(source, tmp_path / "out", to="diffusers", dtype="f16")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["source"]


def test_aliases_come_back(tmp_path, tiny):
    """T5's token table under both of its names, CLIP without the old prefix, a stray buffer that is left out."""
    t5 = tiny.state("text_encoder_2")
    t5["encoder.embed_tokens.weight"] = t5["shared.weight"].copy()
    clip = {name.removeprefix("text_model."): value for name, value in tiny.state("text_encoder").items()}
    for name, tensors in (("text_encoder_2", t5), ("text_encoder", clip)):
        source = tiny.component(tmp_path / name, name, tensors)
        go(source, tmp_path / f"{name}.orbax", to="orbax")
        go(tmp_path / f"{name}.orbax", tmp_path / f"{name}.back", to="diffusers")
        assert tiny.read(*component_files(source)) == tiny.read(*component_files(tmp_path / f"{name}.back"))
    t5["encoder.embed_tokens.weight"][0, 0] += 1
    source = tiny.component(tmp_path / "damaged", "text_encoder_2", t5)
    with pytest.raises(CheckpointError, match="two names of one tensor but differ"):
        go(source, tmp_path / "never", to="orbax")


@pytest.mark.parametrize("layout", ["diffusers-old", "diffusers-conv"])
def test_old_autoencoder_layouts_come_back_as_they_were(tmp_path, tiny, layout):
    source = tiny.component(tmp_path / "source", "vae", layout=layout)
    go(source, tmp_path / "orbax", to="orbax")
    go(tmp_path / "orbax", tmp_path / "back", to="diffusers")
    assert tiny.read(*component_files(source)) == tiny.read(*component_files(tmp_path / "back"))
    go(source, tmp_path / "ae.safetensors", to="bfl")
    go(tmp_path / "ae.safetensors", tmp_path / "new", to="diffusers")
    assert "decoder.mid_block.attentions.0.to_q.weight" in tiny.read(*component_files(tmp_path / "new"))


def test_shards_and_index_agree(tmp_path, tiny):
    source = tiny.component(tmp_path / "source", "transformer", dtype=np.float32)
    go(source, tmp_path / "out", to="diffusers", max_shard_size=200_000)
    files = component_files(tmp_path / "out")
    assert all(file.stat().st_size < 220_000 for file in files)
    with open_tensors(tmp_path / "out") as opened:  # refuses an index that disagrees with its shards
        assert sorted(opened.keys()) == sorted(tiny.read(*component_files(source)))
    assert tiny.read(*files) == tiny.read(*component_files(source))


def test_large_arrays_are_chunked_in_orbax(tmp_path, tiny, monkeypatch):
    source = tiny.component(tmp_path / "source", "transformer")
    monkeypatch.setattr(stream, "CHUNK_LIMIT", 4096)
    go(source, tmp_path / "out", to="orbax")
    assert len(list((tmp_path / "out" / "single.out.kernel.0").glob("0.*"))) > 3
    monkeypatch.undo()
    go(tmp_path / "out", tmp_path / "back", to="diffusers")
    assert tiny.read(*component_files(source)) == tiny.read(*component_files(tmp_path / "back"))


def test_blocks_smaller_than_a_row_change_nothing(tmp_path, tiny, monkeypatch):
    source = tiny.pipeline(tmp_path / "source")
    monkeypatch.setattr(stream, "BLOCK", 100)
    monkeypatch.setattr(stream, "TILE", 5)
    go(source, tmp_path / "orbax", to="orbax")
    go(tmp_path / "orbax", tmp_path / "back", to="diffusers")
    assert fingerprint(source) == fingerprint(tmp_path / "back")


def test_every_target_restored_by_plain_orbax(tmp_path, tiny):
    """Orbax alone, in a process where neither sega_jax nor converters can be imported."""
    tensors = tiny.state("transformer")
    go(tiny.component(tmp_path / "source", "transformer", tensors), tmp_path / "out", to="orbax")
    expected = {t.source: t for t in expand(flux.DIFFUSERS, flux.dims(tiny.CONFIGS["transformer"]))}
    np.save(tmp_path / "query.npy", tensors["transformer_blocks.1.attn.to_q.weight"].astype(np.float32))
    code = f"""
import sys
sys.modules["sega_jax"] = sys.modules["converters"] = None
import numpy as np, orbax.checkpoint as ocp
for checkpointer in (ocp.PyTreeCheckpointer(), ocp.StandardCheckpointer()):
    tree = checkpointer.restore({str(tmp_path / "out")!r})
    count = lambda x: sum(map(count, x.values())) if isinstance(x, dict) else 1
    assert count(tree) == {len(expected)}, count(tree)
    got = np.asarray(tree["double"]["image"]["attention"]["query"]["kernel"]["1"])
    assert got.dtype.name == "bfloat16"
    assert np.array_equal(got.astype(np.float32).T, np.load({str(tmp_path / "query.npy")!r}))
print("restored")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "restored\n", done.stderr[-2000:]


def test_an_orbax_checkpoint_saved_by_orbax_is_read(tmp_path, tiny):
    """What a user saves again: OCDBT, compressed, chunked as Orbax likes."""
    ocp = pytest.importorskip("orbax.checkpoint")
    tensors = tiny.state("transformer", dtype=np.float32)
    source = tiny.component(tmp_path / "source", "transformer", tensors)
    go(source, tmp_path / "orbax", to="orbax")
    tree = ocp.PyTreeCheckpointer().restore(tmp_path / "orbax")
    for ocdbt in (True, False):
        folder = tmp_path / f"again-{ocdbt}"
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)).save(folder, tree)
        (folder / "config.json").write_text(json.dumps(tiny.CONFIGS["transformer"]))
        go(folder, tmp_path / f"back-{ocdbt}", to="diffusers")
        assert tiny.read(*component_files(tmp_path / f"back-{ocdbt}")) == tiny.read(*component_files(source))


def test_no_jax_and_no_sega_jax_needed(tmp_path, tiny):
    source = tiny.pipeline(tmp_path / "source")
    code = f"""
import sys
for name in ("jax", "jaxlib", "flax", "orbax", "sega_jax", "torch"):
    sys.modules[name] = None
from converters.__main__ import main
for target in ("orbax", "bfl", "diffusers"):
    assert main(["convert", {str(source)!r}, {str(tmp_path)!r} + "/" + target, "--to", target, "--verify"]) == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=REPOSITORY, check=True
    )
    assert done.stdout.count("equal bit for bit") == 12
    for target in ("orbax", "bfl", "diffusers"):
        assert fingerprint(tmp_path / target) == fingerprint(source)


def test_published_full_size_names_and_shapes(tmp_path):
    """The BFL layout of FLUX.1-dev against facts of the published file: 780 tensors, these names and shapes."""
    config = {
        "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
        "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    }  # fmt: skip
    tensors = {t.source: t.shape for t in expand(flux.BFL, flux.dims(config))}
    assert len(tensors) == 780
    assert sum(int(np.prod(shape)) for shape in tensors.values()) == 11_901_408_320
    assert tensors["double_blocks.18.img_attn.qkv.weight"] == (9216, 3072)
    assert tensors["double_blocks.18.txt_mod.lin.weight"] == (18432, 3072)
    assert tensors["single_blocks.37.linear1.weight"] == (21504, 3072)
    assert tensors["single_blocks.37.linear2.weight"] == (3072, 15360)
    assert tensors["final_layer.adaLN_modulation.1.weight"] == (6144, 3072)
    assert tensors["guidance_in.in_layer.weight"] == (3072, 256)
    assert tensors["txt_in.weight"] == (3072, 4096)


# -- scaled float8 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
def test_scaled_float8_is_multiplied_out(tmp_path, tiny, spelling):
    exact = tiny.state("transformer", "bfl", np.float32)
    stored, expected = {}, {}
    for name, value in exact.items():
        if name.endswith(".weight") and "linear1" in name:
            scale = np.float32(np.abs(value).max() / 448)
            small = (value / scale).astype(ml_dtypes.float8_e4m3fn)
            base = f"model.diffusion_model.{name.removesuffix('.weight')}"
            stored[f"{base}.weight"], stored[f"{base}.{spelling}"] = small, scale
            stored[f"{base}.{'scale_input' if spelling == 'scale_weight' else 'input_scale'}"] = np.float32(1)
            expected[name] = small.astype(np.float32) * scale
        else:
            stored[f"model.diffusion_model.{name}"] = expected[name] = value.astype(ml_dtypes.bfloat16)
    if spelling == "scale_weight":
        stored["model.diffusion_model.scaled_fp8"] = np.zeros(2, ml_dtypes.float8_e4m3fn)
    save_fp8(stored, tmp_path / "fp8.safetensors")
    go(tmp_path / "fp8.safetensors", tmp_path / "out.safetensors", to="bfl")
    got = load_file(tmp_path / "out.safetensors")
    assert got.keys() == exact.keys()
    for name, value in expected.items():
        assert got[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(got[name], value.astype(ml_dtypes.bfloat16))


def save_fp8(tensors, path):
    """safetensors' numpy writer lacks float8, so the header is written by hand."""
    names = {"float8_e4m3fn": "F8_E4M3", "bfloat16": "BF16", "float32": "F32", "uint8": "U8"}
    header, data = {}, b""
    for name, value in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        raw = value.tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[value.dtype.name], "shape": list(value.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x.weight_scale": np.ones((2, 1, 2), np.float32)}, "scale of shape"),
        ({"x.weight": np.ones((4, 4), np.float32), "x.weight_scale": np.float32(1)}, "is not float8"),
        ({"y.scale_weight": np.float32(1)}, "y.weight is not float8"),
        ({"x.comfy_quant": np.frombuffer(b'{"format": "nvfp4"}', np.uint8)}, "'nvfp4' are not supported"),
        ({"x.comfy_quant": np.frombuffer(b"[[[", np.uint8)}, "expected a JSON object"),
    ],
)
def test_unknown_quantised_formats_are_refused_by_name(tmp_path, change, message):
    save_fp8({"x.weight": np.ones((4, 4), ml_dtypes.float8_e4m3fn), **change}, tmp_path / "q.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "q.safetensors")


# -- reports and the command line ----------------------------------------------------------------------------------


def test_report_is_stored_and_printed(tmp_path, tiny, capsys):
    source = tiny.component(tmp_path / "source", "vae")
    report = go(source, tmp_path / "out", to="orbax")
    stored = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert stored == json.loads(json.dumps(report))
    assert len(stored["components"]["vae"]["verify"]["hashes"]) == stored["components"]["vae"]["slots"]
    (weights,) = component_files(source)
    entry = {"name": weights.name, "bytes": weights.stat().st_size}
    assert stored["source"]["files"] == [entry | {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}]
    assert f"fingerprint {stored['source']['fingerprint']}" in str(inspect(tmp_path / "out"))
    assert "equal bit for bit" in summary(stored)
    go(source, tmp_path / "ae.safetensors", to="bfl")
    assert main(["inspect", str(tmp_path / "ae.safetensors")]) == 0
    assert "fingerprint" in capsys.readouterr().out
    assert main(["fingerprint", str(tmp_path / "ae.safetensors")]) == 0
    assert capsys.readouterr().out.strip() == stored["source"]["fingerprint"]


@pytest.mark.parametrize(("text", "size"), [("10GB", 10**10), ("1.5 MB", 1_500_000), ("200kb", 200_000), (17, 17)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "5 parsecs", "1e9"])
def test_sizes_refused(text):
    with pytest.raises(ValueError, match="positive number of bytes"):
        parse_size(text)


@pytest.mark.parametrize(
    "options",
    [{"to": "gguf"}, {"to": "orbax", "dtype": "int4"}, {"to": "orbax", "verify": "maybe"}, {"to": "bfl", "workers": 0}],
)
def test_arguments_out_of_range(tmp_path, options):
    with pytest.raises(ValueError, match=r"expected|at least"):
        convert(tmp_path, tmp_path / "out", **options)


def test_mixed_types_cannot_be_fused_silently(tmp_path, tiny):
    tensors = tiny.state("transformer")
    name = "transformer_blocks.0.attn.to_k.weight"
    tensors[name] = tensors[name].astype(np.float32)
    source = tiny.component(tmp_path / "source", "transformer", tensors)
    with pytest.raises(CheckpointError, match=r"fused from tensors of different types \(bfloat16, float32\)"):
        go(source, tmp_path / "out.safetensors", to="bfl")
    go(source, tmp_path / "out.safetensors", to="bfl", dtype="f32")
    go(source, tmp_path / "orbax", to="orbax")
    go(tmp_path / "orbax", tmp_path / "back", to="diffusers")
    assert tiny.read(*component_files(source)) == tiny.read(*component_files(tmp_path / "back"))


def test_cover_lists_everything(tmp_path, tiny):
    tensors = tiny.state("transformer")
    tensors["surplus"] = tensors.pop("x_embedder.bias")
    tensors["proj_out.bias"] = np.zeros(17, np.float32)
    source = tiny.component(tmp_path / "source", "transformer", tensors)
    with pytest.raises(CoverageError) as caught:
        go(source, tmp_path / "out", to="orbax")
    for part in ("3 problems", "missing: x_embedder.bias (48,)", "not recognised: surplus", "expected (16,)"):
        assert part in str(caught.value)
