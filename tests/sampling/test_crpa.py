"""Mixed-resolution sampling against its algebra worked by hand, and against the plain pipelines on nano."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sega_jax as sj
from sega_jax import positional as pe
from sega_jax.geometry import RopeSpec
from sega_jax.layouts.crpa import arrange, core, level_name, present, up
from sega_jax.layouts.dense import Dense
from sega_jax.models.abstract import initialize
from sega_jax.models.flux import Flux, FluxConfig
from sega_jax.sampling.crpa import (
    RESIZERS,
    CoarseMixedFine,
    Crpa,
    bicubic,
    block_mean,
    nearest,
    noises,
    rewind_coefficients,
    rewound,
    settle,
    stages_of,
)
from sega_jax.sampling.crpa_cost import estimate
from sega_jax.sampling.denoise import Velocity, predict
from sega_jax.sampling.regions import parse_regions
from sega_jax.sampling.registry import get_layout
from sega_jax.sampling.sampler import Noise, Sampler
from sega_jax.sharding import mesh as M
from sega_jax.sharding import rules
from tests.tiny import flux_conditioning

PROMPT = "a red circle with stripes in the centre, blue background"
SPEC = RopeSpec(dims=(4, 6, 6), theta=100.0, trained=(8, 8))


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def pixels(mask):
    return np.asarray(up(np.asarray(mask), 2))[..., None]


# -- noise -------------------------------------------------------------------------------------------------------


def test_noise_of_all_levels_is_white_and_shared():
    fields = noises(normal(1, 1024, 1024, 4), 3)
    for level, name in enumerate(("level0", "level1", "level2")):
        assert float(fields[name].std()) == pytest.approx(1, abs=0.005)
        assert fields[name].shape == (1, 1024 >> level, 1024 >> level, 4)
    direct = np.asarray(fields["level0"]).reshape(1, 256, 4, 256, 4, 4).mean((2, 4)) * 4
    np.testing.assert_allclose(np.asarray(fields["level2"]), direct, atol=1e-5)
    sparse = jax.image.resize(fields["level0"], (1, 256, 256, 4), "linear", antialias=False) * 4
    assert float(sparse.std()) == pytest.approx(2, abs=0.02)  # why the mean is taken level by level


def test_rewinding():
    assert rewind_coefficients(0.7, 2.0)[2] == pytest.approx(0.823529, abs=1e-6)
    assert rewind_coefficients(0.4, 2.0)[2] == pytest.approx(0.571429, abs=1e-6)
    for sigma, a, raised in ((0.7, 0.211779, 0.936466), (0.55, 0.254819, 0.885331)):
        got = rewind_coefficients(sigma, 6.317)
        assert got[0] == pytest.approx(a, abs=1e-6)
        assert got[2] == pytest.approx(raised, abs=1e-6)

    z, sigma = 3.0, 0.6
    a, b, raised = rewind_coefficients(sigma, z)
    keep = 1 - (1 - 4 / z**2) ** 0.5
    fresh = np.eye(4) - keep * np.full((4, 4), 0.25)
    covariance = (a * sigma) ** 2 * np.ones((4, 4)) + b**2 * fresh @ fresh.T
    np.testing.assert_allclose(covariance, raised**2 * np.eye(4), atol=1e-12)
    assert (a * sigma) ** 2 + b**2 * (1 - 1 / z**2) == pytest.approx(raised**2, abs=1e-12)
    assert a * (1 - sigma) == pytest.approx(1 - raised, abs=1e-12)  # the clean part is scaled as the level says
    wrong = (a * sigma) ** 2 + b**2
    assert pytest.approx(1.02506, abs=1e-4) == (((0.211779 * 0.7) ** 2 + 0.936466**2) / 0.936466**2)
    assert wrong > raised**2

    x = (1 - sigma) * 0.5 + sigma * normal(1, 256, 256, 4, seed=3)
    fields = {"level0": normal(1, 512, 512, 4, seed=4), "level1": normal(1, 256, 256, 4, seed=5)}
    out = rewound(x, jnp.float32(sigma), fields, z=z)
    for name in out:
        left = np.asarray(out[name]) - (1 - raised) * 0.5
        assert left.std() == pytest.approx(raised, rel=0.005)
        assert abs(left.mean()) < 0.01
    blocks = np.asarray(out["level0"] - (1 - raised) * 0.5).reshape(256, 2, 256, 2, 4)
    np.testing.assert_allclose(
        np.cov(blocks.transpose(0, 2, 4, 1, 3).reshape(-1, 4).T), raised**2 * np.eye(4), atol=0.01
    )


def test_resizers():
    x = normal(2, 6, 8, 3)
    np.testing.assert_array_equal(np.asarray(block_mean(nearest(x))), np.asarray(x))
    ramp = jnp.broadcast_to(jnp.arange(8.0)[None, None, :, None], (1, 8, 8, 1))
    inside = np.asarray(bicubic(ramp))[0, 8, 4:-4, 0]
    np.testing.assert_allclose(inside, np.arange(4, 12) / 2 - 0.25, atol=1e-5)  # half-pixel centres


# -- exchange ----------------------------------------------------------------------------------------------------


def block(height, width, *box):
    mask = np.zeros((1, height, width), bool)
    top, left, bottom, right = box
    mask[:, top:bottom, left:right] = True
    return mask


@pytest.mark.parametrize("sigma_next", [0.4, 0.0])
def test_exchange_of_a_constant_picture(sigma_next):
    refined = (jnp.asarray(block(6, 6, 1, 1, 5, 5)),)
    fields = noises(normal(1, 24, 24, 2), 2)
    constant, sigma = 0.7, jnp.float32(0.5)
    latents = {name: (1 - sigma) * constant + sigma * x for name, x in fields.items()}
    velocity = {name: x - constant for name, x in fields.items()}
    outside = [(~pixels(mask)).astype(np.float32) for mask in core(refined)]
    stirred = {name: x + 5 * outside[level] for level, (name, x) in enumerate(latents.items())}
    out = settle(stirred, velocity, sigma, jnp.float32(sigma_next), refined, fields, resizer=RESIZERS["nearest"])
    own, there = core(refined), present(refined, (2, 1))
    for level, name in enumerate(("level0", "level1")):
        expected = (1 - sigma_next) * constant + sigma_next * np.asarray(fields[name])
        mine = np.broadcast_to(pixels(own[level]), expected.shape)
        band = np.broadcast_to(pixels(there[level]) & ~pixels(own[level]), expected.shape)
        assert band.any()
        np.testing.assert_allclose(np.asarray(out[name])[band], expected[band], atol=1e-6)
        moved = stirred[name] + (jnp.float32(sigma_next) - sigma) * velocity[name]
        np.testing.assert_allclose(np.asarray(out[name])[mine], np.asarray(moved)[mine], rtol=0, atol=1e-6)


@dataclass(frozen=True)
class Oracle:
    """A velocity towards a known picture; zero where a level has no token, as the model's."""

    target: Any
    layout: Any = None

    def grid(self, latents, conditioning):
        side = max(x.shape[1] for x in latents.values()) if isinstance(latents, dict) else latents.shape[1]
        return SPEC.grid(side // 2, side // 2)

    def initial_state(self, latents, conditioning):
        return {"image": None}

    def advance(self, params, latents, sigma, conditioning, index, memory, content=None):
        if not isinstance(latents, dict):
            (clean,) = [x for x in self.target.values() if x.shape == latents.shape]
            return (latents - clean) / sigma, memory
        grid = self.grid(latents, None)
        out = {}
        for level in range(self.layout.levels):
            name, side = level_name(level), grid.height >> level
            there = np.zeros((1, side * side + 1), bool)
            there[0, np.asarray(content.index[level])[0]] = True
            mask = pixels(there[:, :-1].reshape(1, side, side))
            out[name] = jnp.where(jnp.asarray(mask), (latents[name] - self.target[name]) / sigma, 0)
        return out, dict.fromkeys(self.layout.grids(grid))


MASKS = {
    "inside": (block(8, 8, 2, 2, 6, 5),),
    "at the border": (block(8, 8, 0, 3, 4, 8),),
    "two": (block(8, 8, 0, 0, 2, 2) | block(8, 8, 5, 4, 8, 8),),
    "three levels": (block(8, 8, 2, 2, 5, 6), block(4, 4, 1, 1, 3, 3)),
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(("coarse", "fine"), [(0.7, 0.2), (0.9, 0.0), (1.0, 0.3)])
def test_every_step_follows_the_path_to_the_target(masks, coarse, fine):
    refined = MASKS[masks]
    levels = len(refined) + 1
    small = normal(1, 32 >> (levels - 1), 32 >> (levels - 1), 2, seed=7)  # constant in the coarsest latent pixels
    target, x = {}, small
    for level in range(levels - 1, -1, -1):
        target[level_name(level)] = x
        x = nearest(x)
    options = Crpa(levels=levels, coarse=coarse, fine=fine, resize="nearest", pad_fine=2, pad_coarse=1)
    sampler = CoarseMixedFine.of(Oracle(target), np.linspace(1, 0, 9, dtype=np.float32), (32, 32, 2), options, refined)
    assert isinstance(sampler, Sampler)
    noise = Noise(3, (0,))
    state = sampler.start(noise, None)
    fields = noises(noise.field((32, 32, 2)), levels)
    for index in range(sampler.steps):
        state = sampler.step(None, state, None, index)
        sigma = sampler.sigmas[index, 1]
        alive = present(tuple(map(jnp.asarray, refined)), options.pads)
        stage = sampler.stage(index)
        for level in range(levels):
            name = level_name(level)
            if (stage == "coarse" and level != levels - 1) or (stage == "fine" and level):
                continue
            where = np.ones_like(np.asarray(alive[level])) if stage != "mixed" else np.asarray(alive[level])
            expected = (1 - sigma) * np.asarray(target[name]) + sigma * np.asarray(fields[name])
            error = np.abs(np.asarray(state["latents"][name]) - expected) * pixels(where)
            assert error.max() < 1e-5, (index, stage, level)
    np.testing.assert_allclose(np.asarray(sampler.latents(state)), np.asarray(target["level0"]), atol=1e-5)
    shown = sampler.levels_map(state)
    assert shown.shape == (1, 16, 16)
    assert sorted(np.unique(shown)) == list(range(levels))


def test_rewound_runs_end_at_the_target():
    small = normal(1, 16, 16, 2, seed=7)
    target = {"level1": small, "level0": nearest(small)}
    options = Crpa(coarse=0.6, fine=0.2, switch="rewind", rewind=2.5, resize="nearest")
    sigmas = np.linspace(1, 0, 11, dtype=np.float32)
    sampler = CoarseMixedFine.of(Oracle(target), sigmas, (32, 32, 2), options, MASKS["inside"])
    first, second = sampler.splits
    assert sampler.sigmas[first - 1, 1] == sigmas[4]
    raised = rewind_coefficients(float(sigmas[4]), 2.5)[2]
    assert sampler.sigmas[first, 0] == pytest.approx(raised)
    np.testing.assert_array_equal(sampler.sigmas[first + 1 :, 0], sampler.sigmas[first:-1, 1])
    assert sampler.steps > 10
    assert second < sampler.steps
    state = sampler.start(Noise(3, (0,)), None)
    for index in range(sampler.steps):
        state = sampler.step(None, state, None, index)
        if index == first - 1:  # the new fields are those the canvases hold
            for name in target:
                expected = (1 - raised) * np.asarray(target[name]) + raised * np.asarray(state["noise"][name])
                np.testing.assert_allclose(np.asarray(state["latents"][name]), expected, atol=1e-5)
                assert np.asarray(state["noise"][name]).std() == pytest.approx(1, abs=0.1)
    np.testing.assert_allclose(np.asarray(sampler.latents(state)), np.asarray(target["level0"]), atol=1e-5)


def test_stages_of_a_schedule():
    sigmas = np.array([1, 0.9, 0.8, 0.5, 0.2, 0], np.float32)
    assert stages_of(sigmas, Crpa())[1] == (2, 4)
    assert stages_of(sigmas, Crpa(coarse=1.0, fine=0.0))[1] == (0, 5)
    assert stages_of(sigmas, Crpa(coarse=0.0, fine=0.0))[1] == (5, 5)
    assert stages_of(sigmas, Crpa(coarse=1.0, fine=1.0))[1] == (0, 0)
    assert stages_of(sigmas, Crpa(coarse=0.85, fine=0.85))[1] == (2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("crpa(fine=0.9)", "0 <= fine <= coarse <= 1"),
        ("crpa(positions='left')", "expected aligned or pi-lr or pi-hr or stretched"),
        ("crpa(pad_fine=-1)", "pad_fine=-1; expected a whole number of at least 0"),
        ("crpa(switch='rewind', levels=3)", "defined for one doubling"),
        ("crpa(switch='rewind', rewind=1.0)", "rewind=1.0; expected a number of at least 2"),
        ("crpa(coarse='a')", "coarse='a'; expected a number"),
        ("crpa(3)", "is unknown"),
        ("dense(levels=3)", "dense has no option levels; known: none"),
        ("crpa(levels=__import__('os'))", "is unknown"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        get_layout(options)


def test_options_print_as_they_are_read():
    for text in ("crpa", "crpa(levels=3, fine=0.2)", "crpa(switch='rewind', rewind=6.317)"):
        assert get_layout(text).name == text
        assert get_layout(get_layout(text).name) == get_layout(text)


# -- cost --------------------------------------------------------------------------------------------------------


def test_cost_of_published_sizes():
    """FLUX at 1024^2, 512 text tokens, by hand: (text + fine) x all keys + coarse x (text + cells), over dense."""
    grid = FluxConfig.dev().rope_spec().grid(64, 64, 512)
    for share, cells, pairs, tokens in ((0.3, 307, 0.253, 0.533), (0.45, 461, 0.365, 0.633), (0.6, 614, 0.502, 0.733)):
        layout = Crpa(pad_fine=0, pad_coarse=0).expected(parse_regions(f"auto:{share}"), grid)
        assert layout.capacity == (4 * cells, 1024 - cells)
        assert layout.pairs(512) / 4608**2 == pytest.approx(pairs, abs=5e-4)
        assert (layout.tokens + 512) / 4608 == pytest.approx(tokens, abs=5e-4)


def test_cost_of_a_step_is_what_the_program_does():
    from sega_jax.costs.jaxpr import count
    from sega_jax.sampling.sampler import Stage

    pipe = sj.Pipeline.from_pretrained("nano", dtype="float32")
    options = Crpa()
    grid = pipe.grid(256, 256)
    sigmas, regions = pipe.sigmas(8, 256, 256), parse_regions("center:0.3")
    sampler = CoarseMixedFine.of(pipe.velocity(), sigmas, (32, 32, 16), options, regions)
    expected = estimate(pipe.parts.transformer_config, grid, sigmas, options, regions)
    stages = {stage.name: stage for stage in sampler.stages()}
    assert set(stages) == {"coarse", "mixed", "fine"} - {n for n, (steps, _, _) in expected.stages.items() if not steps}
    conditioning = jax.eval_shape(lambda: pipe.encode([PROMPT]))
    for name, stage in stages.items():
        assert isinstance(stage, Stage)
        shapes = stage.latents if isinstance(stage.latents, dict) else {"image": stage.latents}
        latents = {n: jax.ShapeDtypeStruct((1, *shape), jnp.float32) for n, shape in shapes.items()}
        latents = latents if isinstance(stage.latents, dict) else latents["image"]
        step = count(
            lambda p, x, c, content, stage=stage: stage.velocity.advance(p, x, 0.5, c, 0, None, content),
            pipe.params, latents, conditioning, stage.content,
        )  # fmt: skip
        assert step.flops == pytest.approx(expected.stages[name][2], rel=0.02)


# -- nano --------------------------------------------------------------------------------------------------------

SIZE = {"width": 128, "height": 128, "steps": 4, "mu": 1.15, "seed": 5, "positional": "none"}


@pytest.fixture(scope="module")
def pipe():
    return sj.Pipeline.from_pretrained("nano", dtype="float32")


def made(pipe, **options):
    return pipe.generate(PROMPT, decode=False, **{**SIZE, **options})


def test_everything_refined_is_the_plain_pipeline(pipe):  # K = N
    ours = made(pipe, layout="crpa(coarse=1, fine=0)", regions="center:1")
    np.testing.assert_array_equal(ours.latents, made(pipe).latents)
    assert (ours.levels == 0).all()


def test_nothing_refined_is_the_plain_pipeline_at_half_size(pipe):  # K = 0
    field = pipe.noise(5, 128, 128)
    low = made(pipe, width=64, height=64, init_latents=np.asarray(2 * block_mean(field)))
    sampler = CoarseMixedFine.of(
        pipe.velocity(),
        pipe.sigmas(4, 128, 128, 1.15),
        (16, 16, 16),
        get_layout("crpa(fine=0)"),
        (np.zeros((1, 4, 4), bool),),
    )
    state = sampler.start(Noise(5, (0,)), conditioning := pipe.encode([PROMPT]))
    for index in range(sampler.steps):
        state = sampler.step(pipe.params, state, conditioning, index)
    np.testing.assert_array_equal(np.asarray(state["latents"]["level1"]), low.latents)
    np.testing.assert_allclose(np.asarray(sampler.latents(state)), np.asarray(bicubic(low.latents)), atol=1e-5)


def test_one_compilation_per_stage_for_regions_of_one_budget(pipe):
    before = predict._cache_size()
    first = made(pipe, layout="crpa(fine=0.6)", regions="box:0,0,64,64", width=160)
    stages = predict._cache_size() - before
    assert 1 <= stages <= 3  # dense stages may be programs of runs before this one
    second = made(pipe, layout="crpa(fine=0.6)", regions="box:64,32,64,64", width=160)
    assert predict._cache_size() == before + stages
    assert (first.levels == 0).sum() == (second.levels == 0).sum() == 16
    assert np.abs(first.latents - second.latents).max() > 1e-3


def test_a_batch_with_guidance_and_a_region_per_picture(pipe):
    masks = np.zeros((2, 4, 4), bool)
    masks[0, :2, :2] = True
    masks[1, 2:, 1:3] = True
    one = pipe.encode([PROMPT], negative_prompt="a green square", true_guidance=2.0)
    both = flux_conditioning(
        *(jnp.concatenate([one.arrays[name]] * 2) for name in ("text", "pooled")),
        one.scales.get("guidance"),
        tuple(jnp.concatenate([one.negative[name]] * 2) for name in ("text", "pooled")),
        one.true_guidance,
    )

    def sample(masks, conditioning, indices):
        sampler = CoarseMixedFine.of(
            pipe.velocity("sega"),
            np.array([1.0, 0.5], np.float32),
            (16, 16, 16),
            Crpa(coarse=1.0, fine=0.0),
            (masks,),
        )
        state = sampler.start(Noise(5, indices), conditioning)
        return np.asarray(sampler.latents(sampler.step(pipe.params, state, conditioning, 0)))

    together = sample(masks, both, (0, 1))
    for row in range(2):
        alone = sample(masks[row : row + 1], one, (row,))
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4)
    assert np.abs(together - sample(masks[::-1], both, (0, 1))).max() > 1e-3


def test_automatic_regions(pipe):
    result = made(pipe, layout="crpa(fine=0)", regions="auto:0.25")
    assert (result.levels == 0).sum() == 16
    assert np.isfinite(result.latents).all()
    assert result.records[0]["regions"] == "auto:0.25"
    with pytest.raises(ValueError, match="chosen from the coarse result"):
        made(pipe, layout="crpa(coarse=1.0)", regions="auto:0.25")
    with pytest.raises(ValueError, match="give layout='crpa'"):
        made(pipe, regions="auto:0.25")
    with pytest.raises(ValueError, match="not of one step"):
        pipe.velocity("none", "crpa")


def test_three_levels_and_a_start_from_a_picture(pipe):
    """The corner is fine, a margin of one coarse cell around it middling, the rest coarse."""
    options = {"layout": "crpa(levels=3, fine=0)", "regions": "box:0,0,32,32", "width": 192, "height": 192}
    result = made(pipe, init_image=np.zeros((192, 192, 3), np.float32), strength=0.5, **options)
    expected = np.full((12, 12), 2)
    expected[:8, :8] = 1
    expected[:2, :2] = 0
    np.testing.assert_array_equal(result.levels[0], expected)
    assert np.isfinite(result.latents).all()


def test_the_arrangement_is_traced(pipe):
    """Regions of a batch cross `jit` as arrays."""
    layout = Crpa().expected(parse_regions("auto:0.25"), SPEC.grid(16, 16))
    shapes = jax.eval_shape(lambda masks: arrange(masks, layout), (jax.ShapeDtypeStruct((3, 8, 8), bool),))
    assert shapes.index[0].shape == (3, layout.capacity[0])
    assert replace(layout, text="coarse") != layout
    assert FluxConfig.dev().step_flops(4096, 512, 4608**2) > 5e13


def test_eight_devices_make_the_same_picture():
    config = FluxConfig(
        in_channels=16, double_layers=1, single_layers=1, heads=4, head_dim=12, text_dim=8, pooled_dim=8,
        rope_dims=(4, 4, 4),
    )  # fmt: skip
    graphdef, params = nnx.split(initialize(lambda rngs: Flux(config, rngs=rngs)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), params)
    spec = config.rope_spec((4, 4))
    velocity = Velocity(graphdef, pe.get("sega"), Dense(), spec, "float32")
    conditioning = flux_conditioning(normal(2, 5, 8), normal(2, 8, seed=1), jnp.float32(3.5))
    masks = np.zeros((2, 4, 4), bool)
    masks[0, :2, 1:3] = True
    masks[1, 1:3, 2:] = True

    def run(velocity, params):
        options = Crpa(coarse=0.9, fine=0.6)
        sigmas = np.array([1.0, 0.9, 0.7, 0.5, 0.0], np.float32)
        sampler = CoarseMixedFine.of(velocity, sigmas, (16, 16, 4), options, (masks,))
        assert [sampler.stage(i) for i in range(4)] == ["coarse", "mixed", "mixed", "fine"]
        state = sampler.start(Noise(0, (0, 1)), conditioning)
        for index in range(sampler.steps):
            state = sampler.step(params, state, conditioning, index)
        return M.to_host(sampler.latents(state))

    mesh = M.make_mesh(data=2, context=2, tensor=2)
    got = run(replace(velocity, mesh=mesh), rules.place(params, mesh))
    np.testing.assert_allclose(got, run(velocity, params), atol=1e-4, rtol=0)
