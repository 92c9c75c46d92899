"""Attention over sequences sharded on a mesh axis, built on any local kernel: `ring`, `ulysses`, and their product."""

from sega_jax.attention.context.ring import ring
from sega_jax.attention.context.sharded import Sharded, split_heads, valid_tokens
from sega_jax.attention.context.ulysses import ulysses

__all__ = ["Sharded", "ring", "split_heads", "ulysses", "valid_tokens"]
