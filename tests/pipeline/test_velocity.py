"""The pure face of a pipeline: what is differentiable, and arguments that do not belong together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sega_jax as sj

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def pipe():
    return sj.Pipeline.from_pretrained("nano", dtype=jnp.float32, backend="reference")


@pytest.fixture(scope="module")
def asked(pipe):
    return pipe.encode([PROMPT])


def test_forward_mode_with_the_reference_kernel(pipe, asked):
    """The tangent along a direction is the limit of differences, and of reverse mode's."""
    velocity, x = sj.velocity(pipe), pipe.noise(0, 32, 32)
    direction = jax.random.normal(jax.random.key(1), x.shape)

    def of(latents):
        return velocity(pipe.params, latents, 0.5, asked)

    _, tangent = jax.jvp(of, (x,), (direction,))
    step = 1e-2
    difference = (of(x + step * direction) - of(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(tangent, difference, atol=2e-2)
    cotangent = jax.random.normal(jax.random.key(2), x.shape)
    (backwards,) = jax.vjp(of, x)[1](cotangent)
    np.testing.assert_allclose(jnp.vdot(cotangent, tangent), jnp.vdot(backwards, direction), rtol=1e-3)


@pytest.mark.parametrize(
    ("batch", "prompts", "sigma", "message"),
    [
        (3, 1, 0.5, r"conditioning: \w+ of shape \(1, .*batch of 3; expected one row for each"),
        (1, 2, 0.5, r"conditioning: \w+ of shape \(2, .*batch of 1"),
        (1, 1, np.float32([0.5, 0.5]), r"sigma of shape \(2,\): expected a scalar"),
    ],
)
def test_arguments_that_do_not_belong_together(pipe, batch, prompts, sigma, message):
    latents = pipe.noise(0, 32, 32, range(batch))
    with pytest.raises(ValueError, match=message):
        sj.velocity(pipe)(pipe.params, latents, sigma, pipe.encode([PROMPT] * prompts))


def test_latents_of_another_rank(pipe, asked):
    with pytest.raises(ValueError, match=r"latents of shape \(4, 4, 16\): expected \[batch, height, width, channels\]"):
        sj.velocity(pipe)(pipe.params, jnp.zeros((4, 4, 16)), 0.5, asked)


@pytest.mark.parametrize("returned", [None, {}, {"text": None, "image": None}, 5])
def test_a_method_that_returns_no_ropes_is_named(pipe, returned):
    def broken(grid, signals):
        return returned

    with pytest.raises(TypeError, match=r"positional method .*broken returned .*expected \{'text': Rope"):
        pipe.generate(PROMPT, width=32, height=32, steps=1, positional=broken)


def test_dtypes_may_be_objects(pipe):
    assert pipe.dtype == "float32"
    with pytest.raises(ValueError, match=r"dtype=.*float32' or 'bfloat16'"):
        sj.Pipeline.from_pretrained("nano", dtype=jnp.float16)
    with pytest.raises((ValueError, TypeError), match="dtype=5"):
        sj.Pipeline.from_pretrained("nano", dtype=5)
