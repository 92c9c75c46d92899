"""LoRAs at load: specifications, the merge against the converter's, and adapters kept apart."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from converters.components import open_component
from converters.convert import convert
from converters.errors import CheckpointError
from converters.keymap import Slot
from converters.lora import DIALECTS, Factors, Lora, convert_lora, express
from sega_jax.families.registry import load_parts
from sega_jax.models.abstract import parameters
from sega_jax.weights.hub import resolve
from sega_jax.weights.loras import lora_specs

COMPONENTS = {"transformer": "transformer", "text_encoder": "clip", "text_encoder_2": "t5", "vae": "vae"}


@pytest.fixture(scope="module")
def nano():
    return resolve("nano")


def made(nano, seed=0, components=("transformer",), scale=0.5):
    """A LoRA of the attention projections (and of what text encoders have of them), float32."""
    random = np.random.default_rng(seed)
    found = {}
    for name in components:
        part = open_component(nano, name)
        shapes = {s: h for t in part.tensors for s, h in zip(t.slots, t.piece_shapes(), strict=True)}
        part.source.close()
        wanted = [
            s for s in shapes
            if s.path.endswith(".kernel") and any(w in s.path for w in (".query", ".key", ".value", "attention_out"))
        ]  # fmt: skip
        assert len(wanted) >= 3
        found[name] = {
            s: Factors(
                random.standard_normal((2, shapes[s][0])).astype(np.float32),
                random.standard_normal((shapes[s][1], 2)).astype(np.float32) / 8,
                scale,
            )
            for s in wanted
        }
    return Lora(found, {}, "test")


def saved(lora, path, dialect="diffusers"):
    save_file(express(lora, dialect), path)
    return path


def values(parts):
    return {
        (name, path): np.asarray(leaf[...])
        for name, attribute in COMPONENTS.items()
        for path, leaf in parameters_of(parts.encoders.get(attribute) or getattr(parts, attribute)).items()
    }


def parameters_of(component):
    from flax import nnx

    return parameters(nnx.merge(component.graphdef, component.params))


def load(folder, *loras, dtype="float32"):
    return values(load_parts(folder, dtype=dtype, loras=lora_specs(loras)))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_as_the_converters_merged_export(tmp_path, nano, dialect):
    convert_lora(saved(made(nano), tmp_path / "d"), tmp_path / "lora", to=dialect)
    file = f"{tmp_path / 'lora'}:0.6"
    convert(nano, tmp_path / "merged", to="orbax", dtype="f32", loras=[file], progress=False)
    ours, theirs, plain = load(nano, file), load(tmp_path / "merged"), load(nano)
    changed = {key for key in plain if not np.array_equal(plain[key], ours[key])}
    assert {path for _, path in changed} == {slot.path for slot in made(nano).factors["transformer"]}
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=str(key))


def test_bfloat16_is_rounded_once_after_the_sum(tmp_path, nano):
    file = saved(made(nano), tmp_path / "lora.safetensors")
    wide, narrow = load(nano, (file, 0.8)), load(nano, (file, 0.8), dtype="bfloat16")
    for key, value in wide.items():
        np.testing.assert_array_equal(narrow[key], value.astype(narrow[key].dtype))


def test_text_encoders(tmp_path, nano):
    lora = made(nano, components=("transformer", "text_encoder", "text_encoder_2"))
    ours, plain = load(nano, (saved(lora, tmp_path / "lora.safetensors"), 0.5)), load(nano)
    for (component, slot), delta in lora.deltas().items():
        expected = plain[component, slot.path][slot.index] + np.float32(0.5) * delta.T
        np.testing.assert_allclose(ours[component, slot.path][slot.index], expected, atol=1e-6)


def test_zero_is_the_identity_and_two_commute(tmp_path, nano):
    one = saved(made(nano, 1), tmp_path / "one.safetensors", "kohya")
    two = saved(made(nano, 2), tmp_path / "two.safetensors", "xlabs")
    plain, zero = load(nano), load(nano, (one, 0.0), (two, 0))
    left, right, alone = load(nano, (one, 0.7), two), load(nano, two, (one, 0.7)), load(nano, two)
    for key, value in plain.items():
        np.testing.assert_array_equal(zero[key], value)
        np.testing.assert_array_equal(left[key], right[key])
    assert any(not np.array_equal(left[key], alone[key]) for key in plain)


def test_three_commute_up_to_the_last_bit_of_the_sum(tmp_path, nano):
    files = [saved(made(nano, seed), tmp_path / f"{seed}.safetensors") for seed in range(3)]
    left, right = load(nano, *files), load(nano, *files[::-1])
    for key, value in left.items():
        np.testing.assert_allclose(right[key], value, rtol=0, atol=4 * 2.0**-24 * np.abs(value).max())


def test_what_does_not_fit_is_refused(tmp_path, nano):
    random = np.random.default_rng(0)
    a, b = random.standard_normal((2, 8)).astype(np.float32), random.standard_normal((8, 2)).astype(np.float32)
    lora = Lora({"transformer": {Slot("single.out.kernel", 99): Factors(a, b)}})
    with pytest.raises(CheckpointError, match=r"(?s)does not fit .*has no single.out.kernel.99"):
        load(nano, saved(lora, tmp_path / "deep.safetensors", "bfl"))
    save_file({"lora_unet_nothing.lora_down.weight": a}, tmp_path / "unknown.safetensors")
    with pytest.raises(CheckpointError, match="not a LoRA this tool knows"):
        load(nano, tmp_path / "unknown.safetensors")


# -- specifications ------------------------------------------------------------------------------------------------


def test_specifications(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"content")
    (plain, tupled, text) = lora_specs([file, (str(file), 0.5), f"{file}:-2"])
    assert [spec.weight for spec in (plain, tupled, text)] == [1.0, 0.5, -2.0]
    assert {spec.file for spec in (plain, tupled, text)} == {str(file)}
    assert lora_specs([plain.record(), text]) == (plain, text)
    file.write_bytes(b"other")
    with pytest.raises(ValueError, match="has changed since the picture was made"):
        lora_specs([plain.record()])


def test_folders_are_digested_by_names_and_contents(tmp_path):
    digests = set()
    for name, content in (("x", b"1"), ("y", b"1"), ("x", b"2")):
        folder = tmp_path / f"{name}{content.decode()}"
        folder.mkdir()
        (folder / name).write_bytes(content)
        digests |= {spec.sha256 for spec in lora_specs([folder])}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        ("a.safetensors", "expected a list"),
        (["missing"], "no such file"),
        ([(".", float("inf"))], "finite"),
        ([(".", float("nan"))], "finite"),
    ],
)
def test_specifications_refused(loras, message):
    with pytest.raises(ValueError, match=message):
        lora_specs(loras)
