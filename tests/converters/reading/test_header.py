"""Headers of safetensors files: what the library reads is read alike, and metadata that it refuses is read too."""

import json
import struct
from random import Random

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from converters.errors import CheckpointError
from converters.lora import read_lora
from converters.reading.header import read_header
from converters.reading.sources import MappedSource
from tests.fuzz.mutators import mutate_safetensors

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.bias": np.ones(3, np.float16),
    "empty": np.zeros((0, 4), np.int8), "one": np.array(3.0), "flags": np.array([True, False]),
}  # fmt: skip


def library(path):
    """What the library makes of a file; why not, if it refuses."""
    try:
        with safe_open(path, framework="numpy") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118  not a mapping
                piece = file.get_slice(name)
                found[name] = (piece.get_dtype(), tuple(piece.get_shape()))
            return found, dict(file.metadata() or {})
    except (SafetensorError, OSError) as exc:
        return str(exc)


def test_as_the_library_reads_it(tmp_path):
    """On damaged files too: what the library refuses is refused, what it reads is read alike."""
    sound, path, refused = save(TENSORS, {"format": "pt"}), tmp_path / "x", 0
    for seed in range(1500):
        path.write_bytes(mutate_safetensors(Random(seed), sound) if seed else sound)
        theirs = library(path)
        try:
            header, said = read_header(path), ""
        except CheckpointError as exc:
            header, said = None, str(exc)
        if header is None:
            assert isinstance(theirs, str) or "twice" in said or "axes" in said, (seed, said)
            refused += 1
        elif isinstance(theirs, str):  # but for metadata of other things than strings and numbers nobody reads
            length = struct.unpack("<Q", path.read_bytes()[:8])[0]
            metadata = json.loads(path.read_bytes()[8 : 8 + length]).get("__metadata__") or {}
            lenient = any(not isinstance(value, str) for value in metadata.values())
            assert lenient or not metadata or "number out of range" in theirs, (seed, theirs)
        else:
            assert ({name: (e.dtype, e.shape) for name, e in header.tensors.items()}, header.metadata) == theirs
    assert 300 < refused < 1400


def test_values(tmp_path):
    (tmp_path / "x").write_bytes(save(TENSORS))
    source = MappedSource([tmp_path / "x"])
    for name, value in TENSORS.items():
        assert source.view(name).dtype == value.dtype
        np.testing.assert_array_equal(source.view(name), value)


def with_metadata(metadata):
    data = save({"transformer.x_embedder.lora_A.weight": np.ones((2, 16), np.float32),
                 "transformer.x_embedder.lora_B.weight": np.ones((8, 2), np.float32)})  # fmt: skip
    length = struct.unpack("<Q", data[:8])[0]
    header = json.dumps({"__metadata__": metadata, **json.loads(data[8 : 8 + length])}).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def test_metadata_that_holds_other_things_than_strings(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_metadata({"step": 1000, "config": {"rank": 2}, "tags": ["a", None], "format": "pt"}))
    assert isinstance(library(path), str)
    metadata = MappedSource([path]).metadata
    assert metadata == {"step": "1000", "config": '{"rank": 2}', "tags": '["a", null]', "format": "pt"}
    path.write_bytes(with_metadata({"lora_alpha": 16}))  # and it counts
    (factors,) = read_lora(path).factors["transformer"].values()
    assert factors.scale == 8


@pytest.mark.parametrize("metadata", [[1], "text", 3])
def test_metadata_that_is_no_object(tmp_path, metadata):
    (tmp_path / "x").write_bytes(with_metadata(metadata))
    with pytest.raises(CheckpointError, match="its metadata is no object"):
        read_header(tmp_path / "x")
