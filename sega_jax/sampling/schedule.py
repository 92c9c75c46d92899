"""Noise schedules of flow matching: which sigmas a run visits.

Half of a high-resolution method is here: the published dynamic shift grows without bound with the token count
and leaves every step but the last at pure noise (FLUX.1 at 4096 pixels has a mu of 11.55), so the policy for ``mu``
is explicit and logged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

MuPolicy = Literal["native", "clamp"] | float

MOST_STEPS = 10_000
LARGEST_MU = 10.0  # exp(10): every step but the last few is pure noise
NOISY = 0.95  # a step above this sigma decides next to nothing
_SWITCHES = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)


def check_steps(steps: object) -> int:
    """The number of steps of a run, as a Python integer.

    Raises:
        ValueError: not a whole number from 1 to `MOST_STEPS`.
    """
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or steps < 1:
        raise ValueError(f"steps={steps!r}: expected a positive whole number")
    if steps > MOST_STEPS:
        raise ValueError(f"steps={steps}: expected at most {MOST_STEPS}")
    return int(steps)


@dataclass(frozen=True)
class Schedule:
    """Time shift of a checkpoint, as its ``scheduler_config.json`` states it.

    Attributes:
        dynamic: shift by ``mu``, which grows with the token count, instead of the constant ``shift``.
        base_shift, max_shift: ``mu`` at ``base_tokens`` and at ``max_tokens`` image tokens.
        base_tokens, max_tokens: anchors of that line; ``max_tokens`` is the trained token count.
        shift: constant shift ``shift * s / (1 + (shift - 1) * s)``, where not dynamic.
        terminal: last sigma before 0 after a final stretch, or None (Qwen-Image: 0.02).
        kind: form of the dynamic shift.
    """

    dynamic: bool = True
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    shift: float = 3.0
    terminal: float | None = None
    kind: Literal["exponential", "linear"] = "exponential"

    @classmethod
    def from_dict(cls, config: Mapping) -> Schedule:
        """From a diffusers ``FlowMatchEulerDiscreteScheduler`` configuration.

        Raises:
            ValueError: for another scheduler, a switch that is not implemented, or unknown keys; all named.
        """
        name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
        if name != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(f"scheduler {name}: only FlowMatchEulerDiscreteScheduler is implemented")
        names = {
            "use_dynamic_shifting": "dynamic",
            "base_shift": "base_shift",
            "max_shift": "max_shift",
            "base_image_seq_len": "base_tokens",
            "max_image_seq_len": "max_tokens",
            "shift": "shift",
            "shift_terminal": "terminal",
            "time_shift_type": "kind",
        }
        on = [switch for switch in _SWITCHES if config.get(switch)]
        if on:
            raise ValueError(f"scheduler config: {', '.join(on)} not implemented; set to false")
        known = {*names, *_SWITCHES, "num_train_timesteps"}
        unknown = sorted(key for key in config if key not in known and not key.startswith("_"))
        if unknown:
            raise ValueError(f"scheduler config: unknown keys {unknown}; known: {sorted(known)}")
        values = {names[key]: value for key, value in config.items() if key in names and value is not None}
        values.setdefault("dynamic", False)
        values.setdefault("shift", 1.0)
        schedule = cls(**values)
        if schedule.kind not in ("exponential", "linear"):
            raise ValueError(f"scheduler config: time_shift_type={schedule.kind!r}; expected exponential or linear")
        return schedule

    def mu(self, tokens: int, policy: MuPolicy = "clamp") -> float | None:
        """The dynamic shift at a token count.

        Args:
            tokens: image tokens.
            policy: ``"native"`` extrapolates the line through the two anchors, as diffusers does; ``"clamp"``
                holds it between ``base_shift`` and ``max_shift`` (equal to native up to ``max_tokens``); a number
                is used as it is.

        Returns:
            None where the checkpoint's shift does not depend on the size and no number was given.

        Raises:
            ValueError: for any other policy.
        """
        if isinstance(policy, (int, float)) and not isinstance(policy, bool) and math.isfinite(policy):
            low = -LARGEST_MU if self.kind == "exponential" else math.exp(-LARGEST_MU)
            high = LARGEST_MU if self.kind == "exponential" else math.exp(LARGEST_MU)
            if not low <= policy <= high:
                raise ValueError(f"mu={policy:g}: expected a number from {low:g} to {high:g}, or native or clamp")
            return float(policy)
        if policy not in ("native", "clamp"):
            raise ValueError(f"mu={policy!r}: expected 'native', 'clamp' or a finite number")
        if not self.dynamic:
            return None
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        mu = self.base_shift + slope * (tokens - self.base_tokens)
        if policy == "clamp":
            low, high = sorted((self.base_shift, self.max_shift))
            mu = min(max(mu, low), high)
        return mu

    def sigmas(self, steps: int, tokens: int, policy: MuPolicy = "clamp") -> np.ndarray:
        """Noise levels of a run, float32 [steps + 1], from 1 down to 0.

        Args:
            steps: model evaluations.
            tokens: image tokens, which set ``mu``.
            policy: see `mu`.

        Raises:
            ValueError: for fewer than one step.
        """
        steps = check_steps(steps)
        t = np.linspace(1.0, 1.0 / steps, steps)
        mu = self.mu(tokens, policy)
        if mu is None:
            sigma = self.shift * t / (1 + (self.shift - 1) * t)
        else:
            strength = math.exp(mu) if self.kind == "exponential" else mu
            sigma = strength / (strength + (1 / t - 1))
        if self.terminal is not None and steps > 1:
            sigma = 1 - (1 - sigma) * (1 - self.terminal) / (1 - sigma[-1])
        return np.append(sigma, 0.0).astype(np.float32)


def collapse_warning(sigmas: np.ndarray) -> str | None:
    """A message where more than half of the steps are nearly pure noise, else None."""
    noisy = int((sigmas[:-1] > NOISY).sum())
    steps = len(sigmas) - 1
    if noisy * 2 <= steps:
        return None
    return (
        f"{noisy} of {steps} steps have sigma > {NOISY}: the schedule is collapsed and the picture is made in the "
        "few steps left; use mu='clamp' (the default), a smaller mu, or more steps"
    )


def start_index(steps: int, strength: float) -> int:
    """First step of an image-to-image run: ``strength`` 1 runs all steps, 0.5 the last half (as diffusers counts).

    Raises:
        ValueError: for a strength outside (0, 1], or so small that no step is left.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength}: expected a number above 0 and at most 1")
    start = int(max(steps - steps * strength, 0))
    if start >= steps:
        raise ValueError(f"strength={strength} leaves no step of {steps}; raise strength or steps")
    return start
