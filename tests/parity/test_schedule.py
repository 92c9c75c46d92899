"""Sigmas against diffusers' FlowMatchEulerDiscreteScheduler over sizes, shifts and step counts."""

import numpy as np
import pytest

pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from sega_jax.sampling.schedule import Schedule

pytestmark = pytest.mark.parity

CONFIGS = {
    "dev": {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0},
    "schnell": {"use_dynamic_shifting": False, "shift": 1.0, "base_shift": 0.5, "max_shift": 1.15},
    "static": {"use_dynamic_shifting": False, "shift": 3.0},
    "qwen": {
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
    },
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("steps", [1, 4, 28, 50])
@pytest.mark.parametrize("tokens", [256, 1536, 4096, 16_384, 65_536])
def test_sigmas_match_diffusers(name, steps, tokens):
    if name == "qwen" and steps == 1:
        pytest.skip("diffusers divides by zero stretching a single step to a terminal sigma")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**CONFIGS[name])
    config = dict(theirs.config)
    mu = diffusers.pipelines.flux.pipeline_flux.calculate_shift(
        tokens, config["base_image_seq_len"], config["max_image_seq_len"], config["base_shift"], config["max_shift"]
    )
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    ours = Schedule.from_dict({"_class_name": "FlowMatchEulerDiscreteScheduler", **config})
    np.testing.assert_allclose(ours.sigmas(steps, tokens, "native"), theirs.sigmas.numpy(), atol=1e-6)
