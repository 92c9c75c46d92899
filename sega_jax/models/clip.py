"""The text encoder of CLIP (Radford et al., arXiv 2103.00020), which gives FLUX.1 its pooled text vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sega_jax.models.layers import Embedding, LayerNorm, Linear, stack
from sega_jax.models.text_common import biased_attention, read_config

# Training settings, and the width of the contrastive projection that an encoder alone does not have.
_IGNORED = (
    "attention_dropout",
    "dropout",
    "initializer_factor",
    "initializer_range",
    "projection_dim",
)


def quick_gelu(x: jax.Array) -> jax.Array:
    """``x * sigmoid(1.702 x)``, the approximation OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


def _exact_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": _exact_gelu}


@dataclass(frozen=True)
class ClipConfig:
    """Architecture of a CLIP text encoder; the names are those of the published ``config.json``.

    Attributes:
        vocab_size: rows of the token table.
        hidden_size: width of a token.
        intermediate_size: width inside the MLP.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads per block.
        max_position_embeddings: longest text in tokens.
        hidden_act: ``quick_gelu`` (OpenAI) or ``gelu`` (exact; OpenCLIP).
        layer_norm_eps: epsilon of every layer norm.
        eos_token_id: id whose first position is pooled; 2 stands for the rule of old configurations, which pool
            at the highest id.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"ClipConfig: hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads"
            )
        if self.hidden_act not in _ACTIVATIONS:
            raise ValueError(f"ClipConfig: hidden_act {self.hidden_act!r}, expected one of {sorted(_ACTIVATIONS)}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ClipConfig:
        """From a ``CLIPTextConfig``, or from the ``text_config`` inside a whole ``CLIPConfig``.

        Raises:
            ValueError: for unknown or missing settings.
        """
        config = config.get("text_config", config)
        end = config.get("eos_token_id", cls.eos_token_id)
        if not isinstance(end, int):
            raise ValueError(f"ClipConfig: eos_token_id {end!r}, expected one integer: a text is pooled at one token")
        return read_config(cls, config, _IGNORED)

    @classmethod
    def large(cls) -> ClipConfig:
        """CLIP ViT-L/14's text encoder, the one FLUX.1 ships (with its legacy ``eos_token_id``)."""
        return cls(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            eos_token_id=2,
        )


class ClipBlock(nnx.Module):
    """Pre-norm causal self-attention and MLP."""

    def __init__(self, config: ClipConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        norm = {"epsilon": config.layer_norm_eps, "dtype": dtype, "rngs": rngs}
        self.heads = config.num_attention_heads
        self.activation = config.hidden_act
        self.norm_attention = LayerNorm(width, **norm)
        self.query = Linear(width, width, axes=("embed", "heads"), dtype=dtype, rngs=rngs)
        self.key = Linear(width, width, axes=("embed", "heads"), dtype=dtype, rngs=rngs)
        self.value = Linear(width, width, axes=("embed", "heads"), dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, axes=("heads", "embed"), dtype=dtype, rngs=rngs)
        self.norm_mlp = LayerNorm(width, **norm)
        self.up = Linear(width, inner, axes=("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down = Linear(inner, width, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        y = self.norm_attention(x)
        scale = (x.shape[-1] // self.heads) ** -0.5
        y = biased_attention(self.query(y), self.key(y), self.value(y), bias, heads=self.heads, scale=scale)
        x = x + self.out(y)
        return x + self.down(_ACTIVATIONS[self.activation](self.up(self.norm_mlp(x))))


class ClipTextEncoder(nnx.Module):
    """Token ids to hidden states and one pooled vector per text."""

    def __init__(self, config: ClipConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        width = config.hidden_size
        self.config = config
        self.tokens = Embedding(config.vocab_size, width, dtype=dtype, rngs=rngs)
        self.positions = Embedding(config.max_position_embeddings, width, axes=(None, "embed"), dtype=dtype, rngs=rngs)
        self.blocks = stack(lambda rngs: ClipBlock(config, dtype=dtype, rngs=rngs), config.num_hidden_layers, rngs)
        self.norm = LayerNorm(width, epsilon=config.layer_norm_eps, dtype=dtype, rngs=rngs)

    def __call__(self, ids: Int[Array, "B T"]) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
        """Hidden states after the final layer norm, and the pooled vector, in the dtype of the parameters.

        Args:
            ids: token ids, padded; padding is attended as in the reference (it lies after the end token, so
                causality keeps it out of the pooled vector).

        Raises:
            ValueError: if the text is longer than the position table.
        """
        length = ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(
                f"CLIP text of {length} tokens; this encoder takes at most "
                f"{self.config.max_position_embeddings}: truncate when tokenising"
            )
        x = self.tokens(ids) + self.positions(jnp.arange(length))[None]
        causal = jnp.where(jnp.tri(length, dtype=bool), 0.0, -jnp.inf).astype(jnp.float32)[None]
        x, _ = jax.lax.scan(lambda x, block: (block(x, causal), None), x, self.blocks)
        x = self.norm(x)
        # Argmax gives the first position of the maximum: the end token itself, not padding with the same id.
        legacy = self.config.eos_token_id == 2
        marked = ids if legacy else (ids == self.config.eos_token_id).astype(jnp.int32)
        end = jnp.argmax(marked, axis=-1)
        return x, jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
