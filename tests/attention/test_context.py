"""Ring, Ulysses and their product on eight fake devices against attention on one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sega_jax.attention import attention
from sega_jax.attention.context import Sharded, ring, ulysses
from sega_jax.attention.kernels import registered
from sega_jax.costs import jaxpr

RUN = registered()["xla"].run
TEXT, HEADS, WIDTH, BATCH = 5, 3, 8, 2


def streams(total: int, dtype=jnp.float32, group: int = 1):
    rng = np.random.default_rng(total)
    heads = group * HEADS, HEADS, HEADS
    return [jnp.asarray(2 * rng.standard_normal((BATCH, TEXT + total, h, WIDTH)), dtype) for h in heads]


def on_mesh(scheme, sizes: dict[str, int], total: int, qkv):
    """Pad the image, shard it over all axes of the mesh, run the scheme, drop the padding."""
    devices = int(np.prod(list(sizes.values())))
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))
    padding = -total % devices
    parts = [Sharded(x[:, :TEXT], jnp.pad(x[:, TEXT:], ((0, 0), (0, padding), (0, 0), (0, 0)))) for x in qkv]
    spec = Sharded(P(), P(None, tuple(sizes)))
    run = jax.jit(jax.shard_map(scheme, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False))
    out = run(*parts)
    return np.asarray(jnp.concatenate([out.text, out.image[:, :total]], axis=1), np.float32)


SCHEMES = {
    "ring": (partial(ring, axis="context"), {"context": 8}),
    "ring-heads": (partial(ring, axis="context", head_chunks=3), {"context": 4}),
    "ulysses": (partial(ulysses, axis="context"), {"context": 4}),
    "ulysses-more-devices-than-heads": (partial(ulysses, axis="context"), {"context": 8}),
    "product": (partial(ulysses, axis="heads", inner=partial(ring, axis="ring")), {"ring": 4, "heads": 2}),
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("total", "group"), [(48, 1), (37, 1), (3, 1), (37, 2)])
def test_sharded_attention_equals_the_whole(name, total, group):
    """With as many key heads as query heads, and with grouped keys, which travel as they are."""
    scheme, sizes = SCHEMES[name]
    qkv = streams(total, group=group)
    scheme = partial(scheme, run=RUN, scale=WIDTH**-0.5, total=total)
    expected = np.asarray(attention(*qkv, backend="reference"))
    np.testing.assert_allclose(on_mesh(scheme, sizes, total, qkv), expected, atol=2e-5)


def test_a_ring_of_grouped_keys_sends_the_keys_alone():
    """A quarter of the key heads is a quarter of the traffic."""
    mesh = jax.make_mesh((8,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = Sharded(P(), P(None, "context"))
    scheme = partial(ring, axis="context", run=RUN, scale=1.0, total=64)
    run = jax.shard_map(scheme, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)

    def sent(heads):
        q, k = (Sharded(jnp.zeros((1, TEXT, h, WIDTH)), jnp.zeros((1, 64, h, WIDTH))) for h in (8, heads))
        return jaxpr.count(run, q, k, k).collectives["collective-permute"]

    assert sent(2) == sent(8) / 4


def test_bfloat16_keeps_float32_partial_results():
    qkv = streams(40, jnp.bfloat16)
    scheme = partial(ring, axis="context", run=RUN, scale=WIDTH**-0.5, total=40)
    got = on_mesh(scheme, {"context": 8}, 40, qkv)
    expected = np.asarray(attention(*(x.astype(jnp.float32) for x in qkv), backend="reference"))
    np.testing.assert_allclose(got, expected, atol=3e-2)


def test_gradients_flow_through_the_ring():
    qkv = streams(16)
    scheme = partial(ring, axis="context", run=RUN, scale=WIDTH**-0.5, total=16)
    mesh = jax.make_mesh((8,), ("context",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = Sharded(P(), P(None, "context"))
    run = jax.shard_map(scheme, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)

    def sharded(x):
        out = run(*(Sharded(part[:, :TEXT], part[:, TEXT:]) for part in x))
        return jnp.square(out.image).sum()

    def whole(x):
        return jnp.square(attention(*x, backend="reference")[:, TEXT:]).sum()

    for a, b in zip(jax.jit(jax.grad(sharded))(qkv), jax.grad(whole)(qkv), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=5e-4)


def test_head_chunks_must_divide():
    with pytest.raises(ValueError, match="head_chunks=2: does not divide 3 key heads"):
        on_mesh(
            partial(ring, axis="context", head_chunks=2, run=RUN, scale=1.0, total=8), {"context": 4}, 8, streams(8)
        )
