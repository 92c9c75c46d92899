"""Attention: `attend` over streams and calls, `attention` for plain q, k, v."""

from sega_jax.attention.attend import attend, attention
from sega_jax.attention.kernels import Kernel, Refusal, Request, choose, explain, register, registered
from sega_jax.attention.merge import merge

__all__ = [
    "Kernel",
    "Refusal",
    "Request",
    "attend",
    "attention",
    "choose",
    "explain",
    "merge",
    "register",
    "registered",
]
