"""Positional encodings: what a phase means.

A method is a pure function ``(grid, signals) -> {"text": Rope, "image": Rope}``.  Frequency rules (`pi`, `ntk`,
`yarn`, `ntk_by_parts`, with `dype` as their strength) chain with magnitude rules (`temperature`, `sega_magnitude`);
`get` finds methods by preset, expression, ``module:name`` or entry point.
"""

from sega_jax.positional.chain import (
    Chain,
    Method,
    chain,
    describe,
    get,
    initial_state,
    is_code,
    next_state,
    parse,
    presets,
    ropes_of,
    statistic,
    traceable,
)
from sega_jax.positional.dype import dype
from sega_jax.positional.extrapolate import none, ntk, ntk_by_parts, pi, rebase, temperature, yarn
from sega_jax.positional.methods import BIBTEX, MethodInfo, format_methods, methods
from sega_jax.positional.rope import Rope, base_frequencies, magnitudes, phases, plain, rotate, tables
from sega_jax.positional.rules import FrequencyRule, MagnitudeRule, Policy, Signals
from sega_jax.positional.sega import sega_magnitude
from sega_jax.positional.spectrum import Spectrum, measure

__all__ = [
    "BIBTEX",
    "Chain",
    "FrequencyRule",
    "MagnitudeRule",
    "Method",
    "MethodInfo",
    "Policy",
    "Rope",
    "Signals",
    "Spectrum",
    "base_frequencies",
    "chain",
    "describe",
    "dype",
    "format_methods",
    "get",
    "initial_state",
    "is_code",
    "magnitudes",
    "measure",
    "methods",
    "next_state",
    "none",
    "ntk",
    "ntk_by_parts",
    "parse",
    "phases",
    "pi",
    "plain",
    "presets",
    "rebase",
    "ropes_of",
    "rotate",
    "sega_magnitude",
    "statistic",
    "tables",
    "temperature",
    "traceable",
    "yarn",
]
