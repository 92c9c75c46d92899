"""The two-stage run of Scale-DiT on a tiny model: schedule, low frequencies, the small stream, its cache."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sega_jax import positional as pe
from sega_jax.geometry import RopeSpec
from sega_jax.layouts.dense import Dense
from sega_jax.layouts.scale_dit import ScaleDiT
from sega_jax.layouts.streams import bind
from sega_jax.models import adapters as A
from sega_jax.models.abstract import initialize
from sega_jax.models.flux import PACKING, Flux, FluxConfig
from sega_jax.positional.rope import plain
from sega_jax.sampling import scale_dit, states
from sega_jax.sampling.denoise import Conditioning, Velocity
from sega_jax.sampling.sampler import Noise
from sega_jax.sampling.scale_dit import Guided, TwoStage
from sega_jax.sampling.schedule import Schedule
from sega_jax.sharding import rules
from sega_jax.sharding.mesh import make_mesh, to_host
from tests.tiny import flux_conditioning, step_inputs

CONFIG = FluxConfig(
    in_channels=16, double_layers=1, single_layers=1, heads=2, head_dim=16, text_dim=8, pooled_dim=8,
    guidance_embeds=True, rope_dims=(4, 6, 6),
)  # fmt: skip
SPEC = RopeSpec(dims=(4, 6, 6), trained=(16, 16))
TEXT = 4


def grid_of(height: int, width: int, text: int):
    return SPEC.grid(height // 2, width // 2, text)


@pytest.fixture(scope="module")
def model() -> Flux:
    """A tiny transformer, no parameter zero."""
    module = initialize(lambda rngs: Flux(CONFIG, rngs=rngs))
    graph, params = nnx.split(module)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.1 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves))


@pytest.fixture(scope="module")
def changed(model) -> Flux:
    """The same with adapters that change something."""
    layers = A.create(model, 2, jax.random.key(2)).layers()
    for number, layer in enumerate(layers.values()):
        b = layer.b[...]
        layer.b.set_value(0.2 * jax.random.normal(jax.random.key(number), b.shape))
    graph, params = nnx.split(model)
    return A.attach(nnx.merge(graph, params), A.Adapters(layers))


def conditioning(seed: int = 0, batch: int = 1) -> Conditioning:
    rng = np.random.default_rng(seed)
    text, pooled = rng.standard_normal((batch, TEXT, 8)), rng.standard_normal((batch, 8))
    return flux_conditioning(jnp.asarray(text, jnp.float32), jnp.asarray(pooled, jnp.float32), jnp.float32(3.5))


def velocity(module: Flux, layout, method=None) -> tuple[nnx.State, Velocity]:
    graph, params = nnx.split(module)
    return params, Velocity(graph, method or pe.none(), layout, SPEC, "float32")


def latents(side: int, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (1, side, side, 4))


def run(module: Flux, layout: ScaleDiT, sigma: float = 0.5, low_seed: int = 9) -> np.ndarray:
    params, v = velocity(module, layout)
    content = {"low": PACKING.pack(latents(4, low_seed))} if layout.low == "stream" else None
    return np.asarray(v.advance(params, latents(16, 0), sigma, conditioning(), content=content)[0])


# -- the small stream ----------------------------------------------------------------------------------------------


def test_one_window_without_the_small_stream_is_dense(model):
    params, dense = velocity(model, Dense())
    expected = dense(params, latents(16, 0), 0.5, conditioning())
    np.testing.assert_allclose(
        run(model, ScaleDiT(low="off", mask="paper", window=8, block=(32, 16))), expected, atol=2e-5
    )


@pytest.mark.parametrize("adapt", ["low", "flux1"])
def test_zero_adapters_change_no_bit(model, adapt):
    graph, params = nnx.split(model)
    fresh = A.attach(nnx.merge(graph, params), A.create(model, 2, jax.random.key(3)))
    np.testing.assert_array_equal(run(fresh, ScaleDiT(adapt=adapt)), run(model, ScaleDiT(adapt=adapt)))


def test_adapters_reach_only_streams_that_ask(model, changed):
    np.testing.assert_array_equal(run(changed, ScaleDiT(low="off")), run(model, ScaleDiT(low="off")))
    outputs = [run(changed, ScaleDiT(adapt=a)) for a in ("low", "flux1")] + [run(model, ScaleDiT())]
    for i, one in enumerate(outputs):
        assert all(np.abs(one - other).max() > 1e-4 for other in outputs[:i])


def cache(module: Flux, sigma: float, mask_of: ScaleDiT):
    """Keys and values of the small stream as it runs along at a noise level."""
    grid = SPEC.grid(8, 8, TEXT)
    streams = mask_of.streams()
    x = {
        "text": conditioning().arrays["text"],
        "image": PACKING.pack(latents(16, 0)),
        "low": PACKING.pack(latents(4, 9)),
    }
    calls = bind(mask_of.calls(grid), {"image": dict.fromkeys(("text", "image"), plain(grid))})
    return module.keys_values(
        step_inputs(x, jnp.full((1,), sigma), conditioning().arrays["pooled"], jnp.full((1,), 3.5)),
        calls,
        streams=streams,
    )["low"]


def test_kernel_mask_leaves_the_small_stream_alone_and_the_paper_mask_does_not(changed):
    early, late = (cache(changed, sigma, ScaleDiT()) for sigma in (0.9, 0.2))
    for a, b in zip(jax.tree.leaves(early), jax.tree.leaves(late), strict=True):
        np.testing.assert_array_equal(a, b)
    early, late = (cache(changed, sigma, ScaleDiT(mask="paper")) for sigma in (0.9, 0.2))
    assert np.abs(np.asarray(early.single[0]) - np.asarray(late.single[0])).max() > 1e-3


@pytest.mark.parametrize("negative", [False, True])
def test_cached_equals_recomputed(changed, negative):
    asked = conditioning()
    if negative:
        other = conditioning(5)
        asked = replace(asked, negative=other.arrays, true_guidance=jnp.float32(2.0))
    params, v = velocity(changed, ScaleDiT(adapt="flux1"))
    low = latents(4, 9)
    along, _ = v.advance(params, latents(16, 0), 0.3, asked, content={"low": PACKING.pack(low)})
    made = scale_dit.small_stream(
        params, v.method, low, asked, graphdef=v.graphdef, layout=ScaleDiT(low="alone"), grid=SPEC.grid(8, 8, TEXT),
        dtype="float32", packing=v.packing,
    )  # fmt: skip
    params, v = velocity(changed, ScaleDiT(low="cached", adapt="flux1"))
    given, _ = v.advance(params, latents(16, 0), 0.3, asked, content={"given": {"low": made}})
    np.testing.assert_allclose(given, along, atol=2e-5)


def test_text_never_reads_the_small_stream(changed):
    grid = SPEC.grid(8, 8, TEXT)
    layout = ScaleDiT()
    calls = layout.calls(grid)
    readers = {
        t.stream for call in calls for s in call.sets for t in s.queries if any(k.stream == "low" for k in s.keys)
    }
    assert readers == {"image", "low"}
    assert np.abs(run(changed, layout) - run(changed, layout, low_seed=8)).max() > 1e-4


# -- schedule and arithmetic ---------------------------------------------------------------------------------------


def test_published_sigmas():  # the released schedule, 3 t / (1 + 2 t), by hand
    schedule = Schedule(dynamic=True)
    last = schedule.sigmas(28, 65_536, float(np.log(3)))[Guided().first(28) :]
    published = """.84375 .822581 .8 .775862 .75 .722222 .692308 .66 .625 .586957 .545455 .5 .45 .394737 .333333 .264706
    .1875 .1 0"""
    np.testing.assert_allclose(last, [float(x) for x in published.split()], atol=2e-6)
    np.testing.assert_allclose(schedule.sigmas(4, 1, float(np.log(3))), [1, 0.9, 0.75, 0.5, 0], atol=1e-6)
    eighteen = """1 .980769 .96 .9375 .913043 .886364 .857143 .825 .789474 .75 .705882 .65625 .6 .535714 .461538 .375
    .272727 .15 0"""
    np.testing.assert_allclose(
        schedule.sigmas(18, 1, float(np.log(3))), [float(x) for x in eighteen.split()], atol=2e-6
    )


def test_frequencies_of_the_released_base():  # 100,000, by hand
    grid = RopeSpec().grid(4, 4)
    rope = pe.get("rebase(factor=10.0)")(grid, pe.Signals(sigma=jnp.float32(0.5)))["image"]
    np.testing.assert_allclose(rope.frequencies[0][jnp.array([0, 1, 7])], [1, 0.237137, 4.21697e-5], rtol=2e-6)
    np.testing.assert_allclose(rope.frequencies[1][jnp.array([0, 1, 27])], [1, 0.662870, 1.50859e-5], rtol=2e-6)


def test_pull_replaces_low_frequencies():
    rng = np.random.default_rng(0)
    v, x, target = (jnp.asarray(rng.standard_normal((1, 4, 4, 2)), jnp.float32) for _ in range(3))
    moved = x - 0.5 * scale_dit.pull(v, x, target, 0.5, 1.0)  # one Euler step to zero
    np.testing.assert_allclose(scale_dit.low_frequencies(moved), scale_dit.low_frequencies(target), atol=1e-5)
    detail = x - 0.5 * v
    np.testing.assert_allclose(
        moved - scale_dit.low_frequencies(moved), detail - scale_dit.low_frequencies(detail), atol=1e-5
    )
    np.testing.assert_array_equal(scale_dit.pull(v, x, target, 0.5, 0.0), v)


def test_flow_weights():
    np.testing.assert_allclose(Guided(flow="cosine").weights(4), [1, 0.853553, 0.5, 0.146447], atol=1e-6)
    assert Guided(flow=0.25).weights(3).tolist() == [0.25] * 3


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "scale-dit",
        "scale-dit(start='latents', flow='cosine')",
        "scale-dit(mask='paper', window=4, low='off', flow=0.5)",
    ],
)
def test_settings_are_read_back(text):
    settings = scale_dit.parse(text)
    assert str(settings) == text
    assert scale_dit.parse(str(settings)) == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scale-dit(mask='K')", "mask='K': expected 'kernel' or 'paper'"),
        ("scale-dit(colour='red')", "unknown colour; known: .*flow"),
        ("scale-dit(flow=2)", "flow=2"),
        ("scale-dit(start='noise')", "give share=1"),
        ("scale-dit(share=0)", "share=0"),
        ("scale-dit('paper')", "fields need names"),
        ("scale-dit(mask=)", "cannot be read"),
        ("scale-dit(window='4')", "layout="),
        ("scale-dut", "expected scale-dit"),
    ],
)
def test_wrong_settings_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        scale_dit.parse(text)


def test_resolution():
    grid = SPEC.grid(64, 64, TEXT)
    free = scale_dit.resolve(Guided(), pe.none(), grid, None)
    assert (free.layout.low, free.flow) == ("off", "cosine")
    published = scale_dit.resolve(Guided(), pe.get("rebase(factor=10.0)"), grid, {})
    assert (published.layout.low, published.layout.adapt, published.flow) == ("cached", "flux1", 0.0)
    for method in ("sega", "dype-ntk"):
        assert scale_dit.resolve(Guided(), pe.get(method), grid, {}).layout.low == "stream"
    own = {"layout": "scale-dit(mask='paper')", "adapt": "low"}
    ours = scale_dit.resolve(Guided(), pe.none(), grid, own)
    assert (ours.layout.mask, ours.layout.low, ours.layout.adapt) == ("paper", "stream", "low")
    for settings, lora in ((free, None), (published, {}), (ours, own)):
        assert scale_dit.resolve(settings, pe.none(), grid, lora) == settings
    with pytest.raises(ValueError, match="low='off'"):
        scale_dit.resolve(scale_dit.parse("scale-dit(low='off')"), pe.none(), grid, {})
    with pytest.raises(ValueError, match="low='cached'"):
        scale_dit.resolve(scale_dit.parse("scale-dit(low='cached')"), pe.get("sega"), grid, {})


# -- the run -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", ["off", "stream", "cached"])
def test_run(changed, low):
    """Stage 1 is the plain model; stage 2 starts from its enlarged, noised picture and depends on it."""
    settings = scale_dit.parse(f"scale-dit(low='{low}', start='latents', flow=0.5, share=0.5)")
    params, plain_velocity = velocity(changed, Dense())
    _, windowed = velocity(changed, settings.layout)
    sigmas = Schedule().sigmas(4, 64, 1.0)
    sampler = TwoStage(
        settings, plain_velocity, windowed, sigmas, sigmas[settings.first(4) :], (16, 16, 4),
        lambda x: scale_dit.enlarge(x, (16, 16)),
    )  # fmt: skip
    assert sampler.steps == 6
    assert [(s.steps, s.latents) for s in sampler.stages()] == [(4, (4, 4, 4)), (2, (16, 16, 4))]
    asked = conditioning()
    noise = Noise(3, (0,))
    state = sampler.start(noise, asked)
    small = state["low"]
    for index in range(4):
        state = sampler.step(params, state, asked, index)
        small = small + (sigmas[index + 1] - sigmas[index]) * plain_velocity(params, small, sigmas[index], asked)
    np.testing.assert_allclose(state["low"], small, atol=1e-5)
    start = (1 - sigmas[2]) * scale_dit.enlarge(small, (16, 16)) + sigmas[2] * noise.field((16, 16, 4))
    np.testing.assert_allclose(state["latents"], start, atol=1e-5)
    for index in (4, 5):
        state = sampler.step(params, state, asked, index)
    assert np.isfinite(sampler.latents(state)).all()
    assert sampler.latents(state).shape == (1, 16, 16, 4)


def test_small_pictures_grow_by_the_releases_bicubic():
    """PyTorch's kernel, a = -0.75: the fourth of eight values between four is (-27 225 67 -9) / 256 of them."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 4, 3)).astype(np.float32)
    half = np.array([[283, -27, 0, 0], [198, 67, -9, 0], [58, 225, -27, 0], [-27, 225, 67, -9]]) / 256
    matrix = np.concatenate([half, half[::-1, ::-1]])
    expected = np.einsum("yh,bhwc,xw->byxc", matrix, x, matrix)
    np.testing.assert_allclose(scale_dit.enlarge(jnp.asarray(x), (8, 8)), expected, atol=1e-6)


def test_small_stream_on_a_mesh(changed):
    """The stream and its adapters on two devices, image tokens and channels apart, against one device."""
    params, v = velocity(changed, ScaleDiT(adapt="flux1"))
    content = {"low": PACKING.pack(latents(4, 9))}
    expected, _ = v.advance(params, latents(16, 0), 0.5, conditioning(), content=content)
    for axis in ("context", "tensor"):
        mesh = make_mesh(jax.devices()[:2], **{"context": 1, axis: 2})
        got, _ = replace(v, mesh=mesh).advance(
            rules.place(params, mesh), latents(16, 0), 0.5, conditioning(), content=content
        )
        np.testing.assert_allclose(to_host(got), expected, atol=1e-4)


def test_states_of_both_stages_can_be_saved_and_read():
    pair = (jnp.ones((1, 2, 3)), jnp.zeros((1, 2, 3)))
    late = {"low": jnp.ones(3), "latents": jnp.ones(2), "cache": (pair, pair), "method": {"image": None}}
    early = {"low": jnp.ones(3), "noise": jnp.ones(2), "method": {"image": None}}
    leaves = {}
    outline = states._outline(late, leaves)
    again = states._filled(outline, {name: np.asarray(x) for name, x in leaves.items()}, early)
    assert jax.tree.structure(again) == jax.tree.structure(late)
