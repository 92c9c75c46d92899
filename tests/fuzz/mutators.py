"""Damage to inputs: bytes, text, JSON, safetensors files, folders.  Everything follows from the generator given."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

EDGES = (0, 1, -1, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**64 - 1)
WORDS = (
    "", " ", "\0", "\ud800", "é", "\u202e", "null", "nan", "inf", "-0", "1e400", "0x10", "../x", "/etc/passwd", "a/b",
    "..\\x", "C:\\x", "%s%n", "{0}", "{seed}", "__class__", "os:abort", "[i]", "(" * 200, "[" * 5000, "9" * 5000,
    "a" * 70000, "*", "^x", ".", "..", "BF16", "F64", "F8_E4M3", "I4", "float8", "<f4", "|O", "<M8[ns]", "V1000",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 0.5, -0.0, 1e308, float("nan"), float("inf"), 2**31, 2**63, 2**64, 10**30, 10**400,
    [], {}, [[]], {"": None}, [0], [1, 2], [-1, 5], [2**40, 2**40], ["x"], {"a": {"b": []}},
)  # fmt: skip


def mutate_bytes(rng: Random, data: bytes, edits: int = 4) -> bytes:
    """Up to ``edits`` random edits: bits, spans, numbers at the edges of their types, cuts, repetitions."""
    result = bytearray(data)
    for _ in range(rng.randint(1, edits)):
        at = rng.randrange(len(result) + 1)
        span = min(len(result) - at, rng.choice((1, 2, 4, 8, 64, 1024)))
        match rng.randrange(9):
            case 0 if span:
                result[at] ^= 1 << rng.randrange(8)
            case 1 if span:
                result[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x7B, rng.randrange(256)))
            case 2:
                del result[at : at + span]
            case 3:
                result[at:at] = rng.randbytes(rng.choice((1, 2, 8, 100)))
            case 4:
                result[at:at] = result[at : at + span] * rng.choice((1, 2, 50))
            case 5:
                del result[at:]
            case 6:
                size = rng.choice((1, 2, 4, 8))
                number = (rng.choice(EDGES) + rng.choice((0, 0, 1, -1))) % 2 ** (8 * size)
                where = rng.choice((at, at - at % 8))
                result[where : where + size] = number.to_bytes(size, rng.choice(("little", "big")))
            case 7:
                other = rng.randrange(len(result) + 1)
                result[at : at + span] = result[other : other + span]
            case 8:
                result += rng.randbytes(rng.choice((1, 8, 4096)))
    return bytes(result)


def mutate_text(rng: Random, text: str, words: tuple[str, ...] = (), edits: int = 3) -> str:
    """Up to ``edits`` random edits: characters, spans, and words of the language at hand or troublesome ones."""
    for _ in range(rng.randint(1, edits)):
        at = rng.randrange(len(text) + 1)
        span = rng.choice((0, 1, 1, 3, 10))
        match rng.randrange(6):
            case 0:
                text = text[:at] + text[at + max(span, 1) :]
            case 1:
                text = text[:at] + rng.choice((*words, *WORDS)) + text[at + span :]
            case 2:
                text = text[:at] + text[at : at + span] * rng.choice((2, 3, 1000)) + text[at + span :]
            case 3:
                text = text[:at] + rng.choice("()[]{}=,:;.+-*/^\"'\\ \n\t09eE_@") + text[at + span :]
            case 4:
                other = rng.randrange(len(text) + 1)
                text = text[:at] + text[other : other + 10] + text[at + span :]
            case 5:
                text = text[:at] + str(rng.choice(EDGES) * rng.choice((1, -1))) + text[at + span :]
    return text


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((value, key))
        _places(inner, found)
    return found


def mutate_json(rng: Random, value: Any, words: tuple[str, ...] = (), edits: int = 3) -> Any:
    """A copy of a JSON value with up to ``edits`` places replaced, removed, renamed, swapped, wrapped or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, edits)):
        places = _places(value, [])
        if not places:
            return copy.deepcopy(rng.choice((*VALUES, *WORDS)))
        owner, key = rng.choice(places)
        match rng.randrange(8):
            case 0 | 1:
                owner[key] = copy.deepcopy(rng.choice((*VALUES, *words, *WORDS)))
            case 2:
                del owner[key]
            case 3 if isinstance(owner, dict):
                owner[rng.choice((*words, *WORDS, f"{key}x"))] = owner.pop(key)
            case 4:
                other, there = rng.choice(places)
                owner[key] = copy.deepcopy(other[there])
            case 5:
                owner[key] = [owner[key]] if rng.random() < 0.5 else {rng.choice(WORDS): owner[key]}
            case 6 if isinstance(owner[key], int | float) and not isinstance(owner[key], bool):
                owner[key] = rng.choice((-owner[key], owner[key] * 2, owner[key] + 1, str(owner[key]), *EDGES))
            case 6 if isinstance(owner[key], str):
                owner[key] = mutate_text(rng, owner[key], words)
            case _:
                if isinstance(owner, dict):
                    owner[rng.choice((*words, *WORDS))] = copy.deepcopy(rng.choice(VALUES))
                else:
                    owner.insert(key, copy.deepcopy(rng.choice(VALUES)))
    return value


def json_bytes(rng: Random, value: Any) -> bytes:
    """A JSON text of a value, now and then damaged, repeated keys and deep nesting included."""
    text = json.dumps(value).encode()
    match rng.randrange(12):
        case 0:
            return mutate_bytes(rng, text)
        case 1:
            return b"[" * rng.choice((10, 1000, 200_000)) + text
        case 2:
            return text[:-1] + b"," + text[1:] if text[:1] == b"{" and len(text) > 2 else text
        case 3:
            return rng.choice((b"\xef\xbb\xbf" + text, text.decode().encode("utf-16"), b"", text * 2))
    return text


def mutate_safetensors(rng: Random, data: bytes) -> bytes:
    """A safetensors file with a damaged header (offsets kept right or not), damaged bytes, or both."""
    length = int.from_bytes(data[:8], "little")
    try:
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    except (ValueError, RecursionError):  # damaged before
        return mutate_bytes(rng, data)
    if rng.random() < 0.3 or not isinstance(header, dict):
        return mutate_bytes(rng, data)
    words = ("BF16", "F16", "F32", "F8_E4M3", "I8", "U8", "dtype", "shape", "data_offsets", "__metadata__", *header)
    if rng.random() < 0.5:
        header = mutate_json(rng, header, words)
    else:  # a sound file of other tensors: names, shapes and types change, offsets stay within the file
        names = [name for name in header if name != "__metadata__"]
        for name in rng.sample(names, min(len(names), rng.randint(1, 3))):
            if rng.random() < 0.5:
                header[mutate_text(rng, name, tuple(names[:50]))] = header.pop(name)
            elif isinstance(header[name], dict) and (shape := header[name].get("shape")):
                header[name]["shape"] = rng.choice((shape[::-1], [1, *shape], [*shape, 1], [_product(shape)]))
    text = json_bytes(rng, header)
    text = text + b" " * (-len(text) % 8) if rng.random() < 0.8 else text
    count = len(text) if rng.random() < 0.95 else rng.choice(EDGES) % 2**64
    return count.to_bytes(8, "little") + text + (body if rng.random() < 0.9 else mutate_bytes(rng, body))


def _product(sizes: list[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


Mutator = Callable[[Random, bytes], bytes]


def mutate_json_file(rng: Random, data: bytes) -> bytes:
    """`mutate_json` of a file's content; `mutate_bytes` of what is no JSON."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(rng, data)
    return json_bytes(rng, mutate_json(rng, value))


BY_SUFFIX: Mapping[str, Mutator] = {".json": mutate_json_file, ".safetensors": mutate_safetensors}


def mutate_folder(rng: Random, folder: Path, by_name: Mapping[str, Mutator] | None = None) -> None:
    """Damages one to three files of a folder in place: content, absence, links, folders in their stead.

    Args:
        rng: the generator.
        folder: changed in place.
        by_name: how the content of files of a name or suffix is damaged; `BY_SUFFIX` and `mutate_bytes` otherwise.
    """
    ways = {**BY_SUFFIX, **(by_name or {})}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        if not files:
            return
        path = rng.choice(files)
        way = ways.get(path.name, ways.get(path.suffix, mutate_bytes))
        match rng.randrange(12):
            case 0:
                path.unlink()
            case 1:
                if not (target := path.with_name(rng.choice(("x", f"{path.name}x", f"1{path.name}")))).exists():
                    path.rename(target)
            case 2:
                path.unlink()
                (path.mkdir if rng.random() < 0.7 else lambda path=path: os.mkfifo(path))()
            case 3:
                path.unlink()
                path.symlink_to(rng.choice((path.name, "/etc/hostname", "../absent", str(files[0]), "/dev/null", "/")))
            case 4:
                content = rng.choice(files).read_bytes()
                if not (target := path.with_name(f"copy{path.suffix}")).exists():
                    target.write_bytes(content)
            case 5:
                path.write_bytes(rng.choice(files).read_bytes())
            case 6:
                os.truncate(path, rng.choice((0, 1, 8, path.stat().st_size // 2, 2**20)))
            case _:
                path.write_bytes(way(rng, path.read_bytes()))
