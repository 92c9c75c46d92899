"""Arguments of a request, taken in the forms people have them: checked, named in errors, made plain Python."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sega_jax.sampling.keys import as_integer

DTYPES = ("float32", "bfloat16")


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """A whole number as a Python integer; those of NumPy and JAX are whole numbers too, a bool is none.

    Raises:
        TypeError: something else.
        ValueError: outside ``least`` .. ``most``.
    """
    expected = "a positive whole number" if (least, most) == (1, None) else f"a whole number of at least {least}"
    if most is not None:
        expected = f"a whole number from {least} to {most}"
    number = as_integer(value)
    if number is None:
        raise TypeError(f"{name}={shown(value)}: expected {expected}, got {type(value).__name__}")
    if number < least or (most is not None and number > most):
        raise ValueError(f"{name}={value}: expected {expected}")
    return number


def real(name: str, value: Any, least: float = 0.0) -> float:
    """A finite number of at least ``least`` as a Python float.

    Raises:
        TypeError: something else.
        ValueError: too small, infinite or NaN.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if not isinstance(value, numbers.Real) or isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}={shown(value)}: expected a number, got {type(value).__name__}")
    if not (np.isfinite(value) and value >= least):
        raise ValueError(f"{name}={value}: expected a finite number of at least {least:g}")
    return float(value)


def text(name: str, value: Any) -> str:
    """A string.

    Raises:
        TypeError: something else.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name}={shown(value)}: expected a string, got {type(value).__name__}")
    return str(value)


def several(name: str, value: Any) -> list[Any]:
    """Items of a list, tuple or one-dimensional array.

    Raises:
        TypeError: something else; a string is one item, not several.
    """
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return list(value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return list(value)
    raise TypeError(f"{name}={shown(value)}: expected a list of them, got {type(value).__name__}")


def per_prompt(name: str, value: Any, count: int) -> list[Any]:
    """One value for each of ``count`` prompts: that of each, where a list is given, or the same for all.

    Raises:
        ValueError: a list of another length.
    """
    if value is None or isinstance(value, str) or not isinstance(value, Sequence | np.ndarray) or np.ndim(value) == 0:
        return [value] * count
    values = several(name, value)
    if len(values) != count:
        raise ValueError(f"{name}: {len(values)} values for {count} prompt(s); give one for each, or one for all")
    return values


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """One of several words.

    Raises:
        ValueError: another, or no word at all.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={shown(value)}: expected {', '.join(choices)}")
    return value


def called(name: str, value: Any) -> Any:
    """A function, or None.

    Raises:
        TypeError: something that cannot be called.
    """
    if value is not None and not callable(value):
        raise TypeError(f"{name}={shown(value)}: expected a function, got {type(value).__name__}")
    return value


def numbers_in(name: str, value: Any) -> np.ndarray:
    """Finite real numbers as a float32 array.

    Raises:
        TypeError: no array of real numbers.
        ValueError: NaN or infinity among them.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise TypeError(f"{name} of dtype {array.dtype}: expected real numbers")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} hold NaN or infinity; look for the step that made them")
    return array


def dtype_name(value: Any) -> str:
    """``"float32"`` or ``"bfloat16"``, from that name or a dtype such as ``jnp.bfloat16``.

    Raises:
        ValueError: another dtype.
        TypeError: no dtype at all.
    """
    try:
        name = jnp.dtype(value).name
    except TypeError:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"dtype={shown(value)}: expected 'float32' or 'bfloat16'") from None
    if value is None or name not in DTYPES:
        raise ValueError(f"dtype={shown(value)}: expected 'float32' or 'bfloat16'")
    return name


def shown(value: Any) -> str:
    """A value as part of a message: a line of its ``repr`` at most."""
    return quoted(repr(value))


def quoted(text: str, longest: int = 80) -> str:
    """A text from outside as part of a message: one line of it at most."""
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}… ({len(line)} characters)"
