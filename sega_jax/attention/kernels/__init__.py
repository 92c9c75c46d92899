"""Attention kernels on one device, behind one contract."""

from sega_jax.attention.kernels import cudnn, hopper, reference, splash, tokamax, tpu, xla
from sega_jax.attention.kernels.contract import Kernel, Refusal, Request, choose, explain, register, registered, serving
from sega_jax.attention.kernels.cpu import cpu

# the order in which `auto` asks: dense calls go to the vendors' kernels, block maps to ours;
# what comes after the reference is a choice by name only
ORDER = (cudnn, splash, hopper, tpu, cpu, xla, reference, tokamax)
for module in ORDER:
    register(module.KERNEL)

__all__ = ["Kernel", "Refusal", "Request", "choose", "explain", "register", "registered", "serving"]
