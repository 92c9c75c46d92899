"""Attention kernels on one device, behind one contract."""

from sega_jax.attention.local import reference, tpu, xla
from sega_jax.attention.local.contract import Kernel, Refusal, Request, choose, explain, kernels, register

register(tpu.KERNEL)
register(xla.KERNEL)
register(reference.KERNEL)

__all__ = ["Kernel", "Refusal", "Request", "choose", "explain", "kernels", "register"]
