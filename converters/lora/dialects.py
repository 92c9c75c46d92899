"""The names LoRAs go by, read into and written from `converters.lora.factors.Lora`.

* ``diffusers``: ``transformer.<module>.lora_A.weight``, the modules of diffusers; ``text_encoder.`` likewise;
  ``.alpha`` where the scale is not 1.  PEFT's own ``base_model.model.`` and older suffixes are read too.
* ``ai-toolkit``: the same names with the scale in the factors; ``diffusion_model.`` and BFL modules are read too.
* ``kohya``: ``lora_unet_<BFL module with underscores>.lora_down.weight``, always with ``.alpha``.
* ``bfl``: ``<BFL module>.lora_A.weight``, biases, and norms that replace the model's (the control LoRAs).
* ``xlabs``: ``double_blocks.0.processor.qkv_lora1.down.weight``, attention only.
* ``orbax``: a folder of arrays by slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import CheckpointError
from converters.files import explained, flush, staged
from converters.keymap import Row, Slot, evaluate
from converters.lora.factors import Factors, Lora, combine, fold, inverse_rows
from converters.lora.names import TABLES
from converters.lora.names import slots as slots_of
from converters.lora.read import read_lora
from converters.lora.settings import states_scale
from converters.stream import Output, Progress, write_orbax, write_safetensors
from converters.targets import check_destination

DIALECTS = ("diffusers", "kohya", "bfl", "ai-toolkit", "xlabs", "orbax")
# Entries of a header that are about the bytes or the names of the file it came from.
_OF_THE_FILE = ("format", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
_FOLDED = ("bfl", "ai-toolkit", "xlabs")  # dialects without alpha, whose factors hold the scale


def express(lora: Lora, dialect: str) -> dict[str, np.ndarray]:
    """The tensors of a LoRA in a dialect.

    Raises:
        CheckpointError: listing what the dialect has no name for.
        ValueError: an unknown dialect.
    """
    if dialect not in DIALECTS:
        raise ValueError(f"dialect {dialect!r}: expected one of {', '.join(DIALECTS)}")
    if dialect == "orbax":
        return _express_orbax(lora)
    layout = {"kohya": "bfl", "ai-toolkit": "diffusers"}.get(dialect, dialect)
    tensors: dict[str, np.ndarray] = {}
    homeless: list[str] = []
    for component, slots in lora.factors.items():
        rows = TABLES[component].get(layout)
        if rows is None and dialect == "kohya":
            rows = TABLES[component]["diffusers"]
        left = dict(slots)
        for row in rows or ():
            if row.source.endswith(".weight") and "transpose" in row.ops:
                _express_row(row, component, left, dialect, tensors)
        homeless += [f"{component}: {slot.path}{'' if slot.index is None else [slot.index]}" for slot in left]
    homeless += _express_values(lora, dialect, layout, tensors)
    if homeless:
        shown = "\n  ".join(homeless[:20]) + ("\n  ..." if len(homeless) > 20 else "")
        raise CheckpointError(f"{lora.name}: {len(homeless)} changes have no name in the {dialect} dialect:\n  {shown}")
    return tensors


def _express_values(lora: Lora, dialect: str, layout: str, tensors: dict[str, np.ndarray]) -> list[str]:
    """Writes the values that replace parameters or are added to them; returns what the dialect has no name for."""
    homeless = []
    for component, values in lora.replaced.items():
        for slot, value in values.items():
            module = _module_name(slot, component, layout) if dialect in ("bfl", "diffusers", "ai-toolkit") else None
            if module is None:
                homeless.append(f"{component}: replaced {slot.path}{[slot.index]}")
            else:
                tensors[_stem(module[0], component, dialect) + f".{module[1]}"] = value
    for component, values in lora.added.items():
        left = dict(values)
        if dialect in ("bfl", "kohya", "ai-toolkit"):
            for row in TABLES[component].get(layout, TABLES[component]["diffusers"]):
                if len(row.shape) == 1:
                    _express_added(row, component, left, dialect, tensors)
        homeless += [f"{component}: added to {slot.path}{[slot.index]}" for slot in left]
    return homeless


def _module_name(slot: Slot, component: str, layout: str) -> tuple[str, str] | None:
    """Module and last part of the name of a norm; None if the layout has no name for it."""
    for row in TABLES[component].get(layout, ()):
        if row.shape == ("head",) and slots_of(row, slot.index or 0) == [slot]:
            module, _, last = row.source.replace("{i}", str(slot.index)).rpartition(".")
            return module, last
    return None


def _express_added(
    row: Row, component: str, left: dict[Slot, np.ndarray], dialect: str, out: dict[str, np.ndarray]
) -> None:
    """Writes what is added to a row of biases or a norm, taking its slots out of ``left``; parts unchanged are zero."""
    for index in _layers(row, left):
        slots = _slots_in(row, index)
        parts = [left.pop(slot, None) for slot in slots]
        widths = [4 if size == "mlp" else 1 for size in row.sizes] or [1]  # of the model, as `flux.dims` says
        width = next(part.shape[0] // n for part, n in zip(parts, widths, strict=True) if part is not None)
        filled = [
            np.zeros(n * width, np.float32) if part is None else part for part, n in zip(parts, widths, strict=True)
        ]
        module, _, last = row.source.replace("{i}", str(index)).rpartition(".")
        role = "diff_b" if last == "bias" else "diff"
        out[f"{_stem(module, component, dialect)}.{role}"] = inverse_rows(row.ops, np.concatenate(filled))


def _layers(row: Row, left: Mapping[Slot, Any]) -> list[int | None]:
    """Layers in which any parameter of a row is among ``left``."""
    targets = {slot.path for slot in slots_of(row, 0)}
    return sorted({slot.index for slot in left if slot.path in targets}, key=lambda i: -1 if i is None else i)


def _slots_in(row: Row, index: int | None) -> list[Slot]:
    return [Slot(slot.path, None if slot.index is None else index) for slot in slots_of(row, index or 0)]


def _express_row(row: Row, component: str, left: dict[Slot, Factors], dialect: str, out: dict[str, np.ndarray]) -> None:
    """Writes every layer of a row that the LoRA changes, taking its slots out of ``left``."""
    for index in _layers(row, left):
        slots = _slots_in(row, index)
        parts = [left.pop(slot, None) for slot in slots]
        present = [part for part in parts if part is not None]
        if not present:
            continue
        inputs = present[0].a.shape[1]
        whole = sum(part.b.shape[0] for part in present)
        sizes = [whole] if not row.sizes else [evaluate(s, {"width": inputs, "mlp": 4 * inputs}) for s in row.sizes]
        sizes = [size if part is None else part.b.shape[0] for part, size in zip(parts, sizes, strict=True)]
        factors = combine(parts, sizes) if len(parts) > 1 else present[0]
        if dialect in _FOLDED:
            factors = fold(factors)
        _name(row, component, index, factors, dialect, out)


def _stem(module: str, component: str, dialect: str) -> str:
    """A module's name with the prefix of its component."""
    if component == "text_encoder":
        module = f"text_model.{module}"
    if dialect == "kohya":
        prefix = {"transformer": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te3_"}[component]
        return prefix + module.replace(".", "_")
    return module if dialect in ("bfl", "xlabs") else f"{component}.{module}"


def _name(
    row: Row, component: str, index: int | None, factors: Factors, dialect: str, out: dict[str, np.ndarray]
) -> None:
    stem = _stem(row.source.removesuffix(".weight").replace("{i}", str(index)), component, dialect)
    b = np.ascontiguousarray(inverse_rows(row.ops, factors.b))
    a = np.ascontiguousarray(factors.a)
    if factors.bias is not None and dialect in ("kohya", "xlabs"):
        raise CheckpointError(f"{stem}: the {dialect} dialect has no name for the change of a bias")
    match dialect:
        case "kohya":
            out[f"{stem}.lora_down.weight"], out[f"{stem}.lora_up.weight"] = a, b
            out[f"{stem}.alpha"] = np.array(factors.scale * factors.rank, np.float32)
        case "xlabs":
            out[f"{stem}.down.weight"], out[f"{stem}.up.weight"] = a, b
        case _:
            out[f"{stem}.lora_A.weight"], out[f"{stem}.lora_B.weight"] = a, b
            if factors.bias is not None:
                out[f"{stem}.lora_B.bias"] = np.ascontiguousarray(inverse_rows(row.ops, factors.bias))
            if factors.scale != 1:
                out[f"{stem}.alpha"] = np.array(factors.scale * factors.rank, np.float32)


def _express_orbax(lora: Lora) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for component, slots in lora.factors.items():
        for slot, factors in slots.items():
            stem = f"{component}.{slot.path}" + ("" if slot.index is None else f".{slot.index}")
            tensors[f"{stem}.lora_a"], tensors[f"{stem}.lora_b"] = factors.a.T, factors.b.T
            tensors[f"{stem}.scale"] = np.array(factors.scale, np.float64)
            if factors.bias is not None:
                tensors[f"{stem}.bias"] = factors.bias
    for role, by_component in (("value", lora.replaced), ("added", lora.added)):
        for component, values in by_component.items():
            for slot, value in values.items():
                index = "" if slot.index is None else f".{slot.index}"
                tensors[f"{component}.{slot.path}{index}.{role}"] = value
    return tensors


def _kept_metadata(lora: Lora, dialect: str) -> dict[str, str]:
    """What the header of the file says that is still true in another dialect: trigger words, titles, licences."""
    kept = {name: text for name, text in lora.metadata.items() if name not in _OF_THE_FILE}
    return {name: text for name, text in kept.items() if not states_scale(name, text, of_network=dialect != "kohya")}


def convert_lora(
    source: str | Path, destination: str | Path, *, to: str, overwrite: bool = False, ignore_unknown: bool = False
) -> dict[str, Any]:
    """Reads a LoRA in any dialect and writes it in another; the output appears whole or not at all.

    Metadata goes along, but for settings and hashes that would be false of the new file.

    Returns:
        Counts for people: changed weights per component, largest rank.

    Raises:
        CheckpointError: as `read_lora` and `express`, or the destination cannot be written.
        ValueError: an unknown dialect.
    """
    destination = Path(destination)
    check_destination(destination, [source], overwrite)
    lora = read_lora(source, ignore_unknown=ignore_unknown)
    tensors, metadata = express(lora, to), _kept_metadata(lora, to)
    outputs = [Output(name, value.shape, value.dtype, lambda value=value: [value]) for name, value in tensors.items()]
    with staged(destination, overwrite=overwrite) as stage:
        product = stage / destination.name
        with Progress(sum(output.nbytes for output in outputs), "convert", False) as bar:
            try:
                if to == "orbax":
                    product.mkdir()
                    write_orbax(product, outputs, 1, bar, metadata)
                else:
                    write_safetensors(product, outputs, {"format": "pt", **metadata}, 1, bar)
            except OSError as exc:
                raise explained(exc, destination) from exc
        flush(product)
    ranks = [factors.rank for slots in lora.factors.values() for factors in slots.values()]
    return {
        "weights": {component: len(slots) for component, slots in lora.factors.items()},
        "replaced": sum(len(values) for values in lora.replaced.values()),
        "largest_rank": max(ranks, default=0),
        "to": to,
    }
