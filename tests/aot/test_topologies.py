"""Devices nobody here owns: they compile, and the compiler's own limits agree with the table of capacities."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from sega_jax.costs import topologies

pytestmark = pytest.mark.aot
TARGETS = {"v5e:2x4": 8, "v5p:2x2x1": 4, "v6e:2x2": 4, "tpu7x:2x2x1": 8, "h100:1": 1, "h200:8": 8, "h200:16": 16}


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_over_all_devices(target):
    if lacking := topologies.missing(target):
        pytest.skip(lacking)
    devices = topologies.devices(target)
    assert len(devices) == TARGETS[target]
    assert {d.platform for d in devices} == {topologies.capacity(target).platform}
    mesh = jax.sharding.Mesh(devices, ("x",))
    rows = jax.ShapeDtypeStruct((1_024, 512), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("x")))
    compiled = jax.jit(lambda a: (a @ a.T).sum(), out_shardings=NamedSharding(mesh, PartitionSpec())).lower(rows)
    memory = compiled.compile().memory_analysis()
    assert memory.argument_size_in_bytes == 1_024 * 512 * 2 // len(devices)


@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e", "tpu7x"])
def test_memory_is_what_the_compiler_grants(chip):
    target = f"{chip}:2x2x1" if chip in ("v5p", "tpu7x") else f"{chip}:2x2"
    if lacking := topologies.missing(target):
        pytest.skip(lacking)
    place = SingleDeviceSharding(topologies.devices(target)[0])
    x = jax.ShapeDtypeStruct((1 << 31, 128), jnp.bfloat16, sharding=place)
    granted = topologies.capacity(chip).memory_bytes / topologies.GIB
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"{granted:.2f}G"):
        jax.jit(lambda a: a + 1).lower(x).compile()
