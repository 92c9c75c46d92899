"""Detection and reading of checkpoints, and everything that must be refused."""

import contextlib
import io
import json
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from converters.errors import CheckpointError
from converters.reading.detect import Kind, detect, recognise
from converters.reading.formats import (
    SafetensorsSource,
    Weights,
    choose_weights,
    open_tensors,
    read_json,
    read_pipeline,
)


def raw(path, header, data=b"", length=None):
    """A safetensors file written by hand: 8-byte length, JSON header, data."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def entry(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.fixture
def sharded(tmp_path):
    """A diffusers component in two shards with its index."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = [{"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float16)}, {"c": np.full(4, 7.0)}]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name)
    index = {"metadata": {}, "weight_map": {"a": names[0], "b": names[0], "c": names[1]}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    return folder


def rewrite_index(folder, change):
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


# -- reading ---------------------------------------------------------------------------------------


def test_shards_read_as_one_source(sharded):
    with open_tensors(sharded) as source:
        assert sorted(source.keys()) == ["a", "b", "c"]
        assert source.shape("a") == (2, 3)
        assert (source.dtype("a"), source.dtype("b"), source.dtype("c")) == ("F32", "F16", "F64")
        assert source.nbytes == 6 * 4 + 2 * 2 + 4 * 8
        assert source.file("c").name.endswith("00002-of-00002.safetensors")
        np.testing.assert_array_equal(source.read("a"), [[0, 1, 2], [3, 4, 5]])
        array = source.read("c")
    np.testing.assert_array_equal(array, np.full(4, 7.0))  # outlives the source
    with pytest.raises(ValueError, match="closed"):
        source.read("a")


def test_bfloat16_bits_and_metadata(tmp_path):
    # 1.0 and -2.0 in bfloat16, written as bytes
    path = raw(
        tmp_path / "x.safetensors",
        {"__metadata__": {"k": "v"}, "w": entry("BF16", [2], 0, 4)},
        b"\x80\x3f\x00\xc0",
    )
    with open_tensors(path) as source:
        assert source.metadata == {"k": "v"}
        assert source.read("w").dtype == ml_dtypes.bfloat16
        assert source.read("w").astype(np.float32).tolist() == [1.0, -2.0]
        with pytest.raises(CheckpointError, match="no tensor named 'z'"):
            source.shape("z")


def test_float8_is_listed_but_not_read(tmp_path):
    path = raw(tmp_path / "x.safetensors", {"w": entry("F8_E4M3", [3], 0, 3)}, b"abc")
    with open_tensors(path) as source:
        assert (source.dtype("w"), source.nbytes) == ("F8_E4M3", 3)
        with pytest.raises(CheckpointError, match=r"F8_E4M3.*bfloat16 or float16 version"):
            source.read("w")


def test_a_header_that_begins_like_a_pickle_is_read(tmp_path):
    header = json.dumps({"w": entry("F32", [1], 0, 4)}).encode()
    path = raw(tmp_path / "x.safetensors", header.ljust(0x010280), struct.pack("<f", 3.0))
    assert path.read_bytes()[:3] == b"\x80\x02\x01"  # pickle protocol 2
    with open_tensors(path) as source:
        assert source.read("w").tolist() == [3.0]


# -- indices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "sub/x.safetensors", "..", "C:\\x.safetensors", ""]
)
def test_index_cannot_point_elsewhere(sharded, name):
    save_file({"c": np.zeros(4)}, sharded.parent / "secret.safetensors")
    rewrite_index(sharded, lambda weights: weights.update(c=name))
    with pytest.raises(CheckpointError, match="only plain file names"):
        open_tensors(sharded)


def test_links_must_stay_in_the_folder(sharded):
    shard = sharded / "diffusion_pytorch_model-00002-of-00002.safetensors"
    outside = sharded.parent / "elsewhere.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)
    with pytest.raises(CheckpointError, match="link that leaves its folder"):
        open_tensors(sharded)
    shard.unlink()
    shard.symlink_to(shard.name)
    with pytest.raises(CheckpointError, match=r"cannot be followed|missing"):
        open_tensors(sharded)
    shard.unlink()
    outside.rename(sharded / "renamed.safetensors")
    shard.symlink_to("renamed.safetensors")
    with open_tensors(sharded) as source:
        assert source.shape("c") == (4,)


def test_links_into_the_hub_cache_are_followed(sharded, tmp_path):
    """The cache's layout: snapshots/<commit>/... are links into blobs/."""
    repository = tmp_path / "hub" / "models--owner--name"
    folder = repository / "snapshots" / "abc" / "transformer"
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(sharded.iterdir())):
        file.rename(repository / "blobs" / str(number))
        (folder / file.name).symlink_to(f"../../../blobs/{number}")
    with open_tensors(folder) as source:
        assert source.shape("c") == (4,)


def test_missing_shard(sharded):
    (sharded / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002.safetensors: missing, .*download it again"):
        open_tensors(sharded)


def test_index_and_shards_disagree(sharded):
    def change(weights):
        weights["ghost"] = weights["a"]
        weights["b"] = weights["c"]
        del weights["a"]

    rewrite_index(sharded, change)
    with pytest.raises(CheckpointError) as caught:
        open_tensors(sharded)
    message = str(caught.value)
    assert "3 problems" in message
    assert "ghost: the index says diffusion_pytorch_model-00001-of-00002.safetensors, which lacks it" in message
    assert "b: the index says diffusion_pytorch_model-00002-of-00002.safetensors, it is in" in message
    assert "a: in diffusion_pytorch_model-00001-of-00002.safetensors but not in the index" in message


def test_the_same_tensor_in_two_shards(sharded):
    save_file({"a": np.zeros(1)}, sharded / "diffusion_pytorch_model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="tensor 'a' is in both"):
        open_tensors(sharded)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": {"a": 3}}])
def test_malformed_index(sharded, index):
    (sharded / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map"):
        open_tensors(sharded)


def test_index_naming_a_pickle(sharded):
    rewrite_index(sharded, lambda weights: weights.update(c="pytorch_model.bin"))
    with pytest.raises(CheckpointError, match=r"names the pickle 'pytorch_model.bin'.*can run code"):
        open_tensors(sharded)


# -- damaged and disguised files --------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def _zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Bomb()))
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".ckpt"])
@pytest.mark.parametrize("content", [pickle.dumps(Bomb(), 2), pickle.dumps(Bomb()), _zip()])
def test_pickles_are_refused_unopened(tmp_path, suffix, content):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"Pickles can run code.*use the safetensors files"):
        open_tensors(path)
    assert detect(path).kind is Kind.PICKLE


def test_only_pickled_weights(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        open_tensors(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>Log in</html>", "web page"),
        (b"GGUF" + b"\0" * 30, "GGUF"),
        (b"", "0 bytes"),
        (b"\xff" * 8 + b"{", "truncated or damaged"),
    ],
)
def test_files_that_are_something_else(tmp_path, content, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        open_tensors(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        detect(path)


@pytest.mark.parametrize("keep", [4, 8, 40, -1])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a complete safetensors file.*download it again"):
        open_tensors(path)


def test_a_shape_larger_than_memory_is_refused_before_allocation(tmp_path):
    path = raw(tmp_path / "x.safetensors", {"w": entry("F32", [2**40, 2**40], 0, 4)}, b"1234")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        open_tensors(path)
    path = raw(tmp_path / "y.safetensors", {"w": entry("F32", [2**40], 0, 2**42)}, b"1234")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        open_tensors(path)


NAMES = st.sampled_from(["a", "b", "__metadata__", ""])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "F4", "BOOL", "Q9", 3]),
        "shape": st.lists(st.integers(-1, 5) | st.sampled_from([2**31, 2**63]), max_size=3),
        "data_offsets": st.lists(st.integers(-1, 24), min_size=1, max_size=3),
    }
)
HEADERS = st.dictionaries(NAMES, ENTRIES | st.none() | st.integers(), max_size=3) | st.lists(st.integers(), max_size=2)


@settings(max_examples=150, deadline=None)
@given(header=HEADERS, data=st.binary(max_size=24), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_header_opens_consistently_or_raises_our_error(tmp_path_factory, header, data, length):
    path = raw(tmp_path_factory.getbasetemp() / "fuzz.safetensors", header, data, length)
    try:
        with open_tensors(path) as source:
            assert source.nbytes == len(data)
            for name in source.keys():  # noqa: SIM118
                if source.dtype(name) in ("F32", "BF16", "BOOL"):
                    assert source.read(name).shape == source.shape(name)
    except CheckpointError:
        pass


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=64))
def test_any_bytes_open_or_raise_our_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.safetensors"
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        SafetensorsSource([path]).close()


# -- JSON ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "expected a JSON object, got list"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_read_json_errors(tmp_path, content, words):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json.*{words}"):
        read_json(tmp_path / "config.json")


def test_read_json_missing_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(tmp_path)


# -- choosing weights by name --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["config.json", "model.safetensors"], Weights(("model.safetensors",))),
        (["flux1-dev.safetensors", "ae.safetensors", "config.json"], None),
        (["flux1-dev.safetensors", "model.safetensors", "pytorch_model.bin"], Weights(("model.safetensors",))),
        (["model.fp16.safetensors", "model.safetensors"], Weights(("model.safetensors",))),
        (["diffusion_pytorch_model.fp16.safetensors"], Weights(("diffusion_pytorch_model.fp16.safetensors",))),
        (
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
                "model.fp16-00001-of-00002.safetensors",
                "model.fp16-00002-of-00002.safetensors",
                "model.safetensors.index.fp16.json",
            ],
            Weights(
                ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
                "model.safetensors.index.json",
            ),
        ),
    ],
)
def test_choose_weights(names, expected):
    assert choose_weights(names, "here") == expected


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["model-00001-of-00002.safetensors"], "without their .safetensors.index.json"),
        (["model.safetensors.index.json"], "none of its shards"),
        (["model.safetensors", "diffusion_pytorch_model.safetensors"], "remove the stale one"),
        (
            ["model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"],
            "remove the stale one",
        ),
        (["model.fp16.safetensors", "model.bf16.safetensors"], "several variants"),
    ],
)
def test_choose_weights_refuses(names, words):
    with pytest.raises(CheckpointError, match=words):
        choose_weights(names, "here")


# -- detection -------------------------------------------------------------------------------------------------


BFL = {
    f"{name}.weight": np.zeros(1, np.float32)
    for name in (
        "img_in", "guidance_in.in_layer", "double_blocks.0.img_attn.qkv", "double_blocks.1.img_attn.qkv",
        "single_blocks.0.linear1", "single_blocks.1.linear1", "single_blocks.2.linear1",
    )
}  # fmt: skip


def test_detect_pipeline_beside_a_single_file(sharded):
    root = sharded.parent
    save_file(BFL, root / "flux1-dev.safetensors")
    index = {
        "_class_name": "FluxPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "image_encoder": [None, None],
        "force_zeros": False,
    }
    (root / "model_index.json").write_text(json.dumps(index))
    layout = detect(root)
    assert layout.kind is Kind.PIPELINE
    assert layout.components == {"transformer": ("diffusers", "FluxTransformer2DModel")}
    assert layout.class_name == "FluxPipeline"
    with pytest.raises(CheckpointError, match=r"whole pipeline.*\(transformer\)"):
        open_tensors(root)
    component = detect(sharded)
    assert (component.kind, component.class_name) == (Kind.COMPONENT, "FluxTransformer2DModel")
    single = detect(root / "flux1-dev.safetensors")
    assert single.kind is Kind.BFL_TRANSFORMER
    assert "2 double and 3 single blocks, with guidance" in single.description


def test_detect_a_folder_of_single_files(tmp_path):
    save_file(BFL, tmp_path / "flux1-dev.safetensors")
    layout = detect(tmp_path)
    assert layout.kind is Kind.OTHER
    assert "give one of them: flux1-dev.safetensors" in layout.description
    with pytest.raises(CheckpointError, match="no weights"):
        open_tensors(tmp_path)


def test_detect_other(tmp_path):
    assert detect(tmp_path).kind is Kind.OTHER
    (tmp_path / "notes.txt").write_text("hello")
    assert detect(tmp_path / "notes.txt").kind is Kind.OTHER
    with pytest.raises(CheckpointError, match="no such file or folder"):
        detect(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "ComfyUI"),
        (["transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight"], "LoRA"),
        (["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"], "LoRA"),
        (["latents"], "latents"),
        (["something"], "unknown"),
    ],
)
def test_recognise(names, words):
    kind, what = recognise(names)
    assert kind is Kind.SAFETENSORS
    assert words in what


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"../x": ["diffusers", "A"]}, "plain folder names"),
        ({"vae": ["diffusers"]}, "should be"),
        ({"vae": [1, 2]}, "should be"),
        ({"_class_name": "X"}, "names no components"),
    ],
)
def test_malformed_pipeline_index(tmp_path, index, words):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=words):
        read_pipeline(tmp_path)
