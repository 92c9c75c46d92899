import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sega_jax.training import loop


def toy_loss(params, batch, key):
    x, y = batch
    noise = 0.01 * jax.random.normal(key, y.shape)
    prediction = jnp.tanh(x @ params["first"]) @ params["second"]
    return jnp.square(prediction - y + noise).mean(), {}


def toy_params():
    keys = jax.random.split(jax.random.key(0))
    return {"first": jax.random.normal(keys[0], (4, 8)), "second": jax.random.normal(keys[1], (8, 2))}


def toy_batch(step):
    rng = np.random.default_rng((7, step))
    x = rng.normal(size=(16, 4)).astype(np.float32)
    return x, np.stack([x[:, 0] * x[:, 1], x[:, 2]], 1)


def make(total=20, trainable=None):
    rate = loop.warmup_stable_decay(1e-2, warmup=3, total=total, decay=5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1))
    step = loop.make_step(toy_loss, optimizer, seed=1, ema_decay=0.9, trainable=trainable)
    return loop.create(toy_params(), optimizer), step


def equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_killed_and_resumed_gives_the_same_bits(tmp_path):
    state, step = make()
    whole = loop.fit(state, step, toy_batch, 20, report=lambda _: None)

    path = tmp_path / "run" / "state.safetensors"
    state, step = make()

    class Killed(Exception):
        pass

    def dying(number):
        if number == 13:
            raise Killed
        return toy_batch(number)

    with pytest.raises(Killed):
        loop.fit(state, step, dying, 20, checkpoint=path, every=5, report=lambda _: None)
    state, step = make()
    seen = []

    def watched(number):
        seen.append(number)
        return toy_batch(number)

    resumed = loop.fit(state, step, watched, 20, checkpoint=path, every=5, report=lambda _: None)
    assert seen == list(range(10, 20))
    equal(whole, resumed)
    equal(loop.restore(path, whole), whole)


def test_training_learns_and_the_average_follows():
    state, step = make(total=300)
    lines = []
    start = float(toy_loss(state.params, toy_batch(1000), jax.random.key(0))[0])
    state = loop.fit(state, step, toy_batch, 300, every=100, report=lines.append)
    assert float(toy_loss(state.ema, toy_batch(1000), jax.random.key(0))[0]) < 0.5 * start
    assert len(lines) == 3
    assert "step 300/300" in lines[-1]


def test_average_is_the_recursion_it_says():
    state, step = make()
    average = jax.tree.map(np.asarray, state.ema)
    for n in range(4):
        state, _ = step(state, toy_batch(n))
        keep = min(0.9, (1 + n) / (10 + n))
        average = jax.tree.map(lambda old, new, k=keep: old * k + np.asarray(new) * (1 - k), average, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, np.asarray(b), rtol=1e-5), average, state.ema)


def test_frozen_parameters_stay_and_others_move():
    state, step = make(trainable={"first": False, "second": True})
    before = jax.tree.map(np.asarray, state.params)
    state = loop.fit(state, step, toy_batch, 6, report=lambda _: None)
    np.testing.assert_array_equal(before["first"], np.asarray(state.params["first"]))
    assert np.abs(before["second"] - np.asarray(state.params["second"])).min() > 0


def test_schedule():
    rate = loop.warmup_stable_decay(2.0, warmup=10, total=100, decay=20)
    values = [float(rate(step)) for step in (0, 5, 10, 79, 90, 100)]
    np.testing.assert_allclose(values, [0, 1, 2, 2, 1, 0], atol=1e-6)
    with pytest.raises(ValueError, match="exceed the 5 steps"):
        loop.warmup_stable_decay(1.0, warmup=4, total=5, decay=2)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    loop.save(tmp_path / "a.safetensors", {"x": jnp.zeros(3)})
    with pytest.raises(ValueError, match="tensors differ"):
        loop.restore(tmp_path / "a.safetensors", {"y": jnp.zeros(3)})
    with pytest.raises(ValueError, match="expected \\(4,\\)"):
        loop.restore(tmp_path / "a.safetensors", {"x": jnp.zeros(4)})


def test_time_limit_stops_at_a_checkpoint(tmp_path):
    state, step = make()
    state = loop.fit(state, step, toy_batch, 20, every=4, seconds=0.0, report=lambda _: None)
    assert int(state.step) == 4
