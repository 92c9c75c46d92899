"""``--verify=forward``: right key maps pass it, wrong ones pass a round trip and are caught by it."""

import dataclasses
import json

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import load_file, save_file

from converters.__main__ import main
from converters.convert import convert
from converters.errors import CheckpointError
from converters.keymaps import clip, flux, t5, vae
from converters.kinds import BY_NAME

CONFIGS = {
    "transformer": {
        "in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 3, "joint_attention_dim": 24, "pooled_projection_dim": 20, "guidance_embeds": True,
        "axes_dims_rope": [4, 6, 6],
    },
    "vae": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": [8, 16, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 1, "norm_num_groups": 4, "use_quant_conv": True, "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    },
    "text_encoder": {
        "vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 9, "hidden_act": "quick_gelu",
    },
    "text_encoder_2": {
        "vocab_size": 30, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
    },
}  # fmt: skip


def make(folder, name, dtype=np.float32, layout="diffusers"):
    """A component whose tensors are all different, norms included, at the spread of trained weights."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    state = {}
    for tensor in BY_NAME[name].tensors(CONFIGS[name], layout):
        values = rng.standard_normal(tensor.shape, np.float32)
        fan = int(np.prod(tensor.shape[1:])) if len(tensor.shape) > 1 else 0
        state[tensor.source] = (values * fan**-0.5 if fan else 1 + 0.2 * values).astype(dtype)
    save_file(state, folder / f"{BY_NAME[name].stem}.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    return folder


def target(tmp_path, to, name="out"):
    return tmp_path / (f"{name}.safetensors" if to == "bfl" else name)


@pytest.mark.parametrize("to", ["orbax", "bfl"])
@pytest.mark.parametrize("name", CONFIGS)
def test_right_maps_pass(tmp_path, name, to):
    source = make(tmp_path / "source", name)
    first = convert(source, target(tmp_path, to), to=to, verify="forward", progress=False)
    second = convert(target(tmp_path, to), tmp_path / "back", to="diffusers", verify="forward", progress=False)
    found = first["components"][name]["forward"]
    print(f"{name} to {to}: {found}, back {second['components'][name]['forward']['largest']:.2g}")
    assert found["blocks"] == {"transformer": 5}.get(name, 2)
    assert found["largest"] <= 1e-5
    assert second["components"][name]["forward"]["largest"] <= 1e-5


def test_between_layouts_without_diffusers_modules(tmp_path):
    for name in ("transformer", "vae"):
        source = make(tmp_path / name, name)
        convert(source, tmp_path / f"{name}.safetensors", to="bfl", progress=False)
        report = convert(
            tmp_path / f"{name}.safetensors", tmp_path / f"{name}.orbax", to="orbax", dtype="bf16", verify="forward",
            progress=False,
        )  # fmt: skip
        assert report["components"][name]["forward"]["layouts"] == ["bfl", "orbax"]


@pytest.mark.parametrize("layout", ["diffusers-old", "diffusers-conv"])
def test_old_autoencoders(tmp_path, layout):
    source = make(tmp_path / "source", "vae", layout=layout)
    convert(source, tmp_path / "out", to="orbax", verify="forward", progress=False)


def retarget(rows, change):
    """Rows with some targets exchanged: still one to one, still invertible."""

    def new(target):
        return change.get(target, target)

    def targets(row):
        return new(row.targets) if isinstance(row.targets, str) else tuple(new(target) for target in row.targets)

    return tuple(dataclasses.replace(row, targets=targets(row)) for row in rows)


def swap(left, right):
    return {left: right, right: left}


def unswapped(rows):
    return tuple(dataclasses.replace(row, ops=tuple(op for op in row.ops if op != "swap_halves")) for row in rows)


def norms_swapped(rows):
    return retarget(rows, swap(*(f"single[{{i}}].attention.{part}_norm.scale" for part in ("query", "key"))))


def vae_rows(config, layout="diffusers", real=vae.rows):
    change = swap("decoder.middle.attention.query.kernel", "decoder.middle.attention.key.kernel")
    return list(retarget(real(config, layout), change)) if layout == "diffusers" else real(config, layout)


def vae_halves(config, layout="diffusers", real=vae.rows):
    rows = real(config, layout)
    wanted = layout == "diffusers"
    return [dataclasses.replace(row, ops=("swap_halves", *row.ops))
            if wanted and row.source.startswith("quant_conv.") else row for row in rows]  # fmt: skip


DOUBLE = "double[{i}].image.attention."
SINGLE = "single[{i}].attention."
MUTATIONS = {
    "query and key swapped (diffusers)": ("transformer", flux, "DIFFUSERS", retarget(flux.DIFFUSERS, {
        **swap(f"{DOUBLE}query.kernel", f"{DOUBLE}key.kernel"), **swap(f"{DOUBLE}query.bias", f"{DOUBLE}key.bias")})),
    "key and value swapped (BFL)": ("transformer", flux, "BFL", retarget(flux.BFL, {
        **swap(f"{SINGLE}value.kernel", f"{SINGLE}key.kernel"), **swap(f"{SINGLE}value.bias", f"{SINGLE}key.bias")})),
    "scale and shift not swapped": ("transformer", flux, "DIFFUSERS", unswapped(flux.DIFFUSERS)),
    "norms of query and key swapped": ("transformer", flux, "BFL", norms_swapped(flux.BFL)),
    "image and text swapped": ("transformer", flux, "DIFFUSERS", retarget(
        flux.DIFFUSERS, swap("double[{i}].image.mlp_out.kernel", "double[{i}].text.mlp_out.kernel"))),
    "GELU halves exchanged": ("text_encoder_2", t5, "ROWS", retarget(
        t5.ROWS, swap("blocks[{i}].gate.kernel", "blocks[{i}].up.kernel"))),
    "norms before attention and MLP swapped": ("text_encoder", clip, "ROWS", retarget(
        clip.ROWS, swap("blocks[{i}].norm_attention.scale", "blocks[{i}].norm_mlp.scale"))),
    "query and key of the autoencoder swapped": ("vae", vae, "rows", vae_rows),
    "mean and variance exchanged": ("vae", vae, "rows", vae_halves),
}  # fmt: skip


@pytest.mark.parametrize(("name", "module", "attribute", "value"), MUTATIONS.values(), ids=MUTATIONS)
def test_wrong_maps_pass_the_round_trip_and_are_caught(tmp_path, monkeypatch, name, module, attribute, value):
    source = make(tmp_path / "source", name)
    monkeypatch.setattr(module, attribute, value)
    to = "bfl" if attribute in ("BFL", "rows") else "orbax"
    convert(source, target(tmp_path, to), to=to, verify="exact", progress=False)
    convert(target(tmp_path, to), tmp_path / "back", to="diffusers", verify="exact", progress=False)
    before, after = (load_file(folder / f"{BY_NAME[name].stem}.safetensors") for folder in (source, tmp_path / "back"))
    assert all(np.array_equal(before[key], after[key.removeprefix(BY_NAME[name].prefix)]) for key in before)
    with pytest.raises(CheckpointError, match="compute something else after the conversion"):
        convert(source, target(tmp_path, to, "never"), to=to, verify="forward", progress=False)
    assert not target(tmp_path, to, "never").exists()


def test_command_line(tmp_path, capsys):
    source = make(tmp_path / "source", "text_encoder_2")
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "orbax", "--verify=forward"]) == 0
    assert "forward: 2 blocks compute the same" in capsys.readouterr().out
