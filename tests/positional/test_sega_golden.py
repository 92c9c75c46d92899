"""SEGA against float64 values of an independent implementation of its release."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sega_jax import positional as pe
from sega_jax.geometry import RopeSpec
from sega_jax.positional.sega import pair_correction
from sega_jax.positional.spectrum import axis_bins, collapse, radial_bins

NAMES = ["sega_noise_32x32", "sega_pink_40x24", "sega_tones_96x40"]
PRECISION = pytest.mark.parametrize("x64", [True, False], ids=["x64", "float32"])
FILES = pytest.mark.parametrize("name", NAMES)


def grid_of(arrays, ids, text_tokens=1):
    """The file's grid: trained on 16 x 16 tokens, so that it extrapolates."""
    assert int(arrays["train_px"]) == 16 * 16
    spec = RopeSpec(dims=tuple(arrays["axes"].tolist()), trained=(16, 16), ids=ids)
    return spec.grid(int(arrays["H"]), int(arrays["W"]), text_tokens)


def released(arrays, **switches):
    """The released rule with the file's hyper-parameters; 16 trained tokens on centred grids too."""
    alpha, beta, floor, gamma, kappa, low, high = arrays["hp"].tolist()
    magnitude = pe.sega_magnitude(
        alpha=alpha, beta=beta, gamma=gamma, kappa=kappa, floor=floor, spread=(low, high), reduce="batch", **switches
    )
    return pe.chain(pe.ntk(strength=2.0, damping=0.1, scale="sega", text="image", trained=16), magnitude)


def ropes_of(method, grid, tokens):
    return method(grid, pe.Signals(sigma=0.5, spectrum=pe.statistic(method, tokens, grid)))


def magnitudes_of(rope):
    """Magnitudes of sample 0, axes concatenated, without leaving NumPy."""
    return np.concatenate([m.reshape(-1, m.shape[-1])[0] for m in rope.magnitude])


@PRECISION
@FILES
def test_spectrum(golden, run, name, x64):
    arrays = golden(name)
    grid = grid_of(arrays, "corner")
    tokens = arrays["tokens"]
    first_row = run(x64, lambda t: collapse(t, grid, reduce="batch")[:, 0], jnp.asarray(tokens))
    spectrum = run(x64, lambda t: pe.measure(t, grid, reduce="batch"), jnp.asarray(tokens))
    relative, absolute = (1e-12, 1e-12) if x64 else (1e-5, 5e-6)
    for sample in range(len(tokens)):  # all samples share the mean map's spectrum
        assert_allclose(first_row[sample], arrays["map_row0"], rtol=0, atol=1e-12 if x64 else 1e-5)
        assert_allclose(spectrum.height[sample], arrays["E_h"], rtol=relative)
        assert_allclose(spectrum.width[sample], arrays["E_w"], rtol=relative)
        assert_allclose(spectrum.radial[sample], arrays["E_iso"], rtol=relative)
        assert_allclose(spectrum.flatness[sample], arrays["flatness"], rtol=0, atol=absolute)
    amplitude = run(x64, lambda m, f: m.amplitude(f), pe.sega_magnitude(), spectrum.flatness)[0]
    assert_allclose(amplitude, arrays["sigma"], rtol=0, atol=absolute)
    for side in ("h", "w"):
        energy = spectrum.height[0] if side == "h" else spectrum.width[0]
        correction = run(x64, lambda e: pair_correction(e, 28, 1.5), energy)
        assert_allclose(correction, arrays[f"s_{side}"], rtol=0, atol=1e-12 if x64 else 1e-5)


@FILES
def test_bin_maps(golden, name):
    arrays = golden(name)
    height, width = int(arrays["H"]), int(arrays["W"])
    assert_array_equal(axis_bins(height)[0], arrays["axis_idx_h"])
    assert_array_equal(axis_bins(width)[0], arrays["axis_idx_w"])
    assert_array_equal(radial_bins(height, width)[0], arrays["radial_idx"])


@PRECISION
@FILES
def test_flux_magnitudes_and_tables(golden, run, name, x64):
    arrays = golden(name)
    grid = grid_of(arrays, "corner")
    ropes = run(x64, lambda m, t: ropes_of(m, grid, t), released(arrays), jnp.asarray(arrays["tokens"]))
    tolerance = 1e-12 if x64 else 5e-6
    for kind in ("text", "image"):
        assert_allclose(magnitudes_of(ropes[kind]), arrays["flux_m"], rtol=0, atol=tolerance)
        for axis, factor in enumerate(arrays["flux_ntk"], start=1):
            expected = pe.base_frequencies(56, 10_000.0 * factor)
            assert_allclose(ropes[kind].frequencies[axis], expected, rtol=1e-12 if x64 else 1e-6)
    ids = grid.ids()
    picked = np.concatenate([ids["text"], ids["image"][arrays["probe_tokens"]]])
    assert_array_equal(picked, arrays["flux_probe_ids"])

    def rotated(ropes, q, k):
        text, image = (pe.tables(ropes[kind], part) for kind, part in (("text", picked[:1]), ("image", picked[1:])))
        cos, sin = (jnp.concatenate([a[0], b[0]]) for a, b in zip(text, image, strict=True))
        q, k = (pe.rotate(x.astype(cos.dtype), cos[:, None], sin[:, None]) for x in (q, k))
        logits = jnp.einsum("qhd,khd->hqk", q, k, precision="highest") / np.sqrt(q.shape[-1]).item()
        return cos, sin, q, k, logits

    cos, sin, q, k, logits = run(x64, rotated, ropes, jnp.asarray(arrays["q"]), jnp.asarray(arrays["k"]))
    tolerance = 1e-12 if x64 else 3e-5
    assert_allclose(np.repeat(cos, 2, axis=-1), arrays["flux_cos"], rtol=0, atol=tolerance)
    assert_allclose(np.repeat(sin, 2, axis=-1), arrays["flux_sin"], rtol=0, atol=tolerance)
    for got, key in ((q, "flux_q_rot"), (k, "flux_k_rot"), (logits, "flux_logits")):
        assert_allclose(got, arrays[key], rtol=0, atol=1e-12 if x64 else 3e-5)


@PRECISION
@FILES
def test_qwen_magnitudes_and_tables(golden, run, name, x64):
    arrays = golden(name)
    grid = grid_of(arrays, "centered")
    tokens = jnp.asarray(arrays["tokens"])
    tolerance = 1e-12 if x64 else 5e-6
    for share, key in ((False, "qwen_m"), (True, "qwen_m_released")):
        ropes = run(x64, lambda m, t: ropes_of(m, grid, t), released(arrays, share_width=share), tokens)
        for kind in ("text", "image"):
            assert_allclose(magnitudes_of(ropes[kind]), arrays[key], rtol=0, atol=tolerance)
            for axis, factor in enumerate(arrays["qwen_ntk"], start=1):
                expected = pe.base_frequencies(56, 10_000.0 * factor)
                assert_allclose(ropes[kind].frequencies[axis], expected, rtol=1e-12 if x64 else 1e-6)
    ropes = run(x64, lambda m, t: ropes_of(m, grid, t), released(arrays), tokens)
    ids = grid.ids()
    for kind, part, key in (
        ("image", ids["image"][arrays["probe_tokens"]], "qwen_cis_img"),
        ("text", ids["text"], "qwen_cis_txt"),
    ):
        cos, sin = run(x64, lambda rope, part=part: pe.tables(rope, part), ropes[kind])
        assert_allclose(cos[0], arrays[key].real, rtol=0, atol=1e-12 if x64 else 3e-5)
        assert_allclose(sin[0], arrays[key].imag, rtol=0, atol=1e-12 if x64 else 3e-5)


@PRECISION
def test_constants(golden, run, x64):
    """NTK factors and reference magnitudes at a training resolution of 1024 px, for nine grids and ten scales."""
    arrays = golden("sega_constants")
    relative = 1e-12 if x64 else 1e-6

    def of(method, grid):
        """(ntk factor, reference magnitude) per axis, read off a rope with a flat spectrum."""
        flat = pe.Spectrum(*(jnp.ones((1, 8)),) * 3, jnp.ones((1,)))
        rope = run(x64, lambda m: m(grid, pe.Signals(sigma=0.5, spectrum=flat))["image"], method)
        slowest = np.array([np.asarray(f, np.float64)[..., -1] for f in rope.frequencies[1:]])
        return slowest ** (-56 / 54) / 10_000, [np.asarray(m).ravel() for m in rope.magnitude[1:]]

    for family, spec in (("flux", RopeSpec()), ("qwen", RopeSpec(trained=(83, 83), ids="centered"))):
        for row, (height, width) in enumerate(arrays["grid"].tolist()):
            factors, magnitudes = of(pe.get("sega"), spec.grid(height, width))
            assert_allclose(factors, arrays[f"{family}_ntk"][row], rtol=3 * relative)
            for magnitude, expected in zip(magnitudes, arrays[f"{family}_mref"][row], strict=True):
                assert_allclose(magnitude, np.full(28, expected), rtol=relative)
    for s, factor, reference in zip(arrays["s"], arrays["ntk"], arrays["mref"], strict=True):
        factors, magnitudes = of(pe.get("sega"), RopeSpec().grid(round(64 * s), 16))
        assert_allclose(factors, factor, rtol=3 * relative)
        assert_allclose(magnitudes, np.full((2, 28), reference), rtol=relative)


@PRECISION
def test_log_linear_profile(golden, run, x64):
    arrays = golden("sega_constants")

    def allocated(rule, energy):
        correction = pair_correction(energy, 28, rule.beta)
        return correction, rule.allocate(correction, rule.reference_magnitude(4.0), jnp.ones((), energy.dtype))

    energy = arrays["loglinear_E"] if x64 else arrays["loglinear_E"].astype(np.float32)
    correction, magnitude = run(x64, allocated, pe.sega_magnitude(), energy)
    assert_allclose(correction, arrays["loglinear_s"], rtol=0, atol=1e-12 if x64 else 1e-5)
    assert_allclose(magnitude, arrays["loglinear_m"], rtol=0, atol=1e-12 if x64 else 2e-6)
