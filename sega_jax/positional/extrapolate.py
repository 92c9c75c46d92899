"""Frequency rules PI, NTK, two YaRNs and YaRN's temperature, static or following the noise level.

Functions named below without a source are of DyPE's code (guyyariv/DyPE, ``flux/transformer_flux.py``).

All of them leave an axis at or below its trained length exactly as trained: geometry is static, so that is a Python
branch.  Axes that are neither rows nor columns are never scaled.
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
from sega_jax.positional.dype import strength, strength_at
from sega_jax.positional.rope import base_frequencies
from sega_jax.positional.rules import (
    Activation,
    FrequencyRule,
    MagnitudeRule,
    PerStream,
    Policy,
    Scale,
    Signals,
    choice,
    number,
    on_axes,
    pair,
    per_pair,
    plain_frequencies,
    plain_magnitudes,
    real_dtype,
    side,
    spatial,
)


@dataclass(frozen=True, kw_only=True, repr=False)
class none(FrequencyRule):
    """The rotation the model was trained with, at every size."""

    def frequencies(self, grid: Grid, signals: Signals) -> PerStream:
        return plain_frequencies(grid)


@dataclass(frozen=True, kw_only=True, repr=False)
class rebase(FrequencyRule):
    """The base multiplied, ``theta' = factor * theta``, on every axis and stream and at every size.

    What Scale-DiT's code calls NTK (``ntk_factor``) and trains its weights with: at the trained size too, so it is
    no extrapolation rule.

    Attributes:
        factor: of the base; 10 in the released FLUX.1 settings.
    """

    factor: Any = number(10.0, least=1.0)

    def frequencies(self, grid: Grid, signals: Signals) -> PerStream:
        log_factor = jnp.log(jnp.asarray(self.factor, real_dtype()))
        axes = tuple(_slowed(d, grid.spec.theta, log_factor, _ntk_exponents(d)) for d in grid.spec.dims)
        return {"text": axes, "image": axes}


def _per_stream(grid: Grid, text: str, trained: tuple[Any, ...], image: tuple[Any, ...]) -> PerStream:
    """Text shares the image's values on ``"corner"`` grids, as in FLUX's one table, or on request; else as trained."""
    shared = text == "image" or grid.spec.ids == "corner"
    return {"text": image if shared else trained, "image": image}


@dataclass(frozen=True, kw_only=True, repr=False)
class _Extrapolation(FrequencyRule):
    """What pi, ntk and yarn share; see `ntk` for the fields."""

    strength: Any = strength()
    scale: Scale = choice("per_axis", "isotropic")
    activation: Activation = choice("per_axis", "max_side", "area")
    trained: int | None = side()
    text: Literal["convention", "image"] = choice("convention", "image")

    def policy(self) -> Policy:
        """How the grid's excess over the trained one is measured; magnitude rules of a chain follow it."""
        return Policy(self.scale, self.activation, self.trained)

    def frequencies(self, grid: Grid, signals: Signals) -> PerStream:
        """Frequencies per stream kind and axis, radians per token, [..., d_a / 2]."""
        trained = plain_frequencies(grid)["image"]
        return _per_stream(grid, self.text, trained, on_axes(grid, trained, *self.spatial(grid, signals)))

    def spatial(self, grid: Grid, signals: Signals) -> tuple[jax.Array | None, jax.Array | None]:
        """Frequencies of rows and columns, None where an axis stays as trained."""
        raise NotImplementedError


def _slowed(channels: int, theta: float, log_divisor: jax.Array, per_channel: np.ndarray) -> jax.Array:
    """Base frequencies divided by ``exp(log_divisor * per_channel)``.  Exact at divisor 1, and the small exponent
    keeps float32 within 1e-6 of float64, which a power of the rescaled base would not."""
    base = jnp.asarray(base_frequencies(channels, theta), real_dtype())
    return per_pair(log_divisor, per_channel, lambda d, c: base.reshape(c.shape) * jnp.exp(-d * c))


def _ntk_exponents(channels: int) -> np.ndarray:
    return 2.0 * np.arange(channels // 2) / channels


def _ntk_power(channels: int) -> float:
    """``d / (d - 2)``: the last pair is slowed by exactly ``s`` (``find_newbase_ntk``)."""
    if channels < 4:
        raise ValueError(f"a rotary axis of {channels} channels has one pair, which NTK cannot slow; use pi()")
    return channels / (channels - 2)


@dataclass(frozen=True, kw_only=True, repr=False)
class pi(_Extrapolation):
    """Position interpolation: frequencies divided by ``s ** strength`` (arXiv 2306.15595).

    Fields as in `ntk`; ``strength=dype()`` is Dy-PI (DyPE's equation 14, scale 2), which no official code contains.
    """

    def spatial(self, grid: Grid, signals: Signals) -> tuple[jax.Array | None, jax.Array | None]:
        kappa = strength_at(self.strength, signals, published=2.0)
        theta = grid.spec.theta
        return tuple(
            _slowed(d, theta, kappa * math.log(s), np.ones(d // 2)) if s > 1 else None
            for d, s in zip(grid.spec.spatial_dims, self.policy().scales(grid), strict=True)
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class ntk(_Extrapolation):
    """NTK-aware base change: ``theta' = theta * max(1, s ** (strength * d / (d - 2)) / (1 + damping * ln s))``
    (``FluxPosEmbed``; with strength 2 and damping 0.1 it is SEGA's base, ``FluxTransformer2DModel`` of its code).

    Attributes:
        strength: 1 is the static method; a `dype` schedule makes it follow sigma.
        damping: coefficient of ``ln s`` in the damping denominator.
        scale: ``"per_axis"``, ``"isotropic"`` (larger side, on both axes) or ``"sega"`` (`Policy`; on ``"centered"``
            grids the shorter axis then takes its share of the longer axis' factor, as SEGA's code for Qwen-Image).
        activation: ``"per_axis"``, ``"max_side"`` or ``"area"`` (`Policy`).
        trained: trained tokens per side, if not the grid's own.
        text: ``"convention"``: text is rescaled with the image on ``"corner"`` grids and stays plain on ``"centered"``
            ones; ``"image"``: rescaled on both.
    """

    damping: Any = number(0.0)
    scale: Scale = choice("per_axis", "isotropic", "sega")

    def spatial(self, grid: Grid, signals: Signals) -> tuple[jax.Array | None, jax.Array | None]:
        kappa = strength_at(self.strength, signals, published=2.0)
        theta, dims = grid.spec.theta, grid.spec.spatial_dims

        def log_factor(channels: int, s: float) -> jax.Array:
            growth = kappa * (_ntk_power(channels) * math.log(s))
            return jnp.maximum(growth - jnp.log1p(self.damping * jnp.asarray(math.log(s), real_dtype())), 0.0)

        def slowed(channels: int, logarithm: jax.Array) -> jax.Array:
            return _slowed(channels, theta, logarithm, _ntk_exponents(channels))

        policy = self.policy()
        rows, columns = policy.stretch(grid)
        if self.scale == "sega" and grid.spec.ids == "centered" and abs(rows - columns) > 1e-8:
            longest = max(rows, columns)
            if longest <= 1 or not policy.applies(grid):
                return None, None
            # of the longer axis' factor F, the shorter takes 1 + (s_short / s_long) (F - 1)
            whole = [log_factor(d, longest) for d in dims]
            logs = (
                f if s == longest else jnp.log1p(s / longest * jnp.expm1(f))
                for f, s in zip(whole, (rows, columns), strict=True)
            )
            return tuple(slowed(d, f) for d, f in zip(dims, logs, strict=True))
        return tuple(
            slowed(d, log_factor(d, s)) if s > 1 else None for d, s in zip(dims, policy.scales(grid), strict=True)
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class yarn(_Extrapolation):
    """Three-band YaRN as in DyPE's code: fast pairs as trained, middle ones NTK, slow ones PI.

    FiT's (arXiv 2402.12376) as ``get_1d_rotary_pos_embed`` writes it; not the two-threshold YaRN of the papers.

    Its temperature is a rule of its own: ``yarn() + temperature()``.  Fields as in `ntk`, and:

    Attributes:
        strength: multiplies the four thresholds (or is their exponent), so that a falling strength slides both ramps
            towards the slow pairs.
        threshold_rule: ``"multiply"`` (DyPE's code since February 2026) or ``"power"`` (before, and ComfyUI-DyPE).
        beta: turns over the trained length at the edges of the NTK-to-PI ramp.
        gamma: turns at the edges of the trained-to-result ramp.
        ramp_fix: caps the ramps' lower edges; False reproduces the published code, which caps only the upper ones, so
            that at small sigma the ramps turn round.
        ntk_scale: how the NTK band's own factor is measured; None as ``scale``, ``"isotropic"`` with per-axis
            ``scale`` is ComfyUI-DyPE's vision YaRN.
    """

    threshold_rule: Literal["multiply", "power"] = choice("multiply", "power")
    beta: tuple[Any, Any] = pair(1.25, 0.75, least=1e-6, falling=True)
    gamma: tuple[Any, Any] = pair(16.0, 2.0, least=1e-6, falling=True)
    ramp_fix: bool = choice(True, False)
    ntk_scale: Scale | None = choice(None, "isotropic")

    def spatial(self, grid: Grid, signals: Signals) -> tuple[jax.Array | None, jax.Array | None]:
        kappa = strength_at(self.strength, signals, published=1.0 if self.threshold_rule == "multiply" else 2.0)
        policy = self.policy()
        scales = policy.scales(grid)
        of_ntk = Policy(self.ntk_scale or self.scale, self.activation, self.trained).scales(grid)
        axes = zip(grid.spec.spatial_dims, policy.side(grid), scales, of_ntk, strict=True)
        return tuple(
            self._axis(d, grid.spec.theta, length, s_pi, s_ntk, kappa) if max(s_pi, s_ntk) > 1 else None
            for d, length, s_pi, s_ntk in axes
        )

    def _axis(
        self, channels: int, theta: float, length: int | float, s_pi: float, s_ntk: float, kappa: Any
    ) -> jax.Array:
        dtype = real_dtype()
        beta = ramp(self.ramp_edges(self.beta, channels, theta, length, kappa), channels)
        gamma = ramp(self.ramp_edges(self.gamma, channels, theta, length, kappa), channels)
        base = base_frequencies(channels, theta)
        slowing = _ntk_power(channels) * math.log(s_ntk) * _ntk_exponents(channels)
        base, of_pi, of_ntk = (
            jnp.asarray(f, dtype).reshape((1,) * (beta.ndim - 1) + f.shape)
            for f in (base, base / s_pi, base * np.exp(-slowing))
        )
        inner = of_ntk * (1 - beta) + of_pi * beta
        return base * (1 - gamma) + inner * gamma

    def ramp_edges(
        self, turns: tuple[Any, Any], channels: int, theta: float, length: int | float, kappa: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Pair indices ``(lo, hi)`` between which a ramp rises, after clamping (``find_correction_range``).

        Args:
            turns: ``(fast, slow)`` full turns over the trained length at the two edges.
            channels, theta, length: of the axis, tokens.
            kappa: strength, scalar or [B].
        """
        dtype = real_dtype()
        pairs_per_log = channels / (2 * math.log(theta))
        whole = math.log(length / (2 * math.pi))
        log_kappa = jnp.log(jnp.maximum(jnp.asarray(kappa, dtype), 1e-12))
        fast, slow = (jnp.log(jnp.asarray(r, dtype)) for r in turns)
        if self.threshold_rule == "power":
            fast, slow = kappa * fast, kappa * slow
        else:
            fast, slow = fast + log_kappa, slow + log_kappa
        last = channels // 2
        lo = jnp.maximum(jnp.floor(pairs_per_log * (whole - fast)), 0.0)
        hi = jnp.minimum(jnp.ceil(pairs_per_log * (whole - slow)), float(last))
        return (jnp.minimum(lo, hi) if self.ramp_fix else lo), hi


@dataclass(frozen=True, kw_only=True, repr=False)
class ntk_by_parts(_Extrapolation):
    """YaRN's own interpolation, "NTK-by-parts" with two thresholds (Peng et al., arXiv 2309.00071, section 3.2).

    A pair that turns ``r`` times over the trained length is divided by ``s`` (PI) where ``r`` is below the slow
    threshold, stays as trained above the fast one, and is mixed linearly in ``r`` between.  At few trained tokens
    hardly any pair turns often, so there it is close to PI; `yarn` has three bands and ramps over pair numbers instead.
    With the paper's temperature: ``ntk_by_parts() + temperature()``.  Fields as in `ntk`, and:

    Attributes:
        strength: multiplies both thresholds, as DyPE does with those of `yarn` (arXiv 2510.20766, section 4): as it
            falls, ever slower pairs return to what was trained; at 0 all have.
        turns: the fast and the slow threshold, 32 and 1 in the paper.
    """

    turns: tuple[Any, Any] = pair(32.0, 1.0, least=1e-6, falling=True)

    def spatial(self, grid: Grid, signals: Signals) -> tuple[jax.Array | None, jax.Array | None]:
        kappa = strength_at(self.strength, signals, published=1.0)
        policy = self.policy()
        axes = zip(grid.spec.spatial_dims, policy.side(grid), policy.scales(grid), strict=True)
        return tuple(self._axis(d, grid.spec.theta, length, s, kappa) if s > 1 else None for d, length, s in axes)

    def _axis(self, channels: int, theta: float, length: int | float, s: float, kappa: jax.Array) -> jax.Array:
        base = base_frequencies(channels, theta)
        fast, slow = (jnp.asarray(turns, real_dtype()) for turns in self.turns)

        def kept(kappa: jax.Array, turns: jax.Array) -> jax.Array:
            return jnp.clip((turns - kappa * slow) / jnp.maximum(kappa * (fast - slow), 1e-12), 0.0, 1.0)

        share = per_pair(kappa, length * base / (2 * math.pi), kept)
        return per_pair(jnp.ones(share.shape[:-1]), base, lambda one, f: f * (one * share + (1 - share) / s))


def ramp(edges: tuple[jax.Array, jax.Array], channels: int) -> jax.Array:
    """Rise from 0 to 1 between two pair indices, [...] each: [..., channels / 2]."""
    lo, hi = (jnp.asarray(edge, real_dtype()) for edge in edges)
    hi = jnp.where(hi == lo, hi + 1e-3, hi)[..., None]
    pairs = jnp.arange(channels // 2, dtype=lo.dtype).reshape((1,) * lo.ndim + (-1,))
    return jnp.clip((pairs - lo[..., None]) / (hi - lo[..., None]), 0.0, 1.0)


@dataclass(frozen=True, kw_only=True, repr=False)
class temperature(MagnitudeRule):
    """YaRN's attention temperature: magnitude ``1 + strength * coefficient * ln s`` on scaled axes (arXiv 2309.00071).

    Queries and keys both carry it, so logits scale by its square.  Text rows carry it on ``"corner"`` grids only.

    Attributes:
        coefficient: 0.1 in YaRN.
        strength: 1 is constant; a `dype` schedule lets it decay with sigma.
        scale, activation, trained: as in `ntk`; None follows the chain's frequency rule (alone: its defaults).
    """

    coefficient: Any = number(0.1)
    strength: Any = strength()
    scale: Scale | None = choice(None, "per_axis", "isotropic", "sega")
    activation: Activation | None = choice(None, "per_axis", "max_side", "area")
    trained: int | None = side()

    def magnitudes(self, grid: Grid, signals: Signals, policy: Policy | None = None) -> PerStream:
        """Magnitudes per stream kind and axis, [..., d_a / 2]."""
        kappa = strength_at(self.strength, signals, published=1.0)
        scales = followed(self, policy, Policy()).scales(grid)
        trained = plain_magnitudes(grid)["image"]
        scaled = (
            per_pair(1 + kappa * self.coefficient * math.log(s), ones, jnp.multiply) if s > 1 else None
            for ones, s in zip(spatial(grid, trained), scales, strict=True)
        )
        return _per_stream(grid, "convention", trained, on_axes(grid, trained, *scaled))


def followed(rule: Any, policy: Policy | None, alone: Policy) -> Policy:
    """A magnitude rule's own choices, completed by its chain's frequency rule (or by ``alone``)."""
    inherited = policy or alone
    return Policy(
        rule.scale or inherited.scale, rule.activation or inherited.activation, rule.trained or inherited.trained
    )
