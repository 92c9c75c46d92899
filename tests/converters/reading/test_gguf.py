"""GGUF in: values against the format's own arithmetic, and damaged files."""

import re

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from converters.components import open_checkpoint
from converters.convert import convert
from converters.errors import CheckpointError
from converters.inspect import inspect
from converters.stream import Progress
from converters.verify.values import compare

gguf = pytest.importorskip("gguf")


def write(path, tensors, quantised, shapes=None):
    """BFL's names as GGUF; 8-bit blocks of 32 values with one float16 scale for the named tensors."""
    writer = gguf.GGUFWriter(path, "flux")
    expected = {}
    for name, shape in (shapes or {}).items():
        writer.add_array(name, list(shape))
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


def test_inspect(tmp_path, file):
    path, expected = file
    report = inspect(path)
    assert (report.kind, report.description) == ("GGUF file", "GGUF transformer in bfl names")
    (part,) = report.parts
    assert part.tensors == len(expected)
    assert part.parameters == sum(value.size for value in expected.values())
    assert part.dtypes.keys() == {"Q8_0", "F32", "F16", "BF16"}
    assert part.dtypes["F16"] == expected["img_in.bias"].size
    blocks = part.dtypes["Q8_0"] // 32  # of 32 codes and a scale of two bytes
    assert part.nbytes == 34 * blocks + 4 * part.dtypes["F32"] + 2 * (part.dtypes["F16"] + part.dtypes["BF16"])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: not a complete GGUF file"):
        inspect(path)


def test_norms_that_are_called_weight(tmp_path, tiny):
    """BFL's names as newer files and converters to GGUF spell them."""
    tensors = tiny.state("transformer", "bfl", np.float32)
    renamed = {name.replace("_norm.scale", "_norm.weight"): value for name, value in tensors.items()}
    assert renamed.keys() != tensors.keys()
    write(tmp_path / "x.gguf", renamed, ())
    save_file(renamed, tmp_path / "x.safetensors")
    for name in ("x.gguf", "x.safetensors"):
        convert(tmp_path / name, tmp_path / f"{name}.out", to="bfl", verify="exact", progress=False)
        got = load_file(tmp_path / f"{name}.out")
        assert got.keys() == tensors.keys()
        assert all(np.array_equal(got[key], value) for key, value in tensors.items())


def test_t5_in_the_names_of_llama(tmp_path, tiny):
    tensors = tiny.state("text_encoder_2", dtype=np.float32)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)  # llama.cpp's own table
    named = {names.get_name(name, (".weight",)): value for name, value in tensors.items()}
    assert len(named) == len(tensors)
    named["dec.blk.0.attn_q.weight"] = np.ones((2, 2), np.float32)
    write(tmp_path / "t5.gguf", named, ())
    convert(tmp_path / "t5.gguf", tmp_path / "out.safetensors", to="bfl", verify="exact", progress=False)
    got = load_file(tmp_path / "out.safetensors")
    assert got.keys() == tensors.keys()
    assert all(np.array_equal(got[key], value) for key, value in tensors.items())


def test_shapes_that_were_changed_for_the_blocks(tmp_path, tiny):
    """Tensors whose rows do not divide into blocks are stored in another shape; the original one is noted."""
    tensors = tiny.state("transformer", "bfl", np.float32)
    name = "img_in.weight"  # [48, 16]: rows of 16 do not divide into blocks of 32
    original = tensors[name].shape
    path = tmp_path / "flux.gguf"
    flat = tensors | {name: tensors[name].reshape(-1, 32)}
    noted = {f"comfy.gguf.orig_shape.{name}": original}
    expected = write(path, flat, (name,), noted)[name].reshape(original)
    convert(path, tmp_path / "out.safetensors", to="bfl", dtype="f32", verify="exact", progress=False)
    np.testing.assert_array_equal(load_file(tmp_path / "out.safetensors")[name], expected)
    write(path, flat, (name,), {f"comfy.gguf.orig_shape.{name}": (47, 16)})
    with pytest.raises(CheckpointError, match=r"img_in\.weight is \(24, 32\) but was \(47, 16\)"):
        open_checkpoint(path)
