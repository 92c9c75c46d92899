import numpy as np
import pytest

from sega_jax.evaluation import metrics


def test_frechet_of_known_normals():
    """Diagonal covariances: the closed form is |m|^2 + sum (s_a - s_b)^2."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(400, 3))
    base = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base, rowvar=False))).T  # exactly white
    a = base * [1.0, 2.0, 3.0]
    b = base * [2.0, 2.0, 0.5] + [1.0, -2.0, 0.0]
    assert metrics.frechet(a, b) == pytest.approx(5 + 1 + 0 + 2.5**2, rel=1e-9)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    assert metrics.frechet(a @ turn, b @ turn) == pytest.approx(metrics.frechet(a, b), rel=1e-9)


def test_frechet_of_correlated_normals_against_the_matrix_root():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 4)), rng.normal(size=(70, 4)) @ rng.normal(size=(4, 4))
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert metrics.frechet(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_refuses_what_has_no_covariance():
    with pytest.raises(ValueError, match="two rows or more"):
        metrics.frechet(np.zeros((1, 3)), np.zeros((5, 3)))


def test_features_see_structure_and_texture_and_not_the_canvas():
    side = np.arange(96)
    plain = np.full((1, 96, 96, 3), 128.0)
    moved = plain.copy()
    moved[:, :48] = 60
    striped = plain + 60 * np.sign(np.sin(2 * np.pi * (side + 0.5) / 24))[None, :, None, None]
    f = [metrics.features(x) for x in (plain, moved, striped)]
    assert f[0].shape == (1, metrics.FEATURES)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(f[i] - f[j]).max() > 0.02
    larger = np.full((1, 192, 192, 3), 128.0)
    larger[:, :96] = 60
    np.testing.assert_allclose(metrics.features(larger), f[1], atol=0.05)


def test_objects():
    mask = np.zeros((20, 30), bool)
    assert metrics.objects(mask) == 0
    mask[2:8, 2:8] = True
    assert metrics.objects(mask) == 1
    mask[12:18, 20:26] = True
    mask[0, 29] = True  # a speck
    assert metrics.objects(mask) == 2
    assert metrics.objects(mask, least=0.0) == 3


def test_autocorrelation_peak():
    rng = np.random.default_rng(0)
    tile = rng.uniform(0, 255, (64, 64, 3))
    assert metrics.autocorrelation_peak(np.tile(tile, (2, 2, 1))) == pytest.approx(1, abs=1e-6)
    assert metrics.autocorrelation_peak(rng.uniform(0, 255, (128, 128, 3))) < 0.2
    assert metrics.autocorrelation_peak(np.full((64, 64, 3), 7.0)) == 0
    stripes = np.broadcast_to((np.arange(256)[:, None, None] % 8 < 4) * 255.0, (256, 256, 3))
    assert metrics.autocorrelation_peak(stripes) == 0  # texture finer than a cell is no repetition


def test_seam_energy_of_a_known_picture():
    """Steps of 1 everywhere and of 3 across the seams: the energy ratio is 9."""
    steps = np.where(np.arange(1, 32) % 8 == 0, 3.0, 1.0)
    ramp = np.concatenate([[0.0], np.cumsum(steps)])
    image = (ramp[:, None] + ramp[None, :])[..., None].repeat(3, -1)
    np.testing.assert_allclose(metrics.seam_energy(image[None], 8), 9.0)
    smooth = (np.arange(32.0)[:, None] + np.arange(32.0))[..., None]
    np.testing.assert_allclose(metrics.seam_energy(np.stack([smooth, 2 * smooth]), 8), 1.0)
    assert np.isnan(metrics.seam_energy(np.zeros((1, 32, 32, 3)), 8)).all()
    with pytest.raises(ValueError, match="pitch=40"):
        metrics.seam_energy(image[None], 40)


def test_bootstrap_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(2)
    inside = 0
    for i in range(200):
        interval = metrics.bootstrap(rng.normal(size=60), draws=300, seed=i)
        assert interval.low <= interval.mean <= interval.high
        inside += interval.low <= 0 <= interval.high
    assert 0.88 < inside / 200 < 0.99


def test_pairing_removes_what_cases_share():
    rng = np.random.default_rng(3)
    shared = rng.normal(size=100) * 10
    a, b = shared + 0.3 + 0.1 * rng.normal(size=100), shared
    interval = metrics.paired(a, b, draws=500)
    assert 0.2 < interval.low < 0.3 < interval.high < 0.4
    assert interval == metrics.paired(a, b, draws=500)
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.paired(a, b[:5])
