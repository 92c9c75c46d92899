"""Latents keep their values, layout and record; files that are not usable are refused in words."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from converters.errors import CheckpointError
from sega_jax.media.latents import load_latents, save_latents, unpack


@pytest.fixture
def latents():
    return np.random.default_rng(0).normal(size=(2, 6, 4, 16)).astype(np.float32)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "latents.safetensors"


def test_round_trip(path, latents):
    record = {"prompt": "σ", "height": 48, "width": 32, "sigmas": [1.0, 0.5]}
    assert save_latents(path, latents, record) == path
    array, metadata = load_latents(path)
    np.testing.assert_array_equal(array, latents)
    assert array.dtype == np.float32
    assert array.flags.c_contiguous
    assert metadata == record
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_file_by_hand(path, latents):
    """The bytes say: one float32 tensor [B, C, H, W], channel-major."""
    save_latents(path, latents, {"seed": 1})
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert json.loads(header.pop("__metadata__")["sega_jax"]) == {"seed": 1}
    assert set(header) == {"latents"}
    assert (header["latents"]["dtype"], header["latents"]["shape"]) == ("F32", [2, 16, 6, 4])
    values = np.frombuffer(content[8 + length :], "<f4").reshape(2, 16, 6, 4)
    assert values[1, 5, 2, 3] == latents[1, 2, 3, 5]


def test_bfloat16_is_stored_as_float32(path):
    save_latents(path, jnp.full((1, 2, 2, 4), 1.5, jnp.bfloat16), {})
    array, metadata = load_latents(path)
    assert array.dtype == np.float32
    assert (array == 1.5).all()
    assert metadata == {}


def pack(latents):
    """Tokens of 2x2 latent pixels, features channel-major, written as loops on purpose."""
    batch, height, width, channels = latents.shape
    packed = np.zeros((batch, height // 2 * (width // 2), 4 * channels), np.float32)
    for row in range(height):
        for column in range(width):
            for channel in range(channels):
                token = row // 2 * (width // 2) + column // 2
                packed[:, token, 4 * channel + 2 * (row % 2) + column % 2] = latents[:, row, column, channel]
    return packed


@pytest.mark.parametrize("unit", [1, 2, 8, 16])
def test_packed(path, latents, unit):
    """3 x 2 tokens; height and width in tokens, latent pixels or image pixels."""
    save_file({"latents": pack(latents)}, path)
    array, metadata = load_latents(path, height=3 * unit, width=2 * unit)
    np.testing.assert_array_equal(array, latents)
    assert metadata == {}


def test_packed_with_the_size_in_its_record(path, latents):
    save_file({"latents": pack(latents)}, path, metadata={"sega_jax": json.dumps({"height": 48, "width": 32})})
    np.testing.assert_array_equal(load_latents(path)[0], latents)


def test_unpack(latents):
    np.testing.assert_array_equal(unpack(pack(latents), 3, 2), latents)


@pytest.mark.parametrize("size", [(48, 48), (32, 48), (47, 32), (1, 1), (96, 16)])
def test_packed_with_a_wrong_size(path, latents, size):
    save_file({"latents": pack(latents)[:, :5]}, path)
    with pytest.raises(CheckpointError, match="5 tokens do not make up"):
        load_latents(path, height=size[0], width=size[1])


def test_packed_without_a_size(path, latents):
    save_file({"latents": pack(latents)}, path)
    with pytest.raises(CheckpointError, match="give height= and width="):
        load_latents(path)
    save_file({"latents": np.zeros((1, 6, 63), np.float32)}, path)
    with pytest.raises(CheckpointError, match="multiple of 4"):
        load_latents(path, height=48, width=32)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"other": np.zeros(1)}, "no tensor named 'latents'; it holds other"),
        ({"latents": np.zeros((4, 4), np.float32)}, r"shape \[4, 4\]"),
        ({"latents": np.zeros((1, 0, 4, 4), np.float32)}, "shape"),
        ({"latents": np.zeros((1, 16, 4, 4), np.int32)}, "stored as I32"),
        ({"latents": np.full((1, 16, 4, 4), np.nan, np.float32)}, "NaN"),
    ],
)
def test_unusable_files(path, tensors, words):
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=words):
        load_latents(path)


def test_damaged_files(path, latents):
    save_latents(path, latents, {})
    whole = path.read_bytes()
    for keep in (0, 4, 30, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            load_latents(path)
    save_file({"latents": latents}, path, metadata={"sega_jax": "{"})
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_latents(path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_latents(path.parent / "none.safetensors")


@pytest.mark.parametrize(
    ("array", "error", "words"),
    [
        (np.zeros((4, 4, 16), np.float32), ValueError, "batch, height, width, channels"),
        (np.zeros((1, 4, 4, 16), np.int32), TypeError, "int32"),
        (np.full((1, 4, 4, 16), np.inf, np.float32), ValueError, "infinity"),
    ],
)
def test_save_refuses(path, array, error, words):
    with pytest.raises(error, match=words):
        save_latents(path, array, {})
    assert not path.exists()


def test_save_refuses_other_suffixes(tmp_path, latents):
    with pytest.raises(ValueError, match=r"stored as \.safetensors"):
        save_latents(tmp_path / "latents.pt", latents, {})
