"""Pipelines load the same parameters from every layout that the converter writes."""

import jax
import numpy as np
import pytest

import sega_jax as sj
from converters.convert import convert
from converters.errors import CheckpointError
from sega_jax.families.registry import load_parts
from sega_jax.models.abstract import axes
from sega_jax.weights.hub import resolve

COMPONENTS = ("transformer", "clip", "t5", "vae")


@pytest.fixture(scope="module")
def nano():
    return resolve("nano")


@pytest.fixture(scope="module")
def exported(nano, tmp_path_factory):
    folder = tmp_path_factory.mktemp("orbax") / "nano"
    convert(nano, folder, to="orbax", progress=False)
    return folder


@pytest.fixture(scope="module")
def parts(nano):
    return load_parts(nano)


def assert_same(ours, theirs, *names):
    for name in names or COMPONENTS:
        a, b = ((parts.encoders.get(name) or getattr(parts, name)).params for parts in (ours, theirs))
        assert jax.tree.structure(a) == jax.tree.structure(b)
        for path, leaf in jax.tree.leaves_with_path(a):
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(dict(jax.tree.leaves_with_path(b))[path]))


def test_a_pipeline_exported_to_orbax_loads_bit_equal(exported, parts):
    assert not list(exported.rglob("*.safetensors"))
    pipe = sj.Pipeline.from_pretrained(exported, dtype="float32")
    assert_same(pipe.parts, parts)
    assert pipe.parts.text_tokens == parts.text_tokens
    assert pipe.parts.tokenizers["t5"](["a red circle"]).tolist() == parts.tokenizers["t5"](["a red circle"]).tolist()


def test_bfloat16_is_rounded_the_same_way(exported, nano):
    assert_same(load_parts(exported, dtype="bfloat16"), load_parts(nano, dtype="bfloat16"))


@pytest.mark.parametrize("layout", ["orbax", "bfl", "diffusers", "pipeline"])
def test_a_transformer_of_any_layout_replaces_the_folders_own(tmp_path, nano, exported, parts, layout):
    other = exported if layout == "pipeline" else tmp_path / f"flux1{'.safetensors' * (layout == 'bfl')}"
    if layout != "pipeline":
        convert(nano / "transformer", other, to=layout, progress=False)
    assert_same(load_parts(nano, transformer=other), parts)


def test_a_component_of_another_kind_is_refused(nano, exported):
    with pytest.raises(CheckpointError, match=r"vae: holds vae; expected a transformer|vae.config\.json"):
        load_parts(nano, transformer=exported / "vae")


def test_damage_to_an_orbax_component_is_named(nano, tmp_path):
    convert(nano / "transformer", tmp_path / "t", to="orbax", progress=False)
    (tmp_path / "t" / "out.bias" / "0").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="truncated"):
        load_parts(nano, transformer=tmp_path / "t")


def test_orbax_restores_onto_a_mesh(exported, parts):
    """Every parameter of a named axis lies in pieces on the devices, and is the same as a whole."""
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Explicit,))

    def shardings(path, param):
        names = [("tensor" if name in ("heads", "mlp") else None) for name in axes(param)]
        return jax.sharding.NamedSharding(mesh, jax.P(*names))

    placed = load_parts(exported, shardings=shardings)
    assert_same(placed, parts)
    cut = [leaf for leaf in jax.tree.leaves(placed.transformer.params) if not leaf.is_fully_replicated]
    assert len(cut) > 10
    for leaf in cut:
        assert sum(shard.data.size for shard in leaf.addressable_shards) == leaf.size
