"""Options of a verb in groups: the help shows a box for each, the verb itself stays one flat dataclass."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, get_type_hints

import tyro


def documentation(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass and of those it inherits from, by field."""
    told: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, below in itertools.pairwise(body):
            text = below.value if isinstance(below, ast.Expr) else None
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Constant) and isinstance(text.value, str):
                told[field.target.id] = " ".join(text.value.split())
    return told


def _described(hint: Any, text: str) -> Any:
    """An option's type with its help; its `options.option` is kept."""
    metadata = list(getattr(hint, "__metadata__", ()))
    kind = hint.__origin__ if metadata else hint
    made = tyro.conf.arg(help=text)
    for position, entry in enumerate(metadata):
        if isinstance(entry, type(made)):
            metadata[position] = dataclasses.replace(entry, help=text)
            return Annotated[kind, *metadata]
    return Annotated[kind, *metadata, made]


class Grouped:
    """What `grouped` makes.

    Attributes:
        verb: the flat dataclass.
        groups: title -> fields.
    """

    verb: ClassVar[type]
    groups: ClassVar[Mapping[str, Sequence[str]]]

    def flat(self) -> Any:
        """The verb itself, with the options of all groups."""
        places = ((title, name) for title, names in self.groups.items() for name in names)
        return self.verb(**{name: getattr(getattr(self, title), name) for title, name in places})


def grouped(cls: type, groups: Mapping[str, Sequence[str]]) -> type:
    """The face of a verb for the parser: its fields in nested dataclasses, one for each group.

    Args:
        cls: the verb, a dataclass whose fields have a string below them.
        groups: title -> its fields, in the order of the help; every field stands in one.

    Raises:
        ValueError: a field that stands in none or in several.
    """
    listed = Counter(name for names in groups.values() for name in names)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    wrong = sorted(name for name in {*listed, *fields} if listed[name] != 1 or name not in fields)
    if wrong:
        raise ValueError(f"groups of {cls.__name__}: {', '.join(wrong)} missing, unknown or twice")
    hints, told = get_type_hints(cls, include_extras=True), documentation(cls)
    parts = []
    for title, names in groups.items():
        entries = [(name, _described(hints[name], told[name]), fields[name].default) for name in names]
        part = dataclasses.make_dataclass(title, entries, frozen=True, kw_only=True)
        part.__doc__ = ""
        parts.append((title, tyro.conf.OmitArgPrefixes[part]))
    made = dataclasses.make_dataclass(cls.__name__, parts, bases=(Grouped,), frozen=True, kw_only=True)
    made.__doc__, made.verb, made.groups = cls.__doc__, cls, dict(groups)
    return made
