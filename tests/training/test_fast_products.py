"""The CPU training products against plain float32 ones: values and gradients up to bfloat16 rounding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sega_jax.attention.kernels import Request, choose, registered
from sega_jax.models.layers import Linear
from sega_jax.training import fast_products


def close(got, expected, share=0.02):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == jnp.float32
        assert np.abs(a - b).max() < share * np.abs(b).max()


def random(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def test_matmul_and_its_gradients():
    x, kernel, weight = random((3, 5, 16), (16, 8), (3, 5, 8))

    def loss(product, x, kernel):
        return (product(x, kernel) * weight).sum()

    close(fast_products.matmul(x, kernel), x @ kernel)
    gradients = [
        jax.grad(lambda *a, p=p: loss(p, *a), argnums=(0, 1))(x, kernel) for p in (fast_products.matmul, jnp.matmul)
    ]
    close(*gradients)
    np.testing.assert_array_equal(
        fast_products.matmul(x[:, 0], kernel), x[:, 0] @ kernel
    )  # conditioning vectors: exact


def test_every_product_is_rows_by_columns():
    """XLA's CPU backend has a fast routine for that form alone, and folds transpositions into products if it may."""
    x, kernel, weight, q = random((3, 64, 16), (16, 8), (3, 64, 8), (3, 2, 64, 16))

    def loss(x, kernel, q):
        attended = fast_products._attention(q, q, q, jnp.float32(0.3))
        return (fast_products.matmul(x, kernel) * weight).sum() + jnp.square(attended).sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, kernel, q).compile().as_text()
    found = re.findall(r"f32\[([\d,]+)\]\S* dot\(.*lhs_contracting_dims={(\d)}.*rhs_contracting_dims={(\d)}", text)
    assert len(found) == 8  # two gradients of the matmul; attention's two products and the four of its gradients
    for shape, left, right in found:
        rank = shape.count(",") + 1
        assert (int(left), int(right)) == (rank - 1, rank - 2)


def test_attention_and_its_gradients_against_the_reference():
    q, k, v, weight = random((2, 7, 2, 16), (2, 9, 2, 16), (2, 9, 2, 16), (2, 7, 2, 16))

    def loss(name, q, k, v):
        return (registered()[name].run(Request(q, k, v, 0.3))[0].astype(jnp.float32) * weight).sum()

    out, lse = registered()[fast_products.BACKEND].run(Request(q, k, v, 0.3))
    expected, expected_lse = registered()["xla"].run(Request(q, k, v, 0.3))
    close((out, lse), (expected, expected_lse))
    gradients = [
        jax.grad(lambda *a, n=n: loss(n, *a), argnums=(0, 1, 2))(q, k, v) for n in (fast_products.BACKEND, "xla")
    ]
    close(*gradients, share=0.04)


def test_what_the_kernel_does_not_do_is_refused():
    kernel = registered()[fast_products.BACKEND]
    x = jnp.zeros((1, 4, 1, 8))
    assert kernel.supports(Request(x, x, x, 1.0)) is None
    assert "bfloat16" in kernel.supports(Request(*[x.astype(jnp.bfloat16)] * 3, 1.0)).reason
    assert "kv_length" in kernel.supports(Request(x, x, x, 1.0, kv_length=jnp.ones(1, jnp.int32))).reason


def test_prepared_modules_use_the_product():
    class Pair(nnx.Module):
        def __init__(self, rngs):
            self.inner = Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            return self.inner(x)

    with nnx.use_eager_sharding(False):
        plain, prepared = Pair(nnx.Rngs(0)), Pair(nnx.Rngs(0))
    fast_products.prepare([prepared])
    (x,) = random((2, 3, 8))
    assert np.abs(np.asarray(plain(x) - prepared(x))).max() > 0  # bfloat16 operands
    close(prepared(x), plain(x))
    graph, state = nnx.split(prepared)
    np.testing.assert_array_equal(nnx.merge(graph, state)(x), prepared(x))
    assert "product" not in vars(plain.inner)


def test_auto_passes_it_by():
    x = jnp.zeros((1, 4, 1, 8))
    chosen, _ = choose(Request(x, x, x, 1.0))
    assert chosen.name != fast_products.BACKEND
