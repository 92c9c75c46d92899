"""Measured tiles: kept per device, found for lengths nearby, used by the kernels, refused when broken."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from sega_jax.attention import bench
from sega_jax.attention.kernels import Request, chunks, reference, registered, tiles, xla
from sega_jax.attention.kernels.tiles import Entry
from sega_jax.cli import Bench
from sega_jax.layouts.blocks import from_mask


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A device nobody has measured."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(tiles, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(tiles, "device_name", lambda: "abacus")
    tiles.known.cache_clear()
    yield tiles.user_file()
    tiles.known.cache_clear()


def request(keys, dtype="float32", blocks=None):
    rng = np.random.default_rng(keys)
    x = jnp.asarray(rng.standard_normal((1, keys, 2, 8)), dtype)
    return Request(x, x, x, 0.3, None, blocks)


def entry(keys, tile, kernel="xla", dtype="float32"):
    return Entry(kernel, dtype, 8, keys, tile, 1.0, (8, 8), 2.0)


def test_nearest_length_of_the_same_kind(device):
    assert tiles.tuned("xla", request(100)) is None
    tiles.write([entry(100, (16, 32)), entry(300, (32, 64)), entry(100, (1, 1), "tpu")], device, {"date": "today"})
    assert [tiles.tuned("xla", request(n)) for n in (49, 50, 160, 200, 600, 601)] == [
        None,
        (16, 32),
        (16, 32),
        (32, 64),
        (32, 64),
        None,
    ]
    assert tiles.tuned("xla", request(100, "bfloat16")) is None
    assert tiles.tuned("xla", request(100, blocks=from_mask(np.ones((100, 100), bool), 50, 50))) is None


def test_measuring_again_replaces_and_keeps_the_rest(device):
    tiles.write([entry(100, (16, 32)), entry(300, (32, 64))], device, {})
    tiles.write([entry(100, (8, 8))], device, {"commit": "abc"})
    assert {e.keys: e.tile for e in tiles.read(device)} == {100: (8, 8), 300: (32, 64)}
    assert json.loads(device.read_text())["commit"] == "abc"
    assert [f.name for f in device.parent.iterdir()] == [device.name]


def test_what_the_user_measured_goes_before_what_came_along(device):
    tiles.write([entry(100, (16, 32))], tiles.PACKAGED / device.name, {})
    assert tiles.tuned("xla", request(100)) == (16, 32)
    tiles.write([entry(100, (64, 32))], device, {})
    assert tiles.tuned("xla", request(100)) == (64, 32)


@pytest.mark.parametrize("content", ["", "[]", '{"tiles": [{"kernel": "xla"}]}'])
def test_a_broken_file_is_named(device, content):
    device.parent.mkdir(parents=True)
    device.write_text(content)
    with pytest.raises(ValueError, match=r"abacus\.json is not a file of measured tiles"):
        tiles.tuned("xla", request(100))


def test_a_kernel_takes_the_measured_tile(device, monkeypatch):
    seen = []
    monkeypatch.setattr(
        xla, "dense_visits", lambda *a, real=chunks.dense_visits, **o: seen.append(a[-1]) or real(*a, **o)
    )
    asked = request(100)
    expected = reference.run(asked)
    for tile in (None, (32, 48)):
        if tile:
            tiles.write([entry(100, tile)], device, {})
        out, lse = xla.run(asked)
        np.testing.assert_allclose(out, expected[0], atol=2e-6)
        np.testing.assert_allclose(lse, expected[1], atol=2e-6)
    assert [(plan.scores // plan.keys, plan.keys) for plan in seen] == [xla.tilings(asked)[0], (32, 48)]


def test_every_tiling_of_the_cpu_path_gives_the_same(device):
    asked = request(300)
    expected = reference.run(asked)[0]
    for tile in registered()["xla"].tilings(asked):
        np.testing.assert_allclose(xla.run(asked, tile=tile)[0], expected, atol=2e-6)


def test_the_verb_measures_and_keeps(device):
    options = {"pixels": (256,), "dtypes": ("float32",), "text": (128,), "heads": 1, "depth": 8, "rounds": 1}
    result = Bench(tune=True, backends=("xla",), **options).run()
    assert result["path"] == str(device)
    (found,) = tiles.read(device)
    assert (found.kernel, found.dtype, found.depth, found.keys) == ("xla", "float32", 8, 16**2 + 128)
    assert found.seconds <= found.heuristic_seconds
    assert found.tile in xla.tilings(request(8))
    assert json.loads(device.read_text())["versions"]["jax"]


def test_tiles_under_a_block_map_are_its_own():
    with pytest.raises(ValueError, match="'scale-dit-k': tiles are measured on dense cases"):
        bench.tune(bench.Case("scale-dit-k", 1024))
