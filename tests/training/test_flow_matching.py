import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.nano import grammar
from sega_jax.nano import model as nano
from sega_jax.training import data, flow_matching


def test_loss_against_numpy():
    rng = np.random.default_rng(0)
    clean, noise, guess = (rng.normal(size=(3, 5, 4)) for _ in range(3))
    sigma = np.array([0.1, 0.5, 0.9])
    seen = {}

    def velocity(noisy, level):
        seen.update(noisy=np.asarray(noisy), level=np.asarray(level))
        return jnp.asarray(guess, jnp.float32)

    arrays = [jnp.asarray(a, jnp.float32) for a in (clean, noise, sigma)]
    loss = flow_matching.flow_matching_loss(velocity, *arrays)
    np.testing.assert_allclose(loss, np.mean((guess - (noise - clean)) ** 2), rtol=1e-5)
    s = sigma[:, None, None]
    np.testing.assert_allclose(seen["noisy"], (1 - s) * clean + s * noise, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen["level"], sigma, rtol=1e-6)


def test_the_true_velocity_has_no_loss_and_leads_from_noise_to_clean():
    clean, noise = jax.random.normal(jax.random.key(0), (2, 2, 3, 4))
    sigma = jnp.array([0.3, 0.8])
    assert flow_matching.flow_matching_loss(lambda x, s: noise - clean, clean, noise, sigma) == 0
    steps = np.linspace(1, 0, 9)
    x = noise
    for now, then in itertools.pairwise(steps):
        x = x + jnp.float32(then - now) * (noise - clean)
    np.testing.assert_allclose(x, clean, atol=1e-5)


def test_sigma_follows_the_shifted_schedule():
    """The shift of the sampler, applied to an unshifted logit-normal draw, is the shifted draw."""
    key = jax.random.key(0)
    plain = np.asarray(flow_matching.sample_sigma(key, 20_000, jnp.float32(0)), np.float64)
    shifted = np.asarray(flow_matching.sample_sigma(key, 20_000, jnp.float32(1.15)))
    shift = np.exp(1.15)
    np.testing.assert_allclose(shifted, shift * plain / (1 + (shift - 1) * plain), rtol=1e-4)
    assert abs(np.median(plain) - 0.5) < 0.02


def test_shift_anchors():
    assert nano.shift_mu(64) == 0.5
    assert nano.shift_mu(144) == pytest.approx(1.15)


def test_batches_depend_on_seed_and_step_alone(tmp_path):
    rng = np.random.default_rng(0)
    for rows, columns in ((4, 4), (4, 6)):
        tokens = rng.normal(size=(8, rows * columns, 64)).astype(np.float16)
        np.save(tmp_path / f"{rows}x{columns}.npy", tokens)
        np.save(tmp_path / f"{rows}x{columns}.scenes.npy", np.arange(8, dtype=np.int32))
    phases = (data.Phase(3, 4, (("4x4", 1.0),)), data.Phase(5, 2, (("4x4", 0.5), ("4x6", 0.5))))

    def words(length):  # a tokeniser that counts captions instead of reading them
        class Counter:
            pad_id = -1

            def __init__(self):
                self.length = length

            def __call__(self, prompts):
                return np.repeat(np.arange(len(prompts), dtype=np.int32)[:, None], length, 1)

        return Counter()

    def make(seed):
        return data.batches(tmp_path, phases, clip=words(data.CLIP_TRAIN_LENGTH), t5=words(32), seed=seed)

    (first, total), (second, _), (other, _) = make(0), make(0), make(1)
    assert total == 8
    shapes = set()
    for step in (7, 2, 0, 5, 6, 4, 3):
        a, b = first(step), second(step)
        jax.tree.map(np.testing.assert_array_equal, a, b)
        np.testing.assert_array_equal(a.clip_ids[:, 0], a.t5_ids[:, 0])
        shapes.add((step < 3, a.tokens.shape))
    assert shapes == {(True, (4, 16, 64)), (False, (2, 16, 64)), (False, (2, 24, 64))}
    assert (np.asarray(first(0).tokens) != np.asarray(other(0).tokens)).any()

    templates = len(grammar.TEMPLATES)
    rows = np.concatenate([np.asarray(first(step).t5_ids)[:, 0] // templates for step in range(8)])
    empty = len(grammar.TRAINING_SCENES)
    assert set(rows) <= {*range(8), empty}
