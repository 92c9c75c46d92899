"""Whole pipelines through the converter, opened by diffusers' FluxPipeline; LoRAs merged at load against diffusers'."""

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

from flax import nnx
from safetensors.numpy import save_file

from converters.components import open_component
from converters.convert import convert
from converters.lora import Factors, Lora, express
from sega_jax.families.registry import load_parts
from sega_jax.models.abstract import parameters
from sega_jax.weights.hub import resolve
from sega_jax.weights.loras import lora_specs


def opened(folder):
    pipe = diffusers.FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe):
    generator = torch.Generator().manual_seed(3)
    made = pipe("a red circle", height=64, width=64, num_inference_steps=2, generator=generator, output_type="np")
    return made.images[0]


@pytest.fixture(scope="module")
def expected():
    return picture(opened(resolve("nano")))


@pytest.mark.parametrize("through", ["orbax", "bfl"])
def test_an_exported_pipeline_gives_the_same_picture(tmp_path, expected, through):
    """nano to another layout and back to a diffusers folder: every pixel is equal."""
    convert(resolve("nano"), tmp_path / "there", to=through, verify="exact", progress=False)
    base = {"base": resolve("nano")} if through == "bfl" else {}
    convert(tmp_path / "there", tmp_path / "back", to="diffusers", verify="exact", progress=False, **base)
    assert expected.std() > 0.01
    np.testing.assert_array_equal(picture(opened(tmp_path / "back")), expected)


def attention_lora():
    """Changes of the attention of both kinds of block and of CLIP, which are what diffusers loads into FLUX.1."""
    random = np.random.default_rng(0)
    found = {}
    for name, kinds in (("transformer", ("query", "value", "attention_out")), ("text_encoder", ("query", "value"))):
        part = open_component(resolve("nano"), name)
        shapes = {s: h for t in part.tensors for s, h in zip(t.slots, t.piece_shapes(), strict=True)}
        part.source.close()
        found[name] = {
            slot: Factors(
                random.standard_normal((3, shape[0])).astype(np.float32),
                random.standard_normal((shape[1], 3)).astype(np.float32) / 16,
                0.5,
            )
            for slot, shape in shapes.items()
            if slot.path.endswith(tuple(f"{kind}.kernel" for kind in kinds))
        }
        assert len(found[name]) > 1
    return Lora(found, {}, "attention")


def test_loras_merged_at_load_against_diffusers(tmp_path, expected):
    file = tmp_path / "lora.safetensors"
    save_file(express(attention_lora(), "diffusers"), file)
    theirs = opened(resolve("nano"))
    theirs.load_lora_weights(file)
    theirs.fuse_lora(components=["transformer", "text_encoder"], lora_scale=0.8)
    theirs.unload_lora_weights()
    ours = load_parts(resolve("nano"), loras=lora_specs([(file, 0.8)]))
    plain = load_parts(resolve("nano"))
    for name, attribute, module in (
        ("transformer", "transformer", theirs.transformer),
        ("text_encoder", "clip", theirs.text_encoder),
    ):
        state = {key: value.numpy() for key, value in module.state_dict().items()}
        part = open_component(resolve("nano"), name)
        prefix = "" if all(tensor.source in state for tensor in part.tensors) else "text_model."
        found = (parts.encoders.get(attribute) or getattr(parts, attribute) for parts in (ours, plain))
        merged, before = (parameters(nnx.merge(component.graphdef, component.params)) for component in found)
        changed = 0
        for tensor in part.tensors:
            for slot, piece in zip(tensor.slots, tensor.pieces(state[prefix + tensor.source]), strict=True):
                at = () if slot.index is None else slot.index
                np.testing.assert_allclose(np.asarray(merged[slot.path][...][at]), piece, atol=1e-6, err_msg=str(slot))
                changed += not np.array_equal(np.asarray(before[slot.path][...][at]), piece)
        part.source.close()
        assert changed == len(attention_lora().factors[name])
    convert(resolve("nano"), tmp_path / "merged", to="diffusers", dtype="f32", loras=[f"{file}:0.8"], progress=False)
    fused = picture(theirs)
    assert np.abs(fused - expected).max() > 0.02
    np.testing.assert_allclose(picture(opened(tmp_path / "merged")), fused, atol=1e-4)
