"""The pipeline on the embedded demo model: seeds, batches, guidance, starts, compile counts, the pure face."""

import dataclasses
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sega_jax as sj
from sega_jax import positional as pe
from sega_jax.media.latents import load_latents, save_latents
from sega_jax.sampling.denoise import predict

PROMPT = "a red circle with stripes in the centre, blue background"
SMALL = {"width": 96, "height": 128, "steps": 2}


@pytest.fixture(scope="module")
def pipe():
    return sj.Pipeline.from_pretrained("nano", dtype="float32")


@pytest.fixture(scope="module")
def beyond(pipe):
    """A size above the trained one on one axis, so that methods act; still small."""
    side = pipe.parts.rope.trained[1] * pipe.parts.rope.pixels_per_token
    return {"width": side + 64, "height": 64, "steps": 2}


def latents(pipe, prompt=PROMPT, **options):
    return pipe.generate(prompt, decode=False, **options).latents


def test_a_picture_and_its_record(pipe):
    result = pipe.generate(PROMPT, seed=3, **SMALL)
    assert result.images[0].array.shape == (128, 96, 3)
    record = result.images[0].metadata
    assert {key: record[key] for key in ("prompt", "width", "height", "steps", "seed", "image_index")} == {
        "prompt": PROMPT, "width": 96, "height": 128, "steps": 2, "seed": 3, "image_index": 0
    }  # fmt: skip
    assert pe.describe(pe.get(record["positional"])) == record["positional"] == "none()"
    assert set(result.timings) == {"encode", "denoise", "decode"}


def test_euler_over_the_pure_velocity_gives_the_same_bits(pipe, beyond):
    for method in ("none", "sega", "dype-yarn"):
        velocity = sj.velocity(pipe, positional=method)
        conditioning = pipe.encode([PROMPT])
        x = pipe.noise(seed=5, height=beyond["height"], width=beyond["width"])
        sigmas = pipe.sigmas(steps=2, height=beyond["height"], width=beyond["width"])
        for sigma, sigma_next in itertools.pairwise(sigmas):
            x = sj.euler(x, velocity(pipe.params, x, sigma, conditioning), sigma, sigma_next)
        np.testing.assert_array_equal(np.asarray(x), latents(pipe, seed=5, positional=method, **beyond))


def test_gradients_through_the_velocity_are_finite(pipe, beyond):
    velocity = sj.velocity(pipe, positional="sega")
    conditioning = pipe.encode([PROMPT])
    x = pipe.noise(seed=0, height=beyond["height"], width=beyond["width"])

    def energy(params, x):
        return jnp.square(velocity(params, x, 0.7, conditioning)).sum()

    for gradient in jax.tree.leaves(jax.grad(energy, argnums=(0, 1))(pipe.params, x)):
        assert bool(jnp.isfinite(gradient).all())
    step = 1e-2 * jax.random.normal(jax.random.key(1), x.shape)
    slope = float((jax.grad(energy, argnums=1)(pipe.params, x) * step).sum())
    difference = float(energy(pipe.params, x + step) - energy(pipe.params, x - step)) / 2
    assert slope == pytest.approx(difference, rel=0.02, abs=1e-2)


def test_one_compilation_for_steps_prompts_guidance_and_hyper_parameters(pipe, beyond):
    size = {**beyond, "width": beyond["width"] + 16}
    before = predict._cache_size()
    latents(pipe, positional="sega", **size)
    assert predict._cache_size() == before + 1
    latents(pipe, "a", positional="sega", **{**size, "steps": 3})
    latents(pipe, "a green square " * 20, positional="sega", seed=9, mu="native", **size)
    base, gentler = pe.get("sega"), pe.sega_magnitude(alpha=0.05)
    latents(pipe, positional=pe.chain(base.frequency, gentler), **size)
    assert predict._cache_size() == before + 1
    latents(pipe, positional="sega", negative_prompt="", true_guidance=2.0, **size)
    assert predict._cache_size() == before + 2  # twice the rows is another shape
    latents(pipe, positional="sega", negative_prompt="a blue square", true_guidance=4.0, **size)
    assert predict._cache_size() == before + 2


def test_at_the_trained_size_every_method_is_plain_rope(pipe):
    side = pipe.parts.rope.trained[0] * pipe.parts.rope.pixels_per_token
    options = {"width": side, "height": side // 2, "steps": 1}
    plain = latents(pipe, positional="none", **options)
    for name in pe.presets():
        np.testing.assert_array_equal(latents(pipe, positional=name, **options), plain)


def test_methods_differ_beyond_it(pipe, beyond):
    made = {
        name: latents(pipe, positional=name, **beyond) for name in ("none", "pi", "ntk", "yarn", "sega", "dype-ntk")
    }
    for a in made:
        for b in made:
            assert a == b or np.abs(made[a] - made[b]).max() > 1e-4, (a, b)


def test_pictures_depend_on_seed_and_index_not_on_the_batch(pipe):
    together = latents(pipe, num_images=3, batch_size=3, seed=7, **SMALL)
    padded = latents(pipe, num_images=3, batch_size=2, seed=7, **SMALL)
    alone = latents(pipe, image_indices=[2], seed=7, **SMALL)
    np.testing.assert_allclose(together, padded, atol=2e-5)
    np.testing.assert_allclose(together[2:], alone, atol=2e-5)
    assert np.abs(together[0] - together[1]).max() > 0.1
    assert np.abs(latents(pipe, seed=8, **SMALL) - together[0]).max() > 0.1


def test_the_spectrum_is_measured_per_sample(pipe, beyond):
    """SEGA on a batch equals SEGA one by one; the release's batch mean does not."""
    options = {"num_images": 2, "seed": 1, **beyond}
    np.testing.assert_allclose(
        latents(pipe, positional="sega", batch_size=2, **options),
        latents(pipe, positional="sega", batch_size=1, **options),
        atol=5e-5,
    )


def test_a_two_stage_picture_does_not_depend_on_its_batch(pipe):
    options = {"layout": "scale-dit(start='pixels')", "width": 64, "height": 64, "steps": 2, "seed": 1}
    three = latents(pipe, num_images=3, batch_size=3, **options)
    np.testing.assert_allclose(three[2:], latents(pipe, image_indices=[2], **options), atol=5e-5)


def test_true_guidance(pipe, beyond):
    plain = latents(pipe, positional="sega", **beyond)
    neutral = latents(pipe, positional="sega", negative_prompt="a blue square", true_guidance=1.0, **beyond)
    np.testing.assert_allclose(neutral, plain, atol=5e-5)
    velocity, x = pipe.velocity("sega"), pipe.noise(0, beyond["height"], beyond["width"])
    asked, avoided = pipe.encode([PROMPT]), pipe.encode(["a blue square"])
    both = pipe.encode([PROMPT], negative_prompt="a blue square", true_guidance=2.5)
    up, down = (velocity(pipe.params, x, 0.8, c) for c in (asked, avoided))
    got = velocity(pipe.params, x, 0.8, both)
    np.testing.assert_allclose(np.asarray(got), np.asarray(down + 2.5 * (up - down)), atol=1e-4)


def test_image_to_image(pipe):
    source = pipe.generate(PROMPT, seed=1, **SMALL).images[0]
    picture = source.array.astype(np.float32) / 127.5 - 1
    little = latents(pipe, init_image=picture, strength=0.5, seed=2, **SMALL)
    clean = np.asarray(pipe.encode_image(picture[None], seed=2))
    fresh = latents(pipe, seed=2, **SMALL)
    assert np.abs(little - clean).mean() < np.abs(fresh - clean).mean()
    whole = pipe.generate(PROMPT, init_image=picture, strength=1.0, seed=2, decode=False, **SMALL)
    np.testing.assert_array_equal(whole.latents, fresh)  # strength 1 starts from pure noise


def test_initial_latents_from_a_file(pipe, tmp_path):
    noise = np.asarray(pipe.noise(11, SMALL["height"], SMALL["width"], [0, 1]))
    save_latents(tmp_path / "noise.safetensors", noise, {})
    given = latents(pipe, init_latents=tmp_path / "noise.safetensors", num_images=2, **SMALL)
    np.testing.assert_array_equal(given, latents(pipe, seed=11, num_images=2, **SMALL))
    np.testing.assert_array_equal(load_latents(tmp_path / "noise.safetensors")[0], noise)


def test_precomputed_embeddings_replace_the_encoders(pipe):
    encoded = pipe.encode([PROMPT])
    embeddings = {name: np.asarray(x) for name, x in encoded.arrays.items()}
    got = latents(pipe, "whatever", embeddings=embeddings, **SMALL)
    np.testing.assert_array_equal(got, latents(pipe, **SMALL))
    with pytest.raises(ValueError, match="pooled missing"):
        latents(pipe, embeddings={"text": embeddings["text"]}, **SMALL)


def test_latents_are_handed_over_before_decoding(pipe, monkeypatch):
    kept = []

    def broken(self, *args, **kwargs):
        raise MemoryError("decoder")

    monkeypatch.setattr(sj.Pipeline, "decode", broken)
    with pytest.raises(MemoryError):
        pipe.generate(PROMPT, on_latents=lambda z, records: kept.append((z, records)), **SMALL)
    assert kept[0][0].shape == (1, 16, 12, 16)
    assert kept[0][1][0]["prompt"] == PROMPT


def test_tiled_decode_is_close_to_plain(pipe):
    z = latents(pipe, width=256, height=192, steps=4)
    plain, tiled = pipe.decode(z, vae="plain"), pipe.decode(z, vae="tiled")
    np.testing.assert_allclose(tiled, plain, atol=1e-5)  # one tile covers it


def test_exact_decode_is_plain_and_auto_takes_it_where_plain_would_not_fit(pipe, monkeypatch):
    z = latents(pipe, width=256, height=192, steps=4)
    plain, exact = pipe.decode(z, vae="plain"), pipe.decode(z, vae="exact")
    np.testing.assert_allclose(exact, plain, atol=1e-4)
    monkeypatch.setattr("sega_jax.decoding.decode.PLAIN_DECODE_BYTES", 0)
    np.testing.assert_array_equal(pipe.decode(z), exact)
    with pytest.raises(ValueError, match="expected one of auto, plain, exact, tiled"):
        pipe.decode(z, vae="strips")


@dataclasses.dataclass(frozen=True)
class Remembering:
    """A method with a statistic of its own, memory between steps, and a magnitude per head."""

    heads: int

    def measure(self, tokens, grid, probe):
        return jnp.square(tokens).mean((1, 2))

    def init(self, grid, batch):
        return jnp.zeros((batch,))

    def update(self, state, grid, signals):
        return state + signals.spectrum

    def __call__(self, grid, signals):
        plain = pe.plain(grid)
        gain = 1 + 0.1 * jnp.tanh(signals.state + signals.spectrum)[:, None, None]  # [B, 1, 1]
        head = jnp.linspace(1.0, 1.1, self.heads)[None, :, None]
        magnitude = tuple(gain * head * m[None, None, :] for m in plain.magnitude)
        return {"text": plain, "image": pe.Rope(plain.frequencies, magnitude)}


def test_a_method_from_outside(pipe, beyond):
    method = Remembering(pipe.parts.transformer_config.heads)
    two = latents(pipe, positional=method, num_images=2, batch_size=2, **beyond)
    one = latents(pipe, positional=method, image_indices=[1], **beyond)
    np.testing.assert_allclose(two[1:], one, atol=5e-5)
    assert np.abs(one - latents(pipe, positional="none", image_indices=[1], **beyond)).max() > 1e-4
    guided = latents(pipe, positional=method, negative_prompt="", true_guidance=1.0, image_indices=[1], **beyond)
    np.testing.assert_allclose(guided, one, atol=5e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 100}, "width=100"),
        ({"height": 0}, "height=0"),
        ({"steps": -1}, "steps=-1"),
        ({"guidance": 3.5}, "guidance=3.5"),
        ({"true_guidance": 2.0}, "true_guidance=2.0"),
        ({"seed": -2}, "seed=-2"),
        ({"num_images": 0}, "num_images=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"positional": "sigma"}, "sigma"),
        ({"layout": "sparse"}, "layout='sparse'"),
        ({"mu": "wild"}, "mu='wild'"),
        ({"strength": 0.5}, "strength=0.5"),
        ({"init_latents": np.zeros((1, 2, 2, 16), np.float32)}, "init_latents"),
    ],
)
def test_bad_requests_are_named(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe.generate(PROMPT, **{**SMALL, **options})


def test_warnings_reach_the_user(pipe, caplog):
    with caplog.at_level(logging.WARNING):
        pipe.plan(PROMPT, width=2048, height=2048, mu="native")
        pipe.encode(["a zebra in the sky"])
    assert "collapsed" in caplog.text
    assert "zebra" in caplog.text
