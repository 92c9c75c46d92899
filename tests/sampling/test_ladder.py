"""The ladder: its steps with oracle denoisers, a random two-block model, requests, and nano end to end."""

from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sega_jax as sj
from sega_jax.costs.visits import attention_flops
from sega_jax.evaluation.multidiffusion import MultiDiffusion, multidiffusion, window_starts
from sega_jax.geometry import RopeSpec
from sega_jax.layouts.dense import Dense
from sega_jax.layouts.scalediff import Neighborhood
from sega_jax.layouts.streams import draw
from sega_jax.models.flux import Flux, FluxConfig
from sega_jax.pipeline import ladders
from sega_jax.positional import none
from sega_jax.sampling import latent_ops as ops
from sega_jax.sampling.denoise import Velocity, predict
from sega_jax.sampling.ladder import Codec, Ladder, Level
from sega_jax.sampling.rungs import parse, text_of
from sega_jax.sampling.sampler import Noise, Sampler
from sega_jax.sampling.schedule import Schedule
from tests.tiny import flux_conditioning

FLUX_SIGMAS = Schedule().sigmas(30, 4096)[12:]


def blocks(x, factor):
    return np.asarray(x).repeat(factor, 1).repeat(factor, 2)


# A stand-in for the autoencoder whose decode and encode undo each other: two pixels per latent pixel.
CODEC = Codec(
    decode=lambda z: blocks(z, 2),
    encode=lambda image, eps: jnp.asarray(image)[:, ::2, ::2] + (0.0 if eps is None else 0.0 * eps),
)


@dataclass(frozen=True)
class Oracle:
    """A model that predicts one clean latent, whatever it sees; None: the stage's own reference."""

    clean: object
    layout: object = Dense()

    def grid(self, latents, conditioning):
        return RopeSpec().grid(*latents.shape[1:3])

    def initial_state(self, latents, conditioning):
        return None

    def advance(self, params, latents, sigma, conditioning, step=0, state=None, content=None):
        return (latents - self.clean) / sigma, state


def climb(reference, clean, sigmas, gammas, seed=0):
    """One stage from a finished 4 x 4 latent of one value, with an oracle that always predicts ``clean``."""
    first = Level(Oracle(jnp.full((1, 4, 4, 2), reference)), np.array([1.0, 0.0], np.float32), (4, 4, 2))
    second = Level(Oracle(jnp.full((1, 8, 8, 2), clean)), sigmas, (8, 8, 2), gammas)
    ladder = Ladder((first, second), CODEC)
    assert isinstance(ladder, Sampler)
    state = ladder.start(Noise(seed, (0,)), None)
    for index in range(ladder.steps):
        state = ladder.step(None, state, None, index)
    return np.asarray(ladder.latents(state))


def test_the_true_noise_leads_back_to_the_reference():
    gammas = ops.gamma_of_flow(FLUX_SIGMAS)
    np.testing.assert_allclose(climb(0.7, 0.7, FLUX_SIGMAS, gammas), 0.7, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 5])
def test_an_oracle_ends_at_its_own_clean_latent_moved_by_the_last_gamma(seed):
    flow = climb(1.0, 0.0, FLUX_SIGMAS, ops.gamma_of_flow(FLUX_SIGMAS), seed)
    np.testing.assert_allclose(flow, 0.0982080, atol=2e-6)
    vanishing = np.full(len(FLUX_SIGMAS) - 1, 0.0031279, np.float32)
    np.testing.assert_allclose(climb(1.0, 0.0, FLUX_SIGMAS, vanishing, seed), 0.0031279, atol=2e-6)
    np.testing.assert_allclose(climb(1.0, 0.0, FLUX_SIGMAS, None, seed), 0.0, atol=2e-6)


def test_references():
    z = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 3)), jnp.float32)
    state = {"latents": z, "seed": jnp.zeros((2, 2), jnp.uint32), "rows": jnp.asarray([0, 1], jnp.uint32)}

    def made(reference):
        stage = Level(Oracle(0), FLUX_SIGMAS, (8, 8, 3), reference=reference)
        return np.asarray(Ladder((stage, stage), CODEC).reference(state, 1))

    picture = np.asarray(ops.bicubic(jnp.asarray(blocks(z, 2)), 16, 16))[:, ::2, ::2]
    np.testing.assert_allclose(made("image"), picture, atol=1e-6)
    np.testing.assert_allclose(made("latent"), np.asarray(ops.bicubic(z, 8, 8)), atol=1e-6)
    expected = ops.mix(jnp.asarray(picture), ops.bicubic(z, 8, 8), 0.25)
    np.testing.assert_allclose(made("mixed"), np.asarray(expected), atol=1e-6)


# -- counts ------------------------------------------------------------------------------------------------------


def formula(s, side, text, width, jitter=False):
    windows = (2 * s + jitter) ** 2
    return 4 * windows * (side * side // 4 + text) * (side * side + text) * width


@pytest.mark.parametrize(("s", "text"), [(2, 0), (2, 16), (4, 16)])
@pytest.mark.parametrize("layout", [Neighborhood(), Neighborhood(path="windows"), Neighborhood(jitter=True)])
def test_attention_flops_are_the_formulas(layout, s, text):
    grid = RopeSpec(trained=(8, 8)).grid(8 * s, 8 * s, text)
    assert attention_flops(layout, grid, 256) == formula(s, 8, text, 256, layout.jitter)
    assert attention_flops(Dense(), grid, 256) == 4 * (grid.tokens + text) ** 2 * 256


def test_flux_at_4096():
    grid = RopeSpec().grid(256, 256, 256)
    assert 57 * attention_flops(Neighborhood(), grid, 3072) == pytest.approx(2.497e14, rel=1e-3)
    rows, columns = Neighborhood().axes(grid)
    assert len(rows.starts()[0]) * len(columns.starts()[0]) == 64
    assert len(rows.starts(0)[0]) * len(columns.starts(0)[0]) == 81
    assert [len(window_starts(64 * s, 64)) ** 2 for s in (2, 4)] == [9, 49]


# -- a random two-block model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """Velocity by layout, parameters and conditioning of a tiny random transformer with 4 x 4 trained tokens."""
    config = FluxConfig(
        in_channels=16, double_layers=1, single_layers=1, heads=2, head_dim=16, text_dim=8, pooled_dim=8,
        guidance_embeds=False, rope_dims=(4, 6, 6),
    )  # fmt: skip
    with nnx.use_eager_sharding(False):
        graphdef, params = nnx.split(Flux(config, rngs=nnx.Rngs(0)))
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + jnp.asarray(random.normal(0, 0.2, x.shape), x.dtype), params)
    spec = config.rope_spec((4, 4), 16)

    def velocity(layout):
        return Velocity(graphdef, none(), layout, spec, "float32")

    text, pooled = (jnp.asarray(random.standard_normal(s), jnp.float32) for s in ((1, 3, 8), (1, 8)))
    return SimpleNamespace(velocity=velocity, params=params, conditioning=flux_conditioning(text, pooled))


def latent(side, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((1, side, side, 4)), jnp.float32)


def test_one_window_is_the_dense_model(model):
    dense, windows = (
        model.velocity(layout)(model.params, latent(8), 0.6, model.conditioning) for layout in (Dense(), Neighborhood())
    )
    np.testing.assert_allclose(np.asarray(windows), np.asarray(dense), atol=1e-5)


def test_paths_agree_and_jitter_compiles_once(model):
    for side in (16, 32):
        x = latent(side)
        blocks, gathered = (
            np.asarray(model.velocity(Neighborhood(path=path))(model.params, x, 0.6, model.conditioning))
            for path in ("blocks", "windows")
        )
        assert blocks.shape == x.shape
        np.testing.assert_allclose(gathered, blocks, atol=2e-5)
    velocity = model.velocity(Neighborhood(jitter=True))
    grid = velocity.grid(x, model.conditioning)
    before, made = predict._cache_size(), []
    for offsets in ((0, 0), (1, 2), (2, 1)):
        content = {"offsets": jnp.asarray([offsets], jnp.int32)}
        made.append(np.asarray(velocity.advance(model.params, x, 0.6, model.conditioning, content=content)[0]))
    assert predict._cache_size() == before + 1
    assert np.abs(made[0] - made[1]).max() > 1e-3
    drawn = [np.asarray(draw(velocity.layout, jnp.asarray([0, n], jnp.uint32), grid)["offsets"]) for n in range(40)]
    assert {int(n) for n in np.ravel(drawn)} == {0, 1, 2}  # both ends of 0…patch


def test_multidiffusion_of_one_window_is_the_model_and_of_nine_their_mean(model):
    velocity = model.velocity(Dense())
    one = MultiDiffusion(velocity, (8, 8)).advance(model.params, latent(8), 0.6, model.conditioning)[0]
    np.testing.assert_allclose(
        np.asarray(one), np.asarray(velocity(model.params, latent(8), 0.6, model.conditioning)), atol=1e-6
    )
    x = latent(16)
    nine = np.asarray(MultiDiffusion(velocity, (8, 8)).advance(model.params, x, 0.6, model.conditioning)[0])
    parts = [
        np.asarray(velocity(model.params, x[:, y : y + 8, z : z + 8], 0.6, model.conditioning))
        for y, z in ((0, 0), (0, 4), (4, 0), (4, 4))
    ]
    middle = (parts[0][:, 4:, 4:] + parts[1][:, 4:, :4] + parts[2][:, :4, 4:] + parts[3][:, :4, :4]) / 4
    np.testing.assert_allclose(nine[:, 4:8, 4:8], middle, atol=1e-5)
    stage = Level(velocity, FLUX_SIGMAS, (8, 8, 4))
    assert multidiffusion(Ladder((stage, stage), CODEC), velocity).levels[1].velocity.window == (8, 8)


# -- requests ----------------------------------------------------------------------------------------------------


def test_a_ladder_reads_back():
    text = '256 positional=pi(), 512 layout=scalediff(window=(8, 8), jitter=True) positional="a b"+c start=3 rho=0.5'
    rungs = parse(text)
    assert [rung.width for rung in rungs] == [256, 512]
    assert rungs[1].layout == "scalediff(window=(8, 8), jitter=True)"
    assert rungs[1].positional == '"a b"+c'
    assert parse(text_of(rungs)) == rungs


@pytest.fixture(scope="module")
def pipe():
    return sj.Pipeline.from_pretrained("nano", dtype="float32")


def test_a_plan_is_filled_in_and_repeats_itself(pipe):
    plan = pipe.plan("a", layout="scalediff", ladder="256x128,512x256 layout=dense positional=sega,1024x512 tau=0.5")
    first, second, third = plan.ladder
    assert (first.layout, second.layout, third.layout) == ("dense", "dense", "scalediff(window=(8, 16))")
    assert (first.start, second.start, third.start) == (None, 8, 10)
    assert second.positional.endswith("sega_magnitude()")
    assert third.positional == "pi()+sega_magnitude()"  # 16 tokens of a window, 12 trained
    again = pipe.plan("a", layout="scalediff", ladder=plan.record(0)["ladder"])
    assert again.ladder == plan.ladder
    assert plan.evaluations() == 20 + 12 + 10
    assert plan.evaluations(from_picture=True) == 12 + 10
    doubled = pipe.plan("a", layout="scalediff", width=1024, height=1024).ladder
    assert [rung.width for rung in doubled] == [128, 256, 512, 1024]
    assert [rung.width for rung in ladders.default(RopeSpec().grid(384, 384))] == [1024, 3072, 6144]
    # above the trained grid the window stays trained
    assert pipe.plan("a", layout="scalediff", ladder="384,768").ladder[1].layout == "scalediff"


@pytest.mark.parametrize(
    ("ladder", "words"),
    [
        ("512,256", "must be larger|sizes must grow"),
        ("256,512x256", "sizes must grow|must be larger"),
        ("256,512x768", "aspect ratio"),
        ("256,500", "height=500"),
        ("192,400", "try 24 tokens"),
        ("256 colour=red,512", "'colour=red' is no option"),
        ("256,512 tau=0", "above 0 and at most 1"),
        ("256,512 tau=x", "expected a number"),
        ("256,512 tau=0.5 start=2", "both given"),
        ("192,384 start=20", "no step of 20"),
        ("256 tau=0.5,512", "first size"),
        ("256,512 gamma=strong", "sigma, relative, none"),
        ("256,512 layout=sparse", "known: dense"),
        ("256,512 layout=scalediff(size=3)", "no option size; known: window"),
        ("large", "expected a size"),
        ("", "expected a size"),
    ],
)
def test_bad_ladders_are_refused_before_work(pipe, ladder, words):
    with pytest.raises(ValueError, match=words):
        pipe.plan("a", layout="scalediff", ladder=ladder)


def test_conflicts_are_refused(pipe):
    with pytest.raises(ValueError, match="ends at 512x512"):
        pipe.plan("a", ladder="256,512", width=1024, height=1024)
    with pytest.raises(ValueError, match="tau"):
        pipe.plan("a", ladder="256,512", strength=0.5)
    with pytest.raises(ValueError, match="give two sizes"):
        pipe.plan("a", ladder="256", photo=(256, 256))
    with pytest.raises(ValueError, match="factors of two and three"):
        pipe.plan("a", layout="scalediff", width=400, height=400)


# -- nano end to end ---------------------------------------------------------------------------------------------

LADDER = "64,128 tau=0.5,256 tau=0.25 layout=scalediff(jitter=True)"


def test_pictures_of_a_ladder_depend_on_seed_and_index_alone(pipe):
    options = {"layout": "scalediff", "ladder": LADDER, "steps": 4, "decode": False}
    together = pipe.generate("a red circle", num_images=3, batch_size=3, seed=1, **options)
    alone = pipe.generate("a red circle", image_indices=[2], seed=1, **options)
    assert together.latents.shape == (3, 32, 32, 16)
    np.testing.assert_allclose(together.latents[2:], alone.latents, atol=2e-4)
    assert np.abs(together.latents[0] - together.latents[1]).max() > 0.1
    assert "scalediff(window=(4, 4), jitter=True)" in together.records[0]["ladder"]


def test_a_picture_enters_the_ladder(pipe):
    picture = np.zeros((64, 64, 3), np.float32)
    picture[:, 32:] = 0.8
    seen = []
    result = pipe.generate(
        "a red circle", init_image=picture, layout="scalediff", ladder="64,128 start=19", steps=20,
        on_step=seen.append,
    )  # fmt: skip
    assert len(seen) == 1  # the first size is not made
    assert result.images[0].array.shape == (128, 128, 3)
    left, right = result.images[0].array[:, :48].mean(), result.images[0].array[:, 80:].mean()
    assert right > left
