"""The Hopper attention kernel compiled down to sm_90a machine code for GPUs nobody here owns, at FLUX shapes."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from sega_jax.attention.kernels import Request, hopper
from sega_jax.costs import topologies
from sega_jax.layouts.scale_dit import block_map

pytestmark = pytest.mark.aot
if lacking := topologies.missing("h200:1"):
    pytest.skip(lacking, allow_module_level=True)
if jax.__version_info__ < hopper.OLDEST_JAX:
    pytest.skip("the Hopper kernel needs jax >= 0.11 (Python >= 3.12)", allow_module_level=True)

TEXT, HEADS = 512, 24
SHARED_MEMORY = 232_448  # bytes a block of threads may have on sm_90
# GPU, batch, tokens, head size, Scale-DiT side and mask, per-sample lengths, map as an argument
CASES = {
    "dense 6144²": ("h100:1", 1, 147_456 + TEXT, 128, None, False, False),
    "Scale-DiT mask K 4096²": ("h100:1", 1, 70_144, 128, (256, "kernel"), False, False),
    "dense 1024², head size 64": ("h200:1", 1, 4_096 + TEXT, 64, None, False, False),
    "dense 2048², lengths": ("h200:1", 2, 16_384 + TEXT, 128, None, True, False),
    "Scale-DiT mask K 6144²": ("h200:1", 1, 157_184, 128, (384, "kernel"), False, False),
    "Scale-DiT mask P 4096²": ("h200:1", 1, 70_144, 128, (256, "paper"), False, False),
    "Scale-DiT mask P 6144²": ("h200:1", 1, 157_184, 128, (384, "paper"), False, False),
    "Scale-DiT mask K 1024², map as argument, lengths": ("h200:1", 1, 4_864, 128, (64, "kernel"), True, True),
}


@pytest.fixture
def report(tmp_path, monkeypatch):
    """What the assembler says: (registers, bytes spilled, bytes of shared memory)."""
    for kind in ("PTXAS", "RESOURCES"):
        monkeypatch.setenv(f"MOSAIC_GPU_DUMP_{kind}", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    cached = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)

    def read():
        told = "\n".join(path.read_text() for path in tmp_path.iterdir() if path.suffix in (".ptxas", ".txt"))
        spilled = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", told)]
        (registers,) = re.findall(r"Used (\d+) registers", told)
        (shared,) = re.findall(r"smem_scratch_bytes=(\d+)", told)
        return int(registers), sum(spilled), int(shared)

    yield read
    jax.config.update("jax_enable_compilation_cache", cached)


@pytest.mark.parametrize("name", CASES)
def test_compiles(name, report):
    target, batch, tokens, depth, sparse, lengths, as_argument = CASES[name]
    place = SingleDeviceSharding(topologies.devices(target)[0])

    def on_device(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    q = on_device((batch, tokens, HEADS, depth), jnp.bfloat16)
    blocks = None if sparse is None else block_map(sparse[0], sparse[0], TEXT, sparse[1])
    traced = jax.tree.map(lambda x: on_device(x.shape, x.dtype), blocks) if as_argument else None
    length = on_device((batch,), jnp.int32) if lengths else None

    def run(q, k, v, length, traced):
        return hopper.run(Request(q, k, v, depth**-0.5, length, blocks if traced is None else traced))

    memory = jax.jit(run).lower(q, q, q, length, traced).compile().memory_analysis()
    registers, spilled, shared = report()
    visited = "" if blocks is None else f", {blocks.visited} visited blocks"
    temp = memory.temp_size_in_bytes
    print(
        f"{target}, {name}: shared memory {shared} of {SHARED_MEMORY} bytes, {registers} registers, {spilled} bytes "
        f"spilled, temp {temp / 1e6:.1f} MB{visited}"
    )
    assert spilled == 0
    assert hopper.shared_memory_bytes(depth) <= shared <= SHARED_MEMORY
    # neither q, k, v nor out is copied: what is left are the tables and the padded LSE
    assert temp <= 0.01 * memory.argument_size_in_bytes + 1e6


def test_lengths_that_no_tile_divides():
    """A picture of 65 x 65 tokens, or CRPA's mixed sequences; in float the interpreter's tests compare values."""
    place = SingleDeviceSharding(topologies.devices("h200:1")[0])
    q, k = (jax.ShapeDtypeStruct((1, n, 2, 128), jnp.bfloat16, sharding=place) for n in (1_025 + TEXT, 300))
    out, lse = jax.jit(lambda q, k: hopper.run(Request(q, k, k, 0.1))).lower(q, k).compile().out_info
    assert out.shape == q.shape
    assert lse.shape == (1, 1_025 + TEXT, 2)


def test_grouped_keys(report):
    """Twelve key heads for forty-eight: no register is spilled, no key repeated."""
    place = SingleDeviceSharding(topologies.devices("h200:1")[0])
    q, k = (jax.ShapeDtypeStruct((1, 4_608, heads, 128), jnp.bfloat16, sharding=place) for heads in (48, 12))
    memory = jax.jit(lambda q, k: hopper.run(Request(q, k, k, 0.1))).lower(q, k).compile().memory_analysis()
    _, spilled, _ = report()
    assert spilled == 0
    assert memory.temp_size_in_bytes <= 0.01 * memory.argument_size_in_bytes + 1e6
