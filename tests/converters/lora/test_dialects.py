"""LoRA dialects: the same change whatever the names, merging, and what is refused by name."""

import itertools
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters.__main__ import main
from converters.convert import convert
from converters.errors import CheckpointError
from converters.keymap import Slot
from converters.lora import DIALECTS, Factors, Lora, convert_lora, express, parse_lora, read_lora

WIDTH, TEXT, HIDDEN = 48, 24, 64
BOUND = 1e-6


def factors(rng, inputs, outputs, rank=2, scale=1.0, dtype=np.float32, a=None):
    a = rng.standard_normal((rank, inputs)).astype(dtype) if a is None else a
    return Factors(a, rng.standard_normal((outputs, rank)).astype(dtype) / 4, scale)


def attention_lora(scale=0.75, dtype=np.float32, shared=False):
    """Changes every dialect can express: queries, keys, values and outputs of both kinds of block."""
    rng = np.random.default_rng(0)
    slots = {}
    for layer, half in itertools.product((0, 1), ("image", "text")):
        a = rng.standard_normal((2, WIDTH)).astype(dtype) if shared else None
        for part in ("query", "key", "value"):
            slot = Slot(f"double.{half}.attention.{part}.kernel", layer)
            slots[slot] = factors(rng, WIDTH, WIDTH, scale=scale, dtype=dtype, a=a)
        slots[Slot(f"double.{half}.attention_out.kernel", layer)] = factors(rng, WIDTH, WIDTH, 3, scale, dtype)
    for part in ("query", "value"):  # no key: a fused layer that is changed in part
        slots[Slot(f"single.attention.{part}.kernel", 2)] = factors(rng, WIDTH, WIDTH, scale=scale, dtype=dtype)
    slots[Slot("single.out.kernel", 1)] = factors(rng, 5 * WIDTH, WIDTH, scale=scale, dtype=dtype)
    return Lora({"transformer": slots}, {}, "attention")


def full_lora():
    """Everything else: modulations, MLPs, embedders, the final layer with its swapped halves, text encoders."""
    rng = np.random.default_rng(1)
    slots = dict(attention_lora().factors["transformer"])
    slots[Slot("double.image.modulation.kernel", 0)] = factors(rng, WIDTH, 6 * WIDTH)
    slots[Slot("double.text.mlp_in.kernel", 1)] = factors(rng, WIDTH, 4 * WIDTH, 4, 0.5)
    slots[Slot("double.text.mlp_out.kernel", 1)] = factors(rng, 4 * WIDTH, WIDTH)
    slots[Slot("single.modulation.kernel", 0)] = factors(rng, WIDTH, 3 * WIDTH)
    slots[Slot("single.mlp_in.kernel", 2)] = factors(rng, WIDTH, 4 * WIDTH, 3, 1.5)
    slots[Slot("image_embed.kernel")] = factors(rng, 16, WIDTH)
    slots[Slot("text_embed.kernel")] = factors(rng, TEXT, WIDTH)
    slots[Slot("time.into.kernel")] = factors(rng, 256, WIDTH)
    slots[Slot("guidance.out.kernel")] = factors(rng, WIDTH, WIDTH)
    slots[Slot("pooled.into.kernel")] = factors(rng, 20, WIDTH)
    slots[Slot("out_modulation.kernel")] = factors(rng, WIDTH, 2 * WIDTH)
    slots[Slot("out.kernel")] = factors(rng, WIDTH, 16)
    clip = {
        Slot("blocks.query.kernel", 1): factors(rng, HIDDEN, HIDDEN, 2, 2.0),
        Slot("blocks.up.kernel", 0): factors(rng, HIDDEN, 32),
    }
    t5 = {Slot("blocks.gate.kernel", 0): factors(rng, 16, 32)}
    return Lora({"transformer": slots, "text_encoder": clip, "text_encoder_2": t5}, {}, "full")


def write(lora, path, dialect):
    save_file({k: np.ascontiguousarray(v) for k, v in express(lora, dialect).items()}, path)
    return path


def assert_same(left, right, bound=BOUND):
    left, right = left.deltas(), right.deltas()
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert np.abs(value - right[key]).max() <= bound * max(1, np.abs(value).max()), key


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("first", DIALECTS)
def test_each_dialect_into_each_other(tmp_path, first, shared):
    lora = attention_lora(shared=shared)
    convert_lora(write(lora, tmp_path / "source.safetensors", "diffusers"), tmp_path / "first", to=first)
    assert_same(read_lora(tmp_path / "first"), lora)
    for second in DIALECTS:
        convert_lora(tmp_path / "first", tmp_path / second, to=second)
        assert_same(read_lora(tmp_path / second), lora)


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "ai-toolkit", "orbax"])
def test_text_encoders_and_every_module(tmp_path, dialect):
    convert_lora(write(full_lora(), tmp_path / "source", "kohya"), tmp_path / "out", to=dialect)
    assert_same(read_lora(tmp_path / "out"), full_lora())


def test_shared_factors_are_kept_once_and_ranks_restored(tmp_path):
    shared, apart = (express(attention_lora(shared=s), "kohya") for s in (True, False))
    key = "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
    assert shared[key].shape == (2, WIDTH)
    assert apart[key].shape == (6, WIDTH)
    write(attention_lora(), tmp_path / "kohya", "kohya")
    ranks = {f.rank for f in read_lora(tmp_path / "kohya").factors["transformer"].values()}
    assert ranks == {2, 3}


def test_kohya_alpha_and_names_by_hand(tmp_path):
    rng = np.random.default_rng(3)
    down, up = (
        rng.standard_normal((4, WIDTH)).astype(np.float32),
        rng.standard_normal((7 * WIDTH, 4)).astype(np.float32),
    )
    stem = "lora_unet_single_blocks_7_linear1"
    save_file(
        {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": np.array(2, np.float32)},
        tmp_path / "x",
    )
    deltas = read_lora(tmp_path / "x").deltas()
    whole = (2 / 4) * (up @ down)
    for i, part in enumerate(("query", "key", "value")):
        got = deltas["transformer", Slot(f"single.attention.{part}.kernel", 7)]
        np.testing.assert_allclose(got, whole[i * WIDTH : (i + 1) * WIDTH], atol=1e-5)
    np.testing.assert_allclose(deltas["transformer", Slot("single.mlp_in.kernel", 7)], whole[3 * WIDTH :], atol=1e-5)


@pytest.mark.parametrize(
    ("stem", "slot", "shape"),
    [
        ("base_model.model.double_blocks.3.img_attn.proj", Slot("double.image.attention_out.kernel", 3), (8, 8)),
        ("diffusion_model.double_blocks.3.txt_mlp.0", Slot("double.text.mlp_in.kernel", 3), (32, 8)),
        ("transformer.transformer_blocks.3.attn.to_add_out", Slot("double.text.attention_out.kernel", 3), (8, 8)),
        ("transformer_blocks.3.ff.net.0.proj", Slot("double.image.mlp_in.kernel", 3), (32, 8)),
        ("lora_transformer_single_transformer_blocks_11_attn_to_k", Slot("single.attention.key.kernel", 11), (8, 8)),
        ("single_transformer_blocks.11.norm.linear", Slot("single.modulation.kernel", 11), (24, 8)),
    ],
)
@pytest.mark.parametrize("suffixes", [("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"),
                                      ("lora_A.default.weight", "lora_B.default.weight"),
                                      ("lora.down.weight", "lora.up.weight")])  # fmt: skip
def test_spellings(tmp_path, stem, slot, shape, suffixes):
    a, b = np.ones((2, shape[1]), np.float32), np.full((shape[0], 2), 3, np.float32)
    save_file({f"{stem}.{suffixes[0]}": a, f"{stem}.{suffixes[1]}": b}, tmp_path / "x")
    deltas = read_lora(tmp_path / "x").deltas()
    assert list(deltas) == [("transformer", slot)]
    np.testing.assert_array_equal(deltas["transformer", slot], np.full(shape, 6))


def test_peft_settings_give_the_scale(tmp_path):
    tensors = {
        "transformer.x_embedder.lora_A.weight": np.ones((2, 16), np.float32),
        "transformer.x_embedder.lora_B.weight": np.ones((8, 2), np.float32),
        "transformer.proj_out.lora_A.weight": np.ones((4, 8), np.float32),
        "transformer.proj_out.lora_B.weight": np.ones((16, 4), np.float32),
    }
    record = {"transformer.lora_alpha": 6, "transformer.r": 2, "transformer.alpha_pattern": {"proj_out": 2}}
    save_file(tensors, tmp_path / "x", metadata={"lora_adapter_metadata": json.dumps(record)})
    found = read_lora(tmp_path / "x").factors["transformer"]
    assert found[Slot("image_embed.kernel")].scale == 3
    assert found[Slot("out.kernel")].scale == 0.5
    (tmp_path / "adapter").mkdir()
    save_file(
        {f"base_model.model.{k[12:]}": v for k, v in tensors.items()},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "use_rslora": True}))
    found = read_lora(tmp_path / "adapter").factors["transformer"]
    assert found[Slot("out.kernel")].scale == 2
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"lora_alpha": 4, "use_dora": True}))
    with pytest.raises(CheckpointError, match="DoRA"):
        read_lora(tmp_path / "adapter")


def test_control_lora_biases_and_norms(tmp_path, tiny):
    """BFL's control LoRAs also change biases and replace norms; both survive and are merged."""
    rng = np.random.default_rng(4)
    tensors = {
        "double_blocks.0.img_attn.qkv.lora_A.weight": rng.standard_normal((2, WIDTH)).astype(np.float32),
        "double_blocks.0.img_attn.qkv.lora_B.weight": rng.standard_normal((3 * WIDTH, 2)).astype(np.float32),
        "double_blocks.0.img_attn.qkv.lora_B.bias": rng.standard_normal(3 * WIDTH).astype(np.float32),
        "double_blocks.0.img_attn.norm.query_norm.scale": rng.standard_normal(16).astype(np.float32),
        "final_layer.adaLN_modulation.1.lora_A.weight": rng.standard_normal((2, WIDTH)).astype(np.float32),
        "final_layer.adaLN_modulation.1.lora_B.weight": rng.standard_normal((2 * WIDTH, 2)).astype(np.float32),
        "final_layer.adaLN_modulation.1.lora_B.bias": rng.standard_normal(2 * WIDTH).astype(np.float32),
    }
    save_file(tensors, tmp_path / "control")
    for dialect in ("diffusers", "orbax"):
        convert_lora(tmp_path / "control", tmp_path / dialect, to=dialect)
        convert_lora(tmp_path / dialect, tmp_path / f"{dialect}.back", to="bfl")
        back = load_file(tmp_path / f"{dialect}.back")
        assert back.keys() == tensors.keys()
        assert all(np.array_equal(back[key], value) for key, value in tensors.items())
    base = tiny.state("transformer", "bfl", np.float32)
    save_file(base, tmp_path / "base.safetensors")
    convert(
        tmp_path / "base.safetensors",
        tmp_path / "merged",
        to="bfl",
        loras=[f"{tmp_path / 'control'}:0.5"],
        progress=False,
    )
    merged = load_file(tmp_path / "merged")
    name = "double_blocks.0.img_attn.qkv"
    expected = base[f"{name}.weight"] + 0.5 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    np.testing.assert_allclose(merged[f"{name}.weight"], expected, atol=BOUND)
    np.testing.assert_allclose(
        merged[f"{name}.bias"], base[f"{name}.bias"] + 0.5 * tensors[f"{name}.lora_B.bias"], atol=BOUND
    )
    norm = "double_blocks.0.img_attn.norm.query_norm.scale"
    np.testing.assert_allclose(merged[norm], 0.5 * (base[norm] + tensors[norm]), atol=BOUND)
    with pytest.raises(CheckpointError, match=r"no name in the kohya dialect|no name for the change of a bias"):
        convert_lora(tmp_path / "control", tmp_path / "never", to="kohya")


# -- merging -------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path, tiny):
    return tiny.component(tmp_path / "base", "transformer", dtype=np.float32)


def merged(base, out, *loras, **options):
    convert(base, out, to="diffusers", loras=[str(lora) for lora in loras], verify="exact", progress=False, **options)
    return load_file(next(out.glob("*.safetensors")))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_merged_weights_by_plain_arithmetic(tmp_path, base, dialect):
    lora = attention_lora()
    convert_lora(write(lora, tmp_path / "d", "diffusers"), tmp_path / "lora", to=dialect)
    before, after = (
        load_file(next(base.glob("*.safetensors"))),
        merged(base, tmp_path / "out", f"{tmp_path / 'lora'}:0.6"),
    )
    names = {"query": "to_q", "key": "to_k", "value": "to_v"}
    expected = dict(before)
    for slot, f in lora.factors["transformer"].items():
        kind, part = slot.path.split(".")[0], slot.path.split(".")[-2]
        if kind == "single":
            name = "proj_out" if part == "out" else f"attn.{names[part]}"
            name = f"single_transformer_blocks.{slot.index}.{name}.weight"
        elif part == "attention_out":
            name = f"transformer_blocks.{slot.index}.attn.{'to_add_out' if 'text' in slot.path else 'to_out.0'}.weight"
        else:
            name = f"add_{part[0]}_proj" if "text" in slot.path else names[part]
            name = f"transformer_blocks.{slot.index}.attn.{name}.weight"
        expected[name] = before[name] + np.float32(0.6 * f.scale) * (f.b @ f.a)
    assert after.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(after[name], value, atol=BOUND, err_msg=name)
    assert sum(not np.array_equal(after[name], before[name]) for name in before) == len(lora.factors["transformer"])


def test_weight_zero_is_the_identity_and_two_commute(tmp_path, base, tiny):
    one = write(attention_lora(), tmp_path / "one", "kohya")
    two = write(attention_lora(scale=0.3, shared=True), tmp_path / "two", "xlabs")
    merged(base, tmp_path / "zero", f"{one}:0", f"{two}:0")
    assert tiny.read(*base.glob("*.safetensors")) == tiny.read(*(tmp_path / "zero").glob("*.safetensors"))
    left, right = merged(base, tmp_path / "ab", f"{one}:0.7", two), merged(base, tmp_path / "ba", two, f"{one}:0.7")
    alone = merged(base, tmp_path / "a", f"{one}:0.7")
    assert all(np.array_equal(left[name], right[name]) for name in left)
    assert any(not np.array_equal(left[name], alone[name]) for name in left)


def test_a_sum_is_rounded_once(tmp_path, tiny):
    base = tiny.component(tmp_path / "base", "transformer")
    lora = write(attention_lora(dtype=ml_dtypes.bfloat16), tmp_path / "lora", "kohya")
    wide, narrow = merged(base, tmp_path / "wide", lora, dtype="f32"), merged(base, tmp_path / "narrow", lora)
    for name, value in wide.items():
        np.testing.assert_array_equal(narrow[name], value.astype(ml_dtypes.bfloat16))


def test_text_encoders_of_a_pipeline(tmp_path, tiny):
    base = tiny.pipeline(tmp_path / "base", dtype=np.float32)
    write(full_lora(), tmp_path / "lora", "diffusers")
    report = convert(base, tmp_path / "out", to="diffusers", loras=[f"{tmp_path / 'lora'}:0.5"], progress=False)
    assert report["loras"] == [{"name": "lora", "weight": 0.5}]
    before, after = (load_file(folder / "text_encoder" / "model.safetensors") for folder in (base, tmp_path / "out"))
    name = "text_model.encoder.layers.1.self_attn.q_proj.weight"
    delta = full_lora().deltas()["text_encoder", Slot("blocks.query.kernel", 1)]
    np.testing.assert_allclose(after[name], before[name] + 0.5 * delta, atol=BOUND)


def test_loras_that_do_not_fit(tmp_path, base, tiny):
    lora = write(full_lora(), tmp_path / "lora", "diffusers")
    with pytest.raises(CheckpointError, match="changes the text_encoder, which is not in"):
        merged(base, tmp_path / "out", lora)
    deep = Lora({"transformer": {Slot("single.out.kernel", 9): factors(np.random.default_rng(0), 240, 48)}})
    with pytest.raises(CheckpointError, match=r"transformer has no single.out.kernel.9"):
        merged(base, tmp_path / "out", write(deep, tmp_path / "deep", "bfl"))
    wide = Lora({"transformer": {Slot("image_embed.kernel"): factors(np.random.default_rng(0), 32, 48)}})
    with pytest.raises(CheckpointError, match=r"is \(16, 48\), the LoRA is for \(32, 48\); a control LoRA"):
        merged(base, tmp_path / "out", write(wide, tmp_path / "wide", "bfl"))


# -- refusals ------------------------------------------------------------------------------------------------------

GOOD = {
    "transformer.x_embedder.lora_A.weight": np.ones((2, 16), np.float32),
    "transformer.x_embedder.lora_B.weight": np.ones((8, 2), np.float32),
}
BAD = {
    "DoRA": ({"lora_unet_img_in.dora_scale": np.ones(8, np.float32)}, "DoRA, not a plain LoRA"),
    "DoRA of PEFT": ({"transformer.x_embedder.lora_magnitude_vector": np.ones(8, np.float32)}, "DoRA"),
    "LoKr": ({"lora_unet_img_in.lokr_w1": np.ones((2, 2), np.float32)}, "LoKr"),
    "LoHa": ({"lora_unet_img_in.hada_w1_a": np.ones((2, 2), np.float32)}, "LoHa"),
    "OFT": ({"lora_unet_img_in.oft_blocks": np.ones((2, 2), np.float32)}, "OFT"),
    "Tucker": ({"lora_unet_img_in.lora_mid.weight": np.ones((2, 2), np.float32)}, "LoCon"),
    "full difference": ({"lora_unet_img_in.diff": np.ones((2, 2), np.float32)}, "full difference"),
    "unknown module": ({"transformer.nothing.lora_A.weight": np.ones((2, 2), np.float32)}, "1 keys of no known module"),
    "unknown key": ({"step": np.ones(1, np.float32)}, "no known module: step"),
    "half a pair": ({"transformer.proj_out.lora_A.weight": np.ones((2, 8), np.float32)}, "without their other half"),
    "alpha alone": ({"transformer.proj_out.alpha": np.array(1, np.float32)}, "without their other half"),
    "twice": ({"x_embedder.lora_A.weight": np.ones((2, 16), np.float32)}, "has two a factors"),
    "two layouts": (
        {"img_in.lora_A.weight": np.ones((2, 16), np.float32), "img_in.lora_B.weight": np.ones((8, 2), np.float32)},
        "two modules change image_embed.kernel",
    ),
    "ranks differ": (
        {"transformer.proj_out.lora_A.weight": np.ones((2, 8), np.float32),
         "transformer.proj_out.lora_B.weight": np.ones((16, 3), np.float32)}, "do not multiply",
    ),
    "cannot be split": (
        {"double_blocks.0.img_attn.qkv.lora_A.weight": np.ones((2, 8), np.float32),
         "double_blocks.0.img_attn.qkv.lora_B.weight": np.ones((23, 2), np.float32)}, "do not divide",
    ),
    "not a number": (
        {"transformer.proj_out.lora_A.weight": np.full((2, 8), np.nan, np.float32),
         "transformer.proj_out.lora_B.weight": np.ones((16, 2), np.float32)}, "NaN or infinity",
    ),
    "alpha of many": ({"transformer.x_embedder.alpha": np.ones(3, np.float32)}, "one finite number"),
    "alpha not finite": ({"transformer.x_embedder.alpha": np.array(np.inf, np.float32)}, "one finite number"),
}  # fmt: skip


@pytest.mark.parametrize(("extra", "message"), BAD.values(), ids=BAD)
def test_refused(tmp_path, extra, message):
    save_file(GOOD | extra, tmp_path / "x")
    with pytest.raises(CheckpointError, match=message):
        read_lora(tmp_path / "x")


def test_unknown_keys_can_be_left_out(tmp_path):
    save_file(GOOD | {"transformer.nothing.lora_A.weight": np.ones((2, 2), np.float32)}, tmp_path / "x")
    assert list(read_lora(tmp_path / "x", ignore_unknown=True).deltas()) == [
        ("transformer", Slot("image_embed.kernel"))
    ]
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "y")
    with pytest.raises(CheckpointError, match=r"no LoRA of FLUX.1 in it"):
        read_lora(tmp_path / "y", ignore_unknown=True)


def test_dialects_without_a_name_for_a_change(tmp_path):
    for dialect in ("xlabs", "bfl"):
        with pytest.raises(CheckpointError, match=rf"changes have no name in the {dialect} dialect"):
            express(full_lora(), dialect)
    with pytest.raises(ValueError, match="expected one of"):
        express(full_lora(), "pickle")


def test_command_line(tmp_path, capsys):
    write(attention_lora(), tmp_path / "x.safetensors", "kohya")
    assert main(["lora", str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors"), "--to", "xlabs"]) == 0
    assert "19 weights of the transformer, rank up to 3" in capsys.readouterr().out
    assert_same(read_lora(tmp_path / "y.safetensors"), attention_lora())
    assert main(["lora", str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors"), "--to", "xlabs"]) == 1
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a.safetensors", ("a.safetensors", 1)), ("a:0.5", ("a", 0.5)), ("C:\\x", ("C:\\x", 1)), ("a:-1", ("a", -1))],
)  # fmt: skip
def test_paths_with_weights(text, expected):
    path, weight = parse_lora(text)
    assert (str(path), weight) == expected


def test_weights_that_are_not_finite():
    with pytest.raises(ValueError, match="finite"):
        parse_lora("a:nan")
