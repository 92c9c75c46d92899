"""DyPE: extrapolation whose strength follows the noise level (arXiv 2510.20766, code guyyariv/DyPE).

Low spatial frequencies of an image settle early in sampling, high ones evolve to the end; so extrapolate fully
while sigma is near 1 and return towards the trained encoding as it falls.
"""

# ruff: noqa: RUF009 - the field makers return dataclass fields
from __future__ import annotations

from dataclasses import dataclass
from types import NoneType
from typing import Any

import jax
import jax.numpy as jnp

from sega_jax.positional.rules import Expression, Signals, choice, number, real_dtype


@dataclass(frozen=True, kw_only=True, repr=False)
class dype(Expression):  # the lower-case name is the expression's
    """Strength ``scale * min(sigma / start, 1) ** exponent``, the paper's ``kappa(t) = lambda_s t^lambda_t``.

    Attributes:
        scale: lambda_s; None takes the published value of the rule it is given to: 2 for `pi` and `ntk`, 1 for
            `yarn` (2 with ``threshold_rule="power"``), 1 for `temperature`.
        exponent: lambda_t.
        start: noise level below which the strength begins to fall (for image-to-image, its first sigma).
        t_round: ``"bfloat16"`` rounds sigma as the official FLUX pipeline does; None does not.
    """

    scale: Any = number(None, kinds=(NoneType,))
    exponent: Any = number(2.0)
    start: Any = number(1.0, least=1e-6)
    t_round: str | None = choice(None, "bfloat16")

    def kappa(self, sigma: Any, published: float = 1.0) -> jax.Array:
        """Strength at a noise level.

        Args:
            sigma: scalar or [B]; clipped to [0, 1].
            published: value of ``scale`` where that is None.

        Returns:
            Strength of sigma's shape.
        """
        sigma = jnp.asarray(sigma)
        if self.t_round == "bfloat16":
            # reduce_precision, because compilers drop a cast to bfloat16 and back
            thousandths = jax.lax.reduce_precision(1000 * sigma.astype(jnp.float32), 8, 7)
            sigma = jax.lax.reduce_precision(thousandths / 1000, 8, 7)
        sigma = sigma.astype(real_dtype())
        scale = published if self.scale is None else self.scale
        return scale * jnp.power(jnp.clip(sigma / self.start, 0.0, 1.0), self.exponent)


def strength() -> Any:
    """The field of a rule that is either a constant strength (1 is the static method) or a `dype` schedule."""
    return number(1.0, kinds=(dype,))


def strength_at(value: Any, signals: Signals, published: float) -> jax.Array:
    """A strength field at this step: scalar, or [B] where sigma is."""
    if not isinstance(value, dype):
        return jnp.asarray(value, real_dtype())
    if signals.sigma is None:
        raise ValueError(f"{value} follows the noise level, but Signals.sigma is None; pass the step's sigma")
    return value.kappa(signals.sigma, published)
