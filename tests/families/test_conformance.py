"""What every registered family must keep to, whatever model it is."""

import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax import positional as pe
from sega_jax.families.base import Family
from sega_jax.families.registry import FAMILIES, abstract_conditioning, family_named
from sega_jax.models.abstract import axes, build_abstract, parameters

EACH = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)


def missing(family) -> list[str]:
    """Members of the protocol that a family lacks."""
    members = {*inspect.get_annotations(Family), *(name for name in vars(Family) if not name.startswith("_"))}
    return sorted(name for name in members if not hasattr(family, name))


def outlines(family):
    return [build() for build in family.presets.values()]


@EACH
def test_has_every_member(family):
    assert missing(family) == []
    assert family_named(family.name) is family
    assert FAMILIES[family.pipeline_class] is family


def test_a_member_that_lacks_is_found():
    whole = next(iter(FAMILIES.values()))
    lame = SimpleNamespace(**{name: getattr(whole, name) for name in dir(whole) if name not in ("recipe", "combine")})
    assert missing(lame) == ["combine", "recipe"]


@EACH
def test_geometry_packing_and_autoencoder_agree(family):
    for outline in outlines(family):
        assert outline.family == family.name
        assert outline.rope.pixels_per_token == outline.packing.patch * outline.vae_config.factor
        grid = outline.rope.grid(6, 10)
        height, width, channels = outline.latent_shape(grid)
        assert (height * outline.vae_config.factor, width * outline.vae_config.factor) == grid.pixels
        assert channels == outline.vae_config.latent_channels


@EACH
def test_packing_is_inverted_and_puts_tokens_row_by_row(family):
    for outline in outlines(family):
        shape = outline.latent_shape(outline.rope.grid(2, 3))
        latents = jnp.asarray(np.random.default_rng(0).standard_normal((2, *shape)), jnp.float32)
        tokens = outline.packing.pack(latents)
        np.testing.assert_array_equal(outline.packing.unpack(tokens, 2, 3), latents)
        corner = outline.packing.pack(latents[:, : shape[0] // 2, : shape[1] // 3])
        np.testing.assert_array_equal(tokens[:, :1], corner)


@EACH
def test_statistics_of_the_autoencoder_are_inverted(family):
    for outline in outlines(family):
        latents = jnp.asarray(np.random.default_rng(1).standard_normal((1, 2, 2, outline.vae_config.latent_channels)))
        there = outline.vae_config.normalize(latents)
        np.testing.assert_allclose(outline.vae_config.denormalize(there), latents, atol=1e-6)


@EACH
def test_the_network_names_every_axis_and_counts_its_blocks(family):
    for outline in outlines(family):
        build = family.network(outline)
        module = build_abstract(lambda rngs, build=build: build(rngs=rngs))
        stacked = 0
        for path, param in parameters(module).items():
            assert len(axes(param)) == param.ndim, path
            if axes(param)[0] == "layers":
                stacked += param.size
        assert stacked == pytest.approx(outline.transformer_config.block_parameters, rel=0.01)
        probe = jax.eval_shape(lambda module: module.probe(), module)
        assert (probe.shape, probe.dtype) == ((outline.transformer_config.in_channels,), jnp.float32)


@EACH
def test_conditioning_has_the_names_and_shapes_it_promises(family):
    for outline in outlines(family):
        made = abstract_conditioning(outline, jax.ShapeDtypeStruct, rows=3, dtype=jnp.bfloat16, guided=True, tokens=7)
        assert made.text_tokens == 7
        assert {name: x.shape[1:] for name, x in made.arrays.items()} == dict(family.conditioning_spec(outline, 7))
        assert set(made.negative) == set(made.arrays)
        assert ("guidance" in made.scales) == outline.takes_guidance


@EACH
def test_guidance_of_one_gives_back_the_prediction(family):
    rng = np.random.default_rng(2)
    positive, negative = (jnp.asarray(rng.standard_normal((2, 5, 8)), jnp.float32) for _ in range(2))
    np.testing.assert_allclose(family.combine(positive, negative, jnp.float32(1)), positive, atol=1e-5)


@EACH
def test_recipes_name_methods_that_exist_and_say_where_they_are_from(family):
    for outline in outlines(family):
        rows, columns = outline.rope.trained
        for factor in (1, 2, 4):
            recipe = family.recipe(outline, outline.rope.grid(factor * rows, factor * columns))
            pe.get(recipe.positional)
            assert recipe.steps > 0
            assert recipe.source
            assert (recipe.guidance is None) == (not outline.takes_guidance)


@EACH
def test_checkpoints_state_their_licence_and_size(family):
    for checkpoint in family.checkpoints:
        assert checkpoint.licence
        assert checkpoint.checked
        assert min(checkpoint.trained) > 0
