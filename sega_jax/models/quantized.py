"""int8 weights: the matrices of the transformer's blocks in eight bits, with one float32 scale per output channel.

They are the share of the weights that counts (99 % of FLUX.1's); norms, biases, embedders and the last layer are small
and sensitive and stay as they are, as in the eight-bit files that `converters.reading.quantised` writes.  Activations
and products stay in the dtype of the run: ``y = (x @ q) * scale + bias``.  Whole numbers up to 128 are exact in
bfloat16, so that rounding to ``q`` is all that is lost.

Quantising is qwix's (`qwix.quantize`), one matrix at a time, on the host, as a checkpoint is read.  Its providers,
which quantise a whole model by intercepting its products (`qwix.quantize_model`), do not get along with these modules:
they run the model to find the products, replace parameters while it runs, which flax refuses inside a scan
(``TraceContextError``), and want real arrays where planning has shapes alone (``ShapeDtypeStruct``).
"""

from __future__ import annotations

import importlib.util
from functools import cache, partial
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sega_jax.models.abstract import axes, parameters
from sega_jax.models.layers import Linear

Weights = Literal["full", "int8"]
KERNEL, SCALE = ".kernel", ".kernel_scale"
# The largest weight of a channel is stored as 127, as in ComfyUI's files, whose weights are then not rounded again;
# qwix would make it 127.5, which has to be cut off.
LARGEST = f"absmax,{127.5 / 127}"


def check_weights(weights: str) -> None:
    """Refuses what cannot be served.

    Raises:
        ValueError: an unknown name, or int8 without the extra ``quant``.
    """
    if weights not in ("full", "int8"):
        raise ValueError(f"weights={weights!r}: expected 'full' or 'int8'")
    if weights == "int8":
        _qwix()


def available() -> bool:
    """Whether the extra ``quant`` is installed."""
    return importlib.util.find_spec("qwix") is not None


def _qwix() -> ModuleType:
    try:
        import qwix
    except ImportError as error:
        raise ValueError(
            f"weights='int8' needs the package qwix ({error}): pip install 'sega-jax[quant]', or use weights='full'"
        ) from error
    return qwix


def quantized(transformer: nnx.Module) -> nnx.Module:
    """The transformer with the kernels of its blocks in int8; the module itself is changed.

    Serves real modules and, under `jax.eval_shape`, abstract ones: whatever is asked for shapes (loading, planning,
    sharding) learns them here.
    """
    for _, layer in nnx.iter_graph(transformer):
        if isinstance(layer, Linear) and axes(layer.kernel)[0] == "layers":
            _replace(layer)
    return transformer


def _replace(layer: Linear) -> None:
    kernel = layer.kernel
    *lead, _, out = axes(kernel)
    values, scale = _quantized(kernel[...], -2)
    with nnx.use_eager_sharding(False):
        layer.kernel = nnx.Param(values, out_sharding=axes(kernel))
        layer.kernel_scale = nnx.data(nnx.Param(scale, out_sharding=(*lead, out)))


@partial(jax.jit, static_argnums=1)
def _quantized(kernel: jax.Array, summed: int) -> tuple[jax.Array, jax.Array]:
    """int8 values of a matrix or of a stack of them, and float32 scales, without the axis that products sum over."""
    own = set(range(kernel.ndim)) - {summed % kernel.ndim}
    result = _qwix().quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=own, calibration_method=LARGEST)
    return result.qvalue, result.scale.squeeze(summed)


@cache
def _host() -> jax.Device | None:
    """Where quantising happens: the CPU, or the default device where JAX was told not to use it."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def quantize(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A matrix [in, out] of any float type to int8 [in, out] and float32 scales [out].

    ``values * scale`` is within half a scale of the matrix.  A transposed view stays one, for `weights.load.assign`.
    """
    turned = kernel.flags.f_contiguous and not kernel.flags.c_contiguous
    values, scale = _quantized(jax.device_put(kernel.T if turned else kernel, _host()), -1 if turned else -2)
    values = np.asarray(values)
    return values.T if turned else values, np.asarray(scale)


def scales(module: nnx.Module) -> dict[str, str]:
    """Path of the scales of every kernel that a module has in int8."""
    found = (path.removesuffix(SCALE) for path in parameters(module) if path.endswith(SCALE))
    return {layer + KERNEL: layer + SCALE for layer in found}
