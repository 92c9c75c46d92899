"""LoRA files of every dialect, read into one meaning (`converters.lora.factors.Lora`)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import CheckpointError
from converters.keymap import Row, Slot
from converters.lora.factors import Factors, Lora, slot_rows
from converters.lora.names import TABLES, Module, is_unused, resolve, sizes, slots
from converters.lora.settings import Settings, gather
from converters.reading.formats import listing, read_json
from converters.reading.sources import MappedSource, OrbaxSource, Source, is_orbax

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's
_DIFFUSERS = "pytorch_lora_weights.safetensors"
_SUFFIXES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (r"\.lora_A(\.\w+)?\.weight$|\.lora_down(\.\w+)?\.weight$", "a"),  # the name of PEFT's adapter in between
        (r"\.lora_B(\.\w+)?\.weight$|\.lora_up(\.\w+)?\.weight$", "b"),
        (r"\.lora\.down\.weight$|\.lora_linear_layer\.down\.weight$", "a"),
        (r"\.lora\.up\.weight$|\.lora_linear_layer\.up\.weight$", "b"),
        (r"(?<=_lora)\.down\.weight$|(?<=_lora[12])\.down\.weight$", "a"),
        (r"(?<=_lora)\.up\.weight$|(?<=_lora[12])\.up\.weight$", "b"),
        (r"\.lora_B(\.\w+)?\.bias$", "bias"),
        (r"\.alpha$", "alpha"),
        (r"\.diff$", "diff"),
        (r"\.diff_b$", "diff_b"),
    )
)
_OTHERS = {  # what a key says -> the method, which is not a LoRA
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"lokr_": "LoKr",
    r"hada_": "LoHa",
    r"oft_|boft_": "OFT",
    r"\.(a1|a2|b1|b2)\.weight$": "GLoRA",
    r"on_input$|ia3_l": "IA3",
    r"lora_mid": "LoCon with a middle factor (Tucker)",
    r"\.set_weight$": "a file of replaced weights",
    r"\.lora_E(\.\w+)?$|\.ranknum(\.\w+)?$": "AdaLoRA",
    r"vera_lambda_": "VeRA",
}
_INSTEAD = "merge it with the tool that made it, or convert the merged checkpoint"


def lora_files(path: str | Path) -> tuple[Path, Path | None]:
    """The weights file of a LoRA, and the ``adapter_config.json`` that belongs to it.

    A folder is PEFT's (``adapter_model.safetensors``), diffusers' (``pytorch_lora_weights.safetensors``), or one with a
    single safetensors file.  Settings beside a file are its own if it has PEFT's name, or is alone in its folder.

    Raises:
        CheckpointError: a folder without weights, or with several files that could be meant.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    beside = folder / ADAPTER_CONFIG
    config = beside if beside.is_file() else None
    if not path.is_dir():
        alone = config is not None and [file for file in listing(folder) if file.suffix == ".safetensors"] == [path]
        return path, config if path.name == ADAPTER or alone else None
    names = [file.name for file in listing(path) if file.is_file()]
    files = [name for name in names if name.endswith(".safetensors")]
    known = [name for name in (ADAPTER, _DIFFUSERS) if name in files]
    if len(known) > 1 or (not known and len(files) > 1):
        raise CheckpointError(f"{path}: {', '.join(known or files)} could all be meant; give one of the files")
    if files:
        name = known[0] if known else files[0]
        return path / name, config if name == ADAPTER or len(files) == 1 else None
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        raise CheckpointError(
            f"{path}: only pickled weights ({', '.join(pickles)}), which can run code when opened and are refused; "
            "save the LoRA as safetensors"
        )
    raise CheckpointError(f"{path}: no LoRA in it; expected {ADAPTER}, {_DIFFUSERS} or one other .safetensors file")


def read_lora(path: str | Path, *, ignore_unknown: bool = False) -> Lora:
    """A LoRA in any of `converters.lora.DIALECTS`: a safetensors file, a folder that holds one, or an Orbax folder.

    Args:
        path: the file or folder.
        ignore_unknown: leave out keys that belong to nothing known instead of refusing the file.

    Raises:
        CheckpointError: not a LoRA, another method (DoRA, LoKr, ... by name), unknown or partly matching keys, settings
            that contradict each other or apply to nothing.
    """
    path = Path(path)
    if path.is_dir() and is_orbax(path):
        with contextlib.closing(OrbaxSource(path)) as orbax:
            return _read_orbax(orbax, path)
    file, config = lora_files(path)
    adapter = {} if config is None else read_json(config)
    with contextlib.closing(MappedSource([file])) as source:
        return parse(source, str(file), adapter=adapter, ignore_unknown=ignore_unknown)


@dataclass
class _Found:
    """What a file says about one module, in the order its layout stores rows."""

    module: Module
    stem: str
    values: dict[str, np.ndarray] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)


@dataclass
class _Sorted:
    """Keys of a file by what they are."""

    pairs: dict[tuple[str, str, int], _Found] = field(default_factory=dict)
    added: dict[str, dict[Slot, np.ndarray]] = field(default_factory=dict)
    replaced: dict[Slot, np.ndarray] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)


def parse(
    source: Source, where: str, *, adapter: Mapping[str, Any] | None = None, ignore_unknown: bool = False
) -> Lora:
    """`read_lora` for tensors already opened.  ``adapter`` is PEFT's ``adapter_config.json``, if there is one."""
    settings = gather(adapter or {}, source.metadata, where, lenient=ignore_unknown)
    _refuse_other_methods(source.keys(), where)
    found = _sort(source, where)
    if not ignore_unknown and (found.unknown or found.partial):
        raise CheckpointError(_complaint(where, found.unknown, found.partial, bool(found.pairs)))
    factors: dict[str, dict[Slot, Factors]] = {}
    for (component, _, index), pair in found.pairs.items():
        row = pair.module.weight
        if row is None:
            continue
        for slot, piece in zip(slots(row, index), _factors(pair, row, settings, where), strict=True):
            if piece is None:
                continue
            if slot in factors.setdefault(component, {}):
                raise CheckpointError(f"{where}: two modules change {slot.path} of layer {slot.index}")
            factors[component][slot] = piece
    if not factors and not found.replaced and not found.added:
        raise CheckpointError(f"{where}: no LoRA of FLUX.1 in it; keys begin with {sorted(source.keys())[:3]}")
    if not ignore_unknown and (unused := settings.unused()):
        raise CheckpointError(
            f"{where}: {len(unused)} statements about alpha fit no module of the file, so that its scale is in doubt: "
            f"{'; '.join(unused[:5])}. Correct the settings, or leave them out with --ignore-unknown"
        )
    replaced = {"transformer": found.replaced} if found.replaced else {}
    return Lora(factors, replaced, Path(where).name, found.added, dict(source.metadata))


def _sort(source: Source, where: str) -> _Sorted:
    found, lost = _Sorted(), dict[str, list[tuple[str, str]]]()
    for key in source.keys():  # noqa: SIM118
        role, stem = next(
            ((role, pattern.sub("", key)) for pattern, role in _SUFFIXES if pattern.search(key)), ("", "")
        )
        module = resolve(stem or key.rpartition(".")[0])
        if role in ("a", "b", "bias", "alpha") and module is not None and module.is_linear:
            pair = found.pairs.setdefault(module.key, _Found(module, stem))
            if role in pair.values:
                raise CheckpointError(f"{where}: {stem} has two {role} factors ({', '.join(pair.keys)}, {key})")
            pair.values[role] = np.array(source.view(key))
            pair.keys.append(key)
        elif role in ("diff", "diff_b"):
            _sort_difference(key, role, module, source, where, found)
        elif role:
            lost.setdefault(stem, []).append((role, key))
        elif module is not None and module.weight is not None and module.weight.shape == ("head",):
            found.replaced[slots(module.weight, module.index)[0]] = _finite(np.array(source.view(key)), key, where)
        else:
            found.unknown.append(key)
    for stem, keys in lost.items():
        ups = [key for role, key in keys if role == "b"]
        if not is_unused(stem) and not (ups and not any(np.any(source.view(key)) for key in ups)):
            found.unknown += [key for _, key in keys]
    halves = [name for name, pair in found.pairs.items() if not {"a", "b"} <= pair.values.keys()]
    for name in halves:
        found.partial += found.pairs.pop(name).keys
    return found


def _sort_difference(key: str, role: str, module: Module | None, source: Source, where: str, found: _Sorted) -> None:
    """A value that is added to a bias or a norm as it is, as ComfyUI's extractions have them; zeros are left out."""
    value = np.array(source.view(key))
    if value.size and not np.any(value):
        return
    row = None if module is None else module.bias if role == "diff_b" else module.weight
    if module is None or row is None:
        found.unknown.append(key)
        return
    if len(row.shape) != 1:
        raise CheckpointError(f"{where}: {key}: a full difference of weights, not a plain LoRA; {_INSTEAD}")
    if value.ndim != 1:
        raise CheckpointError(f"{where}: {key} has the shape {value.shape}; expected one number per output")
    widths = 3 if len(row.sizes) == 3 else 7  # in a fused bias: query, key, value, and four for an MLP
    pieces = _split(row, _finite(value, key, where), value.size // widths, key, where)
    for slot, piece in zip(slots(row, module.index), pieces, strict=True):
        if slot in found.added.setdefault(module.component, {}):
            raise CheckpointError(f"{where}: two keys add to {slot.path} of layer {slot.index}, the second is {key}")
        found.added[module.component][slot] = piece


def _split(row: Row, rows: np.ndarray, inputs: int, name: str, where: str) -> list[np.ndarray]:
    """The rows of each part of a module, in the order of its slots."""
    counts = sizes(row, inputs, rows.shape[0])
    if min(counts) <= 0 or sum(counts) != rows.shape[0]:
        raise CheckpointError(
            f"{where}: {name}: {rows.shape[0]} output rows for {inputs} inputs do not divide into "
            f"{' + '.join(str(size) for size in row.sizes) or 'one layer'} of a FLUX.1 model"
        )
    return np.split(slot_rows(row.ops, rows), np.cumsum(counts)[:-1])


def _finite(values: np.ndarray, name: str, where: str) -> np.ndarray:
    try:
        sound = bool(np.isfinite(np.asarray(values, np.float32)).all())
    except (TypeError, ValueError) as exc:
        raise CheckpointError(f"{where}: {name}: holds {values.dtype.name}; expected real numbers") from exc
    if not sound:
        raise CheckpointError(f"{where}: {name}: NaN or infinity in its factors; the file is damaged")
    return values


def _complaint(where: str, unknown: list[str], partial: list[str], any_known: bool) -> str:
    lines = [f"{where}: {'partly' if any_known else 'not'} a LoRA this tool knows"]
    if unknown:
        lines.append(f"{len(unknown)} keys of no known module: {', '.join(sorted(unknown)[:10])}")
    if partial:
        lines.append(f"{len(partial)} keys without their other half: {', '.join(sorted(partial)[:10])}")
    return "\n  ".join([*lines, "--ignore-unknown of `sega-jax convert` and `python -m converters lora` uses the rest"])


def _refuse_other_methods(keys: Sequence[str], where: str) -> None:
    for pattern, method in _OTHERS.items():
        if found := [key for key in keys if re.search(pattern, key)]:
            raise CheckpointError(
                f"{where}: {method}, not a plain LoRA ({len(found)} keys such as {found[0]}); {_INSTEAD}"
            )


def _factors(pair: _Found, row: Row, settings: Settings, where: str) -> list[Factors | None]:
    """Factors of each part of a module; None for parts of a fused one that it leaves as they are."""
    a, b = pair.values["a"], pair.values["b"]
    if a.ndim == 4 and a.shape[2:] == (1, 1):
        a = a[:, :, 0, 0]
    if b.ndim == 4 and b.shape[2:] == (1, 1):
        b = b[:, :, 0, 0]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise CheckpointError(
            f"{where}: {pair.stem}: factors {pair.values['a'].shape} and {pair.values['b'].shape} do not multiply; "
            "expected [rank, in] and [out, rank]"
        )
    bias = pair.values.get("bias")
    for values in (a, b) if bias is None else (a, b, bias):
        _finite(values, pair.stem, where)
    if bias is not None and bias.shape != (b.shape[0],):
        raise CheckpointError(f"{where}: {pair.stem}: bias of shape {bias.shape} for {b.shape[0]} output rows")
    scale = settings.scale(pair.module.component, pair.module.name, a.shape[0], _alpha(pair, where))
    parts = _split(row, b, a.shape[1], pair.stem, where)
    biases = [None] * len(parts) if bias is None else _split(row, bias, a.shape[1], pair.stem, where)
    split = [Factors(a, part, scale, piece) for part, piece in zip(parts, biases, strict=True)]
    changed = [bool(np.any(part.b)) or bool(part.bias is not None and np.any(part.bias)) for part in split]
    if len(split) == 1 or not any(changed):
        return list(split)
    return [piece.trimmed() if used else None for piece, used in zip(split, changed, strict=True)]


def _alpha(pair: _Found, where: str) -> float | None:
    alpha = pair.values.get("alpha")
    if alpha is None:
        return None
    if alpha.size != 1 or not np.isfinite(value := float(np.asarray(alpha, np.float64).reshape(()))):
        raise CheckpointError(f"{where}: {pair.stem}: alpha should be one finite number, has shape {alpha.shape}")
    return value


def _read_orbax(source: OrbaxSource, path: Path) -> Lora:
    factors: dict[str, dict[Slot, Factors]] = {}
    values: dict[str, dict[str, dict[Slot, np.ndarray]]] = {"value": {}, "added": {}}
    found: dict[tuple[str, Slot], dict[str, np.ndarray]] = {}
    for name in source.keys():  # noqa: SIM118
        component, _, rest = name.partition(".")
        rest, _, role = rest.rpartition(".")
        target, _, last = rest.rpartition(".")
        slot = Slot(target, int(last)) if last.isdecimal() and len(last) < 5 else Slot(rest)
        if component not in TABLES or role not in ("lora_a", "lora_b", "scale", "bias", *values):
            raise CheckpointError(f"{path}: {name!r} is not part of a LoRA; convert checkpoints with `convert`")
        found.setdefault((component, slot), {})[role] = _finite(np.array(source.view(name)), name, str(path))
    for (component, slot), roles in found.items():
        for role in roles.keys() & values.keys():
            values[role].setdefault(component, {})[slot] = roles.pop(role)
        if not roles:
            continue
        if not {"lora_a", "lora_b", "scale"} <= roles.keys():
            raise CheckpointError(
                f"{path}: {component}.{slot.path}: needs lora_a, lora_b and scale, has {sorted(roles)}"
            )
        a, b = roles["lora_a"].T, roles["lora_b"].T
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or roles["scale"].shape != ():
            raise CheckpointError(
                f"{path}: {component}.{slot.path}: factors of shapes {a.shape}, {b.shape} do not multiply"
            )
        factors.setdefault(component, {})[slot] = Factors(a, b, float(roles["scale"]), roles.get("bias"))
    return Lora(factors, values["value"], path.name, values["added"], dict(source.metadata))
