"""A whole FLUX.1-dev denoising step compiled for a TPU nobody here owns, with the compiler's own memory figures."""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from sega_jax import positional as pe
from sega_jax.layouts.dense import Dense
from sega_jax.models.abstract import build_abstract
from sega_jax.models.flux import Flux, FluxConfig
from sega_jax.sampling.denoise import predict
from tests.tiny import flux_conditioning

pytestmark = pytest.mark.aot
pytest.importorskip("libtpu", reason="libtpu is not installed (extra `tpu`)")

PARAMETER_BYTES = 2 * 11_901_408_320


def test_a_step_at_1024_fits_one_v5p():
    side, positional, ceiling = 1024, "dype-yarn", 1e9
    device = topologies.get_topology_desc("v5p:2x2x1", "tpu").devices[0]
    place = SingleDeviceSharding(device)

    def on_device(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    config = FluxConfig.dev()
    model = build_abstract(lambda rngs: Flux(config, rngs=rngs, dtype=jnp.bfloat16))
    graphdef, params = nnx.split(model)
    params = jax.tree.map(lambda x: on_device(x.shape, x.dtype), params)
    grid = config.rope_spec().grid_for_pixels(side, side, 512)
    conditioning = flux_conditioning(
        on_device((1, 512, 4096), jnp.bfloat16), on_device((1, 768), jnp.bfloat16), on_device((), jnp.float32)
    )
    compiled = predict.lower(
        params,
        pe.traceable(pe.get(positional)),
        on_device((1, side // 8, side // 8, 16), jnp.float32),
        on_device((), jnp.float32),
        conditioning,
        on_device((), jnp.int32),
        None,
        None,
        graphdef=graphdef,
        layout=Dense(),
        grid=grid,
        dtype="bfloat16",
        backend="xla",
    ).compile()
    memory = compiled.memory_analysis()
    arguments, temp = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    print(f"{side}²: arguments {arguments / 1e9:.2f} GB, temp {temp / 1e9:.2f} GB")
    assert arguments < 1.02 * PARAMETER_BYTES
    assert temp < ceiling
