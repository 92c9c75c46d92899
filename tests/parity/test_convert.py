"""Conversions judged by diffusers and transformers: folders they wrote, folders they open, names they expect."""

import json

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file, save_file

from converters.convert import convert
from converters.keymap import expand
from converters.keymaps import flux
from converters.kinds import BY_NAME
from converters.verify.values import fingerprint

DEV = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
THIN = DEV | {
    "in_channels": 16, "attention_head_dim": 16, "num_attention_heads": 1, "joint_attention_dim": 24,
    "pooled_projection_dim": 20, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


def shaken(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.to(torch.bfloat16).eval()


def make_transformer(folder):
    shaken(diffusers.FluxTransformer2DModel(**THIN)).save_pretrained(folder, max_shard_size="200KB")


def run_transformer(folder):
    model = diffusers.FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    grid = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(3.0), torch.arange(4.0), indexing="ij"), -1)
    with torch.no_grad():
        return model(
            hidden_states=torch.randn(1, 12, 16, generator=generator),
            encoder_hidden_states=torch.randn(1, 5, 24, generator=generator),
            pooled_projections=torch.randn(1, 20, generator=generator),
            timestep=torch.tensor([0.7]),
            guidance=torch.tensor([3.5]),
            img_ids=grid.reshape(12, 3),
            txt_ids=torch.zeros(5, 3),
        ).sample


def make_vae(folder):
    widths = (32, 32, 64, 64)
    model = diffusers.AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, latent_channels=16, norm_num_groups=32, use_quant_conv=False,
        use_post_quant_conv=False, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip
    shaken(model).save_pretrained(folder)


def run_vae(folder):
    model = diffusers.AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    with torch.no_grad():
        image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        return model.decode(model.encode(image).latent_dist.mean).sample


def make_clip(folder):
    config = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=64, intermediate_size=128, num_hidden_layers=12, num_attention_heads=1,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=2, projection_dim=64,
    )  # fmt: skip
    shaken(transformers.CLIPTextModel(config)).save_pretrained(folder)


def run_clip(folder):
    model, info = transformers.CLIPTextModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        return model(torch.arange(12)[None] + 3).last_hidden_state


def make_t5(folder):
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=24, num_heads=2, feed_forward_proj="gated-gelu"
    )
    shaken(transformers.T5EncoderModel(config)).save_pretrained(folder)


def run_t5(folder):
    model, info = transformers.T5EncoderModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    with torch.no_grad():
        return model(torch.arange(12)[None] + 3).last_hidden_state


FAMILIES = {
    "transformer": (make_transformer, run_transformer),
    "vae": (make_vae, run_vae),
    "text_encoder": (make_clip, run_clip),
    "text_encoder_2": (make_t5, run_t5),
}


def tensors(folder):
    merged = {}
    for file in sorted(folder.glob("*.safetensors")):
        merged |= load_file(file)
    return merged


def same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value, right[name]), name


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A component at full depth and tiny width as its own library writes it."""
    folder = tmp_path_factory.mktemp(request.param) / "source"
    make, run = FAMILIES[request.param]
    make(folder)
    return request.param, folder, run


@pytest.mark.parametrize("through", ["orbax", "bfl"])
def test_full_depth_round_trip(family, tmp_path, through):
    _, source, run = family
    middle = tmp_path / ("middle.safetensors" if through == "bfl" else "middle")
    convert(source, middle, to=through, verify="exact", progress=False)
    convert(middle, tmp_path / "back", to="diffusers", verify="exact", max_shard_size="300KB", progress=False)
    same(tensors(source), tensors(tmp_path / "back"))
    assert torch.equal(run(source), run(tmp_path / "back"))


def test_comfy_file_opens_in_the_libraries(tmp_path):
    """A ComfyUI single file made by renaming alone becomes four folders that open, with equal outputs."""
    bundle = {}
    for name, prefix in (
        ("transformer", "model.diffusion_model."),
        ("vae", "vae."),
        ("text_encoder", "text_encoders.clip_l.transformer."),
        ("text_encoder_2", "text_encoders.t5xxl.transformer."),
    ):
        FAMILIES[name][0](tmp_path / name)
        convert(tmp_path / name, tmp_path / f"{name}.safetensors", to="bfl", progress=False)
        bundle |= {prefix + key: value for key, value in load_file(tmp_path / f"{name}.safetensors").items()}
    save_file(bundle, tmp_path / "comfy.safetensors")
    convert(tmp_path / "comfy.safetensors", tmp_path / "out", to="diffusers", verify="exact", progress=False)
    for name, (_, run) in FAMILIES.items():
        source, out = tensors(tmp_path / name), tensors(tmp_path / "out" / name)
        same(source, out)
        if name in ("transformer", "text_encoder_2"):  # shapes do not tell rope dims or relative distances
            config = json.loads((tmp_path / name / "config.json").read_text())
            (tmp_path / "out" / name / "config.json").write_text(json.dumps(config))
        assert torch.equal(run(tmp_path / name), run(tmp_path / "out" / name))


def test_bfl_export_against_diffusers_at_full_width(tmp_path):
    """One double and one single block at width 3072: what diffusers' own converter makes of our BFL file."""
    config = DEV | {"num_layers": 1, "num_single_layers": 1}
    generator = torch.Generator().manual_seed(0)
    state = {
        t.source: torch.randn(t.shape, generator=generator, dtype=torch.bfloat16)
        for t in expand(flux.DIFFUSERS, flux.dims(config))
    }
    (tmp_path / "source").mkdir()
    save_file(state, tmp_path / "source" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "source", tmp_path / "flux.safetensors", to="bfl", verify="exact", progress=False)
    same(convert_flux_transformer_checkpoint_to_diffusers(load_file(tmp_path / "flux.safetensors")), state)
    convert(tmp_path / "flux.safetensors", tmp_path / "back", to="diffusers", progress=False)
    same(tensors(tmp_path / "back"), state)
    assert fingerprint(tmp_path / "flux.safetensors") == fingerprint(tmp_path / "source")


def test_vae_export_against_diffusers(tmp_path):
    make_vae(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "ae.safetensors", to="bfl", verify="exact", progress=False)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    theirs = convert_ldm_vae_checkpoint(load_file(tmp_path / "ae.safetensors"), config)
    same(theirs, tensors(tmp_path / "source"))


@pytest.mark.parametrize("guidance", [True, False])
def test_full_size_maps_on_meta_tensors(guidance):
    """FLUX.1-dev and -schnell, both layouts, both directions, without their 24 GB."""
    config = DEV | {"guidance_embeds": guidance}
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(**config)
    theirs = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    family = BY_NAME["transformer"]
    assert {t.source: t.shape for t in family.tensors(config, "diffusers")} == theirs
    bfl = {t.source: torch.empty(t.shape, device="meta") for t in family.tensors(config, "bfl")}
    back = convert_flux_transformer_checkpoint_to_diffusers(dict(bfl))
    assert {name: tuple(value.shape) for name, value in back.items()} == theirs

    def slots(layout):
        every = family.tensors(config, layout)
        return {slot: shape for t in every for slot, shape in zip(t.slots, t.piece_shapes(), strict=True)}

    assert slots("diffusers") == slots("bfl")
    inferred = family.infer({name: tuple(value.shape) for name, value in bfl.items()}, "bfl")
    assert {key: inferred[key] for key in ("num_layers", "num_single_layers", "guidance_embeds")} == {
        "num_layers": 19, "num_single_layers": 38, "guidance_embeds": guidance,
    }  # fmt: skip
    assert tuple(inferred["axes_dims_rope"]) == (16, 56, 56)
    assert sum(int(np.prod(shape)) for shape in theirs.values()) == (11_901_408_320 if guidance else 11_891_178_560)
