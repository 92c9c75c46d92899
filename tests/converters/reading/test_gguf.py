"""GGUF in: values against the format's own arithmetic, and damaged files."""

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from converters.components import open_checkpoint
from converters.convert import convert
from converters.errors import CheckpointError
from converters.stream import Progress
from converters.verify.values import compare

gguf = pytest.importorskip("gguf")


def write(path, tensors, quantised):
    """BFL's names as GGUF; 8-bit blocks of 32 values with one float16 scale for the named tensors."""
    writer = gguf.GGUFWriter(path, "flux")
    expected = {}
    for name, value in tensors.items():
        if name in quantised:
            blocks = value.astype(np.float32).reshape(-1, 32)
            scale = (np.abs(blocks).max(1) / 127).astype(np.float16)
            codes = np.round(blocks / scale.astype(np.float32)[:, None]).clip(-127, 127).astype(np.int8)
            raw = np.concatenate([scale[:, None].view(np.uint8), codes.view(np.uint8)], 1)
            raw = raw.reshape(value.shape[0], -1)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            expected[name] = (codes * scale.astype(np.float32)[:, None]).reshape(value.shape)
        elif value.dtype == ml_dtypes.bfloat16:
            raw = value.view(np.uint8)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
            expected[name] = value
        else:
            writer.add_tensor(name, value)
            expected[name] = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture
def file(tmp_path, tiny):
    tensors = tiny.state("transformer", "bfl", np.float32)
    tensors["img_in.bias"] = tensors["img_in.bias"].astype(np.float16)
    tensors["txt_in.weight"] = tensors["txt_in.weight"].astype(ml_dtypes.bfloat16)
    quantised = [name for name, value in tensors.items() if value.ndim == 2 and value.shape[1] % 32 == 0]
    assert len(quantised) > 5
    return tmp_path / "flux.gguf", write(tmp_path / "flux.gguf", tensors, quantised)


def test_values(tmp_path, file):
    path, expected = file
    report = convert(path, tmp_path / "wide.safetensors", to="bfl", dtype="f32", verify="exact", progress=False)
    assert report["components"]["transformer"]["tensors"] == len(expected)
    got = load_file(tmp_path / "wide.safetensors")
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value.astype(np.float32), err_msg=name)
    convert(path, tmp_path / "out", to="orbax", verify="exact", progress=False)
    with open_checkpoint(tmp_path / "out") as opened:
        part = opened.parts["transformer"]
        assert {part.source.storage(t.source).name for t in part.tensors} == {"bfloat16", "float16", "float32"}


def test_only_what_was_quantised_is_rounded(tmp_path, file):
    """Norms, biases and embedders that lie in the file as they are keep every bit, and --verify insists on it."""
    path, expected = file
    report = convert(path, tmp_path / "out.safetensors", to="bfl", verify="exact", progress=False)
    assert report["dtype"] == "kept (GGUF Q8_0 as bfloat16)"
    with safe_open(path.parent / "out.safetensors", framework="numpy") as got:
        for name, value in expected.items():
            quantised = value.ndim == 2 and value.shape[1] % 32 == 0 and value.dtype != ml_dtypes.bfloat16
            wanted = value.astype(ml_dtypes.bfloat16) if quantised else value
            assert got.get_tensor(name).dtype == wanted.dtype
            assert got.get_tensor(name).tobytes() == np.ascontiguousarray(wanted).tobytes(), name
    found = report["components"]["transformer"]["verify"]
    assert 0 < found["rounded"] < found["slots"] / 2
    assert found["equal"] + found["rounded"] == found["slots"]


def test_verification_sees_a_rounding_nobody_asked_for(tmp_path, file):
    path, _ = file
    convert(path, tmp_path / "narrow.safetensors", to="bfl", dtype="bf16", progress=False)
    with open_checkpoint(path) as source, open_checkpoint(tmp_path / "narrow.safetensors") as output:
        parts = source.parts["transformer"], output.parts["transformer"]
        findings = compare(*parts, 1, Progress(1, "", False))
        asked = compare(*parts, 1, Progress(1, "", False), np.dtype(ml_dtypes.bfloat16))
    assert findings.wrong["double.image.attention.query_norm.scale.0"] == "written as bfloat16, expected float32"
    assert "image_embed.bias" in findings.wrong  # float16 in the file
    assert not asked.wrong


@pytest.mark.parametrize("keep", [4, 20, 100, 2000, -1])
def test_truncated(tmp_path, file, keep):
    path, _ = file
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a complete GGUF file"):
        open_checkpoint(path)


def test_counts_beyond_the_file(tmp_path, file):
    path, _ = file
    data = bytearray(path.read_bytes())
    data[8:16] = (1 << 62).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not a complete GGUF file"):
        open_checkpoint(path)
