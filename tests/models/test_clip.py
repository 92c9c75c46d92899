import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters.keymap import expand
from converters.keymaps import clip as clip_map
from sega_jax.models.abstract import axes, build_abstract, count, initialize, parameters
from sega_jax.models.clip import ClipConfig, ClipTextEncoder, quick_gelu

PUBLISHED = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "eos_token_id": 39,
    "hidden_act": "quick_gelu",
    "architectures": ["CLIPTextModel"],
    "torch_dtype": "bfloat16",
    "dropout": 0.0,
}
CONFIG = ClipConfig.from_dict(PUBLISHED)


@pytest.fixture(scope="module")
def encoder():
    return initialize(lambda rngs: ClipTextEncoder(CONFIG, rngs=rngs))


def test_later_tokens_do_not_reach_earlier_ones(encoder):
    ids = jnp.arange(12, dtype=jnp.int32)[None]
    hidden, _ = encoder(ids)
    changed, _ = encoder(ids.at[0, 7].set(30))
    difference = np.abs(np.asarray(hidden - changed)).max(-1)[0]
    assert not difference[:7].any()
    assert (difference[7:] > 0).all()


def test_pooling_takes_the_first_end_token_or_by_the_old_rule_the_highest_id(encoder):
    ids = jnp.asarray([[1, 5, 39, 39, 39, 39], [1, 39, 2, 39, 2, 2]], jnp.int32)
    hidden, pooled = encoder(ids)
    np.testing.assert_array_equal(pooled, np.asarray(hidden)[[0, 1], [2, 1]])
    encoder_of_old = initialize(lambda rngs: ClipTextEncoder(dataclasses.replace(CONFIG, eos_token_id=2), rngs=rngs))
    ids = jnp.asarray([[1, 5, 39, 39, 39, 39], [1, 2, 30, 38, 2, 38]], jnp.int32)
    hidden, pooled = encoder_of_old(ids)
    np.testing.assert_array_equal(pooled, np.asarray(hidden)[[0, 1], [2, 3]])


def test_positions_matter(encoder):
    hidden, _ = encoder(jnp.full((1, 6), 4, jnp.int32))
    # Causal attention over equal tokens: only the position table can tell them apart.
    assert np.abs(np.diff(np.asarray(hidden)[0], axis=0)).max(-1).min() > 1e-3


def test_texts_longer_than_the_position_table_are_refused(encoder):
    with pytest.raises(ValueError, match=r"13 tokens.*at most 12"):
        encoder(jnp.zeros((1, 13), jnp.int32))


def test_quick_gelu():
    x = np.linspace(-4, 4, 33)
    np.testing.assert_allclose(quick_gelu(jnp.asarray(x, jnp.float32)), x / (1 + np.exp(-1.702 * x)), atol=1e-6)


def test_activations_follow_the_parameters():
    encoder = initialize(lambda rngs: ClipTextEncoder(CONFIG, dtype=jnp.bfloat16, rngs=rngs))
    hidden, pooled = jax.jit(encoder)(jnp.zeros((2, 5), jnp.int32))
    assert hidden.dtype == pooled.dtype == jnp.bfloat16
    assert hidden.shape == (2, 5, 16)
    assert pooled.shape == (2, 16)


def test_every_parameter_names_each_dimension():
    params = parameters(build_abstract(lambda rngs: ClipTextEncoder(CONFIG, rngs=rngs)))
    for path, param in params.items():
        assert len(axes(param)) == len(param.shape), path
        assert (axes(param)[0] == "layers") == path.startswith("blocks."), path
    assert axes(params["blocks.query.kernel"]) == ("layers", "embed", "heads")
    assert axes(params["blocks.out.kernel"]) == ("layers", "heads", "embed")


def test_key_map_targets_are_the_parameters():
    params = parameters(build_abstract(lambda rngs: ClipTextEncoder(CONFIG, rngs=rngs)))
    shapes: dict[str, dict] = {}
    for tensor in expand(clip_map.ROWS, clip_map.dims(PUBLISHED)):
        for slot, shape in zip(tensor.slots, tensor.piece_shapes(), strict=True):
            shapes.setdefault(slot.path, {})[slot.index] = shape
    mapped = {path: shape[None] if None in shape else (len(shape), *shape[0]) for path, shape in shapes.items()}
    assert mapped == {path: tuple(param.shape) for path, param in params.items()}


def test_size_of_the_published_encoder():
    large = build_abstract(lambda rngs: ClipTextEncoder(ClipConfig.large(), rngs=rngs))
    per_layer = 4 * (768 * 768 + 768) + 2 * 768 * 3072 + 3072 + 768 + 4 * 768
    assert count(large) == (49408 + 77) * 768 + 12 * per_layer + 2 * 768


def test_configurations():
    whole = {"text_config": PUBLISHED, "vision_config": {}, "projection_dim": 512}
    assert ClipConfig.from_dict(whole) == CONFIG
    assert clip_map.dims(whole) == clip_map.dims(PUBLISHED)
    with pytest.raises(ValueError, match=r"unknown settings.*'rope_theta'.*missing settings.*'vocab_size'"):
        ClipConfig.from_dict({k: v for k, v in PUBLISHED.items() if k != "vocab_size"} | {"rope_theta": 1})
    with pytest.raises(ValueError, match="hidden_act 'relu'"):
        ClipConfig.from_dict(PUBLISHED | {"hidden_act": "relu"})
    with pytest.raises(ValueError, match="does not divide into 3 heads"):
        ClipConfig.from_dict(PUBLISHED | {"num_attention_heads": 3})
    with pytest.raises(ValueError, match="eos_token_id"):
        ClipConfig.from_dict(PUBLISHED | {"eos_token_id": [1, 2]})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("text_model.final_layer_norm.weight", "final_layer_norm.weight"),
        ("final_layer_norm.weight", "final_layer_norm.weight"),
        ("text_model.embeddings.position_ids", None),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", None),
        ("logit_scale", None),
        ("text_model.encoder.surprise", "encoder.surprise"),
    ],
)
def test_declared_renames(name, expected):
    assert clip_map.rename(name) == expected
