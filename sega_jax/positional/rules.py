"""What a positional method is made of: signals, and rules that print, compare and trace.

A rule is a frozen dataclass.  Its numbers are pytree leaves, so a rule may be passed to a jitted function as an
ordinary argument: changing ``alpha`` recompiles nothing and ``jax.grad`` reaches it.  Its choices (strings,
switches, sizes in tokens) are static structure.  ``str(rule)`` is the expression that `sega_jax.positional.parse`
reads back to an equal rule.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sega_jax.geometry import Grid
from sega_jax.positional.rope import Rope, plain

Scale = Literal["per_axis", "isotropic", "sega"]
Activation = Literal["per_axis", "max_side", "area"]
PerStream = dict[str, tuple[jax.Array, ...]]

TOLERATED_STRETCH = 1.5  # as InvokeAI's DyPE (pull request 8763), which leaves images of up to 1536 px alone
SEGA_PIXELS = 1024  # training_resolution of SEGA's code, also where the model's own differs (Qwen-Image)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Signals:
    """What a method may know about the present step; a pytree, every field traced.

    Attributes:
        sigma: noise level in [0, 1], 1 is pure noise: a scalar, or one per sample [B].
        spectrum: what the method's own ``measure`` returned for this step's latent, or None.
        step: index of the step, i32 scalar, or None.
        state: the method's memory (its ``init`` and ``update``), or None.
    """

    sigma: Any
    spectrum: Any = None
    step: Any = None
    state: Any = None


def real_dtype() -> jnp.dtype:
    """The dtype positional arithmetic runs in: float32, or float64 under ``jax.enable_x64``."""
    return jnp.result_type(float)


# --- fields ---------------------------------------------------------------------------------------------------


def _checked_number(value: Any, least: float, name: str) -> Any:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}={value}: expected a number")
    if isinstance(value, numbers.Real) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = float(value)
        if not (math.isfinite(value) and value >= least):
            raise ValueError(f"{name}={value}: expected a finite number of at least {least:g}")
        return value
    if isinstance(value, jax.Array) and value.ndim == 0:
        return value  # a traced or device scalar, taken as it is
    raise TypeError(f"{name}={value!r}: expected a number, got {type(value).__name__}")


def number(default: Any = dataclasses.MISSING, *, least: float = 0.0, kinds: tuple[type, ...] = ()) -> Any:
    """A numeric hyper-parameter: a pytree leaf.  ``kinds``: other values it takes, such as None or a schedule."""

    def check(value: Any, name: str) -> Any:
        return value if isinstance(value, kinds) else _checked_number(value, least, name)

    return field(default=default, metadata={"check": check})


def pair(first: float, second: float, *, least: float = 0.0, falling: bool = False) -> Any:
    """Two numeric hyper-parameters, both leaves; ``falling`` demands that the first exceeds the second."""

    def check(value: Any, name: str) -> Any:
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise TypeError(f"{name}={value!r}: expected two numbers")
        value = tuple(_checked_number(v, least, name) for v in value)
        if falling and all(isinstance(v, float) for v in value) and value[0] <= value[1]:
            raise ValueError(f"{name}={value}: the first must exceed the second")
        return value

    return field(default=(first, second), metadata={"check": check})


def choice(default: Any, *others: Any) -> Any:
    """A static choice among constants, the default first."""
    options = (default, *others)

    def check(value: Any, name: str) -> Any:
        if not any(value is o or (type(value) is type(o) and value == o) for o in options):
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, options))}")
        return value

    return field(default=default, metadata={"check": check, "static": True})


def side() -> Any:
    """A static side length in tokens, or None."""

    def check(value: Any, name: str) -> Any:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name}={value!r}: expected a whole number of tokens per side, or None")
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least one token per side")
        return int(value)

    return field(default=None, metadata={"check": check, "static": True})


# --- rules ----------------------------------------------------------------------------------------------------


def _literal(value: Any) -> str:
    if isinstance(value, jax.core.Tracer):
        return "..."
    if isinstance(value, jax.Array):
        return repr(float(value))
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))})"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _is_default(value: Any, default: Any) -> bool:
    values = value if isinstance(value, tuple) else (value,)
    return not any(isinstance(v, jax.core.Tracer) for v in values) and bool(value == default)


class Expression:
    """Base of everything that has an expression: validation, printing and pytree registration.

    Subclass it with ``@dataclass(frozen=True, kw_only=True, repr=False)`` and fields made by `number`, `pair`,
    `choice` and `side`.  Subclasses become pytrees by themselves; rebuilding one from leaves skips validation, as
    JAX puts tracers and placeholders there.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)

        def split(self: Any) -> tuple[list[dataclasses.Field], list[dataclasses.Field]]:
            fields = dataclasses.fields(self)
            static = [f for f in fields if f.metadata.get("static")]
            return [f for f in fields if not f.metadata.get("static")], static

        def flatten(self: Any):
            data, static = split(self)
            children = [(jax.tree_util.GetAttrKey(f.name), getattr(self, f.name)) for f in data]
            return children, tuple(getattr(self, f.name) for f in static)

        def unflatten(aux: tuple, children: Any):
            self = object.__new__(cls)
            data, static = split(self)
            for f, value in zip((*data, *static), (*children, *aux), strict=True):
                object.__setattr__(self, f.name, value)
            return self

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            check = f.metadata.get("check")
            if check is not None:
                value = check(getattr(self, f.name), f"{type(self).__name__}: {f.name}")
                object.__setattr__(self, f.name, value)

    def __str__(self) -> str:
        shown = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))
        arguments = (f"{f.name}={_literal(value)}" for f, value in shown if not _is_default(value, f.default))
        return f"{type(self).__name__}({', '.join(arguments)})"

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Policy:
    """How far a grid is beyond the trained one, axis by axis.  Static: Python numbers from a static grid.

    Attributes:
        scale: ``"per_axis"``: tokens over trained tokens of the axis; ``"isotropic"``: the larger of the two on both
            axes; ``"sega"``: isotropic on ``"corner"`` grids, per axis against 1024 px on ``"centered"`` ones, as
            SEGA's code does for FLUX and for Qwen-Image.
        activation: ``"per_axis"``: an axis beyond its trained length is scaled; ``"max_side"``: only if the longest
            side exceeds 1.5 times trained; ``"area"``: only if the grid has more tokens than the trained one.
        trained: trained tokens per side, replacing the grid's own `RopeSpec.trained`.
    """

    scale: Scale = "per_axis"
    activation: Activation = "per_axis"
    trained: int | None = None

    def side(self, grid: Grid) -> tuple[int | float, int | float]:
        """Tokens per side (rows, columns) that count as trained."""
        if self.trained is not None:
            return self.trained, self.trained
        if self.scale == "sega" and grid.spec.ids == "centered":
            return SEGA_PIXELS / grid.spec.pixels_per_token, SEGA_PIXELS / grid.spec.pixels_per_token
        return grid.spec.trained

    def stretch(self, grid: Grid) -> tuple[float, float]:
        """Tokens over trained tokens (rows, columns) before any scaling policy; may be below 1."""
        rows, columns = self.side(grid)
        return grid.height / rows, grid.width / columns

    def applies(self, grid: Grid) -> bool:
        """Whether ``activation`` lets the rule act on this grid at all."""
        if self.activation == "max_side":
            return max(self.stretch(grid)) > TOLERATED_STRETCH
        rows, columns = self.side(grid)
        return self.activation != "area" or grid.tokens > rows * columns

    def scales(self, grid: Grid) -> tuple[float, float]:
        """Extrapolation factors ``s`` (rows, columns), at least 1; exactly 1 leaves the axis as trained."""
        if not self.applies(grid):
            return 1.0, 1.0
        rows, columns = self.stretch(grid)
        if self.scale == "isotropic" or (self.scale == "sega" and grid.spec.ids == "corner"):
            rows = columns = max(rows, columns)
        return max(1.0, rows), max(1.0, columns)


class FrequencyRule(Expression):
    """A rule that sets frequencies; a positional method by itself.

    Subclasses define ``frequencies(grid, signals)`` returning, per stream kind (``"text"``, ``"image"``), one
    array per axis ``[..., d_a / 2]`` in radians per token, and may define ``policy()``, which magnitude rules of
    the same chain follow, and ``measure``, ``init``, ``update``.
    """

    def frequencies(self, grid: Grid, signals: Signals) -> PerStream:
        raise NotImplementedError(f"{type(self).__name__} defines no frequencies(grid, signals)")

    def __call__(self, grid: Grid, signals: Signals) -> dict[str, Rope]:
        return join(self.frequencies(grid, signals), plain_magnitudes(grid))


class MagnitudeRule(Expression):
    """A rule that sets magnitudes; a positional method by itself, on plain frequencies.

    Subclasses define ``magnitudes(grid, signals, policy)`` returning, per stream kind, one array per axis
    ``[..., d_a / 2]``; ``policy`` is the frequency rule's, or None.  They may define ``measure``, ``init``,
    ``update``.
    """

    def magnitudes(self, grid: Grid, signals: Signals, policy: Policy | None = None) -> PerStream:
        raise NotImplementedError(f"{type(self).__name__} defines no magnitudes(grid, signals, policy)")

    def __call__(self, grid: Grid, signals: Signals) -> dict[str, Rope]:
        return join(plain_frequencies(grid), self.magnitudes(grid, signals))


def plain_frequencies(grid: Grid) -> PerStream:
    """Base frequencies of both stream kinds."""
    rope = plain(grid)
    return {"text": rope.frequencies, "image": rope.frequencies}


def plain_magnitudes(grid: Grid) -> PerStream:
    """Magnitude one for both stream kinds."""
    rope = plain(grid)
    return {"text": rope.magnitude, "image": rope.magnitude}


def spatial(grid: Grid, per_axis: tuple[Any, ...]) -> tuple[Any, Any]:
    """Of values per axis, those of rows and columns."""
    rows, columns = grid.spec.spatial
    return per_axis[rows], per_axis[columns]


def on_axes(grid: Grid, trained: tuple[Any, ...], rows: Any, columns: Any) -> tuple[Any, ...]:
    """``trained`` per axis, with the values of rows and columns in their places; None leaves one as trained."""
    new = dict(zip(grid.spec.spatial, (rows, columns), strict=True))
    return tuple(old if new.get(axis) is None else new[axis] for axis, old in enumerate(trained))


def join(frequencies: PerStream, magnitudes: PerStream) -> dict[str, Rope]:
    """Ropes per stream kind from frequencies and magnitudes per stream kind."""
    return {kind: Rope(frequencies[kind], magnitudes[kind]) for kind in frequencies}


def per_pair(values: jax.Array, constants: Any, combine: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """``combine`` of values ``[...]`` (one per sample) and a vector ``[n]`` (one per pair): ``[..., n]``."""
    values = jnp.asarray(values, real_dtype())
    constants = jnp.asarray(constants, real_dtype())
    return combine(values[..., None], constants.reshape((1,) * values.ndim + constants.shape))
