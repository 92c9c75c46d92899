"""The autoencoder against diffusers: moments, images, and the names of every published layout."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from converters.cover import check_cover
from converters.keymap import expand
from converters.keymaps import vae as keymap
from converters.reading.sources import ArraySource
from sega_jax.models.abstract import build_abstract, parameters
from sega_jax.models.vae import Vae, VaeConfig
from sega_jax.weights.load import load

BOUND = 1e-4


def reference(config, seed=0):
    """A diffusers autoencoder with every tensor random, biases and norms included."""
    levels = len(config.block_out_channels)
    torch.manual_seed(seed)
    model = diffusers.AutoencoderKL(
        **dataclasses.asdict(config),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim == 1:
                tensor.add_(0.2 * torch.randn_like(tensor))
    return model.eval()


def sizes(quant=False, attention=True, levels=(8, 16, 16), layers=2):
    return VaeConfig(
        latent_channels=4,
        block_out_channels=levels,
        layers_per_block=layers,
        norm_num_groups=4,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        mid_block_add_attention=attention,
    )


def arrays(state):
    return {name: tensor.numpy() for name, tensor in state.items()}


def shapes_of(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def loaded(config, state, layout="diffusers"):
    fields = dataclasses.asdict(config)
    source = ArraySource(arrays(state))
    return load(lambda rngs: Vae(config, rngs=rngs), keymap.rows(fields, layout), keymap.dims(fields), source)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


@pytest.mark.parametrize(
    ("config", "height", "width"),
    [
        (sizes(quant=True), 5, 7),
        (sizes(quant=False), 9, 3),
        (sizes(attention=False, levels=(8, 8, 16, 12), layers=1), 3, 2),
        (sizes(levels=(16,), layers=1), 6, 5),
    ],
    ids=["quant convolutions", "as FLUX.1", "no attention", "one level"],
)
def test_moments_and_images(config, height, width):
    model = reference(config)
    vae = loaded(config, model.state_dict())
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, height * config.factor, width * config.factor, 3)).astype(np.float32)
    latents = rng.normal(size=(2, height, width, 4)).astype(np.float32)
    with torch.no_grad():
        posterior = model.encode(nchw(images)).latent_dist
        decoded = model.decode(nchw(latents)).sample
    mean, logvar = jax.jit(lambda x: vae.encode(x))(images)
    ours = (mean, logvar, jax.jit(lambda x: vae.decode(x))(latents))
    for name, expected, got in zip(
        ("mean", "log-variance", "image"), (posterior.mean, posterior.logvar, decoded), ours, strict=True
    ):
        expected = np.moveaxis(expected.numpy(), 1, -1)
        assert expected.std() > 0.05, f"{name} carries no signal"
        difference = float(np.abs(expected - np.asarray(got)).max())
        print(f"{name}: largest difference {difference:.2e}")
        assert difference <= BOUND, name


def test_flux_tensors_are_all_used_once():
    config = VaeConfig.flux()
    with torch.device("meta"):
        model = diffusers.AutoencoderKL(
            **dataclasses.asdict(config),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    shapes = shapes_of(model.state_dict())
    fields = dataclasses.asdict(config)
    targets = parameters(build_abstract(lambda rngs: Vae(config, rngs=rngs)))
    check_cover(
        expand(keymap.rows(fields), keymap.dims(fields)),
        ArraySource({name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}),
        {path: tuple(param.shape) for path, param in targets.items()},
    )
    assert keymap.detect(shapes) == "diffusers"
    assert VaeConfig.from_dict(json.loads(model.to_json_string())) == config


def test_absent_configuration_keys_mean_what_diffusers_means():
    partial = {"block_out_channels": (16,), "norm_num_groups": 4}
    completed = json.loads(diffusers.AutoencoderKL(**partial).to_json_string())
    assert set(partial) < set(completed)
    assert VaeConfig.from_dict(completed) == VaeConfig.from_dict(partial)


@pytest.mark.parametrize("quant", [False, True])
def test_bfl_layout_is_the_one_diffusers_converts(quant):
    """Our parameters, written under Black Forest Labs' names and read back by diffusers' own converter."""
    config = sizes(quant=quant)
    model = reference(config)
    vae = loaded(config, model.state_dict())
    values = {path: np.asarray(param[...]) for path, param in parameters(vae).items()}
    fields = dataclasses.asdict(config)
    single_file = {
        tensor.source: torch.from_numpy(np.array(tensor.assemble([values[slot.path] for slot in tensor.slots])))
        for tensor in expand(keymap.rows(fields, "bfl"), keymap.dims(fields))
    }
    assert single_file["decoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    converted = convert_ldm_vae_checkpoint(dict(single_file), dict(model.config))
    expected = model.state_dict()
    assert converted.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(converted[name], tensor), name
    again = loaded(config, single_file, keymap.detect(shapes_of(single_file)))
    for path, param in parameters(again).items():
        np.testing.assert_array_equal(param[...], values[path], err_msg=path)


def test_old_attention_names_are_those_diffusers_renames():
    config = sizes()
    model = reference(config)
    fields = dataclasses.asdict(config)
    sources = {}
    for layout in ("diffusers", "diffusers-old"):
        for tensor in expand(keymap.rows(fields, layout), keymap.dims(fields)):
            sources.setdefault(tensor.slots[0].path, {})[layout] = tensor.source
    state = model.state_dict()
    old = {names["diffusers-old"]: state[names["diffusers"]] for names in sources.values()}
    vae = loaded(config, old, keymap.detect(shapes_of(old)))
    renamed = dict(old)
    model._fix_state_dict_keys_on_load(renamed)
    assert old.keys() != renamed.keys() == state.keys()
    for name in state:
        assert torch.equal(renamed[name], state[name]), name
    images = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (1, 12, 8, 3)), jnp.float32)
    np.testing.assert_array_equal(vae.encode(images)[0], loaded(config, state).encode(images)[0])
