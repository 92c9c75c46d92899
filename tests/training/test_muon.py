"""Muon with fast products against optax's in float32, and what it is by definition: the orthogonal factor."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
import pytest

from sega_jax.training import muon


def random(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("shape", [(3, 16, 24), (2, 48, 16)])
def test_singular_values_are_moved_close_to_one_and_the_directions_stay(shape):
    x = random(shape)
    u, values, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    inner = np.einsum("bmi,bmn,bin->bi", u, np.asarray(muon.orthogonalise([x])[0], np.float64), vt)
    assert values.max() / values.min() > 2
    assert inner.min() > 0.5  # the published coefficients end between 0.7 and 1.2; small values on their way there
    assert inner.max() < 1.3


def test_updates_are_optax_s_of_jordan_s_momentum():
    """Momentum after Jordan's code, in numpy; optax's first update, which is the iteration alone, in float32.

    optax corrects the bias of its momentum, so its later updates weigh momentum and gradient otherwise.
    """
    parameters = {"stack": random((3, 16, 40)), "tall": random((48, 16)), "wide": random((16, 32))}
    numbers = {name: optax.contrib.MuonDimensionNumbers(p.ndim - 2, p.ndim - 1) for name, p in parameters.items()}
    ours, theirs = muon.scale_by_muon(), optax.contrib.scale_by_muon(weight_dimension_numbers=numbers)
    update, iteration = jax.jit(ours.update), jax.jit(theirs.update)
    state, momentum = ours.init(parameters), {name: np.zeros(p.shape) for name, p in parameters.items()}
    for step in (1, 2, 3):
        gradient = jax.tree.map(lambda p, step=step: random(p.shape, step) + 0.1 * p, parameters)
        momentum = {name: 0.95 * m + 0.05 * np.asarray(gradient[name]) for name, m in momentum.items()}
        ahead = {name: jnp.asarray(0.95 * m + 0.05 * gradient[name], jnp.float32) for name, m in momentum.items()}
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            expected, _ = iteration(ahead, theirs.init(parameters))
        made, state = update(gradient, state)
        for name, value in made.items():
            size = 0.2 * max(value.shape[-2:]) ** 0.5
            difference = np.linalg.norm(value / size - expected[name]) / np.linalg.norm(expected[name])
            assert difference < 0.04, (step, name, difference)


def test_matrices_of_one_shape_do_not_mix():
    first, second, third = random((2, 8, 24), 1), random((24, 8), 2), random((8, 8), 3)
    together = muon.orthogonalise([first, second, third])
    apart = [muon.orthogonalise([x])[0] for x in (first, second, third)]
    jax.tree.map(np.testing.assert_array_equal, together, apart)
    assert [x.shape for x in together] == [(2, 8, 24), (24, 8), (8, 8)]
    assert not muon.orthogonalise([jnp.zeros((4, 4))])[0].any()


def test_every_product_of_the_iteration_is_rows_by_columns():
    """Tall matrices too: XLA's CPU backend has a fast routine for that form, and for others in bfloat16 none at all."""
    text = jax.jit(muon.orthogonalise).lower([random((2, 8, 24)), random((64, 16))]).compile().as_text()
    found = re.findall(r"f32\[([\d,]+)\]\S* dot\(.*lhs_contracting_dims={(\d)}.*rhs_contracting_dims={(\d)}", text)
    assert len(found) == 2 * 3 * 5
    for shape, left, right in found:
        rank = shape.count(",") + 1
        assert (int(left), int(right)) == (rank - 1, rank - 2)
