"""Putting rules together, and finding methods by name.

A positional *method* is any callable ``(grid, signals) -> {"text": Rope, "image": Rope}``: a rule, a chain of rules,
or your own function or object.  It may carry

* ``measure(tokens, grid, probe)``: its own statistic of the latent, handed back as ``Signals.spectrum``;
* ``init(grid, batch)`` and ``update(state, grid, signals)``: its memory between steps, handed back as
  ``Signals.state``.

`statistic`, `initial_state` and `next_state` call them where they exist.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from sega_jax.geometry import Grid
from sega_jax.positional.dype import dype
from sega_jax.positional.extrapolate import none, ntk, ntk_by_parts, pi, rebase, temperature, yarn
from sega_jax.positional.rope import Rope
from sega_jax.positional.rules import (
    Expression,
    FrequencyRule,
    MagnitudeRule,
    Signals,
    join,
)
from sega_jax.positional.sega import sega_magnitude

ENTRY_POINTS = "sega_jax.positional"


@runtime_checkable
class Method(Protocol):
    """Anything that encodes positions; see the module's docstring for its optional attributes."""

    def __call__(self, grid: Grid, signals: Signals) -> dict[str, Rope]: ...


# --- chaining -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Chain(Expression):
    """A frequency rule followed by a magnitude rule; made by `chain`."""

    frequency: FrequencyRule
    magnitude: MagnitudeRule

    def __str__(self) -> str:
        return f"{self.frequency}+{self.magnitude}"

    def __call__(self, grid: Grid, signals: Signals) -> dict[str, Rope]:
        policy = getattr(self.frequency, "policy", None)
        return join(
            self.frequency.frequencies(grid, self._seen_by(self.frequency, signals)),
            self.magnitude.magnitudes(grid, self._seen_by(self.magnitude, signals), policy and policy()),
        )

    def _having(self, name: str) -> tuple[Any, ...]:
        return tuple(rule for rule in (self.frequency, self.magnitude) if getattr(rule, name, None) is not None)

    def _seen_by(self, rule: Any, signals: Signals) -> Signals:
        """A rule's own part of the statistic and the state, where both rules have one."""
        for name, owner in (("spectrum", "measure"), ("state", "init")):
            owners, value = self._having(owner), getattr(signals, name)
            if len(owners) == 2 and value is not None:
                part = value[0] if rule is self.frequency else value[1]
                signals = dataclasses.replace(signals, **{name: part})
        return signals

    @property
    def measure(self) -> Callable[..., Any] | None:
        """The rules' own statistic: None, the one rule's, or a tuple of both."""
        return _both(self._having("measure"), "measure")

    @property
    def init(self) -> Callable[..., Any] | None:
        """The rules' initial state: None, the one rule's, or a tuple of both."""
        return _both(self._having("init"), "init")

    @property
    def update(self) -> Callable[..., Any] | None:
        """The rules' next state, or None without memory."""
        owners = self._having("init")
        if not owners:
            return None

        def update(state: Any, grid: Grid, signals: Signals) -> Any:
            states = state if len(owners) == 2 else (state,)
            news = tuple(
                next_state(rule, grid, dataclasses.replace(self._seen_by(rule, signals), state=old))
                for rule, old in zip(owners, states, strict=True)
            )
            return news if len(owners) == 2 else news[0]

        return update


def _both(owners: tuple[Any, ...], name: str) -> Callable[..., Any] | None:
    if len(owners) < 2:
        return getattr(owners[0], name) if owners else None
    return lambda *args: tuple(getattr(rule, name)(*args) for rule in owners)


def chain(*rules: Any) -> Method:
    """At most one frequency rule, then at most one magnitude rule.

    Chains may be given and are taken apart; ``none()`` adds nothing.  A single rule is returned as it is, and no
    rule at all is ``none()``.

    Raises:
        TypeError: something given is not a rule.
        ValueError: more than one rule of a kind, or a magnitude before a frequency rule.
    """
    flat: list[Any] = []
    for rule in rules:
        flat.extend((rule.frequency, rule.magnitude) if isinstance(rule, Chain) else (rule,))
    for rule in flat:
        if not isinstance(rule, (FrequencyRule, MagnitudeRule)):
            hint = "; give it as a rule's strength" if isinstance(rule, dype) else ""
            raise TypeError(f"chain: {rule!r} is neither a frequency rule nor a magnitude rule{hint}")
    flat = [rule for rule in flat if not isinstance(rule, none)]
    frequency = [rule for rule in flat if isinstance(rule, FrequencyRule)]
    magnitude = [rule for rule in flat if isinstance(rule, MagnitudeRule)]
    if len(frequency) > 1:
        raise ValueError(
            f"{' and '.join(map(str, frequency))} are both frequency rules: each sets the frequencies anew, so only "
            "one can hold; leave one out"
        )
    if len(magnitude) > 1:
        raise ValueError(
            f"{' and '.join(map(str, magnitude))} are both magnitude rules: each sets the magnitude of the same pairs "
            "(SEGA replaces YaRN's temperature), so only one can hold; leave one out"
        )
    if len(flat) == 2 and flat[0] is magnitude[0]:
        raise ValueError(f"{flat[0]} stands before {flat[1]}: a chain is a frequency rule, then a magnitude rule")
    if len(flat) == 2:
        return Chain(*flat)
    return flat[0] if flat else none()


# --- what a sampler asks of any method ------------------------------------------------------------------------


def ropes_of(method: Method, grid: Grid, signals: Signals) -> dict[str, Rope]:
    """The method's ropes by kind of stream.

    Raises:
        TypeError: it returned something else; names the method.
    """
    made = method(grid, signals)
    if not isinstance(made, Mapping) or not all(isinstance(made.get(kind), Rope) for kind in ("text", "image")):
        told = {kind: type(value).__name__ for kind, value in made.items()} if isinstance(made, Mapping) else made
        raise TypeError(
            f"positional method {describe(method)} returned {told!r}; expected {{'text': Rope, 'image': Rope}} "
            "(sega_jax.positional.Rope)"
        )
    return made


def statistic(method: Method, tokens: jax.Array, grid: Grid, probe: jax.Array | None = None) -> Any:
    """The method's own statistic of the latent for ``Signals.spectrum``, or None if it reads none."""
    measure = getattr(method, "measure", None)
    return None if measure is None else measure(tokens, grid, probe)


def initial_state(method: Method, grid: Grid, batch: int) -> Any:
    """The method's memory before the first step for ``Signals.state``, or None if it keeps none."""
    init = getattr(method, "init", None)
    return None if init is None else init(grid, batch)


def next_state(method: Method, grid: Grid, signals: Signals) -> Any:
    """The method's memory after a step that saw ``signals``; unchanged if it has no ``update``."""
    update = getattr(method, "update", None)
    return signals.state if update is None else update(signals.state, grid, signals)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Static:
    """A method that is no pytree of numbers, as static structure of a jitted function's argument."""

    method: Any = dataclasses.field(metadata={"static": True})

    def __call__(self, grid: Grid, signals: Signals) -> Any:
        return self.method(grid, signals)  # `ropes_of` says what is wrong with anything but ropes

    def __getattr__(self, name: str) -> Any:
        if name in ("measure", "init", "update"):
            return getattr(self.method, name, None)
        raise AttributeError(name)

    def __str__(self) -> str:
        return describe(self.method)


def traceable(method: Method) -> Method:
    """The method in a form that may be an argument of a jitted function.

    Rules and chains are that already: their numbers are traced, their choices static.  A function or any other
    hashable object is wrapped, and static as a whole.
    """
    leaves = jax.tree.leaves(method)
    if all(isinstance(leaf, (int, float, np.ndarray, np.generic, jax.Array)) for leaf in leaves):
        return method
    return Static(method)


def describe(method: Method) -> str:
    """What metadata stores: the expression of rules and chains, ``module:name`` of your own functions and objects."""
    if isinstance(method, (Expression, Static)):
        return str(method)
    named = method if hasattr(method, "__qualname__") else type(method)
    return f"{named.__module__}:{named.__qualname__}"


# --- expressions ----------------------------------------------------------------------------------------------

RULES: dict[str, type[Expression]] = {
    cls.__name__: cls for cls in (none, pi, ntk, yarn, ntk_by_parts, rebase, temperature, sega_magnitude)
}
SCHEDULES: dict[str, type[Expression]] = {"dype": dype}
LONGEST = 2_000  # characters of an expression; the longest preset has 150


def parse(expression: str, *, imports: bool = True) -> Method:
    """The method an expression stands for, such as ``ntk(strength=dype(scale=2))+sega_magnitude(alpha=0.2)``.

    A small grammar, nothing is evaluated: rules joined by ``+``; a rule is a name called with keyword arguments;
    values are numbers, strings, True, False, None, pairs of numbers, or a schedule.  Rules of other packages are
    found under their entry point's name.  ``parse(str(method)) == method``.

    Args:
        expression: the text.
        imports: whether rules of other packages may be imported; not for text that comes out of a file.

    Raises:
        ValueError: unreadable text, an unknown rule or argument (the known ones are listed), a refused chain.
        TypeError: a value of the wrong type.
    """
    if len(expression) > LONGEST:
        raise ValueError(f"a positional expression of {len(expression)} characters; expected at most {LONGEST}")
    try:
        with warnings.catch_warnings(action="ignore"):  # Python's remarks about spelling, such as 1if
            tree = ast.parse(expression.strip(), mode="eval").body
        terms: list[ast.expr] = []
        while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
            terms.append(tree.right)
            tree = tree.left
        return chain(*(_call(term, RULES, expression, imports) for term in (tree, *reversed(terms))))
    except (SyntaxError, MemoryError, RecursionError, OverflowError) as error:
        raise ValueError(f"cannot read the positional expression {expression!r}: {error}") from None


def _unknown(what: str, name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f"unknown {what} {name!r}{f' (did you mean {close[0]!r}?)' if close else ''}; known: {', '.join(known)}"


def _call(node: ast.expr, known: dict[str, type[Expression]], expression: str, imports: bool) -> Expression:
    if isinstance(node, ast.Name):
        if node.id not in known and node.id not in _entry_points():
            raise ValueError(_unknown("positional rule", node.id, known))
        raise ValueError(f"in {expression!r}: write {node.id}() for the rule {node.id!r}")
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise ValueError(f"in {expression!r}: expected rules such as ntk(strength=2.0), got {ast.unparse(node)!r}")
    name = node.func.id
    cls = known.get(name) or (_outside_rule(name, imports) if known is RULES else None)
    if cls is None:
        names = [*known, *_entry_points()] if known is RULES else list(known)
        raise ValueError(_unknown("positional rule" if known is RULES else "schedule", name, names))
    fields = [f.name for f in dataclasses.fields(cls)]
    if node.args:
        raise ValueError(f"in {expression!r}: name the arguments of {name}; it has {', '.join(fields) or 'none'}")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg not in fields:
            raise ValueError(_unknown(f"argument of {name}", keyword.arg or "**", fields or ["none"]))
        if keyword.arg in arguments:
            raise ValueError(f"in {expression!r}: {name} gets {keyword.arg} twice")
        arguments[keyword.arg] = _value(keyword.value, expression, imports)
    return cls(**arguments)


def _value(node: ast.expr, expression: str, imports: bool) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, bool, type(None))):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _value(node.operand, expression, imports)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.Tuple):
        return tuple(_value(element, expression, imports) for element in node.elts)
    if isinstance(node, ast.Call):
        return _call(node, SCHEDULES, expression, imports)
    raise ValueError(
        f"in {expression!r}: expected a number, string, True, False, None, a pair or a schedule, "
        f"got {ast.unparse(node)!r}"
    )


# --- names ----------------------------------------------------------------------------------------------------

_SEGA_BASE = 'ntk(strength=2.0, scale="sega", text="image", damping=0.1)'
PRESETS: dict[str, str] = {
    "none": "none()",
    "pi": "pi()",
    "ntk": "ntk()",
    "yarn": "yarn()+temperature()",
    "yarn-original": "ntk_by_parts()+temperature()",
    "vision-yarn": 'yarn(strength=dype(scale=2.0), threshold_rule="power", ntk_scale="isotropic")'
    '+temperature(strength=dype(scale=1.0), scale="isotropic")',
    "dype-pi": "pi(strength=dype(scale=2.0))",
    "dype-ntk": "ntk(strength=dype(scale=2.0))",
    "dype-yarn": "yarn(strength=dype(scale=1.0))+temperature()",
    "dype-yarn-original": "ntk_by_parts(strength=dype(scale=1.0))+temperature()",
    "sega": f"{_SEGA_BASE}+sega_magnitude()",
    "sega-release": f'{_SEGA_BASE}+sega_magnitude(reduce="batch", share_width=True, bins="float32")',
}


def _entry_points() -> list[str]:
    return sorted({point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS)})


def _entry_point(name: str) -> importlib.metadata.EntryPoint | None:
    return next(iter(importlib.metadata.entry_points(group=ENTRY_POINTS, name=name)), None)


def _code(name: str) -> ValueError:
    """The refusal of a name that a file gives and that would have to be imported."""
    return ValueError(
        f"{name!r} names code, and a file may not: names that come from files are presets and expressions of the "
        f"rules {', '.join(RULES)}; type it yourself (--positional), or allow it with --trust-code"
    )


def _outside_rule(name: str, imports: bool) -> type[Expression] | None:
    point = _entry_point(name)
    if point is None:
        return None
    if not imports:
        raise _code(name)
    cls = point.load()
    if not (isinstance(cls, type) and issubclass(cls, (FrequencyRule, MagnitudeRule))):
        raise ValueError(f"entry point {name!r} ({point.value}) is no rule class, so it cannot stand in an expression")
    return cls


def _as_method(found: Any, name: str) -> Method:
    """A method itself, or what a class or a factory without required arguments makes."""
    if callable(found):
        try:
            signature = inspect.signature(found)
        except (TypeError, ValueError):
            return found
        if _accepts(signature):
            found = found()
            signature = inspect.signature(found) if callable(found) else None
        if callable(found) and _accepts(signature, "grid", "signals"):
            return found
    raise TypeError(
        f"{name}: expected a positional method, a callable (grid, signals) -> {{'text': Rope, 'image': Rope}}, or a "
        f"factory without required arguments; got {found!r}"
    )


def _accepts(signature: inspect.Signature, *arguments: str) -> bool:
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def get(method: Any, *, imports: bool = True) -> Method:
    """The positional method asked for.

    Args:
        method: a method (returned as it is); or a string: a preset (`presets`), ``module:name`` (imported; a method,
            or a class or factory without required arguments), an entry point of the group ``sega_jax.positional``,
            or an expression (`parse`).
        imports: whether names of code, ``module:name`` and entry points, may be imported; not for a name that comes
            out of a file.

    Raises:
        TypeError: not a method.
        ValueError: a name nobody knows; the known ones are listed.
    """
    if not isinstance(method, str):
        if isinstance(method, dype):
            raise TypeError(f"{method} is a schedule; give it as a rule's strength, as in yarn(strength={method})")
        return _as_method(method, "positional")
    name = method.strip()
    if len(name) > LONGEST:
        raise ValueError(f"a positional method of {len(name)} characters; expected at most {LONGEST}")
    if name in PRESETS:
        return parse(PRESETS[name])
    if is_code(name):
        if not imports:
            raise _code(name)
        return _as_method(_imported(name), name)
    if re.fullmatch(r"[\w.-]+", name):
        point = _entry_point(name)
        if point is not None:
            if not imports:
                raise _code(name)
            return _as_method(point.load(), f"entry point {name!r}")
        known = [*PRESETS, *_entry_points()]
        raise ValueError(
            f"{_unknown('positional method', name, known)}; or give module:name, or an expression of the rules "
            f"{', '.join(f'{rule}(...)' for rule in RULES)}"
        )
    return parse(name, imports=imports)


def is_code(name: str) -> bool:
    """Whether a text is of the form ``module:name``."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name.strip()) is not None


def _imported(name: str) -> Any:
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"positional method {name!r}: {error}") from error
    return found


def presets() -> dict[str, Method]:
    """Preset name -> method."""
    return {name: parse(expression) for name, expression in PRESETS.items()}
