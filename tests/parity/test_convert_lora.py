"""The change a LoRA makes, in every dialect, against what diffusers and PEFT make of the same file at full width."""

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers.loaders import FluxLoraLoaderMixin
from safetensors.numpy import save_file
from safetensors.torch import load_file

from converters.keymap import Slot, expand
from converters.keymaps import flux
from converters.lora import Factors, Lora, express, read_lora

WIDTH = 3072
CONFIG = {
    "in_channels": 64, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
NAMES = {
    Slot("double.image.attention.query.kernel", 0): "transformer_blocks.0.attn.to_q",
    Slot("double.image.attention.key.kernel", 0): "transformer_blocks.0.attn.to_k",
    Slot("double.image.attention.value.kernel", 0): "transformer_blocks.0.attn.to_v",
    Slot("double.text.attention_out.kernel", 0): "transformer_blocks.0.attn.to_add_out",
    Slot("single.attention.query.kernel", 0): "single_transformer_blocks.0.attn.to_q",
    Slot("single.attention.key.kernel", 0): "single_transformer_blocks.0.attn.to_k",
    Slot("single.attention.value.kernel", 0): "single_transformer_blocks.0.attn.to_v",
}


def zero_transformer():
    """A model of zeros, which cost no memory until a LoRA is merged into them: the merged weight is the change."""
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(**CONFIG)
    state = {name: torch.zeros(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


def change_by_diffusers(path):
    state, alphas = FluxLoraLoaderMixin.lora_state_dict(load_file(path), return_alphas=True)
    model = zero_transformer()
    known = {f"transformer.{name.removesuffix('.weight')}" for name in model.state_dict()}
    state = {k: v for k, v in state.items() if k.rsplit(".lora_", 1)[0] in known}
    model.load_lora_adapter(state, network_alphas=alphas, prefix="transformer")
    model.fuse_lora()
    model.unload_lora()
    return {name: value.numpy() for name, value in model.state_dict().items()}


def small_lora():
    rng = np.random.default_rng(0)

    def factors(scale):
        a = rng.standard_normal((2, WIDTH)).astype(np.float32)
        return Factors(a, rng.standard_normal((WIDTH, 2)).astype(np.float32) / 10, scale)

    return Lora({"transformer": {slot: factors(0.5) for slot in NAMES}}, {}, "small")


@pytest.mark.parametrize("dialect", ["diffusers", "kohya", "ai-toolkit", "xlabs"])
def test_change_of_weights(tmp_path, dialect):
    lora = small_lora()
    save_file(express(lora, dialect), tmp_path / "lora.safetensors")
    theirs = change_by_diffusers(tmp_path / "lora.safetensors")
    ours = read_lora(tmp_path / "lora.safetensors").deltas()
    assert len(ours) == len(NAMES)
    for slot, name in NAMES.items():
        expected = theirs[f"{name}.weight"]
        difference = np.abs(ours["transformer", slot] - expected).max()
        assert np.abs(expected).max() > 0.1
        assert difference <= 1e-6, (name, difference)


def test_control_lora_of_full_depth(tmp_path):
    """BFL's style, whose reader in diffusers wants every module of a full model; two blocks are compared."""
    rng = np.random.default_rng(1)
    config = CONFIG | {"num_layers": 19, "num_single_layers": 38}
    tensors = {}
    for tensor in expand(flux.BFL, flux.dims(config)):
        name, shape = tensor.source, tensor.shape
        if name.endswith(".scale"):
            tensors[name] = np.ones(shape, np.float32)
        elif name.endswith(".weight"):
            first = name.startswith(("double_blocks.0.", "single_blocks.0.", "final_layer"))
            stem = name.removesuffix(".weight")
            make = rng.standard_normal if first else np.zeros
            tensors[f"{stem}.lora_A.weight"] = np.asarray(make((2, shape[1])), np.float32) / 10
            tensors[f"{stem}.lora_B.weight"] = np.asarray(make((shape[0], 2)), np.float32) / 10
    save_file(tensors, tmp_path / "control.safetensors")
    state = FluxLoraLoaderMixin.lora_state_dict(load_file(tmp_path / "control.safetensors"))
    lora = read_lora(tmp_path / "control.safetensors")
    ours = lora.factors["transformer"]
    names = NAMES | {
        Slot("single.mlp_in.kernel", 0): "single_transformer_blocks.0.proj_mlp",
        Slot("double.image.modulation.kernel", 0): "transformer_blocks.0.norm1.linear",
        Slot("out.kernel"): "proj_out",
    }
    for slot, name in names.items():
        a, b = (state[f"transformer.{name}.lora_{part}.weight"].numpy() for part in "AB")
        assert np.abs(ours[slot].delta() - b @ a).max() <= 1e-6
    # The final layer's halves are (scale, shift) in diffusers and (shift, scale) in the slot.  diffusers swaps the
    # halves of A as well, which are ranks, not outputs, and so pairs ranks wrongly; A is taken from the file.
    a, b = tensors["final_layer.adaLN_modulation.1.lora_A.weight"], state["transformer.norm_out.linear.lora_B.weight"]
    b = b.numpy()
    expected = np.concatenate([(b @ a)[WIDTH:], (b @ a)[:WIDTH]])
    assert np.abs(ours[Slot("out_modulation.kernel")].delta() - expected).max() <= 1e-6
    assert len(lora.replaced["transformer"]) == 19 * 4 + 38 * 2
