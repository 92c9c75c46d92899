"""Files of prompts: JSON lines or plain text, from a file or standard input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LARGEST_FILE = 100_000_000  # bytes of prompts
_JSON = (".jsonl", ".ndjson", ".json")


def read_prompts(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Line numbers (from 1) and rows; empty lines are skipped.

    A file of one of JSON's names, or whose first line begins with ``{``, holds a JSON object per line; any other holds
    a prompt per line.  ``-`` is standard input.  UTF-8, with or without a byte order mark.

    Raises:
        ValueError: not UTF-8, a line that is no JSON object, no line at all, or more than any list of prompts has.
        OSError: if it cannot be read.
    """
    name = "standard input" if str(path) == "-" else str(path)
    if str(path) == "-":
        data = sys.stdin.buffer.read(LARGEST_FILE + 1)
    else:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    if len(data) > LARGEST_FILE:
        raise ValueError(f"{name}: more than {LARGEST_FILE} bytes of prompts; split the file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 text ({error}); expected a JSON object or a prompt per line") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{name}: no rows; expected a JSON object or a prompt per line")
    if path.suffix.lower() in _JSON or lines[0][1].startswith("{"):
        return [(number, _object(line, f"{name} line {number}")) for number, line in lines]
    for number, line in lines:
        if line.startswith("{"):
            raise ValueError(f"{name} line {number}: a JSON object among plain prompts; give one kind per file")
    return [(number, {"prompt": line}) for number, line in lines]


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return dict(pairs)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_fields)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}); expected one object per line") from error
    if not isinstance(row, dict):
        raise ValueError(f'{where}: expected an object such as {{"prompt": "…"}}, got {type(row).__name__}')
    return row
