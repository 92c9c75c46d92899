"""FLUX.1 transformer against diffusers on random weights, float32, and the key maps at full size."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import jax.numpy as jnp

from converters.keymap import expand
from converters.keymaps import flux as keymap
from converters.reading.sources import ArraySource
from sega_jax.layouts.dense import Dense
from sega_jax.layouts.streams import bind
from sega_jax.models.flux import PACKING, Flux, FluxConfig
from sega_jax.positional.rope import plain
from sega_jax.weights import load
from tests.tiny import step_inputs

pytestmark = pytest.mark.parity

TINY = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": [4, 6, 6],
}


def random_torch(config: dict):
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(**config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 2:
                parameter.copy_(noise * (3 * parameter.shape[1]) ** -0.5)  # spread of the default init
            else:
                parameter.copy_(0.1 * noise + ("norm_" in name))
    return model


@pytest.mark.parametrize(
    ("guidance_embeds", "batch", "height", "width", "text_tokens"),
    [(True, 1, 6, 6, 5), (False, 2, 4, 7, 9), (True, 2, 9, 3, 1)],
)
def test_transformer_matches_diffusers(guidance_embeds, batch, height, width, text_tokens):
    config = {**TINY, "guidance_embeds": guidance_embeds}
    theirs = random_torch(config)
    source = ArraySource({k: v.numpy() for k, v in theirs.state_dict().items()})
    ours_config = FluxConfig.from_dict(dict(theirs.config))
    ours = load.load(lambda rngs: Flux(ours_config, rngs=rngs), keymap.DIFFUSERS, keymap.dims(theirs.config), source)

    rng = np.random.default_rng(1)
    tokens = rng.standard_normal((batch, height * width, 16), np.float32)
    text = rng.standard_normal((batch, text_tokens, 24), np.float32)
    pooled = rng.standard_normal((batch, 20), np.float32)
    sigma = np.linspace(0.9, 0.3, batch, dtype=np.float32)
    guidance = np.full(batch, 3.5, np.float32) if guidance_embeds else None

    grid = ours_config.rope_spec().grid(height, width, text_tokens)
    ids = grid.ids()
    with torch.no_grad():
        expected = theirs(
            hidden_states=torch.from_numpy(tokens),
            encoder_hidden_states=torch.from_numpy(text),
            pooled_projections=torch.from_numpy(pooled),
            timestep=torch.from_numpy(sigma),
            img_ids=torch.from_numpy(ids["image"]),
            txt_ids=torch.from_numpy(ids["text"]),
            guidance=None if guidance is None else torch.from_numpy(guidance),
        ).sample.numpy()

    rope = plain(grid)
    calls = bind(Dense().calls(grid), {"image": {"text": rope, "image": rope}})
    got = ours(
        step_inputs(
            {"text": jnp.asarray(text), "image": jnp.asarray(tokens)},
            jnp.asarray(sigma),
            jnp.asarray(pooled),
            None if guidance is None else jnp.asarray(guidance),
        ),
        calls,
    )["image"]
    difference = np.abs(np.asarray(got) - expected).max()
    print(f"max |Δ| {difference:.2e}, scale {np.abs(expected).max():.2f}")
    assert difference <= 2e-5


@pytest.mark.parametrize(
    ("guidance_embeds", "tensors", "parameters"), [(True, 1160, 11_901_408_320), (False, 1156, 11_891_178_560)]
)
def test_full_size_key_map_covers_diffusers(guidance_embeds, tensors, parameters):
    with torch.device("meta"):
        theirs = diffusers.FluxTransformer2DModel(
            guidance_embeds=guidance_embeds, axes_dims_rope=(16, 56, 56), in_channels=64
        )
    state = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    mapped = {t.source: t.shape for t in expand(keymap.DIFFUSERS, keymap.dims(theirs.config))}
    assert mapped == state
    assert len(state) == tensors
    assert sum(int(np.prod(shape)) for shape in state.values()) == parameters


def test_bfl_map_agrees_with_diffusers_conversion():
    """The BFL map against diffusers' own BFL conversion, on one double and one single block at full width."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    config = {
        "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 128, "num_attention_heads": 24,
        "in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
    }  # fmt: skip
    dims = keymap.dims(config)
    rng = np.random.default_rng(0)
    ours: dict[tuple, np.ndarray] = {}
    bfl = {}
    for tensor in expand(keymap.BFL, dims):
        values = rng.standard_normal(tensor.shape, np.float32)
        bfl[tensor.source] = torch.from_numpy(values)
        for slot, piece in zip(tensor.slots, tensor.pieces(values), strict=True):
            ours[slot.path, slot.index] = piece
    theirs = convert_flux_transformer_checkpoint_to_diffusers(bfl)
    for tensor in expand(keymap.DIFFUSERS, dims):
        for slot, piece in zip(tensor.slots, tensor.pieces(theirs[tensor.source].numpy()), strict=True):
            np.testing.assert_array_equal(piece, ours.pop((slot.path, slot.index)))
    assert not ours


def test_pack_matches_diffusers():
    latents = np.random.default_rng(0).standard_normal((2, 6, 10, 16), np.float32)
    theirs = diffusers.FluxPipeline._pack_latents(torch.from_numpy(latents.transpose(0, 3, 1, 2)), 2, 16, 6, 10)
    ours = PACKING.pack(jnp.asarray(latents))
    np.testing.assert_array_equal(np.asarray(ours), theirs.numpy())
    np.testing.assert_array_equal(np.asarray(PACKING.unpack(ours, 3, 5)), latents)
