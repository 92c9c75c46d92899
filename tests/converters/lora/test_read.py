"""LoRA files as trainers and tools in the wild write them."""

import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from converters.errors import CheckpointError
from converters.keymap import Slot
from converters.lora import DIALECTS, convert_lora, read_lora

WIDTH = 16
QUERY = Slot("single.attention.query.kernel", 3)


def pair(stem, down="lora_A.weight", up="lora_B.weight", alpha=None, rows=WIDTH, inputs=WIDTH):
    rng = np.random.default_rng(7)
    found = {
        f"{stem}.{down}": rng.standard_normal((2, inputs)).astype(np.float32),
        f"{stem}.{up}": rng.standard_normal((rows, 2)).astype(np.float32),
    }
    return found if alpha is None else found | {f"{stem}.alpha": np.array(alpha, np.float32)}


def product(tensors, scale=1.0):
    down, up = list(tensors.values())[:2]
    return scale * (up.astype(np.float64) @ down.astype(np.float64))


MODULE = "single_transformer_blocks.3.attn.to_q"
UNDERSCORED = MODULE.replace(".", "_")
KOHYA = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": 1}
SPELLINGS = {
    "PEFT inside diffusers": pair(f"transformer.base_model.model.{MODULE}"),
    "diffusers inside PEFT": pair(f"base_model.model.transformer.{MODULE}"),
    "an adapter's name": pair(MODULE, "lora_A.default_0.weight", "lora_B.default_0.weight"),
    "another adapter's name": pair(f"base_model.model.{MODULE}", "lora_A.style.weight", "lora_B.style.weight"),
    "trailing underscore": pair(f"lora_unet_{UNDERSCORED}_", **KOHYA),
    "LoCon of LyCORIS": pair(f"lycoris_{UNDERSCORED}", **KOHYA),
    "OneTrainer": pair(f"lora_transformer_{UNDERSCORED}", **KOHYA),
    "model of ComfyUI": pair(f"model.diffusion_model.{MODULE}"),
}


@pytest.mark.parametrize("tensors", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(tmp_path, tensors):
    save_file(tensors, tmp_path / "x")
    deltas = read_lora(tmp_path / "x").deltas()
    assert list(deltas) == [("transformer", QUERY)]
    scale = 0.5 if len(tensors) == 3 else 1
    np.testing.assert_allclose(deltas["transformer", QUERY], product(tensors, scale), atol=1e-6)


@pytest.mark.parametrize(
    ("stem", "component", "slot"),
    [
        ("base_model.model.text_model.encoder.layers.1.self_attn.q_proj", "text_encoder", "blocks.query.kernel"),
        ("text_encoder.base_model.model.text_model.encoder.layers.1.mlp.fc1", "text_encoder", "blocks.up.kernel"),
        ("base_model.model.encoder.block.1.layer.0.SelfAttention.v", "text_encoder_2", "blocks.value.kernel"),
    ],
)
def test_text_encoders_of_peft(tmp_path, stem, component, slot):
    save_file(pair(stem), tmp_path / "x")
    assert list(read_lora(tmp_path / "x").deltas()) == [(component, Slot(slot, 1))]


def test_two_adapters_in_one_file_are_refused(tmp_path):
    save_file(pair(MODULE) | pair(MODULE, "lora_A.other.weight", "lora_B.other.weight"), tmp_path / "x")
    with pytest.raises(CheckpointError, match=r"has two a factors.*lora_A\.other"):
        read_lora(tmp_path / "x")


# -- extractions of ComfyUI ----------------------------------------------------------------------------------------


def extraction():
    """Low-rank weights, differences of biases and norms, and parts of CLIP that the pipeline does not use."""
    rng = np.random.default_rng(3)

    def some(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    model, clip = "diffusion_model.", "text_encoders.clip_l.transformer."
    return (
        pair(f"{model}double_blocks.0.img_attn.qkv", "lora_down.weight", "lora_up.weight", rows=3 * WIDTH)
        | pair(f"{model}single_blocks.1.linear1", "lora_down.weight", "lora_up.weight", rows=7 * WIDTH)
        | pair(f"{clip}text_projection", "lora_down.weight", "lora_up.weight")
        | {
            f"{model}double_blocks.0.img_attn.qkv.diff_b": some(3 * WIDTH),
            f"{model}single_blocks.1.linear1.diff_b": some(7 * WIDTH),
            f"{model}final_layer.adaLN_modulation.1.diff_b": some(2 * WIDTH),
            f"{model}img_in.diff_b": np.zeros(WIDTH, np.float32),
            f"{model}double_blocks.0.img_attn.norm.query_norm.diff": np.zeros(8, np.float32),
            f"{model}double_blocks.0.txt_attn.norm.key_norm.diff": some(8),
            f"{clip}text_model.embeddings.position_embedding.diff": np.zeros((77, WIDTH), np.float32),
            f"{clip}text_model.encoder.layers.0.layer_norm1.diff": some(WIDTH),
            f"{clip}text_model.encoder.layers.0.layer_norm1.diff_b": some(WIDTH),
            f"{clip}text_model.embeddings.token_embedding.lora_down.weight": some(2, WIDTH),
            f"{clip}text_model.embeddings.token_embedding.lora_up.weight": np.zeros((30, 2), np.float32),
        }
    )


def test_differences_of_biases_and_norms(tmp_path):
    tensors = extraction()
    save_file(tensors, tmp_path / "x")
    lora = read_lora(tmp_path / "x")
    expected = {("transformer", Slot("double.text.attention.key_norm.scale", 0)):
                tensors["diffusion_model.double_blocks.0.txt_attn.norm.key_norm.diff"]}  # fmt: skip
    bias = tensors["diffusion_model.double_blocks.0.img_attn.qkv.diff_b"]
    long = tensors["diffusion_model.single_blocks.1.linear1.diff_b"]
    for i, part in enumerate(("query", "key", "value")):
        piece = slice(i * WIDTH, (i + 1) * WIDTH)
        expected["transformer", Slot(f"double.image.attention.{part}.bias", 0)] = bias[piece]
        expected["transformer", Slot(f"single.attention.{part}.bias", 1)] = long[piece]
    expected["transformer", Slot("single.mlp_in.bias", 1)] = long[3 * WIDTH :]
    expected["transformer", Slot("out_modulation.bias")] = tensors[
        "diffusion_model.final_layer.adaLN_modulation.1.diff_b"
    ]
    norm = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.layer_norm1"
    expected["text_encoder", Slot("blocks.norm_attention.scale", 0)] = tensors[f"{norm}.diff"]
    expected["text_encoder", Slot("blocks.norm_attention.bias", 0)] = tensors[f"{norm}.diff_b"]
    found = {(component, slot): value for component, values in lora.added.items() for slot, value in values.items()}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], value) for key, value in expected.items())
    assert len(lora.factors["transformer"]) == 3 + 4
    assert lora.factors.keys() == {"transformer"}


@pytest.mark.parametrize("dialect", ["bfl", "kohya", "ai-toolkit", "orbax"])
def test_differences_in_other_dialects(tmp_path, dialect):
    apart = (
        extraction() if dialect in ("kohya", "orbax") else {k: v for k, v in extraction().items() if "clip_l" not in k}
    )
    if dialect == "ai-toolkit":  # diffusers' modules, where the halves of the last modulation are swapped
        apart["diffusion_model.double_blocks.1.img_attn.proj.diff_b"] = np.ones(WIDTH, np.float32)
    save_file(apart | {"diffusion_model.img_in.diff_b": np.ones(WIDTH, np.float32)}, tmp_path / "x")
    convert_lora(tmp_path / "x", tmp_path / "y", to=dialect)
    before, after = read_lora(tmp_path / "x"), read_lora(tmp_path / "y")
    assert before.added.keys() == after.added.keys()
    for component, values in before.added.items():
        assert values.keys() == after.added[component].keys()
        assert all(np.array_equal(after.added[component][slot], value) for slot, value in values.items())


def test_differences_without_a_name_are_said(tmp_path):
    save_file(extraction(), tmp_path / "x")
    for dialect in ("diffusers", "xlabs"):
        with pytest.raises(CheckpointError, match=rf"have no name in the {dialect} dialect"):
            convert_lora(tmp_path / "x", tmp_path / "y", to=dialect)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("diffusion_model.img_in.diff", np.ones((2, 2), np.float32), "a full difference of weights"),
        ("diffusion_model.img_in.diff_b", np.full(4, np.nan, np.float32), "NaN or infinity"),
        ("diffusion_model.img_in.diff_b", np.ones((4, 1), np.float32), "one number per output"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.diff_b", np.ones(2, np.float32), "do not divide"),
        ("diffusion_model.nothing.diff_b", np.ones(2, np.float32), "1 keys of no known module"),
        ("diffusion_model.img_in.set_weight", np.ones(2, np.float32), "replaced weights"),
    ],
)
def test_differences_that_cannot_be_used(tmp_path, key, value, words):
    save_file(pair(MODULE) | {key: value}, tmp_path / "x")
    with pytest.raises(CheckpointError, match=f"(?s)^{re.escape(str(tmp_path / 'x'))}: .*{words}"):
        read_lora(tmp_path / "x")


# -- metadata ------------------------------------------------------------------------------------------------------

HEADER = {
    "modelspec.trigger_phrase": "xyz style", "ss_tag_frequency": '{"xyz": 3}', "ss_network_alpha": "1",
    "ss_network_dim": "2", "sshs_model_hash": "abc", "modelspec.hash_sha256": "0xabc", "format": "pt",
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_metadata_goes_along(tmp_path, dialect):
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    save_file(pair(stem, "lora_down.weight", "lora_up.weight", 1.0), tmp_path / "x", metadata=HEADER)
    convert_lora(tmp_path / "x", tmp_path / "y", to=dialect)
    before, after = read_lora(tmp_path / "x"), read_lora(tmp_path / "y")
    assert after.metadata["modelspec.trigger_phrase"] == "xyz style"
    assert after.metadata["ss_tag_frequency"] == '{"xyz": 3}'
    assert "sshs_model_hash" not in after.metadata  # of the file it was
    assert "modelspec.hash_sha256" not in after.metadata
    assert ("ss_network_alpha" in after.metadata) == (dialect == "kohya")
    for key, value in before.deltas().items():
        np.testing.assert_allclose(after.deltas()[key], value, atol=1e-6)
