"""The encoder of T5 v1.1 (Raffel et al., arXiv 1910.10683; gated GELU from Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sega_jax.models.layers import Embedding, Linear, RMSNorm, stack
from sega_jax.models.text_common import biased_attention, read_config

# Training settings, settings of the decoder, and a context length that T5 never used.
_IGNORED = (
    "classifier_dropout",
    "dropout_rate",
    "eos_token_id",
    "initializer_factor",
    "n_positions",
    "num_decoder_layers",
    "output_past",
    "scale_decoder_outputs",
)
# Restatements of ``feed_forward_proj``, refused if they say something else.
_IMPLIED = {"is_gated_act": True, "dense_act_fn": "gelu_new"}


@dataclass(frozen=True)
class T5Config:
    """Architecture of a T5 v1.1 encoder; the names are those of the published ``config.json``.

    Attributes:
        vocab_size: rows of the token table.
        d_model: width of a token.
        d_kv: width of a head (``num_heads * d_kv`` need not equal ``d_model``).
        d_ff: width inside the gated feed-forward layer.
        num_layers: number of encoder blocks.
        num_heads: heads per block.
        relative_attention_num_buckets: rows of the relative position table.
        relative_attention_max_distance: distance in tokens from which all share the last bucket.
        layer_norm_epsilon: epsilon of every norm.
        feed_forward_proj: must be ``gated-gelu``, which is what version 1.1 means.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self):
        if self.feed_forward_proj != "gated-gelu":
            raise ValueError(
                f"T5Config: feed_forward_proj {self.feed_forward_proj!r}; only 'gated-gelu' (T5 v1.1) is supported"
            )
        buckets, reach = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 4 or reach <= buckets // 4:
            raise ValueError(
                f"T5Config: {buckets} relative position buckets up to distance {reach}; expected a multiple of 4 "
                "and a distance above a quarter of it"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> T5Config:
        """From a published ``T5Config``, of the encoder alone or of the whole model.

        Raises:
            ValueError: for unknown or missing settings, and for feed-forward layers other than gated GELU.
        """
        if config.get("feed_forward_proj") is None:
            raise ValueError("T5Config: feed_forward_proj is missing, which means T5 v1.0; expected 'gated-gelu'")
        for name, expected in _IMPLIED.items():
            if config.get(name, expected) != expected:
                raise ValueError(f"T5Config: {name} is {config[name]!r}, but T5 v1.1 has {expected!r}")
        return read_config(cls, config, (*_IGNORED, *_IMPLIED))

    @classmethod
    def xxl(cls) -> T5Config:
        """T5 v1.1 XXL, the encoder of FLUX.1."""
        return cls(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)


def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each (query, key) pair of an encoder, int32 [length, length].

    Half of the buckets belong to keys after the query.  Of each half, the first half holds one distance each and
    the rest grow geometrically up to ``max_distance``; anything farther falls into the last (arXiv 1910.10683,
    section 2.1).
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offset)
    half, exact = buckets // 2, buckets // 4
    growth = np.log(np.maximum(distance, exact) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + (growth * (half - exact)).astype(np.int64), half - 1)
    return (np.where(distance < exact, distance, far) + np.where(offset > 0, half, 0)).astype(np.int32)


class T5Block(nnx.Module):
    """Pre-norm self-attention and gated feed-forward, without biases."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        width, inner, hidden = config.d_model, config.num_heads * config.d_kv, config.d_ff
        norm = {"epsilon": config.layer_norm_epsilon, "dtype": dtype, "rngs": rngs}
        plain = {"bias": False, "dtype": dtype, "rngs": rngs}
        self.heads = config.num_heads
        self.norm_attention = RMSNorm(width, **norm)
        self.query = Linear(width, inner, axes=("embed", "heads"), **plain)
        self.key = Linear(width, inner, axes=("embed", "heads"), **plain)
        self.value = Linear(width, inner, axes=("embed", "heads"), **plain)
        self.out = Linear(inner, width, axes=("heads", "embed"), **plain)
        self.norm_mlp = RMSNorm(width, **norm)
        self.gate = Linear(width, hidden, axes=("embed", "mlp"), **plain)
        self.up = Linear(width, hidden, axes=("embed", "mlp"), **plain)
        self.down = Linear(hidden, width, axes=("mlp", "embed"), **plain)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        y = self.norm_attention(x)
        # T5 does not scale the scores: its initialisation of the query does.
        y = biased_attention(self.query(y), self.key(y), self.value(y), bias, heads=self.heads, scale=1.0)
        x = x + self.out(y)
        y = self.norm_mlp(x)
        return x + self.down(jax.nn.gelu(self.gate(y), approximate=True) * self.up(y))


class T5Encoder(nnx.Module):
    """Token ids to hidden states."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.tokens = Embedding(config.vocab_size, config.d_model, dtype=dtype, rngs=rngs)
        # The reference keeps it in its first block; all blocks add the same bias.
        self.relative = Embedding(
            config.relative_attention_num_buckets,
            config.num_heads,
            axes=(None, "heads"),
            dtype=dtype,
            rngs=rngs,
        )
        self.blocks = stack(lambda rngs: T5Block(config, dtype=dtype, rngs=rngs), config.num_layers, rngs)
        self.norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, dtype=dtype, rngs=rngs)

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Hidden states after the final norm, in the dtype of the parameters.

        Padding is attended like any token, as FLUX.1 was trained.  XXL's activations exceed the range of float16;
        use bfloat16 or float32.
        """
        config = self.config
        buckets = relative_buckets(
            ids.shape[1], config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        bias = self.relative(jnp.asarray(buckets)).astype(jnp.float32).transpose(2, 0, 1)
        x, _ = jax.lax.scan(lambda x, block: (block(x, bias), None), self.tokens(ids), self.blocks)
        return self.norm(x)
