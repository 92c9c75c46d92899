"""Every method's tables for the bases, axes and trained sides of several families, against closed forms in float64."""

import io
import re
import tokenize
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sega_jax import positional as pe
from sega_jax.geometry import RopeSpec

SPECS = {
    "10,000, corner, FLUX.1": RopeSpec(),
    "10,000, centred, Qwen-Image": RopeSpec(trained=(83, 83), ids="centered"),
    "256, text on frames, Z-Image": RopeSpec((32, 48, 48), 256.0, (64, 64), text="frames"),
    "1,000, Krea-2": RopeSpec((32, 48, 48), 1_000.0, (128, 128)),
    "2,000, four axes, FLUX.2": RopeSpec((32,) * 4, 2_000.0, (64, 64), roles=("frame", "row", "column", "sequence"),
                                         text="sequence"),
    "10,000, as Wan's stills": RopeSpec((44, 42, 42), 10_000.0, (30, 52)),
    "2,000, axes in another order, unlike": RopeSpec((20, 8, 12, 6), 2_000.0, (40, 24),
                                                     roles=("column", "sequence", "row", "frame")),
    "256, two axes": RopeSpec((12, 16), 256.0, (16, 16), roles=("row", "column")),
}  # fmt: skip
SIGMA = 0.7


def grids() -> list:
    """Two and three times the trained sides; for three families also one side below its own."""
    found = []
    for n, (name, spec) in enumerate(SPECS.items()):
        for down, across in ((2.0, 3.0), (3.5, 0.75))[: 1 + (n < 3)]:
            rows, columns = round(spec.trained[0] * down), round(spec.trained[1] * across)
            found.append(pytest.param(spec.grid(rows, columns, 3), id=f"{name}, {rows} x {columns}"))
    return found


def base(d, theta):
    return theta ** (-2 * np.arange(d // 2) / d)


def as_pi(d, theta, length, s, iso, power):
    return base(d, theta) / s**power


def as_ntk(d, theta, length, s, iso, power, damping=0.0):
    return base(d, theta * max(1.0, s ** (power * d / (d - 2)) / (1 + damping * np.log(s))))


def as_yarn(d, theta, length, s, iso, power, rule=np.multiply):
    """Bands by the turns ``r`` of a pair over the trained length: pair index ``d ln(L / (2 pi r)) / (2 ln theta)``."""

    def ramp(fast, slow):
        at = [d * np.log(length / (2 * np.pi * rule(r, power))) / (2 * np.log(theta)) for r in (fast, slow)]
        low, high = max(np.floor(at[0]), 0), min(np.ceil(at[1]), d // 2)
        low = min(low, high)
        return np.clip((np.arange(d // 2) - low) / (high - low or 1e-3), 0, 1)

    beta, gamma = ramp(1.25, 0.75), ramp(16.0, 2.0)
    slow = as_ntk(d, theta, length, iso, iso, 1.0) * (1 - beta) + base(d, theta) / s * beta
    return base(d, theta) * (1 - gamma) + slow * gamma


def by_parts(d, theta, length, s, iso, power):
    """YaRN's paper: shares of plain and PI by the turns over the trained length, from 1 to 32 (times the strength)."""
    kept = np.clip((length * base(d, theta) / (2 * np.pi) - power) / (31 * power), 0, 1)
    return base(d, theta) * (kept + (1 - kept) / s)


FREQUENCIES = {
    "pi": (as_pi, 1.0, False),
    "ntk": (as_ntk, 1.0, False),
    "yarn": (as_yarn, 1.0, False),
    "dype-pi": (as_pi, 2 * SIGMA**2, False),
    "dype-ntk": (as_ntk, 2 * SIGMA**2, False),
    "dype-yarn": (as_yarn, SIGMA**2, False),
    "yarn-original": (by_parts, 1.0, False),
    "dype-yarn-original": (by_parts, SIGMA**2, False),
    "vision-yarn": (lambda *a: as_yarn(*a, rule=np.power), 2 * SIGMA**2, True),
    'ntk(scale="isotropic",damping=0.1)': (lambda *a: as_ntk(*a, damping=0.1), 1.0, True),
}


def temperatures(expression, scales):
    """Magnitude per spatial axis, 1 where it is as trained."""
    if expression == "vision-yarn":
        scales, strength = (max(scales),) * 2, SIGMA**2
    elif "yarn" in expression:
        strength = 1.0
    else:
        return 1.0, 1.0
    return tuple(1 + strength * 0.1 * np.log(s) for s in scales)


def evaluated(expression, grid, spectrum=None):
    """Ropes in float64 (under x64) and in float32, traced."""
    method, found = pe.get(expression), []
    for wide in (True, False):
        with jax.enable_x64(wide):
            number = jnp.float64 if wide else jnp.float32
            x = None if spectrum is None else jax.tree.map(partial(jnp.asarray, dtype=number), spectrum)
            run = jax.jit(lambda m, sigma, x: m(grid, pe.Signals(sigma=sigma, spectrum=x)))
            found.append(jax.tree.map(np.asarray, run(method, number(SIGMA), x)))
    return found


def compare(ropes, expected, kind):
    """``expected``: (frequencies, magnitudes) per axis; None is as trained, to the bit."""
    for rope, tolerance in zip(ropes, (1e-13, 2e-6), strict=True):
        for field, values in zip(("frequencies", "magnitude"), expected, strict=True):
            for got, right in zip(getattr(rope[kind], field), values, strict=True):
                assert_allclose(got, np.broadcast_to(right, got.shape), rtol=tolerance)


@pytest.mark.parametrize("expression", FREQUENCIES)
@pytest.mark.parametrize("grid", grids())
def test_frequency_methods(expression, grid):
    form, power, isotropic = FREQUENCIES[expression]
    spec = grid.spec
    scales = [max(1.0, n / t) for n, t in zip((grid.height, grid.width), spec.trained, strict=True)]
    frequencies = [base(d, spec.theta) for d in spec.dims]
    magnitudes = [1.0] * len(spec.dims)
    plain = [list(frequencies), list(magnitudes)]
    heat = temperatures(expression, scales)
    for axis, length, own, warm in zip((spec.roles.index("row"), spec.roles.index("column")), spec.trained, scales,
                                       heat, strict=True):  # fmt: skip
        s, iso = own, max(scales) if isotropic else own
        if expression.startswith("ntk("):
            s = iso
        frequencies[axis] = form(spec.dims[axis], spec.theta, length, s, iso, power)
        magnitudes[axis] = warm
    ropes = evaluated(expression, grid)
    compare(ropes, (frequencies, magnitudes), "image")
    compare(ropes, (frequencies, magnitudes) if spec.ids == "corner" else plain, "text")


@pytest.mark.parametrize("name", SPECS)
def test_rebase(name):
    grid = SPECS[name].grid(7, 9, 3)
    frequencies = [base(d, 10 * grid.spec.theta) for d in grid.spec.dims]
    for kind in ("text", "image"):
        compare(evaluated("rebase()", grid), (frequencies, [1.0] * len(frequencies)), kind)


@pytest.mark.parametrize("grid", [g for g in grids() if max(g.values[0].stretch) > 1])
def test_sega(grid):
    """Base and magnitudes from a drawn spectrum: NTK at strength 2, damped, then a standardised log energy per pair."""
    spec, rng = grid.spec, np.random.default_rng(grid.tokens)
    spectrum = pe.Spectrum(
        *(np.exp(rng.normal(0, 2, (2, max(n // 2, 8)))) for n in (grid.height, grid.width)),
        np.ones((2, 4)), rng.uniform(0.1, 0.9, 2),
    )  # fmt: skip
    trained = spec.trained if spec.ids == "corner" else (64, 64)  # its release counts Qwen-Image from 1,024 px
    scales = [n / t for n, t in zip((grid.height, grid.width), trained, strict=True)]
    longest = max(scales)
    frequencies, magnitudes = [base(d, spec.theta) for d in spec.dims], [np.ones((2, d // 2)) for d in spec.dims]
    for role, s, energy in zip(("row", "column"), scales, spectrum[:2], strict=True):
        axis = spec.roles.index(role)
        d = spec.dims[axis]
        factor = max(1.0, longest ** (2 * d / (d - 2)) / (1 + 0.1 * np.log(longest)))
        if spec.ids == "centered" and s != longest:
            factor = 1 + s / longest * (factor - 1)
        frequencies[axis] = base(d, spec.theta * factor)
        s = longest if spec.ids == "corner" else max(1.0, s)
        if s == 1:
            continue
        pairs = d // 2
        at = (1 - np.arange(pairs) / (pairs - 1)) * (energy.shape[1] - 1)
        level = np.stack([np.interp(at, np.arange(energy.shape[1]), np.log(e)) for e in energy])
        level = np.tanh(1.5 * (level - level.mean(1, keepdims=True)) / level.std(1, ddof=1, keepdims=True))
        level -= level.mean(1, keepdims=True)
        amplitude = 1 - spectrum.flatness**1.5
        magnitudes[axis] = np.maximum(s**0.08 * (1 - 0.15 * amplitude[:, None] * level), 1)
    ropes = evaluated("sega", grid, spectrum)
    for rope, tolerance in zip(ropes, (1e-12, 5e-6), strict=True):
        for kind in ("text", "image"):
            for got, right in zip(rope[kind].frequencies, frequencies, strict=True):
                assert_allclose(got, right, rtol=tolerance)
            for got, right in zip(rope[kind].magnitude, magnitudes, strict=True):
                assert_allclose(np.broadcast_to(got, right.shape), right, rtol=tolerance)


# -- ids -----------------------------------------------------------------------------------------------------------


def test_ids_by_role():
    """Each family's text and picture, by what its paper or released code says of single tokens."""
    flux2 = SPECS["2,000, four axes, FLUX.2"].grid(2, 3, 4).ids()
    assert flux2["text"].tolist() == [[0, 0, 0, k] for k in range(4)]
    assert flux2["image"].tolist() == [[0, y, x, 0] for y in range(2) for x in range(3)]
    image = SPECS["256, text on frames, Z-Image"].grid(2, 2, 32).ids()
    assert image["text"].tolist() == [[k, 0, 0] for k in range(1, 33)]
    assert image["image"].tolist() == [[33, y, x] for y in range(2) for x in range(2)]
    qwen = SPECS["10,000, centred, Qwen-Image"].grid(83, 64, 2).ids()
    assert qwen["text"].tolist() == [[41] * 3, [42] * 3]
    assert (qwen["image"][0].tolist(), qwen["image"][-1].tolist()) == ([0, -42, -32], [0, 40, 31])
    flux = RopeSpec().grid(2, 2, 2).ids()
    assert flux["text"].tolist() == [[0] * 3] * 2
    behind = RopeSpec(text="diagonal").grid(2, 5, 2).ids()
    assert behind["text"].tolist() == [[5] * 3, [6] * 3]
    turned = SPECS["2,000, axes in another order, unlike"].grid(2, 2, 1)
    assert turned.ids()["image"].tolist() == [[x, 0, y, 0] for y in range(2) for x in range(2)]
    assert turned.spec.spatial_dims == (12, 20)
    capped = SPECS["2,000, four axes, FLUX.2"].grid(5, 3, 2).ids(largest=3)
    assert capped["text"].tolist() == [[0, -1, 0, 0], [0, -1, 0, 1]]
    assert capped["image"][0].tolist() == [0, -1, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": (4, 6)}, "one per role"),
        ({"dims": (4, 6, 7)}, "positive even channel counts"),
        ({"roles": ("frame", "row", "row")}, "each once"),
        ({"roles": ("frame", "row", "depth")}, "expected 'row', 'column'"),
        ({"text": "sequence"}, "needs an axis of the role 'sequence'"),
        ({"text": "frames", "roles": ("time", "row", "column")}, "needs an axis of the role 'frame'"),
        ({"text": "behind"}, "expected 'origin'"),
    ],
)
def test_specs_that_make_no_sense(change, message):
    with pytest.raises((ValueError, TypeError), match=rf"{message}|Type-check error"):
        RopeSpec(**change)


def test_asking_for_an_axis_that_is_not_there():
    with pytest.raises(
        ValueError, match=r"role 'sequence': no axis counts it; the roles are \('frame', 'row', 'column'\)"
    ):
        RopeSpec().axis("sequence")


# -- the code ------------------------------------------------------------------------------------------------------

FAMILY_NUMBERS = {56, 64, 83, 128, 256, 512, 1_328, 4_096, 10_000}


def family_constants(source: str) -> list[str]:
    """Numbers of one family and axes by their place, in code (comments and docstrings aside)."""
    found = []
    code = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NUMBER:
            try:
                value = float(token.string.replace("_", ""))
            except ValueError:
                continue
            if value in FAMILY_NUMBERS:
                found.append(f"line {token.start[0]}: {token.line.strip()}")
        if token.type not in (tokenize.STRING, tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE):
            code.append(token.string)
    return found + re.findall(r"\bdims \[ [^\]]* \]|\btrained \[ \d? ?:? ?\d? ?\]", " ".join(code))


def test_methods_hold_no_constant_of_a_family():
    """All come from theta, dims and the trained grid; rows and columns are asked for by role."""
    folder = Path(pe.__file__).parent
    for path in sorted(folder.glob("*.py")):
        assert not family_constants(path.read_text()), path.name


@pytest.mark.parametrize(
    "planted", ["theta = 10_000.0", "n = min(n, 4096)", "spec.dims[1:]", "a, b = trained[1:]", "x = trained[0]"]
)
def test_that_is_seen(planted):
    assert family_constants(f"def f(spec, trained, n):\n    {planted}\n")


def test_text_at_its_own_axis_is_never_rescaled():
    """FLUX.2's text keeps its distances under every method, and so does a frame."""
    grid = SPECS["2,000, four axes, FLUX.2"].grid(200, 150, 8)
    plain = pe.plain(grid)
    for preset in ("pi", "ntk", "yarn", "dype-ntk", "dype-yarn", "vision-yarn"):
        ropes = pe.get(preset)(grid, pe.Signals(sigma=1.0))
        for axis in (0, 3):
            assert_array_equal(ropes["text"].frequencies[axis], plain.frequencies[axis])
            assert_array_equal(ropes["image"].magnitude[axis], plain.magnitude[axis])
