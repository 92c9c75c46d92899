"""A whole FLUX.1-dev step under Scale-DiT's mask K compiled for a TPU nobody here owns, its small stream cached."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding

from sega_jax import positional as pe
from sega_jax.attention.kernels import register, tpu
from sega_jax.costs import topologies
from sega_jax.layouts.scale_dit import ScaleDiT
from sega_jax.models.abstract import build_abstract
from sega_jax.models.flux import Flux, FluxConfig, KeysValues
from sega_jax.sampling.denoise import predict
from tests.tiny import flux_conditioning

pytestmark = [pytest.mark.aot, pytest.mark.slow]

PARAMETER_BYTES = 2 * 11_901_408_320


@pytest.mark.parametrize(
    ("side", "low", "ceiling"), [(4096, "cached", 14e9), (4096, "stream", 16e9), (6144, "off", 30e9)]
)
def test_a_step_fits_one_v5p(side, low, ceiling):
    target = "v5p:2x2x1"
    if lacking := topologies.missing(target):
        pytest.skip(lacking)
    place = SingleDeviceSharding(topologies.devices(target)[0])

    # by name the kernel serves TPUs only; to compile for one elsewhere it is asked directly
    register(replace(tpu.KERNEL, name="tpu-ahead", supports=lambda request: None))

    def on_device(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    config = FluxConfig.dev()
    graphdef, params = nnx.split(build_abstract(lambda rngs: Flux(config, rngs=rngs, dtype=jnp.bfloat16)))
    params = jax.tree.map(lambda x: on_device(x.shape, x.dtype), params)
    grid = config.rope_spec().grid_for_pixels(side, side, 512)
    small = grid.tokens // 16

    def pair(layers):
        return (on_device((1, layers, small, 24, 128), jnp.bfloat16),) * 2

    content = {
        "off": None,
        "stream": {"low": on_device((1, small, 64), jnp.float32)},
        "cached": {"given": {"low": KeysValues(pair(19), pair(38))}},
    }[low]
    conditioning = flux_conditioning(
        on_device((1, 512, 4096), jnp.bfloat16), on_device((1, 768), jnp.bfloat16), on_device((), jnp.float32)
    )
    compiled = predict.lower(
        params,
        pe.traceable(pe.get("rebase(factor=10.0)")),
        on_device((1, side // 8, side // 8, 16), jnp.float32),
        on_device((), jnp.float32),
        conditioning,
        on_device((), jnp.int32),
        None,
        content,
        graphdef=graphdef,
        layout=ScaleDiT(low=low),
        grid=grid,
        dtype="bfloat16",
        backend="tpu-ahead",
    ).compile()
    memory = compiled.memory_analysis()
    arguments, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    print(f"{side}², {low}: arguments {arguments / 1e9:.2f} GB, temp {temp / 1e9:.2f} GB")
    cache = 2 * 57 * 2 * small * 3072 if low == "cached" else 0
    assert arguments < 1.02 * (PARAMETER_BYTES + cache)
    assert temp < ceiling
