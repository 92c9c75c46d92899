"""A positional method nobody put into sega_jax: own statistic, memory between steps, one magnitude per head."""

from dataclasses import dataclass

import jax.numpy as jnp

from sega_jax import positional as pe
from sega_jax.positional.rules import number, plain_magnitudes

HEADS = 3


class Remembering:
    """Magnitudes per sample and head from a running mean of the latent's energy."""

    def measure(self, tokens, grid, probe=None):
        return jnp.square(tokens).mean(axis=(1, 2))

    def init(self, grid, batch):
        return jnp.zeros((batch,))

    def update(self, state, grid, signals):
        return 0.5 * state + 0.5 * signals.spectrum

    def __call__(self, grid, signals):
        rope = pe.plain(grid)
        heads = 1 + 0.1 * jnp.arange(HEADS, dtype=jnp.float32)[None, :, None] * signals.state[:, None, None]
        image = pe.Rope(rope.frequencies, tuple(m[None, None] * heads for m in rope.magnitude))
        return {"text": rope, "image": image}


def halved(grid, signals):
    """A plain function is a method too."""
    rope = pe.plain(grid)
    slower = pe.Rope(tuple(f / 2 for f in rope.frequencies), rope.magnitude)
    return {"text": rope, "image": slower}


def factory():
    return pe.chain(pe.pi(), pe.temperature())


def needs_arguments(first, second, third):
    return None


@dataclass(frozen=True, kw_only=True, repr=False)
class boost(pe.MagnitudeRule):
    """A rule of one's own: chains, prints, parses and traces like the others."""

    amount: float = number(1.0)

    def measure(self, tokens, grid, probe=None):
        return jnp.abs(tokens).max(axis=(1, 2))

    def init(self, grid, batch):
        return jnp.zeros((batch,))

    def update(self, state, grid, signals):
        return state + signals.spectrum

    def magnitudes(self, grid, signals, policy=None):
        peak = signals.spectrum[:, None]
        image = tuple(m[None] * (1 + self.amount * peak) for m in plain_magnitudes(grid)["image"])
        return {"text": plain_magnitudes(grid)["text"], "image": image}


@dataclass(frozen=True, kw_only=True, repr=False)
class counting(pe.FrequencyRule):
    """A frequency rule with a statistic and a memory, to be chained with another that has both."""

    def measure(self, tokens, grid, probe=None):
        return tokens.mean(axis=(1, 2))

    def init(self, grid, batch):
        return jnp.zeros((batch,))

    def update(self, state, grid, signals):
        return state + 1

    def frequencies(self, grid, signals):
        plain = pe.plain(grid).frequencies
        image = tuple(f[None] / (1 + signals.state[:, None]) for f in plain)
        return {"text": plain, "image": image}
