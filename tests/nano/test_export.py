import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open

from sega_jax.families.registry import load_parts
from sega_jax.models.abstract import build_abstract, parameters
from sega_jax.nano import export, vocabulary
from sega_jax.nano import model as nano


def random_modules():
    """nano's networks filled with random numbers that bfloat16 can hold; compiles nothing."""
    rng = np.random.default_rng(0)
    with nnx.use_eager_sharding(False):
        modules = nnx.eval_shape(lambda: nano.build_generator(nnx.Rngs(0)))
    modules["vae"] = build_abstract(nano.build_vae)
    for module in modules.values():
        for param in parameters(module).values():
            values = rng.normal(size=param.shape).astype(ml_dtypes.bfloat16)
            param.set_value(jnp.asarray(values.astype(np.float32)))
    return modules


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("nano")
    modules = random_modules()
    return path, modules, export.export(modules, path)


def test_what_is_written_is_what_is_loaded(folder):
    path, modules, _ = folder
    parts = load_parts(path, dtype="float32")
    loaded = {
        "transformer": parts.transformer,
        "vae": parts.vae,
        "text_encoder": parts.encoders["clip"],
        "text_encoder_2": parts.encoders["t5"],
    }
    for name, component in loaded.items():
        back = parameters(nnx.merge(component.graphdef, component.params))
        for where, param in parameters(modules[name]).items():
            expected = np.array(param[...])
            if (name, where) == ("text_encoder_2", "tokens.table"):
                capitalised, lower = vocabulary.t5_aliases(nano.WORDS)
                expected[capitalised] = expected[lower]
            np.testing.assert_array_equal(np.asarray(back[where][...]), expected, err_msg=f"{name} {where}")
    assert parts.text_tokens == vocabulary.T5_LENGTH
    assert (parts.rope.trained, parts.rope.pixels_per_token) == (nano.TRAINED, nano.PIXELS_PER_TOKEN)


def test_size_and_dtype(folder):
    path, _, size = folder
    everything = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert size < everything < 16_000_000
    for file in path.rglob("*.safetensors"):
        with safe_open(file, "numpy") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118


def test_scheduler_gives_native_pictures_the_shift_of_flux(folder):
    config = json.loads((folder[0] / "scheduler" / "scheduler_config.json").read_text())
    assert config["max_image_seq_len"] == nano.TRAINED[0] * nano.TRAINED[1]
    assert config["max_shift"] == nano.shift_mu(256) == 1.15
