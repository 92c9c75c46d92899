"""Files in the wild that are not FLUX.1's base models: refused by name, naming the file and what to use."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters.components import open_checkpoint, open_component
from converters.convert import convert
from converters.errors import CheckpointError, CoverageError

ONE = np.ones((2, 2), np.float32)


def refused(path, words):
    with pytest.raises(CheckpointError, match=f"(?s)^{re.escape(str(path))}.*{words}"):
        open_checkpoint(path)


BY_TENSORS = {
    "NF4": ({"double_blocks.0.img_attn.qkv.weight": ONE,
             "double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4": ONE}, "NF4 weights of bitsandbytes"),
    "NF4 in a bundle": ({"model.diffusion_model.img_in.weight.absmax": ONE}, "NF4.*use the bfloat16 checkpoint"),
    "8 bits of bitsandbytes": ({"transformer_blocks.0.attn.to_q.SCB": ONE}, "8-bit weights of bitsandbytes"),
    "nunchaku": ({"transformer_blocks.0.attn.to_q.qweight": ONE}, "nunchaku"),
    "Chroma": ({"distilled_guidance_layer.in_proj.weight": ONE, "img_in.weight": ONE}, "Chroma"),
    "Chroma in a bundle": ({"model.diffusion_model.distilled_guidance_layer.in_proj.weight": ONE}, "Chroma"),
    "Redux": ({"redux_up.weight": ONE, "redux_down.weight": ONE}, "Redux.*give a checkpoint of FLUX"),
    "ControlNet": ({"controlnet_x_embedder.weight": ONE}, "a ControlNet"),
    "IP-Adapter": ({"ip_adapter_proj_model.proj.weight": ONE}, "an IP-Adapter"),
    "LoKr": ({"lora_unet_img_in.lokr_w1": ONE}, "a LoKr.*merge it with the tool that made it"),
    "LoHa": ({"lora_unet_img_in.hada_w1_a": ONE}, "a LoHa.*merge it with the tool that made it"),
    "LoRA": ({"transformer.x_embedder.lora_A.weight": ONE}, "a LoRA .*--lora FILE"),
    "FLUX.2": ({"double_stream_modulation_img.lin.weight": ONE}, "FLUX.2"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "words"), BY_TENSORS.values(), ids=BY_TENSORS)
def test_by_tensors(tmp_path, tensors, words):
    save_file(tensors, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", words)


@pytest.mark.parametrize(("layout", "into"), [("diffusers", "x_embedder.weight"), ("bfl", "img_in.weight")])
@pytest.mark.parametrize(("times", "words"), [(6, "FLUX.1 Fill"), (2, "FLUX.1 Depth or Canny"), (3, "control picture")])
def test_by_the_channels_they_take(tmp_path, tiny, layout, into, times, words):
    tensors = tiny.state("transformer", layout)
    tensors[into] = np.tile(tensors[into], (1, times))
    save_file(tensors, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", f"{words}.*{into} takes {16 * times} channels, 16 come out")


def test_kontext_by_what_names_it(tmp_path, tiny):
    tensors = tiny.state("transformer", "bfl")
    save_file(tensors, tmp_path / "flux1-Kontext-dev.safetensors")
    refused(tmp_path / "flux1-Kontext-dev.safetensors", "FLUX.1 Kontext, which edits pictures")
    save_file(tensors, tmp_path / "x.safetensors", metadata={"modelspec.title": "FLUX.1 Kontext [dev]"})
    refused(tmp_path / "x.safetensors", "FLUX.1 Kontext")
    save_file(tensors, tmp_path / "y.safetensors", metadata={"modelspec.title": "FLUX.1 [dev]"})
    open_checkpoint(tmp_path / "y.safetensors").close()


@pytest.mark.parametrize(
    ("name", "words"),
    [("FluxFillPipeline", "FLUX.1 Fill"), ("FluxKontextPipeline", "FLUX.1 Kontext"), ("FluxControlPipeline", "Depth"),
     ("FluxControlNetPipeline", "ControlNet"), ("FluxPriorReduxPipeline", "Redux"), ("ChromaPipeline", "Chroma")],
)  # fmt: skip
def test_pipelines_by_their_class(tmp_path, tiny, name, words):
    folder = tiny.pipeline(tmp_path / "whole")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
    refused(folder, f"{words}.*{name} in model_index.json")
    with pytest.raises(CheckpointError, match=words):
        open_component(folder, "transformer")


def test_folders_of_quantised_weights(tmp_path, tiny):
    folder = tiny.component(tmp_path / "transformer", "transformer")
    config = {**tiny.CONFIGS["transformer"], "quantization_config": {"quant_method": "bitsandbytes"}}
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "weights quantised by bitsandbytes; use the bfloat16 checkpoint")


# -- bundles and lone prefixes -------------------------------------------------------------------------------------

LONE = {
    "vae.": "vae", "first_stage_model.": "vae", "diffusion_model.": "transformer",
    "model.diffusion_model.": "transformer", "text_encoders.t5xxl.transformer.": "text_encoder_2",
}  # fmt: skip


@pytest.mark.parametrize(("prefix", "name"), LONE.items())
def test_a_lone_prefix(tmp_path, tiny, prefix, name):
    layout = "diffusers" if name == "text_encoder_2" else "bfl"
    tensors = tiny.state(name, layout, np.float32)
    save_file({prefix + key: value for key, value in tensors.items()}, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", to="bfl", progress=False)
    got = load_file(tmp_path / "y.safetensors")
    assert got.keys() == tensors.keys()
    assert all(np.array_equal(got[key], value) for key, value in tensors.items())


TWICE = {
    "autoencoders": (("vae.", "vae"), ("first_stage_model.", "vae")),
    "transformers": (("model.diffusion_model.", "transformer"), ("diffusion_model.", "transformer")),
    "text encoders": (("text_encoders.t5xxl.transformer.", "text_encoder_2"),
                      ("cond_stage_model.t5xxl.transformer.", "text_encoder_2")),
}  # fmt: skip


@pytest.mark.parametrize("parts", TWICE.values(), ids=TWICE)
def test_two_of_one_kind_in_a_bundle(tmp_path, tiny, parts):
    tensors = {}
    for seed, (prefix, name) in enumerate(parts):
        layout = "diffusers" if name == "text_encoder_2" else "bfl"
        tensors |= {prefix + key: value for key, value in tiny.state(name, layout, seed=seed).items()}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(
        CoverageError, match=f"{re.escape(str(tmp_path))}.*several sets of tensors for the {parts[0][1]}"
    ):
        open_checkpoint(tmp_path / "x.safetensors")


def test_two_of_one_kind_in_a_folder(tmp_path, tiny):
    transformer = tiny.state("transformer", "bfl")
    bundle = {f"model.diffusion_model.{key}": value for key, value in transformer.items()}
    bundle |= {f"vae.{key}": value for key, value in tiny.state("vae", "bfl").items()}
    save_file(bundle, tmp_path / "flux1.safetensors")
    save_file(tiny.state("vae", "bfl", seed=1), tmp_path / "ae.safetensors")
    refused(tmp_path, "several files hold a vae; keep one")
    component = tiny.component(tmp_path / "c", "transformer")
    convert(component, tmp_path / "o", to="orbax", progress=False)
    for file in component.iterdir():
        (tmp_path / "o" / file.name).write_bytes(file.read_bytes())
    refused(tmp_path / "o", "holds Orbax arrays and diffusion_pytorch_model.safetensors; keep one of the two")


# -- configurations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [True, False])
def test_a_configuration_without_guidance_embeds(tmp_path, tiny, guided):
    """The tensors tell; in diffusers the value that is left out stands for a model without."""
    config = {**tiny.CONFIGS["transformer"], "guidance_embeds": guided}
    tensors = {k: v for k, v in tiny.state("transformer").items() if guided or "guidance" not in k}
    folder = tiny.component(tmp_path / "transformer", "transformer", tensors)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "guidance_embeds"}))
    with open_checkpoint(folder) as opened:
        assert opened.parts["transformer"].config["guidance_embeds"] is guided
    convert(folder, tmp_path / "out", to="diffusers", verify="exact", progress=False)


# -- every message names the file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["scale", "aliases", "configuration", "values"])
def test_messages_name_the_file(tmp_path, tiny, where):
    path = tmp_path / "x.safetensors"
    tensors = tiny.state("text_encoder_2", dtype=np.float32)
    if where == "scale":
        save_file(tensors | {"encoder.block.0.layer.0.SelfAttention.q.scale_weight": ONE}, path)
    elif where == "aliases":
        save_file(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"] + 1}, path)
    elif where == "configuration":
        path = tiny.component(tmp_path / "x", "text_encoder_2")
        (path / "config.json").write_text(json.dumps({"architectures": ["T5EncoderModel"]}))
    else:
        save_file(tensors | {"shared.weight": tensors["shared.weight"] * np.float32(1e20)}, path)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        convert(path, tmp_path / "out", to="bfl", dtype="f16" if where == "values" else None, progress=False)
