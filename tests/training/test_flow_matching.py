import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.attention import attend
from sega_jax.layouts.dense import Dense
from sega_jax.layouts.streams import bind
from sega_jax.nano import model as nano
from sega_jax.nano.next import grammar
from sega_jax.positional.rope import plain
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
    assert nano.shift_mu(256) == pytest.approx(1.15)


def stored(folder, *grids):
    """Latents made by hand, as `data.encode_bucket` leaves them: eight pictures a grid, scenes 0 to 7."""
    rng = np.random.default_rng(0)
    for rows, columns in grids:
        tokens = rng.normal(size=(8, rows * columns, 64)).astype(np.float16)
        np.save(folder / f"{rows}x{columns}.npy", tokens)
        np.save(folder / f"{rows}x{columns}.scenes.npy", np.arange(8, dtype=np.int32))


class Counter:
    """A tokeniser that counts captions instead of reading them."""

    pad_id = -1

    def __init__(self, length):
        self.length = length

    def __call__(self, prompts):
        return np.repeat(np.arange(len(prompts), dtype=np.int32)[:, None], self.length, 1)


def test_batches_depend_on_seed_and_step_alone(tmp_path):
    stored(tmp_path, (4, 4), (4, 6), (6, 4))
    oblong = data.Family(0.5, (("4x6", 0.5), ("6x4", 0.5)))
    square = data.Family(1.0, (("4x4", 1.0),))
    phases = (data.Phase(3, 4, (square,)), data.Phase(5, 2, (square, oblong)))

    def make(seed):
        words = {"clip": Counter(data.CLIP_TRAIN_LENGTH), "t5": Counter(32)}
        return data.batches(tmp_path, phases, **words, seed=seed)

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


def test_pictures_of_one_token_count_share_a_batch_each_on_its_own_grid(tmp_path):
    stored(tmp_path, (4, 6), (6, 4), (3, 8))
    family = data.Family(1.0, (("4x6", 0.4), ("6x4", 0.4), ("3x8", 0.2)))
    words = {"clip": Counter(data.CLIP_TRAIN_LENGTH), "t5": Counter(32)}
    batch = data.batches(tmp_path, (data.Phase(1, 24, (family,)),), **words)[0](0)
    kept = {(r, c): np.load(tmp_path / f"{r}x{c}.npy") for r, c in ((4, 6), (6, 4), (3, 8))}
    seen = set()
    for tokens, positions in zip(np.asarray(batch.tokens), np.asarray(batch.positions), strict=True):
        rows, columns = (int(positions[:, axis].max()) + 1 for axis in (1, 2))
        np.testing.assert_array_equal(positions, nano.grid(rows, columns).ids()["image"])
        assert (kept[rows, columns].astype(np.float32) == tokens).all((1, 2)).any()
        seen.add((rows, columns))
    assert seen == set(kept)
    assert float(batch.mu) == pytest.approx(nano.shift_mu(24))


def test_a_batch_of_several_grids_attends_as_each_alone():
    """Positions per sample give the tables that `generate` makes for that grid."""
    grids = (4, 6), (6, 4)
    positions = jnp.asarray(np.stack([nano.grid(*grid).ids()["image"] for grid in grids]))
    heads, width = nano.TRANSFORMER.heads, nano.TRANSFORMER.head_dim
    q, k, v = (
        {
            name: jax.random.normal(jax.random.key(3 * seed + i), (2, count, heads, width))
            for i, (name, count) in enumerate((("text", nano.T5_LENGTH), ("image", 24)))
        }
        for seed in range(3)
    )
    together = attend(q, k, v, flow_matching.calls_for(positions), backend="reference")
    for i, (rows, columns) in enumerate(grids):
        grid = nano.grid(rows, columns)
        rope = plain(grid)
        calls = bind(Dense().calls(grid), {"image": {"text": rope, "image": rope}})
        one = [{name: x[i : i + 1] for name, x in part.items()} for part in (q, k, v)]
        alone = attend(*one, calls, backend="reference")
        for name, value in alone.items():
            np.testing.assert_allclose(together[name][i : i + 1], value, atol=1e-5)


def test_every_trained_grid_has_the_token_count_of_its_family():
    """One program serves a family only if its grids agree; sides up to 24 tokens, aspect ratios up to 2.5."""
    for family in (data.SMALL, data.NOMINAL, data.OBLONG):
        sides = [tuple(map(int, name.split("x"))) for name, _ in family]
        assert len({rows * columns for rows, columns in sides}) == 1
        assert all(max(side) / min(side) <= 2.5 and max(side) <= 24 for side in sides)
        known = {bucket.name for bucket in data.BUCKETS}
        assert {name for name, _ in family} <= known
