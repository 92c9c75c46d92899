"""Layers shared by every model: parameters with logical axis names, norms that compute in float32.

Conventions: a layer computes in the dtype of its input and casts its parameters to it, so one set of
parameters serves bf16 inference and float32 parity tests.  Kernels are ``[inputs, outputs]`` and ``HWIO``;
images are channels-last.  Every parameter names each of its dimensions with a logical axis
(``None`` for dimensions that are never sharded); `sharding/rules.py` maps those names to mesh axes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

Initializer = Callable[..., jax.Array]
Axes = tuple[str | None, ...]

lecun_normal: Initializer = jax.nn.initializers.lecun_normal()
zeros: Initializer = jax.nn.initializers.zeros
ones: Initializer = jax.nn.initializers.ones


def parameter(rngs: nnx.Rngs, init: Initializer, shape: tuple[int, ...], axes: Axes, dtype: DTypeLike) -> nnx.Param:
    """A parameter of ``shape`` whose dimensions carry the logical names ``axes``."""
    if len(axes) != len(shape):
        raise ValueError(f"shape {shape} needs one axis name per dimension, got {axes}")
    return nnx.Param(init(rngs.params(), shape, dtype), out_sharding=axes)


def _along_last(vector: nnx.Param, like: jax.Array) -> jax.Array:
    """A per-channel parameter in the dtype and rank of ``like`` (implicit rank promotion is an error)."""
    return vector[...].astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def stack(build: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """``count`` copies of a module with a leading ``layers`` axis on every parameter, for `jax.lax.scan`."""

    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers"})
    def construct(key: jax.Array) -> nnx.Module:
        return build(nnx.Rngs(key))

    return construct(jax.random.split(rngs.params(), count))


class Linear(nnx.Module):
    """``y = x @ kernel + bias`` over the last axis.

    A kernel in int8 (`models.quantized`) has a float32 scale per output channel: ``y = (x @ kernel) * scale + bias``.
    """

    product: Callable[[jax.Array, jax.Array], jax.Array] = staticmethod(jnp.matmul)  # training has one of its own

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        axes: tuple[str | None, str | None] = ("embed", "mlp"),
        init: Initializer = lecun_normal,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel = parameter(rngs, init, (inputs, outputs), axes, dtype)
        self.kernel_scale: nnx.Param | None = None
        self.bias = parameter(rngs, zeros, (outputs,), (axes[1],), dtype) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return self._finish(self.product(x, self.kernel[...].astype(x.dtype)))

    def of_parts(self, *parts: jax.Array) -> jax.Array:
        """The layer of its input cut along the last axis, as a sum of products: the parts are not joined."""
        ends = np.cumsum([x.shape[-1] for x in parts])
        kernels = jnp.split(self.kernel[...], ends[:-1], axis=0)
        products = [self.product(x, kernel.astype(x.dtype)) for x, kernel in zip(parts, kernels, strict=True)]
        return self._finish(functools.reduce(jnp.add, products))

    def _finish(self, y: jax.Array) -> jax.Array:
        if self.kernel_scale is not None:
            wide = y.astype(jnp.float32)
            y = (wide * _along_last(self.kernel_scale, wide)).astype(y.dtype)
        return y if self.bias is None else y + _along_last(self.bias, y)


class Conv(nnx.Module):
    """2-D convolution, NHWC x HWIO.  ``padding`` is one `(low, high)` pair used for both spatial axes.

    ``rows`` replaces it along the first of them, for strips that carry their neighbours' rows.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        padding: tuple[int, int] = (1, 1),
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        axes = (None, None, "conv_in", "conv_out")
        self.kernel = parameter(rngs, lecun_normal, (kernel, kernel, inputs, outputs), axes, dtype)
        self.bias = parameter(rngs, zeros, (outputs,), ("conv_out",), dtype)
        self.stride = stride
        self.padding = padding

    def __call__(self, x: jax.Array, *, rows: tuple[int, int] | None = None) -> jax.Array:
        y = jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            window_strides=(self.stride, self.stride),
            padding=(self.padding if rows is None else rows, self.padding),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + _along_last(self.bias, y)


class Embedding(nnx.Module):
    """Rows of a table, looked up by integer id."""

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        axes: tuple[str | None, str | None] = ("vocab", "embed"),
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.table = parameter(rngs, jax.nn.initializers.normal(0.02), (rows, width), axes, dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.table[...][ids]


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, in float32; ``affine=False`` for adaLN blocks."""

    def __init__(
        self,
        width: int,
        *,
        affine: bool = True,
        epsilon: float = 1e-6,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.epsilon = epsilon
        self.scale = parameter(rngs, ones, (width,), ("norm",), dtype) if affine else None
        self.bias = parameter(rngs, zeros, (width,), ("norm",), dtype) if affine else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        if self.scale is not None:
            y = y * _along_last(self.scale, y) + _along_last(self.bias, y)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation over the last axis, in float32."""

    def __init__(self, width: int, *, epsilon: float = 1e-6, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.epsilon = epsilon
        self.scale = parameter(rngs, ones, (width,), ("norm",), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return (y * _along_last(self.scale, y)).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Group normalisation of NHWC activations with statistics over H, W and the group, in float32."""

    def __init__(
        self,
        channels: int,
        *,
        groups: int = 32,
        epsilon: float = 1e-6,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if channels % groups:
            raise ValueError(f"GroupNorm: {channels} channels do not divide into {groups} groups")
        self.groups = groups
        self.epsilon = epsilon
        self.scale = parameter(rngs, ones, (channels,), ("norm",), dtype)
        self.bias = parameter(rngs, zeros, (channels,), ("norm",), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        groups = (batch, self.groups, channels // self.groups)

        def group_mean(y: jax.Array) -> jax.Array:
            # Pixels first, then the channels of a group: five times faster on CPU than one joint reduction.
            mean = y.mean(1).reshape(groups).mean(-1, keepdims=True)
            return jnp.broadcast_to(mean, groups).reshape(batch, 1, channels)

        y = x.astype(jnp.float32).reshape(batch, height * width, channels)
        mean = group_mean(y)
        factor = jax.lax.rsqrt(group_mean(jnp.square(y - mean)) + self.epsilon)
        return self.normalize(y, mean, factor).reshape(x.shape).astype(x.dtype)

    def normalize(self, x: jax.Array, mean: jax.Array, factor: jax.Array) -> jax.Array:
        """``x`` [B, ..., C] under statistics f32 [B, 1..., C]: the mean and 1 / standard deviation of its group."""
        y = x.astype(jnp.float32) - mean
        y = y * (factor * _along_last(self.scale, y)) + _along_last(self.bias, y)
        return y.astype(x.dtype)


def timestep_embedding(value: jax.Array, width: int, max_period: float = 10_000.0) -> jax.Array:
    """Sinusoidal features of ``value`` [B] (already times 1000): ``[cos | sin]``, float32 [B, width].

    Frequencies ``max_period ** (-i / (width / 2))``, as FLUX.1 uses for sigma and guidance.  They are rounded as
    the reference rounds them (exponent in float32, then one exp): values reach thousands, where one unit in the
    last place of a frequency moves the phase by 2e-4.
    """
    half = width // 2
    exponent = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    phase = value.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(phase), jnp.sin(phase)], axis=-1)
