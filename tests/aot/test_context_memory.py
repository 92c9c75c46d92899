"""Attention over eight chips at 6144 x 6144, compiled: what a chip holds, and what it sends."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sega_jax.attention import attend
from sega_jax.costs import jaxpr, topologies
from sega_jax.layouts.streams import Call, KeySet, Tokens
from sega_jax.sharding.mesh import make_mesh
from sega_jax.sharding.split import Split

pytestmark = pytest.mark.aot
TEXT, IMAGE, HEADS, WIDTH, CHIPS = 512, 147_456, 24, 128, 8
SHARE = IMAGE // CHIPS * HEADS * WIDTH * 2  # bytes of a chip's queries, keys or values


@pytest.mark.parametrize(
    ("target", "kernel", "scheme"),
    [
        ("v6e:2x4", "tpu", "ring"),
        ("v6e:2x4", "tpu", "ulysses"),
        ("h100:8", "hopper", "ring"),
        ("h100:8", "hopper", "ulysses"),
    ],
)
def test_temporaries_and_traffic_of_a_chip(target, kernel, scheme):
    if lacking := topologies.missing(target):
        pytest.skip(lacking)
    devices = topologies.devices(target)
    mesh = make_mesh(devices, context=CHIPS)
    tokens = Tokens("text"), Tokens("image")
    calls = (Call((KeySet(tokens, tokens),), ("scatter", "scatter")),)
    split = Split.of(mesh, {"image": IMAGE})

    def stream(length, spec):
        return jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    streams = {"text": stream(TEXT, PartitionSpec()), "image": stream(IMAGE, PartitionSpec(None, "context"))}

    @jax.jit
    def run(q, k, v):
        return attend(q, k, v, calls, backend=f"{scheme}+{kernel}", split=split)

    with jax.default_device(devices[0]):
        compiled = run.lower(streams, streams, streams).compile()
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    sent = jaxpr.hlo_collectives(compiled.as_text(), CHIPS)
    print(f"{target} {scheme}: temporaries {temporaries / 1e9:.2f} GB, sent {sum(sent.values()) / 1e9:.2f} GB")
    assert temporaries < 1e9  # the public ring holds 5.4 GB here
    moved = 2 * CHIPS if scheme == "ring" else 4 * (CHIPS - 1) / CHIPS  # shares, as `sega_jax.costs.closed_form` says
    assert sum(sent.values()) == pytest.approx(moved * SHARE, rel=0.2)
