"""Chains, expressions, names, and rules as arguments of compiled functions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from sega_jax import positional as pe
from sega_jax.geometry import RopeSpec

GRID = RopeSpec(dims=(4, 8, 8), trained=(8, 8)).grid(12, 20, 3)


# --- expressions ----------------------------------------------------------------------------------------------

amounts = st.one_of(
    st.floats(0, 1e6, allow_subnormal=False), st.integers(0, 100), st.sampled_from([0.1, 1e-7, 1.0, 2, np.float32(0.3)])
)
schedules = st.builds(
    pe.dype,
    scale=st.none() | amounts,
    exponent=amounts,
    start=st.floats(0.01, 1),
    t_round=st.sampled_from([None, "bfloat16"]),
)
strengths = st.just(1.0) | amounts | schedules
falling = st.tuples(st.floats(0.01, 50), st.floats(0.01, 50)).map(lambda p: (p[0] + p[1], p[1]))
shared = {
    "activation": st.sampled_from(["per_axis", "max_side", "area"]),
    "trained": st.none() | st.integers(1, 512),
}
scaled = {**shared, "strength": strengths, "text": st.sampled_from(["convention", "image"])}
policies = {
    "scale": st.sampled_from([None, "per_axis", "isotropic", "sega"]),
    "activation": st.sampled_from([None, "per_axis", "max_side", "area"]),
    "trained": st.none() | st.integers(1, 512),
}
scales = st.sampled_from(["per_axis", "isotropic"])
frequency_rules = st.one_of(
    st.builds(pe.none),
    st.builds(pe.pi, scale=scales, **scaled),
    st.builds(pe.ntk, scale=st.sampled_from(["per_axis", "isotropic", "sega"]), damping=amounts, **scaled),
    st.builds(
        pe.yarn,
        scale=scales,
        threshold_rule=st.sampled_from(["multiply", "power"]),
        beta=falling,
        gamma=falling,
        ramp_fix=st.booleans(),
        ntk_scale=st.sampled_from([None, "isotropic"]),
        **scaled,
    ),
)
magnitude_rules = st.one_of(
    st.builds(pe.temperature, coefficient=amounts, strength=strengths, **policies),
    st.builds(
        pe.sega_magnitude,
        alpha=amounts,
        beta=amounts,
        gamma=amounts,
        kappa=amounts,
        floor=amounts,
        spread=st.tuples(amounts, amounts),
        reference=st.sampled_from(["power", "log"]),
        reduce=st.sampled_from(["sample", "batch"]),
        share_width=st.booleans(),
        **policies,
    ),
)
drawn_methods = st.one_of(frequency_rules, magnitude_rules, st.builds(pe.chain, frequency_rules, magnitude_rules))


@settings(max_examples=300, deadline=None)
@given(drawn_methods)
def test_parse_reads_back_what_str_prints(method):
    again = pe.parse(str(method))
    assert again == method
    assert type(again) is type(method)
    assert hash(again) == hash(method)
    assert str(again) == str(method) == repr(method) == pe.describe(method)
    assert jax.tree.structure(again) == jax.tree.structure(method)


fragments = st.sampled_from(
    ["ntk", "yarn()", "dype(", "(", ")", "+", ",", "=", "strength=", "scale", "2", "-", "None", "True", "'x'", " ", "*"]
)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.lists(fragments, max_size=8).map("".join))
def test_other_text_is_refused_or_round_trips(text):
    try:
        method = pe.parse(text)
    except (ValueError, TypeError):
        return
    assert pe.parse(str(method)) == method


def test_printing_shows_what_differs_from_the_default():
    rule = pe.ntk(strength=pe.dype(scale=2), damping=0.1, scale="isotropic")
    assert str(rule) == 'ntk(strength=dype(scale=2.0), scale="isotropic", damping=0.1)'
    assert str(pe.chain(pe.yarn(), pe.temperature())) == "yarn()+temperature()"
    assert str(pe.yarn(beta=(2, 1))) == "yarn(beta=(2.0, 1.0))"


def test_an_expression_reads_as_the_objects_it_names():
    method = pe.chain(pe.ntk(strength=pe.dype(scale=2.0, exponent=2.0)), pe.sega_magnitude(alpha=0.2))
    assert pe.parse("ntk(strength=dype(scale=2))+sega_magnitude(alpha=0.2)") == method
    assert pe.parse(" ntk( strength = dype( scale = +2 ) ) + sega_magnitude( alpha = 2e-1 ) ") == method


@pytest.mark.parametrize(
    ("expression", "error", "message"),
    [
        ("", ValueError, "cannot read"),
        ("ntk(", ValueError, "cannot read"),
        ("yarnn()", ValueError, r"unknown positional rule 'yarnn' \(did you mean 'yarn'\?\); known: none, pi, ntk"),
        ("yarn(turns=1)", ValueError, r"unknown argument of yarn 'turns'; known: strength, scale"),
        ("yarn(**{})", ValueError, r"unknown argument of yarn '\*\*'"),
        ("none(x=1)", ValueError, r"unknown argument of none 'x'; known: none"),
        ("ntk(strength=dyp())", ValueError, r"unknown schedule 'dyp' \(did you mean 'dype'\?\)"),
        ("ntk(strength=yarn())", ValueError, "unknown schedule 'yarn'"),
        ("dype(scale=2)", ValueError, "unknown positional rule 'dype'"),
        ("ntk(2)", ValueError, "name the arguments of ntk; it has strength"),
        ("ntk + yarn()", ValueError, r"write ntk\(\) for the rule 'ntk'"),
        ("ntk()*2", ValueError, "expected rules such as"),
        ("ntk() - yarn()", ValueError, "expected rules such as"),
        ("ntk(strength=1+1)", ValueError, "expected a number, string"),
        ("ntk(strength=-1)", ValueError, r"strength=-1.0: expected a finite number of at least 0"),
        ("ntk(strength=1e999)", ValueError, "expected a finite number"),
        ("ntk(strength='2')", TypeError, "expected a number, got str"),
        ("ntk(strength=True)", TypeError, "expected a number"),
        ("ntk(strength=None)", TypeError, "expected a number"),
        ("ntk(strength=b'2')", ValueError, "expected a number, string"),
        ("ntk(strength=-'2')", ValueError, "expected a number, string"),
        ("ntk(scale='both')", ValueError, r"scale='both': expected one of 'per_axis', 'isotropic', 'sega'"),
        ("yarn(ramp_fix=1)", ValueError, r"ramp_fix=1: expected one of True, False"),
        ("yarn(beta=1)", TypeError, "expected two numbers"),
        ("yarn(beta=(1, 2))", ValueError, "the first must exceed the second"),
        ("pi(trained=0)", ValueError, "at least one token"),
        ("pi(trained=1.5)", TypeError, "whole number of tokens"),
        ("yarn()+ntk()", ValueError, r"yarn\(\) and ntk\(\) are both frequency rules"),
        (
            "yarn()+temperature()+sega_magnitude()",
            ValueError,
            r"both magnitude rules.*SEGA replaces YaRN's temperature",
        ),
        ("temperature()+yarn()", ValueError, r"temperature\(\) stands before yarn\(\)"),
        ("__import__('os').system('true')", ValueError, "expected rules such as"),
    ],
)
def test_errors_of_expressions(expression, error, message):
    with pytest.raises((error, TypeError), match=f"{message}|Type-check error"):  # a type-checking hook is quicker
        pe.parse(expression)


# --- chains ---------------------------------------------------------------------------------------------------


def test_chain_shapes():
    assert pe.chain() == pe.none()
    assert pe.chain(pe.ntk()) == pe.ntk()
    assert pe.chain(pe.none(), pe.temperature()) == pe.temperature()
    assert pe.chain(pe.get("yarn")) == pe.get("yarn")
    with pytest.raises(ValueError, match="both magnitude rules"):
        pe.chain(pe.get("yarn"), pe.sega_magnitude())
    with pytest.raises(TypeError, match="give it as a rule's strength"):
        pe.chain(pe.dype())
    with pytest.raises(TypeError, match="neither a frequency rule nor a magnitude rule"):
        pe.chain("ntk")


def test_rules_are_frozen_and_equal_by_value():
    rule = pe.ntk(strength=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.strength = 3
    assert rule == pe.ntk(strength=np.float64(2))
    assert rule != pe.ntk(strength=2, damping=0.1)
    assert pe.pi() != pe.ntk()
    assert len({rule, pe.ntk(strength=2.0), pe.ntk()}) == 2


def test_what_methods_measure():
    tokens = jax.random.normal(jax.random.key(0), (2, GRID.tokens, 5))
    assert pe.statistic(pe.get("yarn"), tokens, GRID) is None
    for method in (pe.sega_magnitude(), pe.get("sega")):
        got = pe.statistic(method, tokens, GRID)
        jax.tree.map(assert_array_equal, got, pe.measure(tokens, GRID))
    released = pe.statistic(pe.get("sega-release"), tokens, GRID)
    jax.tree.map(assert_array_equal, released, pe.measure(tokens, GRID, reduce="batch", bins="float32"))
    assert pe.initial_state(pe.get("sega"), GRID, 2) is None
    assert pe.next_state(pe.get("sega"), GRID, pe.Signals(sigma=1.0)) is None


# --- compiled -------------------------------------------------------------------------------------------------


def test_numbers_trace_and_choices_are_static():
    tokens = jax.random.normal(jax.random.key(0), (2, GRID.tokens, 5))
    compiled = []

    @jax.jit
    def step(method, sigma, tokens):
        compiled.append(str(method))
        return method(GRID, pe.Signals(sigma=sigma, spectrum=pe.statistic(method, tokens, GRID)))

    def check(expression, sigma):
        method = pe.get(expression)
        eager = method(GRID, pe.Signals(sigma=sigma, spectrum=pe.statistic(method, tokens, GRID)))
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5), step(method, sigma, tokens), eager)

    check("ntk(strength=dype(scale=2))+sega_magnitude(alpha=0.1)", 0.9)
    check("ntk(strength=dype(scale=1.5, exponent=1))+sega_magnitude(alpha=0.3, floor=0, spread=(0.1, 2))", 0.4)
    check("ntk(strength=dype(scale=0.1), damping=0.2)+sega_magnitude(kappa=0.2)", 0.1)
    assert len(compiled) == 1, "a number recompiled the step"
    assert compiled[0].startswith("ntk(strength=dype(scale=...,"), "the numbers were not traced"
    check('ntk(strength=dype(scale=2))+sega_magnitude(reference="log")', 0.9)
    assert len(compiled) == 2
    check("yarn(strength=dype(scale=1), beta=(1.5, 0.5))+temperature(coefficient=0.2)", 0.9)
    check("yarn(strength=dype(scale=0.9), gamma=(10, 3))+temperature(coefficient=0.1)", 0.2)
    assert len(compiled) == 3


@pytest.mark.parametrize("expression", ["ntk(strength=dype(scale=2))+sega_magnitude(floor=0)", "pi(strength=dype())"])
def test_gradients_reach_the_numbers(expression):
    tokens = (
        jax.random.normal(jax.random.key(0), (2, GRID.tokens, 5)) * jnp.linspace(0.1, 2, GRID.tokens)[None, :, None]
    )
    method = pe.get(expression)

    def loss(method, sigma):
        rope = method(GRID, pe.Signals(sigma=sigma, spectrum=pe.statistic(method, tokens, GRID)))["image"]
        cos, sin = pe.tables(rope, GRID.ids()["image"])
        return jnp.square(cos).sum() + jnp.sin(3 * sin).sum()

    def moved(method, amount):
        part = method.magnitude if isinstance(method, pe.Chain) else method.strength
        name = "alpha" if isinstance(method, pe.Chain) else "exponent"
        part = dataclasses.replace(part, **{name: getattr(part, name) + amount})
        return dataclasses.replace(method, **{"magnitude" if isinstance(method, pe.Chain) else "strength": part})

    with jax.enable_x64(True):
        gradient, of_sigma = jax.jit(jax.grad(loss, argnums=(0, 1)))(method, 0.6)
        got = gradient.magnitude.alpha if isinstance(method, pe.Chain) else gradient.strength.exponent
        difference = (loss(moved(method, 1e-5), 0.6) - loss(moved(method, -1e-5), 0.6)) / 2e-5
        assert_allclose(got, difference, rtol=1e-4)
        assert_allclose(of_sigma, (loss(method, 0.6 + 1e-6) - loss(method, 0.6 - 1e-6)) / 2e-6, rtol=1e-4)
        assert abs(difference) > 1e-3


def test_vmap_over_sigma_and_spectrum():
    tokens = jax.random.normal(jax.random.key(0), (3, GRID.tokens, 5))
    method = pe.get("ntk(strength=dype(scale=2))+sega_magnitude()")
    signals = pe.Signals(sigma=jnp.array([0.9, 0.5, 0.1]), spectrum=pe.statistic(method, tokens, GRID))
    together = method(GRID, signals)["image"]
    mapped = jax.vmap(lambda s: method(GRID, s))(signals)["image"]
    for axis in (1, 2):
        assert_allclose(together.frequencies[axis], mapped.frequencies[axis], rtol=1e-6)
        assert_allclose(together.magnitude[axis], mapped.magnitude[axis], rtol=1e-6)


def test_vmap_over_a_hyper_parameter():
    many = jax.tree.map(lambda x: jnp.array([x, 2 * x]), pe.temperature())  # coefficient and strength
    got = jax.vmap(lambda rule: rule(GRID, pe.Signals(sigma=1.0))["image"].magnitude[1])(many)
    assert_allclose(got[:, 0], 1 + np.array([0.1, 0.4]) * np.log(1.5), rtol=1e-6)


# --- names ----------------------------------------------------------------------------------------------------


def test_presets():
    assert list(pe.presets()) == [
        *(
            "none",
            "pi",
            "ntk",
            "yarn",
            "yarn-original",
            "vision-yarn",
            "dype-pi",
            "dype-ntk",
            "dype-yarn",
            "dype-yarn-original",
            "sega",
            "sega-release",
        )
    ]
    for name, method in pe.presets().items():
        assert pe.get(name) == pe.get(str(method)) == method
    assert str(pe.get("yarn")) == "yarn()+temperature()"
    assert pe.get("sega").magnitude.reduce == "sample"
    assert pe.get("sega-release").magnitude == pe.sega_magnitude(reduce="batch", share_width=True, bins="float32")


def test_get_returns_objects_as_they_are():
    method = pe.ntk()
    assert pe.get(method) is method
    for wrong, message in ((pe.dype(), "is a schedule"), (3, "expected a positional method"), (None, "expected a")):
        with pytest.raises(TypeError, match=message):
            pe.get(wrong)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown positional method 'seag' \(did you mean 'sega'\?\); known: none, pi"
    ):
        pe.get("seag")
    with pytest.raises(ValueError, match="No module named 'no_such_module'"):
        pe.get("no_such_module:method")
    with pytest.raises(ValueError, match="has no attribute 'missing'"):
        pe.get("sega_jax.positional:missing")


def test_method_table():
    rows = pe.methods()
    assert [row.preset for row in rows] == list(pe.presets())
    for row in rows:
        assert pe.parse(row.expression) == pe.get(row.preset)
        assert row.sources
        assert row.bibtex.count("@article") == len(row.cite)
    caveats = {row.preset: " ".join(row.caveats) for row in rows}
    assert "patent pending" in caveats["dype-ntk"]
    assert "licence" in caveats["sega"]
    text = pe.format_methods(width=80)
    assert all(name in text for name in pe.presets())
    assert max(map(len, text.splitlines())) <= 80
    assert "note: " in pe.format_methods(details=True)


@pytest.mark.parametrize(
    "text",
    [
        "ntk(strength=" + "-" * 1500 + "1)",
        "+".join(["ntk()"] * 380),
        "ntk(strength=1" + "0" * 400 + ")",
        "ntk(strength=2.0, strength=3.0)",
        "(" * 500,
        "n" * 5_000,
        "ntk(strength=" * 150,
        "ntk(strength=" + "9" * 1900 + ")",
        "\0",
        "ntk(\ud800)",
        "",
    ],
    ids=range(11),
)
def test_texts_made_to_break_the_reader(text):
    with pytest.raises(ValueError):  # noqa: PT011  of many kinds, none of which may be another exception
        pe.get(text)
