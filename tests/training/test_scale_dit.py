"""Training of Scale-DiT's LoRA on a tiny transformer: gradients, frozen weights, exact resume, files."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file

from converters.errors import CheckpointError
from converters.lora import read_lora
from sega_jax import positional as pe
from sega_jax.geometry import RopeSpec
from sega_jax.models import adapters as A
from sega_jax.models.abstract import Component, initialize
from sega_jax.models.flux import Flux, FluxConfig
from sega_jax.sharding.mesh import make_mesh
from sega_jax.sharding.rules import place
from sega_jax.training import scale_dit, scale_dit_data

CONFIG = FluxConfig(
    in_channels=16, double_layers=1, single_layers=1, heads=2, head_dim=16, text_dim=8, pooled_dim=8,
    guidance_embeds=True, rope_dims=(4, 6, 6),
)  # fmt: skip
ROPE = RopeSpec(dims=(4, 6, 6), trained=(16, 16))
TINY = {"rank": 2, "accumulate": 1, "batch": 2, "steps": 4, "remat": False}


@pytest.fixture(scope="module")
def transformer() -> Component:
    module = initialize(lambda rngs: Flux(CONFIG, rngs=rngs))
    graph, params = nnx.split(module)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.1 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return Component(graph, jax.tree.unflatten(tree, leaves))


@pytest.fixture
def samples(tmp_path):
    folder = tmp_path / "samples"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        arrays = {"image": (8, 8, 4), "low": (2, 2, 4), "text": (4, 8), "pooled": (8,)}
        save_file(
            {name: rng.standard_normal(shape).astype(np.float32) for name, shape in arrays.items()},
            folder / f"{number}.safetensors",
        )
    save_file({"text": np.zeros((4, 8), np.float32), "pooled": np.zeros(8, np.float32)}, folder / scale_dit_data.EMPTY)
    return folder


def loss_of(recipe, transformer, state_graph, dtype="float32"):
    return scale_dit.guidance_loss(
        transformer.graphdef, state_graph, recipe.windows(), pe.get(recipe.positional), ROPE,
        dtype=dtype, guidance=recipe.guidance, remat=recipe.remat,
    )  # fmt: skip


def train(recipe, transformer, samples, folder, **options):
    batches = scale_dit_data.batches(samples, recipe.batch, caption_drop=recipe.caption_drop, seed=recipe.seed)
    return scale_dit.train(
        recipe, transformer, ROPE, batches, folder, dtype="float32", every=2, report=lambda line: None, **options
    )


def test_gradient_is_that_of_finite_differences(transformer, samples):
    recipe = scale_dit.Recipe(**TINY)
    graph, state = scale_dit.start(recipe, transformer)
    filled = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), state.adapters)
    batch = scale_dit_data.batches(samples, 2, caption_drop=0.0)(0)
    loss = jax.jit(loss_of(recipe, transformer, graph))
    key = jax.random.key(7)
    gradient = jax.jit(jax.grad(loss_of(recipe, transformer, graph)))(filled, transformer.params, batch, key)
    rng = np.random.default_rng(0)
    way = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), filled)
    slope = sum(float((g * w).sum()) for g, w in zip(jax.tree.leaves(gradient), jax.tree.leaves(way), strict=True))
    step = 2e-3
    ahead, behind = (
        float(loss(jax.tree.map(lambda x, w, s=s: x + s * w, filled, way), transformer.params, batch, key))
        for s in (step, -step)
    )
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=2e-2)
    assert abs(slope) > 1e-2


def test_run_falls_freezes_resumes_and_exports(transformer, samples, tmp_path):
    """One run of 12 steps; another killed after 6 and resumed gives the same bits, and no frozen bit moves."""
    before = jax.tree.map(np.array, transformer.params)
    layout = "scale-dit(adapt='flux1')"
    recipe = scale_dit.Recipe(**{**TINY, "layout": layout, "steps": 12, "optimizer": "adamw", "rate": 1e-2})
    whole = train(recipe, transformer, samples, tmp_path / "whole")
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(transformer.params), strict=True):
        np.testing.assert_array_equal(old, new)

    train(recipe, transformer, samples, tmp_path / "killed", seconds=0.0)  # stops at its first checkpoint
    log = tmp_path / "killed" / "log.jsonl"
    assert len(log.read_text().splitlines()) == 1
    resumed = train(recipe, transformer, samples, tmp_path / "killed")
    still = set()
    for name, layer in whole.layers().items():
        other = resumed.layers()[name]
        np.testing.assert_array_equal(layer.a[...], other.a[...])
        np.testing.assert_array_equal(layer.b[...], other.b[...])
        if np.abs(layer.b[...]).max() == 0:
            still.add(name)
    assert still == {"single.mlp_in", "single.out"}  # nobody reads what the last block makes of the small stream
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 10, 12]

    graph, state = scale_dit.start(recipe, transformer)
    loss = jax.jit(loss_of(recipe, transformer, graph))
    batches = scale_dit_data.batches(samples, 2, caption_drop=0.0)
    _, trained = nnx.split(whole)
    values = [
        np.mean([float(loss(s, transformer.params, batches(i), jax.random.key(i))) for i in range(8)])
        for s in (state.adapters, trained)
    ]
    assert values[1] < values[0]

    file = tmp_path / "lora.safetensors"
    A.save(file, whole, recipe.tags())
    assert A.guidance_settings(file) == {
        "layout": layout, "positional": "rebase(factor=10.0)", "adapt": "flux1",
    }  # fmt: skip
    names = set(load_file(file))
    assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in names
    assert "transformer.single_transformer_blocks.0.proj_out.lora_B.weight" in names
    module = nnx.merge(transformer.graphdef, transformer.params)
    again = A.from_factors(module, read_lora(file).factors["transformer"])
    for name, layer in whole.layers().items():
        np.testing.assert_allclose(again.layers()[name].a[...], layer.a[...], rtol=1e-6)
        np.testing.assert_allclose(again.layers()[name].b[...], layer.b[...], rtol=1e-6)
    with pytest.raises(ValueError, match=r"rank=3 .there 2."):
        scale_dit.Checkpoints(tmp_path / "whole", dataclasses.replace(recipe, rank=3))


def test_prodigy_with_accumulation_and_bfloat16_weights(transformer, samples, tmp_path):
    recipe = scale_dit.Recipe(**{**TINY, "accumulate": 2, "remat": True})
    half = Component(transformer.graphdef, jax.tree.map(lambda x: x.astype(jnp.bfloat16), transformer.params))
    batches = scale_dit_data.batches(samples, 2, caption_drop=0.5)
    adapters = scale_dit.train(
        recipe, half, ROPE, batches, tmp_path / "run", dtype="bfloat16", every=4, report=lambda line: None
    )
    assert all(layer.a[...].dtype == jnp.float32 for layer in adapters.layers().values())
    assert max(float(np.abs(layer.b[...]).max()) for layer in adapters.layers().values()) > 0


def test_a_mesh_trains_the_same_adapters(transformer, samples, tmp_path):
    recipe = scale_dit.Recipe(
        **{**TINY, "steps": 2, "optimizer": "adamw", "rate": 1e-2, "layout": "scale-dit(adapt='flux1')"}
    )
    alone = train(recipe, transformer, samples, tmp_path / "alone")
    mesh = make_mesh(jax.devices()[:4], data=2, context=2)
    spread = Component(transformer.graphdef, place(transformer.params, mesh))
    together = train(recipe, spread, samples, tmp_path / "mesh", mesh=mesh)
    for name, layer in alone.layers().items():
        other = together.layers()[name]
        for mine, theirs in ((layer.a[...], other.a[...]), (layer.b[...], other.b[...])):
            assert len(theirs.sharding.device_set) == 4
            np.testing.assert_allclose(mine, theirs, atol=2e-4, err_msg=name)
    log = [json.loads((tmp_path / run / "log.jsonl").read_text().splitlines()[-1]) for run in ("alone", "mesh")]
    assert log[1]["loss"] == pytest.approx(log[0]["loss"], rel=1e-5)
    with pytest.raises(ValueError, match="batch=3: the mesh has data=2"):
        train(dataclasses.replace(recipe, batch=3), spread, samples, tmp_path / "odd", mesh=mesh)


def test_parameter_counts_of_flux():  # by hand: 16 * (in + out) of every layer the release adapts
    from sega_jax.models.abstract import build_abstract

    flux = build_abstract(lambda rngs: Flux(FluxConfig.dev(), rngs=rngs))
    for targets, count in ((A.FULL, 57_951_232), (A.PARTIAL, 43_942_912)):
        made = jax.eval_shape(lambda t=targets: nnx.split(A.create(flux, 16, jax.random.key(0), t))[1])
        assert sum(x.size for x in jax.tree.leaves(made)) == count


def test_loras_of_other_kinds_are_refused(transformer):
    module = nnx.merge(transformer.graphdef, transformer.params)
    text_side = {"double.text.attention.query.kernel": (32, 32), "single.mlp_in.kernel": (32, 64)}
    factors = {
        A.Slot(path, 0): A.Factors(np.ones((2, into), np.float32), np.ones((out, 2), np.float32))
        for path, (into, out) in text_side.items()
    }
    with pytest.raises(CheckpointError, match=r"(?s)double.text.attention.query.*the LoRA is for \(32, 64\)"):
        A.from_factors(module, factors)
    with pytest.raises(CheckpointError, match="changes no layer"):
        A.from_factors(module, {})
    one = {A.Slot("single.attention.query.kernel", 0): A.Factors(np.ones((2, 32), "f4"), np.ones((32, 2), "f4"))}
    bias, norm = A.Slot("image_embed.bias"), A.Slot("single.attention.query_norm.scale", 0)
    for more, words in (
        ({"added": {"transformer": {bias: np.ones(32, "f4")}}}, "values of norms and biases"),
        ({"replaced": {"transformer": {norm: np.ones(16, "f4")}}}, "values of norms and biases"),
        ({"factors": {"transformer": one, "text_encoder": one}}, "also changes text_encoder"),
        ({"factors": {"transformer": {A.Slot("single.attention.query.kernel", 99): next(iter(one.values()))}}}, "99"),
    ):
        with pytest.raises(CheckpointError, match=words):
            A.from_lora(module, A.Lora(**({"factors": {"transformer": one}} | more)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"optimizer": "sgd"}, "optimizer='sgd'"),
        ({"layout": "scale-dit(low='off')"}, "leave out low"),
        ({"caption_drop": 2.0}, "caption_drop=2.0"),
        ({"positional": "spiral"}, "spiral"),
    ],
)
def test_wrong_recipes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        scale_dit.Recipe(**options)


def test_methods_that_follow_the_noise_are_refused(transformer):
    recipe = scale_dit.Recipe(**TINY, positional="dype-ntk")
    graph, _ = scale_dit.start(recipe, transformer)
    with pytest.raises(ValueError, match="the same at every noise level"):
        loss_of(recipe, transformer, graph)


# -- data ----------------------------------------------------------------------------------------------------------


def test_captions(tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a red circle\n")
    with pytest.raises(ValueError, match=r"1 pictures without a caption.*b.png"):
        scale_dit_data.captioned(tmp_path)
    (tmp_path / "captions.jsonl").write_text('{"file": "b.png", "caption": "a blue square"}\n')
    assert [c for _, c in scale_dit_data.captioned(tmp_path)] == ["a red circle", "a blue square"]
    (tmp_path / "captions.jsonl").write_text('{"file": "b.png"}\n')
    with pytest.raises(ValueError, match=r"captions\.jsonl line 1"):
        scale_dit_data.captioned(tmp_path)


def test_encoded_folders_belong_to_one_size_and_lose_no_picture(tmp_path):
    class Pipe:
        def encode(self, prompts):
            return SimpleNamespace(arrays={"text": np.zeros((1, 4, 8)), "pooled": np.zeros((1, 8))})

        def encode_image(self, images):
            return images[:, ::8, ::8]

    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for name in ("a.png", "a.jpg", "b.png"):
        Image.new("RGB", (64, 64)).save(data / name)
        (data / name).with_suffix(".txt").write_text("a circle")
    assert scale_dit_data.encode_folder(Pipe(), data, out, (32, 32)) == 3
    assert {path.name for path in out.glob("*.safetensors")} == {
        "a.png.safetensors", "a.jpg.safetensors", "b.safetensors", scale_dit_data.EMPTY
    }  # fmt: skip
    assert scale_dit_data.encode_folder(Pipe(), data, out, (32, 32)) == 3
    with pytest.raises(ValueError, match=r"size=\[64, 64\] \(there \[32, 32\]\)"):
        scale_dit_data.encode_folder(Pipe(), data, out, (64, 64))


def test_batches_depend_on_seed_and_step_alone(samples):
    first, second = (scale_dit_data.batches(samples, 2, caption_drop=0.5, seed=3) for _ in range(2))
    for step in (5, 0):
        for a, b in zip(first(step), second(step), strict=True):
            np.testing.assert_array_equal(a, b)
    drops = [float(jnp.abs(first(step).text).sum((1, 2)).min()) == 0 for step in range(20)]
    assert 0 < sum(drops) < 20


def test_samples_that_do_not_fit_are_refused(samples, tmp_path):
    with pytest.raises(ValueError, match="no folder with samples"):
        scale_dit_data.batches(tmp_path / "none", 1, caption_drop=0.0)
    arrays = load_file(samples / "0.safetensors")
    save_file({**arrays, "low": arrays["image"]}, samples / "0.safetensors")
    with pytest.raises(CheckpointError, match="4 times smaller"):
        scale_dit_data.batches(samples, 1, caption_drop=0.0)
