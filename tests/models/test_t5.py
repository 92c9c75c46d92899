import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from converters.keymap import expand
from converters.keymaps import t5 as t5_map
from sega_jax.models.abstract import axes, build_abstract, count, initialize, parameters
from sega_jax.models.t5 import T5Config, T5Encoder, relative_buckets

PUBLISHED = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 3,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "dense_act_fn": "gelu_new",
    "num_decoder_layers": 3,
    "tie_word_embeddings": False,
    "architectures": ["T5EncoderModel"],
}
CONFIG = T5Config.from_dict(PUBLISHED)


@pytest.fixture(scope="module")
def encoder():
    return initialize(lambda rngs: T5Encoder(CONFIG, rngs=rngs))


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (16, 64), (12, 40), (64, 256), (32, 100)])
def test_buckets_by_exact_integer_arithmetic(buckets, distance):
    """Bucket ``exact + k`` starts where ``(d / exact) ** (half - exact)`` reaches ``(distance / exact) ** k``."""
    half, exact = buckets // 2, buckets // 4
    span = half - exact

    def bucket(offset: int) -> int:
        d = abs(offset)
        if d < exact:
            inside = d
        else:
            reached = [k for k in range(span) if d**span * exact**k >= distance**k * exact**span]
            inside = exact + max(reached)
        return inside + (half if offset > 0 else 0)

    length = 2 * distance
    expected = [[bucket(key - query) for key in range(length)] for query in range(length)]
    table = relative_buckets(length, buckets, distance)
    np.testing.assert_array_equal(table, expected)
    assert set(table.ravel().tolist()) == set(range(buckets)) - {half}  # distance 0 counts as before


def test_attention_sees_both_sides_and_padding(encoder):
    ids = jnp.arange(2, 12, dtype=jnp.int32)[None]
    hidden = encoder(ids)
    for position in (0, 9):
        changed = encoder(ids.at[0, position].set(0))
        assert (np.abs(np.asarray(hidden - changed)).max(-1) > 0).all()


def test_without_a_bias_the_encoder_has_no_sense_of_order(encoder):
    encoder = nnx.clone(encoder)
    ids = np.array([[3, 9, 27, 5, 11]], np.int32)
    order = np.array([4, 2, 0, 1, 3])
    encoder.relative.table.set_value(10 * encoder.relative.table[...])
    ordered, permuted = encoder(jnp.asarray(ids)), encoder(jnp.asarray(ids[:, order]))
    assert np.abs(np.asarray(ordered)[:, order] - permuted).max() > 1e-3
    encoder.relative.table.set_value(jnp.zeros_like(encoder.relative.table[...]))
    ordered, permuted = encoder(jnp.asarray(ids)), encoder(jnp.asarray(ids[:, order]))
    np.testing.assert_allclose(np.asarray(ordered)[:, order], permuted, atol=1e-5)


def test_activations_beyond_float16_survive_in_bfloat16(encoder):
    """XXL's residual stream grows to about 1e5, which float16 cannot hold; the norm brings it back."""
    encoder = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), encoder)
    encoder.blocks.down.kernel.set_value(encoder.blocks.down.kernel[...] * 1e6)
    encoder.tokens.table.set_value(encoder.tokens.table[...] * 50)
    block = jax.tree.map(lambda leaf: leaf[0], encoder.blocks)
    ids = jnp.arange(12, dtype=jnp.int32)[None]
    inside = block(encoder.tokens(ids), jnp.zeros((1, 12, 12), jnp.float32))
    assert float(jnp.abs(inside.astype(jnp.float32)).max()) > 65504
    hidden = encoder(ids)
    assert hidden.dtype == jnp.bfloat16
    assert bool(jnp.isfinite(hidden.astype(jnp.float32)).all())
    np.testing.assert_allclose(np.square(np.asarray(hidden, np.float32)).mean(-1), 1, rtol=0.02)


def test_every_parameter_names_each_dimension():
    params = parameters(build_abstract(lambda rngs: T5Encoder(CONFIG, rngs=rngs)))
    for path, param in params.items():
        assert len(axes(param)) == len(param.shape), path
        assert (axes(param)[0] == "layers") == path.startswith("blocks."), path
    assert axes(params["relative.table"]) == (None, "heads")
    assert axes(params["blocks.down.kernel"]) == ("layers", "mlp", "embed")


def test_key_map_targets_are_the_parameters():
    params = parameters(build_abstract(lambda rngs: T5Encoder(CONFIG, rngs=rngs)))
    shapes: dict[str, dict] = {}
    for tensor in expand(t5_map.ROWS, t5_map.dims(PUBLISHED)):
        for slot, shape in zip(tensor.slots, tensor.piece_shapes(), strict=True):
            shapes.setdefault(slot.path, {})[slot.index] = shape
    mapped = {path: shape[None] if None in shape else (len(shape), *shape[0]) for path, shape in shapes.items()}
    assert mapped == {path: tuple(param.shape) for path, param in params.items()}


def test_size_of_the_published_encoder():
    xxl = build_abstract(lambda rngs: T5Encoder(T5Config.xxl(), rngs=rngs))
    per_layer = 4 * 4096 * 4096 + 3 * 4096 * 10240 + 2 * 4096
    assert count(xxl) == 32128 * 4096 + 32 * 64 + 24 * per_layer + 4096


def test_configurations():
    with pytest.raises(ValueError, match=r"unknown settings.*'rope_theta'.*missing settings.*'d_ff'"):
        T5Config.from_dict({k: v for k, v in PUBLISHED.items() if k != "d_ff"} | {"rope_theta": 1})
    with pytest.raises(ValueError, match="feed_forward_proj 'relu'"):
        T5Config.from_dict({**PUBLISHED, "feed_forward_proj": "relu"})
    with pytest.raises(ValueError, match=r"v1\.0"):
        T5Config.from_dict({k: v for k, v in PUBLISHED.items() if k != "feed_forward_proj"})
    with pytest.raises(ValueError, match="dense_act_fn"):
        T5Config.from_dict({**PUBLISHED, "dense_act_fn": "relu"})
    with pytest.raises(ValueError, match="multiple of 4"):
        T5Config.from_dict({**PUBLISHED, "relative_attention_num_buckets": 30})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shared.weight", "shared.weight"),
        ("encoder.embed_tokens.weight", "shared.weight"),
        ("decoder.block.0.layer.0.layer_norm.weight", None),
        ("lm_head.weight", None),
        ("encoder.surprise", "encoder.surprise"),
    ],
)
def test_declared_renames(name, expected):
    assert t5_map.rename(name) == expected
