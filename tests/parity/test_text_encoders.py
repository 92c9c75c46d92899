"""CLIP and T5 against transformers, through the real loading path."""

import jax.numpy as jnp
import numpy as np
import pytest

from converters.cover import check_cover
from converters.keymap import canonical, expand
from converters.keymaps import clip as clip_map
from converters.keymaps import t5 as t5_map
from converters.reading.sources import ArraySource, NamedSource, renamed
from sega_jax.models.abstract import build_abstract, parameters
from sega_jax.models.clip import ClipConfig, ClipTextEncoder
from sega_jax.models.t5 import T5Config, T5Encoder, relative_buckets
from sega_jax.weights.load import load

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 2e-5


class ShapeSource:
    """The tensors of a module on the meta device: shapes without data."""

    def __init__(self, module):
        self._tensors = module.state_dict()
        self.files, self.metadata = (), {}

    def keys(self):
        return self._tensors.keys()

    def shape(self, name):
        return tuple(self._tensors[name].shape)


def perturbed(module):
    """The module in evaluation mode with every parameter away from its initial zeros and ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def arrays(module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def clip_config(**changes):
    settings = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 20,
        "pad_token_id": 1,
        "bos_token_id": 94,
        "eos_token_id": 95,
    }
    return transformers.CLIPTextConfig(**{**settings, **changes})


def load_clip(config, tensors, **options):
    settings = ClipConfig.from_dict(config)
    source = renamed(ArraySource(tensors), clip_map.rename)
    dims = clip_map.dims(config)
    return load(lambda rngs: ClipTextEncoder(settings, rngs=rngs), clip_map.ROWS, dims, source, **options)


def clip_ids(length=16) -> np.ndarray:
    """Texts of several lengths: start token, words, then end tokens as padding."""
    ids = np.random.default_rng(0).integers(0, 94, (4, length)).astype(np.int32)
    ids[:, 0] = 94
    for row, end in enumerate((1, 5, 9, length - 1)):
        ids[row, end:] = 95
    return ids


@pytest.mark.parametrize("eos", [95, 2])
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip(eos, act):
    config = clip_config(eos_token_id=eos, hidden_act=act)
    theirs = perturbed(transformers.CLIPTextModel(config))
    ours = load_clip(config.to_dict(), arrays(theirs))
    ids = clip_ids()
    hidden, pooled = ours(jnp.asarray(ids))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids))
    np.testing.assert_allclose(hidden, expected.last_hidden_state.numpy(), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(pooled, expected.pooler_output.numpy(), rtol=0, atol=TOLERANCE)
    assert np.abs(np.asarray(pooled)).max() > 0.5


def test_clip_pools_where_transformers_does_on_ids_without_an_order():
    """The two pooling rules differ once ids above the end token exist, as after textual inversion."""
    ids = np.array([[94, 7, 99, 95, 1, 1], [94, 95, 3, 98, 95, 1], [94, 5, 6, 7, 8, 9]], np.int32)
    pooled = []
    for eos in (95, 2):
        config = clip_config(vocab_size=100, eos_token_id=eos)
        theirs = perturbed(transformers.CLIPTextModel(config))
        ours = load_clip(config.to_dict(), arrays(theirs))
        with torch.no_grad():
            expected = theirs(torch.from_numpy(ids)).pooler_output.numpy()
        pooled.append(np.asarray(ours(jnp.asarray(ids))[1]))
        np.testing.assert_allclose(pooled[-1], expected, rtol=0, atol=TOLERANCE)
    assert np.abs(pooled[0][:2] - pooled[1][:2]).max() > 0.1


def test_clip_from_older_and_larger_files():
    """With the prefix and the buffer of older versions, and from a whole CLIP model."""
    config = clip_config()
    tensors = arrays(perturbed(transformers.CLIPTextModel(config)))
    ids = jnp.asarray(clip_ids())
    expected, _ = load_clip(config.to_dict(), tensors)(ids)
    older = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    older["text_model.embeddings.position_ids"] = np.arange(20)[None]
    np.testing.assert_array_equal(load_clip(config.to_dict(), older)(ids)[0], expected)

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = transformers.CLIPConfig(
        text_config=config.to_dict(), vision_config={**vision, "image_size": 8, "patch_size": 4}, projection_dim=8
    )
    model = perturbed(transformers.CLIPModel(whole))
    ours = load_clip(whole.to_dict(), arrays(model))
    with torch.no_grad():
        expected = model.text_model(torch.from_numpy(clip_ids())).last_hidden_state.numpy()
    np.testing.assert_allclose(ours(ids)[0], expected, rtol=0, atol=TOLERANCE)


def t5_config(**changes):
    settings = {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 6,  # so that heads * d_kv is not d_model
        "d_ff": 56,
        "num_layers": 3,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    }
    return transformers.T5Config(**{**settings, **changes})


def load_t5(config, tensors, **options):
    settings = T5Config.from_dict(config)
    source = renamed(ArraySource(tensors), t5_map.rename)
    return load(lambda rngs: T5Encoder(settings, rngs=rngs), t5_map.ROWS, t5_map.dims(config), source, **options)


def t5_ids(length) -> np.ndarray:
    ids = np.random.default_rng(0).integers(2, 64, (2, length)).astype(np.int32)
    ids[0, length // 3 :] = 0  # padding, which is attended
    return ids


@pytest.mark.parametrize(
    ("length", "changes"),
    [
        (150, {}),
        (9, {}),
        (40, {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "num_heads": 2}),
    ],
)
def test_t5(length, changes):
    config = t5_config(**changes)
    theirs = perturbed(transformers.T5EncoderModel(config))
    ours = load_t5(config.to_dict(), arrays(theirs))
    ids = t5_ids(length)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).last_hidden_state.numpy()
    np.testing.assert_allclose(ours(jnp.asarray(ids)), expected, rtol=0, atol=TOLERANCE)
    assert np.abs(expected).max() > 0.5


def test_t5_from_any_of_its_files():
    """The token table under either or both of its names, and a whole T5 with its decoder."""
    config = t5_config()
    tensors = arrays(perturbed(transformers.T5ForConditionalGeneration(config)))
    assert {"shared.weight", "encoder.embed_tokens.weight", "lm_head.weight"} <= set(tensors)
    ids = jnp.asarray(t5_ids(12))
    expected = load_t5(config.to_dict(), tensors)(ids)
    encoder = {n: t for n, t in tensors.items() if n.startswith("encoder.")}
    without_alias = {n: t for n, t in encoder.items() if n != "encoder.embed_tokens.weight"}
    for variant in (encoder, {**without_alias, "shared.weight": tensors["shared.weight"]}):
        np.testing.assert_array_equal(load_t5(config.to_dict(), variant)(ids), expected)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_bfloat16_stays_near_float32(kind):
    """Norms, scores and softmax are float32 inside, so bfloat16 costs about its own rounding per layer."""
    if kind == "clip":
        config = clip_config()
        tensors = arrays(perturbed(transformers.CLIPTextModel(config)))
        full, half = (
            load_clip(config.to_dict(), tensors, dtype=d)(jnp.asarray(clip_ids()))[0]
            for d in (jnp.float32, jnp.bfloat16)
        )
    else:
        config = t5_config()
        tensors = arrays(perturbed(transformers.T5EncoderModel(config)))
        full, half = (
            load_t5(config.to_dict(), tensors, dtype=d)(jnp.asarray(t5_ids(40))) for d in (jnp.float32, jnp.bfloat16)
        )
    assert half.dtype == jnp.bfloat16
    error = np.asarray(half, np.float32) - np.asarray(full)
    assert np.sqrt(np.mean(error**2) / np.mean(np.square(full))) < 0.03


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (8, 20), (64, 256), (12, 40)])
def test_t5_buckets(buckets, distance):
    attention = transformers.models.t5.modeling_t5.T5Attention
    offset = torch.arange(600)[None, :] - torch.arange(600)[:, None]
    expected = attention._relative_position_bucket(offset, True, buckets, distance).numpy()
    np.testing.assert_array_equal(relative_buckets(600, buckets, distance), expected)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_published_sizes(kind):
    """CLIP-L and T5-XXL: every tensor of the reference used once and every parameter of ours filled, by shape."""
    with torch.device("meta"):
        if kind == "clip":
            config = transformers.CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_attention_heads=12,
                eos_token_id=2,
            )
            reference, settings, keymap = transformers.CLIPTextModel(config), ClipConfig.large(), clip_map
        else:
            config = transformers.T5Config(
                d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
            )
            reference, settings, keymap = transformers.T5EncoderModel(config), T5Config.xxl(), t5_map
    dictionary = config.to_dict()
    kind_of = type(settings)
    assert kind_of.from_dict(dictionary) == settings
    model = ClipTextEncoder if kind == "clip" else T5Encoder
    abstract = build_abstract(lambda rngs: model(settings, rngs=rngs))
    targets = {path: tuple(param.shape) for path, param in parameters(abstract).items()}
    shapes = ShapeSource(reference)
    source = NamedSource(shapes, canonical(shapes.keys(), keymap.rename))
    check_cover(expand(keymap.ROWS, keymap.dims(dictionary)), source, targets)
    size = sum(parameter.numel() for parameter in reference.parameters())
    assert sum(int(np.prod(shape)) for shape in targets.values()) == size
    assert size == {"clip": 123_060_480, "t5": 4_762_310_656}[kind]
