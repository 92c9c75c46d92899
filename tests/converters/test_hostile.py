"""Broken and malicious inputs: a clear error, and nothing left that looks complete."""

import json
import math
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from converters.components import open_checkpoint
from converters.convert import convert
from converters.errors import CheckpointError
from tests.converters.hostile import MEMORY, file_of, refused

REPOSITORY = Path(__file__).parents[2]


def raw(path, header, data=b"", length=None):
    """A safetensors file written by hand."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# -- headers -------------------------------------------------------------------------------------------------------

HEADERS = {
    "empty file": b"",
    "shorter than a length": b"\x01\x02",
    "length beyond the file": struct.pack("<Q", 1 << 20) + b"{}",
    "length of 2^63": struct.pack("<Q", 1 << 63) + b"{}",
    "length zero": struct.pack("<Q", 0),
    "not JSON": struct.pack("<Q", 8) + b"{'a': 1}",
    "not UTF-8": struct.pack("<Q", 8) + b'{"\xff\xfe":1}',
    "a list": struct.pack("<Q", 8) + b"[1,2,3] ",
    "nested a thousand deep": struct.pack("<Q", 2000) + b"[" * 1000 + b"]" * 1000,
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "web page": b"<!DOCTYPE html><html>Access denied</html>",
    "GGUF": b"GGUF\x03\x00\x00\x00" + bytes(64),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_headers(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    refused(tmp_path / "x.safetensors", tmp_path)


ENTRIES = {
    "overlapping offsets": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12),
    "negative offset": ({"a": entry([2], -8, 0)}, 8),
    "offsets backwards": ({"a": entry([2], 8, 0)}, 8),
    "offsets beyond the file": ({"a": entry([1 << 20], 0, 1 << 22)}, 8),
    "a hole": ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20),
    "bytes nobody owns": ({"a": entry([2], 0, 8)}, 20),
    "truncated data": ({"a": entry([100], 0, 400)}, 300),
    "size is not the shape's": ({"a": entry([3], 0, 8)}, 8),
    "size overflows": ({"a": entry([1 << 40, 1 << 40], 0, 8)}, 8),
    "petabytes": ({"a": entry([1 << 50], 0, 1 << 52)}, 8),
    "negative dimension": ({"a": entry([-2], 0, 8)}, 8),
    "unknown type": ({"a": entry([2], 0, 8, "F33")}, 8),
    "type is a number": ({"a": entry([2], 0, 8, 7)}, 8),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "metadata is a number": ({"__metadata__": 3, "a": entry([2], 0, 8)}, 8),
    "configuration is not JSON": ({"__metadata__": {"config": "{{"}, "a": entry([2], 0, 8)}, 8),
}


@pytest.mark.parametrize(("header", "size"), ENTRIES.values(), ids=ENTRIES)
def test_entries(tmp_path, header, size):
    raw(tmp_path / "x.safetensors", header, bytes(size))
    refused(tmp_path / "x.safetensors", tmp_path)


@pytest.mark.parametrize("shape", [[2], [1, 2]])
def test_duplicate_keys(tmp_path, shape):
    one, other = (json.dumps(entry(s, 0, 8)) for s in ([2], shape))
    raw(tmp_path / "x.safetensors", f'{{"a": {one}, "a": {other}}}'.encode(), bytes(8))
    refused(tmp_path / "x.safetensors", tmp_path, "describes 'a' twice")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.one_of(st.none(), st.floats(0, 1)),
)
def test_fuzzed_headers(tmp_path, tiny, edits, cut):
    """Bytes of the header changed, the file cut anywhere: read as it says or refused, never anything else."""
    path = tmp_path / "vae.safetensors"
    original = tmp_path / "original.safetensors"
    if not original.exists():
        save_file(tiny.state("vae", "bfl"), original)
    data = bytearray(original.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    for where, value in edits:
        data[int(where * header)] = value
    path.write_bytes(data if cut is None else data[: int(cut * len(data))])
    tracemalloc.start()
    try:
        with open_checkpoint(path) as checkpoint:
            part = checkpoint.parts["vae"]
            assert sum(part.source.view(t.source).size for t in part.tensors) <= len(data)
    except CheckpointError:
        pass
    assert tracemalloc.get_traced_memory()[1] < MEMORY
    tracemalloc.stop()


# -- pickles and archives ------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("owned",))


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.ckpt"])
def test_pickles_are_refused_unopened(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps({"weight": Bomb()}))
    refused(tmp_path / name, tmp_path, "pickle")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_zip_bombs_are_refused_unopened(tmp_path, name):
    with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(200_000_000))
    assert (tmp_path / name).stat().st_size < 1_000_000
    refused(tmp_path / name, tmp_path, "zip archive")


# -- folders -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path, tiny):
    source = tiny.component(tmp_path / "whole", "transformer")
    convert(source, tmp_path / "source", to="diffusers", max_shard_size="150KB", progress=False)
    shutil.rmtree(source)
    return tmp_path / "source"


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_missing_shard(tmp_path, sharded):
    sorted(sharded.glob("*.safetensors"))[1].unlink()
    refused(sharded, tmp_path, "missing")


def test_truncated_shard(tmp_path, sharded):
    shard = sorted(sharded.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(sharded, tmp_path, "truncated or damaged")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "..\\x.safetensors", "C:\\x", "", "a\0b"])
def test_index_cannot_leave_its_folder(tmp_path, sharded, name):
    save_file({"proj_out.bias": np.zeros(16, np.float32)}, tmp_path / "outside.safetensors")
    index = next(sharded.glob("*.index.json"))
    edit(index, lambda value: value["weight_map"].update({"proj_out.bias": name}))
    refused(sharded, tmp_path, "only plain file names|names the pickle")


def test_links_out_of_the_folder(tmp_path, sharded):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    refused(sharded, tmp_path, "leaves its folder")


def test_loops_of_links(tmp_path, sharded):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.unlink()
    shard.symlink_to(shard.name)
    refused(sharded, tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", tmp_path)


def test_index_that_disagrees(tmp_path, sharded):
    index = next(sharded.glob("*.index.json"))
    edit(index, lambda value: value["weight_map"].pop("proj_out.bias"))
    refused(sharded, tmp_path, "in the index|not in the index")


CONFIGURATIONS = {
    "billions of layers": {"num_layers": 10**12},
    "negative layers": {"num_single_layers": -1},
    "layers as text": {"num_layers": "2"},
    "fractional layers": {"num_layers": 2.5},
    "too few layers": {"num_layers": 1},
    "another width": {"num_attention_heads": 4},
    "width as text": {"attention_head_dim": "16"},
    "huge width": {"attention_head_dim": 10**30},
    "no width": {"attention_head_dim": None},
}


@pytest.mark.parametrize("change", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_configurations(tmp_path, tiny, change):
    source = tiny.component(tmp_path / "source", "transformer")
    edit(source / "config.json", lambda value: value.update(change))
    refused(source, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"layers_per_block": 10**9},
        {"block_out_channels": 8},
        {"block_out_channels": [8] * 10**5},
        {"latent_channels": {}},
    ],
)
def test_autoencoder_configurations(tmp_path, tiny, change):
    source = tiny.component(tmp_path / "source", "vae")
    edit(source / "config.json", lambda value: value.update(change))
    refused(source, tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\x80\x04\x95", b"\xff\xfe{}"])
def test_configuration_files(tmp_path, tiny, content):
    source = tiny.component(tmp_path / "source", "transformer")
    (source / "config.json").write_bytes(content)
    refused(source, tmp_path)


def test_nothing_to_convert(tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "not a checkpoint")
    refused(tmp_path / "absent", tmp_path, "no such file")
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    refused(tmp_path / "other.safetensors", tmp_path, "not a component this tool knows")


def test_pipelines_of_other_families_and_with_holes(tmp_path, tiny):
    source = tiny.pipeline(tmp_path / "source")
    (source / "transformer").rename(source / "unet")
    edit(source / "model_index.json", lambda value: value.update(unet=value.pop("transformer")))
    refused(source, tmp_path, "components unet are not of a FLUX.1 pipeline")
    (source / "unet").rename(source / "transformer")
    edit(source / "model_index.json", lambda value: value.update(transformer=value.pop("unet")))
    file_of(source / "vae").unlink()
    refused(source, tmp_path, "no weights in vae")
    shutil.rmtree(source / "vae")
    shutil.copytree(source / "text_encoder", source / "vae")
    refused(source, tmp_path, "holds a text_encoder; expected a vae")
    edit(source / "model_index.json", lambda value: value.update({"../escape": ["a", "B"]}))
    refused(source, tmp_path, "only plain folder names")


def test_unknown_parts_of_a_bundle(tmp_path, tiny):
    tensors = {f"model.diffusion_model.{k}": v for k, v in tiny.state("transformer", "bfl").items()}
    save_file(tensors | {"control.weight": np.zeros(2, np.float32)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", tmp_path, "belong to no component of a FLUX.1 single file: control.weight")


# -- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
def test_not_a_number(tmp_path, tiny, kind, value):
    tensors = tiny.state("vae", dtype=np.dtype(kind))
    tensors["decoder.conv_in.weight"][1, 2, 0, 1] = value
    source = tiny.component(tmp_path / "source", "vae", tensors)
    refused(source, tmp_path, "hold NaN or infinity .decoder.conv_in.kernel.")
    report = convert(
        source, tmp_path / "out", to="orbax", verify="exact", allow_nonfinite=True, progress=False
    )  # fmt: skip
    assert report["components"]["vae"]["verify"]["nonfinite"] == ["decoder.conv_in.kernel"]
    with pytest.raises(ValueError, match="only verification looks"):
        convert(source, tmp_path / "other", to="orbax", allow_nonfinite=True, progress=False)


# -- Orbax ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def orbax(tmp_path, tiny):
    source = tiny.component(tmp_path / "whole", "vae")
    convert(source, tmp_path / "source", to="orbax", progress=False)
    shutil.rmtree(source)
    return tmp_path / "source"


def _truncate(folder):
    chunk = folder / "decoder.conv_in.kernel" / "0.0.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-2])


def _many_chunks(folder):
    edit(folder / "decoder.conv_in.bias" / ".zarray", lambda v: v.update(shape=[1 << 30], chunks=[1]))


def _wide_chunks(folder):
    edit(
        folder / "decoder.conv_in.bias" / ".zarray",
        lambda v: v.update(chunks=[1 << 40], compressor={"id": "zstd", "level": 1}),
    )


def _grow(folder):
    edit(folder / "decoder.conv_in.bias" / ".zarray", lambda v: v.update(shape=[1 << 50], chunks=[1 << 50]))


def _fill(folder):
    """A compressed array of which no chunk is stored, so that it would be filled: petabytes from a few bytes."""
    edit(
        folder / "decoder.conv_in.bias" / ".zarray",
        lambda v: v.update(shape=[1 << 50], chunks=[1 << 20], compressor={"id": "zstd", "level": 1}),
    )


def _link(folder):
    (folder / "decoder.conv_in.bias").rename(folder.parent / "elsewhere")
    (folder / "decoder.conv_in.bias").symlink_to(folder.parent / "elsewhere")


def _escape(folder):
    def change(tree):
        tree["tree_metadata"]["('..', 'x')"] = {}

    edit(folder / "_METADATA", change)


def _expression(folder):
    edit(folder / "_METADATA", lambda v: v["tree_metadata"].update({"__import__('os')": {}}))


ORBAX = {
    "truncated chunk": _truncate,
    "missing chunk": lambda folder: (folder / "decoder.conv_in.bias" / "0").unlink(),
    "missing array": lambda folder: shutil.rmtree(folder / "decoder.conv_in.bias"),
    "array of petabytes": _grow,
    "a billion chunks": _many_chunks,
    "a chunk of terabytes": _wide_chunks,
    "array of petabytes never stored": _fill,
    "array that is a link": _link,
    "name that climbs": _escape,
    "name that is code": _expression,
    "no tree": lambda folder: (folder / "_METADATA").write_text("{}"),
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "unknown type": lambda f: edit(f / "decoder.conv_in.bias" / ".zarray", lambda v: v.update(dtype="|O")),
    "negative shape": lambda f: edit(f / "decoder.conv_in.bias" / ".zarray", lambda v: v.update(shape=[-1])),
    "another format": lambda f: edit(f / "decoder.conv_in.bias" / ".zarray", lambda v: v.update(zarr_format=9)),
    "ocdbt without its manifest": lambda f: edit(f / "_METADATA", lambda v: v.update(use_ocdbt=True)),
}


@pytest.mark.parametrize("damage", ORBAX.values(), ids=ORBAX)
def test_orbax(tmp_path, orbax, damage):
    damage(orbax)
    refused(orbax, tmp_path)
