"""Tables and frequencies read off the published code of DyPE (guyyariv/DyPE 436fe61; ComfyUI-DyPE v2.3.0)."""

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sega_jax import positional as pe
from sega_jax.geometry import RopeSpec

FLUX = RopeSpec()
QWEN = RopeSpec(trained=(83, 83), ids="centered")
STATIC = {"base": "none()", "ntk_static": "ntk()", "yarn_static": "yarn()+temperature()"}
DYNAMIC = {
    "ntk_dype": "ntk(strength=dype(scale=2))",
    "yarn_dype": "yarn(strength=dype(scale=1))+temperature()",
    "vision_yarn_dype": "vision-yarn",
}
FLUX_SIZES = ["1024x1024", "2048x2048", "4096x4096", "1536x3072", "832x1216", "1365x4096"]
QWEN_SIZES = ["1328x1328", "2048x2048", "3072x3072", "4096x4096", "1536x3072", "928x1664"]
PRECISION = pytest.mark.parametrize("x64", [True, False], ids=["x64", "float32"])


def method_of(variant):
    """A golden's variant name -> method, sigma."""
    if variant in STATIC:
        return pe.get(STATIC[variant]), 1.0
    name, _, sigma = variant.rpartition("_s")
    return pe.get(DYNAMIC[name]), float(sigma)


def check(run, x64, grid, ids, arrays, size, variants, tolerance):
    """Compare the tables of 4 text and 28 image tokens, at their ids, with every variant stored for a size."""
    text, image = ids

    def tables(method, sigma):
        ropes = method(grid, pe.Signals(sigma=sigma))
        of_text, of_image = pe.tables(ropes["text"], text), pe.tables(ropes["image"], image)
        return tuple(jnp.concatenate(parts) for parts in zip(of_text, of_image, strict=True))

    stored = arrays[f"{size}/cos"], arrays[f"{size}/sin"]
    assert len(stored[0]) in (1, len(variants))  # sizes as trained store variant 0: the others were bit-identical
    for index, variant in enumerate(variants):
        got = run(x64, tables, *method_of(variant))
        for table, expected in zip(got, stored, strict=True):
            assert table.dtype == (np.float64 if x64 else np.float32)
            assert_allclose(table, expected[index % len(expected)], rtol=0, atol=tolerance, err_msg=variant)


@PRECISION
@pytest.mark.parametrize("size", FLUX_SIZES)
def test_flux_tables(golden, run, size, x64):
    arrays = golden("dype_flux")
    grid = FLUX.grid(*arrays[f"{size}/hw"].tolist(), text_tokens=arrays["meta"]["n_text"])
    ids = grid.ids()
    index = arrays[f"{size}/seq_index"]
    assert_array_equal(np.concatenate([ids["text"], ids["image"]])[index], arrays[f"{size}/ids"])
    picked = ids["text"][index[:4]], ids["image"][index[4:] - len(ids["text"])]
    check(run, x64, grid, picked, arrays, size, arrays["meta"]["variants"], 1e-6 if x64 else 3e-5)


@PRECISION
@pytest.mark.parametrize("size", QWEN_SIZES)
def test_qwen_tables(golden, run, size, x64):
    arrays = golden("dype_qwen")
    grid = QWEN.grid(*arrays[f"{size}/hw"].tolist(), text_tokens=64)
    ids = grid.ids()
    image = ids["image"][arrays[f"{size}/img_index"]]
    assert_array_equal(image, arrays[f"{size}/img_ids"])
    positions = arrays[f"{size}/txt_pos"]
    text = ids["text"][positions - int(ids["text"][0, 0])]
    assert_array_equal(text, np.stack([positions] * 3, axis=-1))
    variants = arrays["meta"]["variants"]
    assert variants[-1] == "as_shipped"  # static by accident (the table is cached without the time): equals sigma 1
    variants = [*variants[:-1], "yarn_dype_s1.0"]
    check(run, x64, grid, (text, image), arrays, size, variants, 1e-5 if x64 else 3e-5)


@PRECISION
@pytest.mark.parametrize("size", ["2048x2048", "4096x4096", "1536x3072"])
def test_vision_yarn_tables(golden, run, size, x64):
    """ComfyUI's own method, and its isotropic Dy-NTK, on the FLUX tokens of the same size."""
    arrays, flux = golden("dype_comfy"), golden("dype_flux")
    grid = FLUX.grid(*flux[f"{size}/hw"].tolist(), text_tokens=512)
    ids = flux[f"{size}/ids"]
    variants = arrays["meta"]["variants"]
    chosen = [v for v in variants if v.startswith("vision_yarn")]
    picked = {f"{size}/{part}": arrays[f"{size}/{part}"][: len(chosen)] for part in ("cos", "sin")}
    assert variants[: len(chosen)] == chosen
    check(run, x64, grid, (ids[:4], ids[4:]), picked, size, chosen, 1e-6 if x64 else 3e-5)


@pytest.mark.parametrize("family", ["flux", "qwen"])
def test_rotation(golden, family):
    arrays, apply = golden(f"dype_{family}"), golden("dype_apply")
    index = arrays["meta"]["variants"].index("yarn_dype_s0.6")
    cos, sin = (arrays[f"1536x3072/{part}"][index][:, None, :] for part in ("cos", "sin"))  # [tokens, 1, pairs]
    got = pe.rotate(jnp.asarray(apply["x"]), jnp.asarray(cos), jnp.asarray(sin))
    assert_allclose(got, apply[f"{family}_out"], rtol=0, atol=1e-6)


# --- float64 frequencies of one axis ---------------------------------------------------------------------------

QUIRK = "yarn(strength=dype(scale=1), ramp_fix=False)"
QUIRK_2025 = 'yarn(strength=dype(scale=2), threshold_rule="power", ramp_fix=False)'
FREQUENCIES = {
    "yarn_static": "yarn(ramp_fix=False)",
    "ntk_static": "ntk()",
    "yarn_dype": QUIRK,
    "yarn_dype_2025": QUIRK_2025,
    "ntk_dype": "ntk(strength=dype(scale=2))",
}


def axis_frequencies(run, x64, pair, expression, sigma):
    tokens, trained = (int(v) for v in pair)
    grid = RopeSpec(trained=(trained, trained)).grid(tokens, tokens)

    def frequencies(method, sigma):
        return method(grid, pe.Signals(sigma=sigma))["image"].frequencies

    return run(x64, frequencies, pe.get(expression), sigma)


@PRECISION
@pytest.mark.parametrize("name", FREQUENCIES)
def test_frequencies(golden, run, name, x64):
    arrays = golden("dype_freqs")
    sigmas = arrays["sigmas"]
    for row, pair in enumerate(arrays["pairs"]):
        expected = arrays[name][row]
        if expected.ndim == 1:
            got = axis_frequencies(run, x64, pair, FREQUENCIES[name], 1.0)
        else:
            got = axis_frequencies(run, x64, pair, FREQUENCIES[name], sigmas if x64 else sigmas.astype(np.float32))
        assert_allclose(got[1], expected, rtol=1e-7 if x64 else 1e-6)
        assert_array_equal(got[1], got[2])
        assert_allclose(got[0], arrays["axis0"], rtol=1e-15 if x64 else 1e-7)


def test_fix_matters_only_at_the_inversion(golden, run):
    """The published code's inverted ramps (it caps the upper edge alone) are in the goldens at two small sigmas."""
    arrays = golden("dype_freqs")
    for row, pair in enumerate(arrays["pairs"]):
        fixed = axis_frequencies(run, True, pair, "yarn(strength=dype(scale=1))", arrays["sigmas"])[1]
        differs = np.abs(fixed / arrays["yarn_dype"][row] - 1).max(axis=-1) > 1e-6
        assert_array_equal(differs, np.isin(arrays["sigmas"], (0.02, 0.005)), err_msg=str(pair))


def test_magnitude_of_temperature(golden, run):
    arrays = golden("dype_freqs")
    for row, (tokens, trained) in enumerate(arrays["pairs"].tolist()):
        grid = RopeSpec(trained=(trained, trained)).grid(tokens, tokens)
        rope = run(True, lambda m, grid=grid: m(grid, pe.Signals(sigma=0.3))["image"], pe.temperature())
        assert_array_equal(rope.magnitude[0], np.ones(8))
        assert_allclose(rope.magnitude[1], np.full(28, arrays["mscale"][row]), rtol=1e-15)


def ramp_indices(rule, trained, kappa):
    """(lo_beta, hi_beta, lo_gamma, hi_gamma) of a 56-channel axis."""
    edges = [rule.ramp_edges(turns, 56, 10_000.0, trained, kappa) for turns in (rule.beta, rule.gamma)]
    return jnp.stack([jnp.broadcast_to(e, jnp.shape(kappa)) for pair in edges for e in pair], axis=-1)


@PRECISION
def test_ramp_indices(golden, run, x64):
    arrays = golden("dype_freqs")
    kind = np.float64 if x64 else np.float32
    for row, trained in enumerate((64, 83)):
        kappa = arrays["sigmas"].astype(kind) ** 2
        got = run(x64, lambda rule, kappa, t=trained: ramp_indices(rule, t, kappa), pe.yarn(ramp_fix=False), kappa)
        assert_array_equal(got, arrays["ramp_idx"][row])


@PRECISION
def test_default_schedule(golden, run, x64):
    """kappa and ramp edges over the default 28 steps, plain and with the FLUX pipeline's bfloat16 sigma."""
    arrays = golden("dype_schedules")
    sigma = arrays["flux28_sigmas"][:-1]
    for t_round, edges in ((None, "flux28_ramp_idx_f32"), ("bfloat16", "flux28_ramp_idx_bf16")):
        schedule = pe.dype(scale=1.0, t_round=t_round)
        kappa = run(x64, lambda schedule, sigma: schedule.kappa(sigma), schedule, sigma)
        got = run(x64, lambda rule, kappa: ramp_indices(rule, 64, kappa), pe.yarn(ramp_fix=False), kappa)
        assert_array_equal(got, arrays[edges])
    rounded = run(x64, lambda s, sigma: s.kappa(sigma), pe.dype(scale=1.0, exponent=1.0, t_round="bfloat16"), sigma)
    assert_allclose(rounded, arrays["flux28_t_bf16"], rtol=1e-7)
    for name, scale in (("yarn", 1.0), ("ntk", 2.0)):
        kappa = run(x64, lambda s, sigma: s.kappa(sigma), pe.dype(scale=scale, t_round="bfloat16"), sigma)
        assert_allclose(kappa, arrays[f"flux28_kappa_{name}"], rtol=1e-7 if x64 else 1e-6)
    changed = np.any(arrays["flux28_ramp_idx_f32"] != arrays["flux28_ramp_idx_bf16"], axis=-1)
    assert np.flatnonzero(changed).tolist() == [7, 21]


def test_traced_ramp_edges_equal_float64(run):
    """Over a dense grid of noise levels no float32 ramp edge differs from float64."""
    sigma = np.linspace(0.02, 1.0, 20_001).astype(np.float32)
    for trained in (64, 83):
        rule = pe.yarn()
        single = run(False, lambda rule, s, t=trained: ramp_indices(rule, t, pe.dype().kappa(s)), rule, sigma)
        double = run(True, lambda rule, s, t=trained: ramp_indices(rule, t, pe.dype().kappa(s)), rule, sigma)
        assert_array_equal(single, double)
