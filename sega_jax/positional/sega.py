"""SEGA: magnitude per rotary pair from the latent's spectrum (arXiv 2605.22668).

A pair whose spatial frequency carries much energy is turned down, one with little is turned up; the flatter the
spectrum, the less.  Its frequencies are NTK's: ``ntk(strength=2.0, damping=0.1, scale="sega", text="image")``.

Formulas are those of the released code; functions named below are of its ``flux_sega/transformer_flux.py``.
"""

# ruff: noqa: RUF009 - the field makers return dataclass fields
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.geometry import Grid
from sega_jax.positional.extrapolate import followed
from sega_jax.positional.rules import (
    Activation,
    MagnitudeRule,
    PerStream,
    Policy,
    Scale,
    Signals,
    choice,
    number,
    on_axes,
    pair,
    plain_magnitudes,
    real_dtype,
    side,
    spatial,
)
from sega_jax.positional.spectrum import EPS, Bins, Spectrum, measure


@dataclass(frozen=True, kw_only=True, repr=False)
class sega_magnitude(MagnitudeRule):
    """SEGA's magnitudes; all tokens carry them, text included.

    Attributes:
        alpha: strength of the redistribution between pairs.
        beta: gain inside the tanh on standardised log energy.
        gamma: exponent on the flatness in the amplitude.
        kappa: exponent (or coefficient, for ``"log"``) of the reference magnitude.
        floor: smallest magnitude.
        spread: smallest and largest amplitude.
        reference: ``"power"``: ``s ** kappa``; ``"log"``: ``1 + kappa * ln s``.
        reduce: ``"sample"``, or ``"batch"`` as released (`measure`).
        share_width: on ``"centered"`` grids, rows take the columns' magnitudes, as the Qwen-Image release does;
            no effect on ``"corner"`` grids.
        bins: which frequency counts to which bin of the profiles: ``"exact"``, or ``"float32"`` as released
            (`measure`).
        scale, activation, trained: as in `ntk`; None follows the chain's frequency rule (alone: ``"sega"``).
    """

    alpha: Any = number(0.15)
    beta: Any = number(1.5)
    gamma: Any = number(1.5)
    kappa: Any = number(0.08)
    floor: Any = number(1.0)
    spread: tuple[Any, Any] = pair(0.0, 1.0)
    reference: Literal["power", "log"] = choice("power", "log")
    reduce: Literal["sample", "batch"] = choice("sample", "batch")
    share_width: bool = choice(False, True)
    bins: Bins = choice("exact", "float32")
    scale: Scale | None = choice(None, "per_axis", "isotropic", "sega")
    activation: Activation | None = choice(None, "per_axis", "max_side", "area")
    trained: int | None = side()

    def measure(self, tokens: jax.Array, grid: Grid, probe: jax.Array | None = None) -> Spectrum:
        """The spectrum this rule reads: `sega_jax.positional.measure` with the rule's ``reduce`` and ``bins``."""
        return measure(tokens, grid, probe, self.reduce, self.bins)

    def magnitudes(self, grid: Grid, signals: Signals, policy: Policy | None = None) -> PerStream:
        """Magnitudes per stream kind and axis, [..., d_a / 2]; leading axes are the spectrum's."""
        scales = followed(self, policy, Policy("sega")).scales(grid)
        trained = plain_magnitudes(grid)["image"]
        if max(scales) <= 1:
            return {"text": trained, "image": trained}
        spectrum = signals.spectrum
        if not isinstance(spectrum, Spectrum):
            raise ValueError(
                f"sega_magnitude on {grid.height} x {grid.width} tokens needs Signals.spectrum to be a Spectrum, got "
                f"{type(spectrum).__name__}; pass sega_jax.positional.measure(tokens, grid)"
            )
        spectrum = jax.tree.map(lambda x: jnp.asarray(x, real_dtype()), spectrum)
        amplitude = self.amplitude(spectrum.flatness)
        rows, columns = (
            self.allocate(pair_correction(energy, len(ones), self.beta), self.reference_magnitude(s), amplitude)
            if s > 1
            else ones
            for ones, s, energy in zip(spatial(grid, trained), scales, (spectrum.height, spectrum.width), strict=True)
        )
        if self.share_width and grid.spec.ids == "centered":
            rows = columns
        image = on_axes(grid, trained, rows, columns)
        return {"text": image, "image": image}

    def reference_magnitude(self, s: float) -> jax.Array:
        """Magnitude all pairs of an axis share before redistribution; ``s`` at least 1 (``compute_base_mscale``)."""
        exponent = jnp.asarray(self.kappa, real_dtype()) * math.log(s)
        return jnp.exp(exponent) if self.reference == "power" else 1 + exponent

    def amplitude(self, flatness: jax.Array) -> jax.Array:
        """Strength of the redistribution from the spectrum's flatness, [...] (``compute_dynamic_spread``)."""
        low, high = self.spread
        return low + (high - low) * (1 - jnp.power(flatness, self.gamma))

    def allocate(self, correction: jax.Array, reference: jax.Array, amplitude: jax.Array) -> jax.Array:
        """``max(reference * (1 - alpha * amplitude * correction), floor)``, [..., n] (``compute_sega_allocation``)."""
        amplitude = amplitude.astype(correction.dtype)[..., None]
        reference = reference.astype(correction.dtype).reshape((1,) * correction.ndim)
        allocated = jnp.maximum(reference * (1 - self.alpha * amplitude * correction), self.floor)
        return jnp.where(reference > 1 + EPS, allocated, reference)


def band_lookup(pairs: int, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each pair reads the profile: lower bin, upper bin, weight of the upper one, each [pairs].

    The release spreads log periods over the bins, and they are linear in the pair index: the fastest pair reads the
    highest bin, the slowest the axis' mean.
    """
    position = (1 - np.arange(pairs) / max(pairs - 1, 1)) * (bins - 1)
    lower = np.clip(np.floor(position).astype(np.int32), 0, bins - 1)
    return lower, np.minimum(lower + 1, bins - 1), np.clip(position - lower, 0.0, 1.0)


def pair_correction(energy: jax.Array, pairs: int, beta: Any = 1.5) -> jax.Array:
    """Zero-sum correction of each pair from an axis profile: [..., bins] -> [..., pairs]."""
    lower, upper, weight = band_lookup(pairs, energy.shape[-1])
    logs = jnp.log(jnp.maximum(energy, EPS))
    weight = jnp.asarray(weight, logs.dtype).reshape((1,) * (logs.ndim - 1) + weight.shape)
    below = logs[..., lower]
    level = below + weight * (logs[..., upper] - below)  # this form leaves a constant profile constant
    level = level - level.mean(axis=-1, keepdims=True)
    variance = jnp.square(level).sum(axis=-1, keepdims=True) / max(pairs - 1, 1)
    varied = variance > 0  # a constant profile has no correction, and must have no NaN gradient either
    deviation = jnp.where(varied, jnp.sqrt(jnp.where(varied, variance, 1.0)), 0.0)
    squashed = jnp.tanh(beta * level / jnp.maximum(deviation, EPS))
    return squashed - squashed.mean(axis=-1, keepdims=True)
