"""Noise schedules against runs of the published code of DyPE and SEGA, and against values worked by hand."""

from pathlib import Path

import numpy as np
import pytest

from sega_jax.sampling.schedule import Schedule, collapse_warning, start_index

DATA = Path(__file__).parent.parent / "data"
FLUX = Schedule()
QWEN = Schedule(max_shift=0.9, max_tokens=8192, terminal=0.02)


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(DATA / "dype_schedules.npz"))


def test_flux_sigmas_match_the_golden_run(golden):
    np.testing.assert_allclose(FLUX.sigmas(28, 65_536, "clamp"), golden["flux28_sigmas"], atol=1e-6)


def test_qwen_sigmas_match_the_golden_runs(golden):
    for tokens, mu, expected in zip(golden["qwen_seq"], golden["qwen_mu"], golden["qwen40_sigmas"], strict=True):
        assert abs(QWEN.mu(int(tokens), "native") - mu) < 1e-9
        np.testing.assert_allclose(QWEN.sigmas(40, int(tokens), "native"), expected, atol=2e-6)


def test_mu_policies(golden):
    for tokens, stock in zip(golden["flux_seq"], golden["flux_mu_stock"], strict=True):
        assert abs(FLUX.mu(int(tokens), "native") - stock) < 1e-9
        assert FLUX.mu(int(tokens), "clamp") == pytest.approx(min(max(stock, 0.5), 1.15))
    assert FLUX.mu(4096, 2) == 2.0
    assert Schedule(dynamic=False).mu(65_536, "native") is None


def test_sega_release_schedules():
    constants = np.load(DATA / "sega_constants.npz")
    np.testing.assert_allclose(FLUX.sigmas(28, 4096), constants["flux_sigmas_28"], atol=1e-6)
    np.testing.assert_allclose(QWEN.sigmas(40, 10**6), constants["qwen_sigmas_40"], atol=2e-6)


def test_static_shift_and_schnell():
    expected = [1, 0.9, 0.75, 0.5, 0]  # 3 t / (1 + 2 t)
    np.testing.assert_allclose(Schedule(dynamic=False, shift=3.0).sigmas(4, 4096), expected, atol=1e-6)
    schnell = Schedule.from_dict({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0})
    np.testing.assert_allclose(schnell.sigmas(4, 4096), [1, 0.75, 0.5, 0.25, 0], atol=1e-7)


def test_scalediff_levels():  # e^mu / (e^mu + 1 / t - 1) from t = 0.6, mu 1.15
    expected = [0.82570, 0.80507, 0.78305]
    np.testing.assert_allclose(FLUX.sigmas(30, 4096)[12:15], expected, atol=1e-5)


def test_collapse_guard_speaks_only_when_half_the_steps_are_noise():
    assert collapse_warning(FLUX.sigmas(28, 65_536, "clamp")) is None
    message = collapse_warning(FLUX.sigmas(28, 65_536, "native"))
    assert "28 of 28" in message
    assert "mu='clamp'" in message


@pytest.mark.parametrize("strength", [0, -0.1, 1.2, float("nan")])
def test_strength_is_checked(strength):
    with pytest.raises(ValueError, match="strength"):
        start_index(10, strength)


def test_start_index_counts_as_diffusers():
    assert [start_index(28, s) for s in (1.0, 0.6, 0.5)] == [0, 11, 14]
    with pytest.raises(ValueError, match="no step"):
        start_index(4, 1e-20)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_steps_are_checked(steps):
    with pytest.raises(ValueError, match="steps="):
        FLUX.sigmas(steps, 4096)


@pytest.mark.parametrize("mu", ["auto", float("inf"), None])
def test_mu_is_checked(mu):
    with pytest.raises(ValueError, match="mu="):
        FLUX.mu(4096, mu)


@pytest.mark.parametrize(
    "config", [{"use_karras_sigmas": True}, {"surprise": 1}, {"_class_name": "DDIMScheduler"}, {"time_shift_type": "x"}]
)
def test_configurations_that_would_be_ignored_are_refused(config):
    with pytest.raises(ValueError, match="scheduler"):
        Schedule.from_dict(config)
