"""Methods and rules that are not in sega_jax: by object, by ``module:name`` and by entry point."""

import importlib.metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from sega_jax import positional as pe
from sega_jax.geometry import RopeSpec

GRID = RopeSpec(dims=(4, 8, 8), trained=(8, 8)).grid(12, 20, 3)


@pytest.fixture
def custom(monkeypatch, tmp_path):
    """The module ``custom_method``, importable, and installed with entry points."""
    installed = tmp_path / "somebodys_encodings-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-encodings\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[sega_jax.positional]\nremembering = custom_method:Remembering\nboost = custom_method:boost\n"
        "halved = custom_method:halved\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import custom_method

    return custom_method


@pytest.mark.parametrize("how", ["object", "module:name", "entry point"])
def test_method_with_statistic_state_and_heads(custom, how):
    named = {"module:name": "custom_method:Remembering", "entry point": "remembering"}
    method = pe.get(custom.Remembering() if how == "object" else named[how])
    assert isinstance(method, custom.Remembering)
    assert pe.describe(method) == "custom_method:Remembering"
    tokens = jax.random.normal(jax.random.key(0), (2, GRID.tokens, 5))
    traces = []

    @jax.jit
    def step(method, tokens, state):
        traces.append(1)
        signals = pe.Signals(sigma=0.5, spectrum=pe.statistic(method, tokens, GRID), state=state)
        return method(GRID, signals), pe.next_state(method, GRID, signals)

    state = pe.initial_state(method, GRID, 2)
    expected = np.zeros(2)
    for scale in (1.0, 3.0, 2.0):
        ropes, state = step(pe.traceable(method), scale * tokens, state)
        magnitude = ropes["image"].magnitude[1]
        assert magnitude.shape == (2, custom.HEADS, 4)
        assert_allclose(magnitude[:, 2, 0], 1 + 0.2 * expected, rtol=1e-5)
        expected = 0.5 * expected + 0.5 * np.square(scale * np.asarray(tokens)).mean(axis=(1, 2))
        assert_allclose(state, expected, rtol=1e-5)
    assert len(traces) == 1
    cos, _ = pe.tables(ropes["image"], GRID.ids()["image"])
    assert cos.shape == (2, custom.HEADS, GRID.tokens, 10)


def test_function_and_factory(custom):
    assert pe.get("custom_method:halved") is custom.halved
    assert pe.get("halved") is custom.halved
    assert pe.get(custom.halved) is custom.halved
    assert pe.describe(custom.halved) == "custom_method:halved"
    assert str(pe.traceable(custom.halved)) == "custom_method:halved"
    assert pe.statistic(pe.traceable(custom.halved), jnp.zeros((1, GRID.tokens, 1)), GRID) is None
    rope = jax.jit(lambda method: method(GRID, pe.Signals(sigma=1.0)))(pe.traceable(custom.halved))["image"]
    assert_allclose(rope.frequencies[1], pe.plain(GRID).frequencies[1] / 2)
    assert pe.get("custom_method:factory") == pe.parse("pi()+temperature()")
    assert pe.get(custom.factory) == pe.parse("pi()+temperature()")
    with pytest.raises(TypeError, match="custom_method:needs_arguments: expected a positional method"):
        pe.get("custom_method:needs_arguments")
    with pytest.raises(TypeError, match="custom_method:HEADS: expected a positional method"):
        pe.get("custom_method:HEADS")


def test_rule_of_another_package_in_an_expression(custom):
    method = pe.parse("ntk(strength=2)+boost(amount=0.5)")
    assert method == pe.chain(pe.ntk(strength=2.0), custom.boost(amount=0.5))
    assert str(method) == "ntk(strength=2.0)+boost(amount=0.5)"
    assert pe.get("boost") == custom.boost()
    assert pe.traceable(method) is method
    tokens = jax.random.normal(jax.random.key(0), (2, GRID.tokens, 5))
    peak = np.abs(np.asarray(tokens)).max(axis=(1, 2))
    rope = method(GRID, pe.Signals(sigma=1.0, spectrum=pe.statistic(method, tokens, GRID)))["image"]
    assert_allclose(rope.magnitude[1][:, 0], 1 + 0.5 * peak, rtol=1e-6)
    with pytest.raises(ValueError, match="unknown argument of boost 'size'; known: amount"):
        pe.parse("boost(size=1)")
    with pytest.raises(ValueError, match="is no rule class"):
        pe.parse("halved()")
    with pytest.raises(ValueError, match=r"known: .*boost"):
        pe.get("bost")


def test_two_rules_with_a_statistic_and_a_memory_each(custom):
    method = pe.chain(custom.counting(), custom.boost())
    tokens = jax.random.normal(jax.random.key(0), (2, GRID.tokens, 5))
    state = pe.initial_state(method, GRID, 2)
    statistic = pe.statistic(method, tokens, GRID)
    mean, peak = (np.asarray(f(np.asarray(tokens), axis=(1, 2))) for f in (np.mean, lambda t, axis: abs(t).max(axis)))
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-6), statistic, (mean, peak))
    for step in range(3):
        signals = pe.Signals(sigma=0.5, spectrum=statistic, step=step, state=state)
        rope = method(GRID, signals)["image"]
        assert_allclose(rope.frequencies[1], np.tile(pe.plain(GRID).frequencies[1] / (1 + step), (2, 1)), rtol=1e-6)
        assert_allclose(rope.magnitude[1][:, 0], 1 + peak, rtol=1e-6)
        state = pe.next_state(method, GRID, signals)
        assert_array_equal(state[0], [step + 1] * 2)
        assert_allclose(state[1], (step + 1) * peak, rtol=1e-6)


def test_rule_without_its_formula_says_so():
    class unfinished(pe.MagnitudeRule):
        pass

    with pytest.raises(NotImplementedError, match="unfinished defines no magnitudes"):
        unfinished.magnitudes(object.__new__(unfinished), GRID, pe.Signals(sigma=jnp.float32(1)))


@pytest.mark.parametrize(
    "name", ["custom_method:Remembering", "os:abort", "remembering", "ntk()+boost()", " custom_method:Remembering "]
)
def test_names_from_files_import_nothing(custom, monkeypatch, name):
    def refuse(*_args, **_kwargs):
        raise AssertionError("something was imported")

    monkeypatch.setattr(importlib, "import_module", refuse)
    monkeypatch.setattr(importlib.metadata.EntryPoint, "load", refuse)
    with pytest.raises(ValueError, match="names code, and a file may not"):
        pe.get(name, imports=False)
    assert pe.get("sega", imports=False) == pe.get("sega")
    assert pe.get("ntk(strength=2.0)", imports=False) == pe.ntk(strength=2.0)
