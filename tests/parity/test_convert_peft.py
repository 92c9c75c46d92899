"""Scales and starts of LoRAs as PEFT itself computes them: adapters made, saved and merged by PEFT."""

import copy
import warnings

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

from converters.errors import CheckpointError
from converters.keymap import expand
from converters.keymaps import flux
from converters.lora import read_lora

CONFIG = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 3,
    "joint_attention_dim": 24, "pooled_projection_dim": 20, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
TARGETS = ["to_q", "add_q_proj", "ff.net.0.proj", "proj_mlp", "norm.linear"]
SLOTS = {t.source: t.slots[0] for t in expand(flux.DIFFUSERS, flux.dims(CONFIG)) if t.source.endswith(".weight")}


def base():
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(**CONFIG).eval()


def train(model):
    """What training does to the factors, as far as a merge can tell."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def changes(before, after):
    """What merging has made of each weight, by slot."""
    old = before.state_dict()
    found = {}
    for name, value in after.state_dict().items():
        if name in SLOTS and not torch.equal(value, old[name]):
            found["transformer", SLOTS[name]] = (value.double() - old[name].double()).numpy()
    return found


def assert_same(ours, theirs, bound):
    assert ours.keys() == theirs.keys()
    assert len(theirs) > 5
    for key, value in theirs.items():
        assert np.abs(value).max() > 0.01
        assert np.abs(ours[key] - value).max() <= bound, key


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    "pattern",
    [{}, {"proj": 16}, {"^transformer_blocks.0.attn.to_q": 16}, {r"transformer_blocks\.\d+\.attn\.to_q": 3, "to_q": 1},
     {"q_proj": 16}, {"net.0.proj|to_q": 5}],
)  # fmt: skip
def test_scales(tmp_path, pattern, use_rslora, as_file):
    settings = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, alpha_pattern=dict(pattern), use_rslora=use_rslora,
        rank_pattern={"add_q_proj": 2, "^single_transformer_blocks.0.proj_mlp": 6},
    )  # fmt: skip
    with warnings.catch_warnings(action="ignore"):  # of patterns without a module
        train(peft.get_peft_model(base(), settings)).save_pretrained(tmp_path)
        theirs = changes(base(), peft.PeftModel.from_pretrained(base(), tmp_path).merge_and_unload())
    path = tmp_path / "adapter_model.safetensors" if as_file else tmp_path
    if "q_proj" in pattern:  # PEFT lets it pass unused
        with pytest.raises(CheckpointError, match="'q_proj'"):
            read_lora(path)
    assert_same(read_lora(path, ignore_unknown="q_proj" in pattern).deltas(), theirs, 1e-6)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_change_the_base(tmp_path, start):
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=start)
    model = peft.get_peft_model(base(), settings)
    model.peft_config["default"].init_lora_weights = True  # PEFT asks for this before the start is saved
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    train(model).save_pretrained(tmp_path / "raw")
    theirs = changes(base(), copy.deepcopy(model).merge_and_unload())
    with pytest.raises(CheckpointError, match=f"started with '{start}'"):
        read_lora(tmp_path / "raw")
    with warnings.catch_warnings(action="ignore"):  # that the base was changed, which is what this is about
        model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert_same(read_lora(tmp_path / "plain").deltas(), theirs, 1e-5)


def test_dora_is_refused(tmp_path):
    settings = peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True)
    train(peft.get_peft_model(base(), settings)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="DoRA"):
        read_lora(tmp_path)


def test_settings_in_the_header_that_diffusers_writes(tmp_path):
    model = base()
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, alpha_pattern={"proj_mlp": 1}))
    train(model)
    layers = peft.get_peft_model_state_dict(model)
    diffusers.FluxPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    model.fuse_lora()
    model.unload_lora()
    assert_same(read_lora(tmp_path).deltas(), changes(base(), model), 1e-6)
