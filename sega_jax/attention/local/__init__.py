"""Attention kernels on one device, behind one contract."""

from sega_jax.attention.local import cudnn, hopper, reference, splash, tokamax, tpu, xla
from sega_jax.attention.local.contract import Kernel, Refusal, Request, choose, explain, kernels, register

# the order in which `auto` asks: dense calls go to the vendors' kernels, block maps to ours;
# what comes after the reference is a choice by name only
for kernel in (cudnn.KERNEL, splash.KERNEL, hopper.KERNEL, tpu.KERNEL, xla.KERNEL, reference.KERNEL, tokamax.KERNEL):
    register(kernel)

__all__ = ["Kernel", "Refusal", "Request", "choose", "explain", "kernels", "register"]
