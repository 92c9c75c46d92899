"""Weights of eight bits with scales: what is written is what ComfyUI's files hold, and within its exact bound."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from converters.__main__ import main
from converters.components import open_checkpoint
from converters.convert import convert
from converters.errors import CheckpointError
from converters.reading.sources import MappedSource
from converters.stream import Output, Progress, write_safetensors
from converters.verify.values import fingerprint

BLOCKS = ("double_blocks.", "single_blocks.")


def tensors(path):
    source = MappedSource([path])
    found = {name: np.array(source.view(name)) for name in source.keys()}  # noqa: SIM118
    source.close()
    return found


def is_matrix(name):
    return name.startswith(BLOCKS) and name.endswith(".weight")


@pytest.fixture(params=[np.float32, ml_dtypes.bfloat16, np.float16])
def source(request, tmp_path, tiny):
    """A transformer with a row of zeros, very small values and an outlier."""
    state = tiny.state("transformer", dtype=np.float32)
    state["transformer_blocks.0.attn.to_q.weight"][3] = 0
    state["transformer_blocks.0.attn.to_q.weight"][4] *= np.float32(2.0**-13)
    state["single_transformer_blocks.1.proj_out.weight"][0, 0] = 100
    state["single_transformer_blocks.2.proj_mlp.weight"][:] = 0
    return tiny.component(tmp_path / "source", "transformer", {k: v.astype(request.param) for k, v in state.items()})


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_stored_values_and_scales(tmp_path, source, kind):
    convert(source, tmp_path / "plain.safetensors", to="bfl", progress=False)
    report = convert(source, tmp_path / "q.safetensors", to="bfl", dtype=kind, verify="exact", progress=False)
    plain, made = tensors(tmp_path / "plain.safetensors"), tensors(tmp_path / "q.safetensors")
    matrices = [name for name in plain if is_matrix(name)]
    assert len(matrices) == 2 * 2 * 5 + 3 * 3  # modulation, qkv, output and two of the MLP; modulation and two
    for name, exact in plain.items():
        if name not in matrices:
            assert made[name].dtype == exact.dtype
            assert made[name].tobytes() == exact.tobytes()
            continue
        base, exact = name.removesuffix(".weight"), exact.astype(np.float64)
        if kind == "fp8":
            assert made[name].dtype == ml_dtypes.float8_e4m3fn
            scale = made[f"{base}.scale_weight"]
            assert (scale.dtype, scale.shape) == (np.float32, ())
            largest, bound = np.abs(exact).max(), np.maximum(np.abs(exact) / 16, scale / 1024)
            assert scale == (np.float32(largest) / np.float32(448) if largest else 1)
        else:
            assert made[name].dtype == np.int8
            scale = made[f"{base}.weight_scale"]
            assert (scale.dtype, scale.shape) == (np.float32, (len(exact), 1))
            assert json.loads(made[f"{base}.comfy_quant"].tobytes()) == {"format": "int8_tensorwise"}
            assert made[name].min() >= -127
            bound = scale / 2
        error = np.abs(made[name].astype(np.float64) * scale - exact)
        assert np.all(error <= bound + 2.0**-22 * np.abs(exact))
        largest = np.abs(made[name].astype(np.float64)).max()
        assert largest == ({"fp8": 448, "int8": 127}[kind] if exact.any() else 0)
    assert ("scaled_fp8" in made) == (kind == "fp8")
    if kind == "fp8":
        assert (made["scaled_fp8"].dtype, made["scaled_fp8"].size) == (ml_dtypes.float8_e4m3fn, 2)
    found = report["components"]["transformer"]["verify"]
    assert found["wrong"] == {}
    assert found["quantised"] > len(matrices)  # fused ones hold several parameters
    assert found["equal"] + found["quantised"] == found["slots"]
    assert 0.4 < found["largest_step"] <= {"fp8": 16.01, "int8": 0.501}[kind]
    assert report["dtype"] == {"fp8": "float8_e4m3fn with scales", "int8": "int8 with scales"}[kind]
    data = sum(value.nbytes for value in made.values())
    assert report["bytes"] == data


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_read_back_and_converted_further(tmp_path, tiny, kind):
    """A float32 folder made from it holds the products exactly."""
    source = tiny.component(tmp_path / "source", "transformer")
    convert(source, tmp_path / "q.safetensors", to="bfl", dtype=kind, progress=False)
    convert(
        tmp_path / "q.safetensors", tmp_path / "f.safetensors", to="bfl", dtype="f32", verify="exact", progress=False
    )
    made, back = tensors(tmp_path / "q.safetensors"), tensors(tmp_path / "f.safetensors")
    for name, value in back.items():
        if is_matrix(name):
            scale = made[f"{name.removesuffix('.weight')}.{'scale_weight' if kind == 'fp8' else 'weight_scale'}"]
            np.testing.assert_array_equal(value, made[name].astype(np.float32) * scale)
        else:
            np.testing.assert_array_equal(value, made[name].astype(np.float32))
    assert fingerprint(tmp_path / "q.safetensors") != fingerprint(source)


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_whole_pipelines(tmp_path, tiny, kind):
    """T5's matrices are quantised too; CLIP and the autoencoder are not."""
    tiny.pipeline(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out", to="bfl", dtype=kind, verify="exact", progress=False)
    found = {name: part["verify"]["quantised"] for name, part in report["components"].items()}
    assert found == {"transformer": found["transformer"], "vae": 0, "text_encoder": 0, "text_encoder_2": 2 * 7}
    t5 = tensors(tmp_path / "out" / "t5xxl.safetensors")
    assert t5["shared.weight"].dtype == ml_dtypes.bfloat16
    assert t5["encoder.block.1.layer.0.SelfAttention.q.weight"].dtype.itemsize == 1
    assert t5["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].dtype == ml_dtypes.bfloat16
    with open_checkpoint(tmp_path / "out") as opened:
        assert set(opened.parts) == set(report["components"])


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("damage", ["value", "scale"])
def test_verification_sees_one_wrong_value_or_scale(tmp_path, tiny, monkeypatch, kind, damage):
    from converters.reading import quantised

    real = quantised._stored if damage == "value" else quantised._shaped

    def wrong(*arguments):
        (array,) = real(*arguments)
        array = array.copy()
        if damage == "value":
            array[1, 2] = 0 if abs(float(array[1, 2])) > 1 else 100
        else:
            array *= np.float32(1.2)
        return [array]

    monkeypatch.setattr(quantised, real.__name__, wrong)
    source = tiny.component(tmp_path / "source", "transformer")
    with pytest.raises(CheckpointError, match="not the source rounded to"):
        convert(source, tmp_path / "out.safetensors", to="bfl", dtype=kind, verify="exact", progress=False)
    assert not (tmp_path / "out.safetensors").exists()


def test_loras_are_rounded_once(tmp_path, tiny):
    """Merging into eight bits is merging in float32, then rounding."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    lora = {
        "transformer.single_transformer_blocks.0.proj_out.lora_A.weight": rng.standard_normal((2, 240), np.float32),
        "transformer.single_transformer_blocks.0.proj_out.lora_B.weight": rng.standard_normal((48, 2), np.float32),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    source = tiny.component(tmp_path / "source", "transformer")
    options = {"loras": [str(tmp_path / "lora.safetensors")], "progress": False}
    convert(source, tmp_path / "wide", to="diffusers", dtype="f32", **options)
    convert(tmp_path / "wide", tmp_path / "a.safetensors", to="bfl", dtype="int8", progress=False)
    convert(source, tmp_path / "b.safetensors", to="bfl", dtype="int8", **options)
    a, b = tensors(tmp_path / "a.safetensors"), tensors(tmp_path / "b.safetensors")
    for name in a:
        if is_matrix(name) or name.endswith("weight_scale"):
            assert a[name].tobytes() == b[name].tobytes()


@pytest.mark.parametrize("to", ["diffusers", "orbax"])
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_layouts_without_such_weights_are_refused_by_name(tmp_path, tiny, to, kind, capsys):
    source = tiny.component(tmp_path / "source", "transformer")
    with pytest.raises(ValueError, match=f"a {to} checkpoint has no weights of eight bits"):
        convert(source, tmp_path / "out", to=to, dtype=kind, progress=False)
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", to, "--dtype", kind]) == 2
    assert "eight bits" in capsys.readouterr().err
    with pytest.raises(ValueError, match="rounded weights compute something else"):
        convert(source, tmp_path / "out", to="bfl", dtype=kind, verify="forward", progress=False)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_has_no_scale_is_refused(tmp_path, tiny, value):
    state = tiny.state("transformer")
    state["transformer_blocks.0.ff.net.2.weight"][5, 5] = value
    source = tiny.component(tmp_path / "source", "transformer", state)
    with pytest.raises(CheckpointError, match="NaN or infinity, which cannot be quantised"):
        convert(source, tmp_path / "out.safetensors", to="bfl", dtype="fp8", progress=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 256}, "after a rotation"),
        ({"format": "float8_e4m3fn"}, "is int8; damaged"),
        ({"format": "int8_blockwise"}, "'int8_blockwise' are not supported"),
        (None, "is not float8"),
    ],
)
def test_other_kinds_of_int8_are_refused(tmp_path, note, message):
    made = {"x.weight": np.ones((4, 4), np.int8), "x.weight_scale": np.ones((4, 1), np.float32)}
    if note is not None:
        made["x.comfy_quant"] = np.frombuffer(json.dumps(note).encode(), np.uint8)
    outputs = [Output(name, value.shape, value.dtype, lambda value=value: [value]) for name, value in made.items()]
    with Progress(0, "", False) as bar:
        write_safetensors(tmp_path / "q.safetensors", outputs, {}, 1, bar)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "q.safetensors")


def test_only_what_was_quantised_is_rounded(tmp_path, tiny):
    """Tensors of a scaled float8 file that lie there as they are keep their type; only the others become bfloat16."""
    state = tiny.state("transformer", "bfl", np.float32)
    state["img_in.bias"] = state["img_in.bias"].astype(np.float16)
    plain = tmp_path / "plain.safetensors"
    save_file(state, plain)
    convert(plain, tmp_path / "q.safetensors", to="bfl", dtype="fp8", progress=False)
    report = convert(tmp_path / "q.safetensors", tmp_path / "out.safetensors", to="bfl", verify="exact", progress=False)
    assert report["dtype"] == "kept (scaled float8_e4m3fn as bfloat16)"
    for name, value in tensors(tmp_path / "out.safetensors").items():
        if is_matrix(name):
            assert value.dtype == ml_dtypes.bfloat16
        else:
            assert value.dtype == state[name].dtype
            assert value.tobytes() == state[name].tobytes()
