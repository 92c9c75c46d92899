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

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import CheckpointError
from converters.files import explained, flush, staged
from converters.keymap import Row, Slot, evaluate
from converters.keymaps import clip, flux, t5
from converters.lora.factors import Factors, Lora, combine, fold, inverse_rows, slot_rows
from converters.reading.formats import read_json
from converters.reading.sources import MappedSource, OrbaxSource, Source, is_orbax
from converters.stream import Output, Progress, write_orbax, write_safetensors
from converters.targets import check_destination

DIALECTS = ("diffusers", "kohya", "bfl", "ai-toolkit", "xlabs", "orbax")
_FUSED_XLABS = ("width",) * 3


def _xlabs_rows() -> tuple[Row, ...]:
    rows = []
    for half, number in (("image", 1), ("text", 2)):
        names = tuple(f"double[{{i}}].{half}.attention.{part}.kernel" for part in ("query", "key", "value"))
        source = f"double_blocks.{{i}}.processor.{{}}_lora{number}.weight"
        rows.append(
            Row(source.replace("{}", "qkv"), names, ("3*width", "width"), ("transpose",), "double", _FUSED_XLABS)
        )
        out = f"double[{{i}}].{half}.attention_out.kernel"
        rows.append(Row(source.replace("{}", "proj"), out, ("width", "width"), ("transpose",), "double"))
    names = tuple(f"single[{{i}}].attention.{part}.kernel" for part in ("query", "key", "value"))
    source = "single_blocks.{i}.processor.{}_lora.weight"
    rows.append(Row(source.replace("{}", "qkv"), names, ("3*width", "width"), ("transpose",), "single", _FUSED_XLABS))
    out = Row(source.replace("{}", "proj"), "single[{i}].out.kernel", ("width", "inner"), ("transpose",), "single")
    return (*rows, out)


XLABS = _xlabs_rows()
_TABLES: dict[str, tuple[tuple[str, tuple[Row, ...]], ...]] = {
    "transformer": (("diffusers", flux.DIFFUSERS), ("bfl", flux.BFL), ("xlabs", XLABS)),
    "text_encoder": (("diffusers", clip.ROWS),),
    "text_encoder_2": (("diffusers", t5.ROWS),),
}
# prefix, component, modules are written with underscores; the first that fits is taken
_PREFIXES: tuple[tuple[str, str, bool], ...] = (
    ("text_encoders.clip_l.transformer.", "text_encoder", False),
    ("text_encoders.t5xxl.transformer.", "text_encoder_2", False),
    ("text_encoder_2.", "text_encoder_2", False),
    ("text_encoder.", "text_encoder", False),
    ("lora_te1_", "text_encoder", True),
    ("lora_te3_", "text_encoder_2", True),
    ("lora_te2_", "text_encoder_2", True),
    ("lora_te_", "text_encoder", True),
    ("model.diffusion_model.", "transformer", False),
    ("diffusion_model.", "transformer", False),
    ("transformer.", "transformer", False),
    ("lora_unet_", "transformer", True),
    ("lora_transformer_", "transformer", True),
    ("", "transformer", False),
)
_SUFFIXES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), role)
    for pattern, role in (
        (r"\.lora_A(\.default)?\.weight$|\.lora_down(\.default)?\.weight$", "a"),
        (r"\.lora_B(\.default)?\.weight$|\.lora_up(\.default)?\.weight$", "b"),
        (r"\.lora\.down\.weight$|\.lora_linear_layer\.down\.weight$", "a"),
        (r"\.lora\.up\.weight$|\.lora_linear_layer\.up\.weight$", "b"),
        (r"(?<=_lora)\.down\.weight$|(?<=_lora[12])\.down\.weight$", "a"),
        (r"(?<=_lora)\.up\.weight$|(?<=_lora[12])\.up\.weight$", "b"),
        (r"\.lora_B(\.default)?\.bias$", "bias"),
        (r"\.alpha$", "alpha"),
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
    r"\.diff(_b)?$|\.set_weight$": "a full difference of weights",
}


@dataclass
class _Module:
    """What a file says about one module, in the order its layout stores rows."""

    row: Row
    index: int
    found: dict[str, np.ndarray] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    name: str = ""


@cache
def _patterns(component: str, underscored: bool) -> tuple[tuple[re.Pattern[str], Row], ...]:
    compiled = []
    for _, rows in _TABLES[component]:
        for row in rows:
            if not row.source.endswith(".weight") or "transpose" not in row.ops:
                continue
            module = row.source.removesuffix(".weight")
            module = module.replace(".", "_") if underscored else module
            pattern = re.escape(module).replace(re.escape("{i}"), r"(\d{1,4})")
            compiled.append((re.compile(pattern), row))
    return tuple(compiled)


def _resolve(stem: str) -> tuple[str, Row, int] | None:
    """Component, row and layer of a module name in any dialect."""
    stem = stem.removeprefix("base_model.model.")
    for prefix, component, underscored in _PREFIXES:
        if not stem.startswith(prefix):
            continue
        name = stem.removeprefix(prefix)
        if component == "text_encoder":
            name = name.removeprefix("text_model_" if underscored else "text_model.")
        for pattern, row in _patterns(component, underscored):
            if match := pattern.fullmatch(name):
                return component, row, int(match[1]) if match.groups() else 0
    return None


def _norm_slot(key: str) -> Slot | None:
    """The slot of a norm that a control LoRA replaces."""
    name = key.removeprefix("base_model.model.").removeprefix("transformer.").removeprefix("diffusion_model.")
    for rows in (flux.BFL, flux.DIFFUSERS):
        for row in rows:
            if row.shape == ("head",) and isinstance(row.targets, str):
                match = re.fullmatch(re.escape(row.source).replace(re.escape("{i}"), r"(\d{1,4})"), name)
                if match:
                    return Slot(row.targets.replace("[{i}]", ""), int(match[1]))
    return None


def _slots(row: Row, index: int) -> list[Slot]:
    targets = (row.targets,) if isinstance(row.targets, str) else row.targets
    return [Slot(t.replace("[{i}]", ""), index if "[{i}]" in t else None) for t in targets]


def _sizes(row: Row, inputs: int, outputs: int) -> list[int]:
    """Rows of each part of a fused module; the model's width is its input's."""
    if not row.sizes:
        return [outputs]
    return [evaluate(size, {"width": inputs, "mlp": outputs - 3 * inputs}) for size in row.sizes]


# -- reading -------------------------------------------------------------------------------------------------------


def read_lora(path: str | Path, *, ignore_unknown: bool = False) -> Lora:
    """A LoRA in any of `DIALECTS`, from a safetensors file or an Orbax folder.

    Args:
        path: the file or folder.
        ignore_unknown: leave out keys that belong to nothing known instead of refusing the file.

    Raises:
        CheckpointError: not a LoRA, another method (DoRA, LoKr, ... by name), unknown or partly matching keys.
    """
    path = Path(path)
    if path.is_dir() and is_orbax(path):
        source = OrbaxSource(path)
        try:
            return _read_orbax(source, path)
        finally:
            source.close()
    adapter: dict[str, Any] = {}
    if path.is_dir() and (path / "adapter_config.json").is_file():
        adapter = read_json(path / "adapter_config.json")
        path = path / "adapter_model.safetensors"
    source = MappedSource([path])
    try:
        return parse(source, str(path), adapter=adapter, ignore_unknown=ignore_unknown)
    finally:
        source.close()


def parse(
    source: Source, where: str, *, adapter: Mapping[str, Any] | None = None, ignore_unknown: bool = False
) -> Lora:
    """`read_lora` for tensors already opened.  ``adapter`` is PEFT's ``adapter_config.json``, if there is one."""
    _refuse_other_methods(source.keys(), where, adapter or {})
    modules: dict[tuple[str, str, int], _Module] = {}
    replaced: dict[Slot, np.ndarray] = {}
    unknown: list[str] = []
    for key in source.keys():  # noqa: SIM118
        role, stem = next(
            ((role, pattern.sub("", key)) for pattern, role in _SUFFIXES if pattern.search(key)), ("", key)
        )
        known = _resolve(stem) if role else None
        if known is None:
            slot = _norm_slot(key)
            if slot is None:
                unknown.append(key)
            else:
                replaced[slot] = np.array(source.view(key))
            continue
        component, row, index = known
        module = modules.setdefault((component, row.source, index), _Module(row, index, name=stem))
        if role in module.found:
            raise CheckpointError(f"{where}: {stem} has two {role} factors ({', '.join(module.keys)}, {key})")
        module.found[role] = np.array(source.view(key))
        module.keys.append(key)
    partial = [key for m in modules.values() if not {"a", "b"} <= m.found.keys() for key in m.keys]
    if not ignore_unknown and (unknown or partial):
        raise CheckpointError(_complaint(where, unknown, partial, bool(modules)))
    factors: dict[str, dict[Slot, Factors]] = {}
    for (component, _, index), module in modules.items():
        if {"a", "b"} <= module.found.keys():
            pieces = _factors(module, component, source.metadata, adapter or {}, where)
            for slot, piece in zip(_slots(module.row, index), pieces, strict=True):
                if piece is None:
                    continue
                if slot in factors.setdefault(component, {}):
                    raise CheckpointError(f"{where}: two modules change {slot.path} of layer {slot.index}")
                factors[component][slot] = piece
    if not factors and not replaced:
        raise CheckpointError(f"{where}: no LoRA of FLUX.1 in it; keys begin with {sorted(source.keys())[:3]}")
    return Lora(factors, {"transformer": replaced} if replaced else {}, Path(where).name)


def _complaint(where: str, unknown: list[str], partial: list[str], any_known: bool) -> str:
    lines = [f"{where}: {'partly' if any_known else 'not'} a LoRA this tool knows"]
    if unknown:
        lines.append(f"{len(unknown)} keys of no known module: {', '.join(sorted(unknown)[:10])}")
    if partial:
        lines.append(f"{len(partial)} keys without their other half: {', '.join(sorted(partial)[:10])}")
    return "\n  ".join([*lines, "--ignore-unknown of `sega-jax convert` and `python -m converters lora` uses the rest"])


def _refuse_other_methods(keys: Iterable[str], where: str, adapter: Mapping[str, Any]) -> None:
    for pattern, method in _OTHERS.items():
        if found := [key for key in keys if re.search(pattern, key)]:
            raise CheckpointError(
                f"{where}: {method}, not a plain LoRA ({len(found)} keys such as {found[0]}); merge it with the tool "
                "that made it, or convert the merged checkpoint"
            )
    if adapter.get("use_dora"):
        raise CheckpointError(f"{where}: DoRA (use_dora in adapter_config.json), not a plain LoRA")


def _factors(
    module: _Module, component: str, metadata: Mapping[str, str], adapter: Mapping[str, Any], where: str
) -> list[Factors | None]:
    """Factors of each part of a module; None for parts of a fused one that it leaves as they are."""
    a, b = module.found["a"], module.found["b"]
    if a.ndim == 4 and a.shape[2:] == (1, 1):
        a = a[:, :, 0, 0]
    if b.ndim == 4 and b.shape[2:] == (1, 1):
        b = b[:, :, 0, 0]
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise CheckpointError(
            f"{where}: {module.name}: factors {module.found['a'].shape} and {module.found['b'].shape} do not multiply; "
            "expected [rank, in] and [out, rank]"
        )
    if not all(np.isfinite(np.asarray(x, np.float32)).all() for x in (a, b)):
        raise CheckpointError(f"{where}: {module.name}: NaN or infinity in its factors; the file is damaged")
    alpha = module.found.get("alpha")
    if alpha is not None and (alpha.size != 1 or not np.isfinite(float(alpha.reshape(())))):
        raise CheckpointError(f"{where}: {module.name}: alpha should be one finite number, has shape {alpha.shape}")
    rank = a.shape[0]
    scale = (
        float(alpha.reshape(())) / rank if alpha is not None else _stated(module, component, metadata, adapter, rank)
    )
    sizes = _sizes(module.row, a.shape[1], b.shape[0])
    bias = module.found.get("bias")
    if min(sizes) <= 0 or sum(sizes) != b.shape[0] or (bias is not None and bias.shape != (b.shape[0],)):
        raise CheckpointError(
            f"{where}: {module.name}: {b.shape[0]} output rows for {a.shape[1]} inputs do not divide into "
            f"{' + '.join(str(size) for size in module.row.sizes) or 'one layer'} of a FLUX.1 model"
        )
    edges = np.cumsum(sizes)[:-1]
    parts = np.split(slot_rows(module.row.ops, b), edges)
    biases = [None] * len(parts) if bias is None else np.split(slot_rows(module.row.ops, bias), edges)
    split = [Factors(a, part, scale, piece) for part, piece in zip(parts, biases, strict=True)]
    changed = [
        bool(np.any(piece.b != 0)) or bool(piece.bias is not None and np.any(piece.bias != 0)) for piece in split
    ]
    if len(split) == 1 or not any(changed):
        return list(split)
    return [piece.trimmed() if used else None for piece, used in zip(split, changed, strict=True)]


def _stated(
    module: _Module, component: str, metadata: Mapping[str, str], adapter: Mapping[str, Any], rank: int
) -> float:
    """The scale of a module without an alpha of its own: from PEFT's record if there is one, else 1."""
    settings = dict(adapter)
    try:
        record = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        prefix = f"{component}."
        settings |= {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}
        pattern = settings.get("alpha_pattern") or {}
        alpha = next(
            (v for k, v in pattern.items() if re.search(rf"(.*\.)?{k}$", module.name)), settings.get("lora_alpha")
        )
        if alpha is None:
            return 1.0
        return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    except (ValueError, TypeError, AttributeError, RecursionError, re.error) as exc:
        raise CheckpointError(f"{module.name}: the LoRA's PEFT settings cannot be read ({exc})") from exc


def _read_orbax(source: OrbaxSource, path: Path) -> Lora:
    factors: dict[str, dict[Slot, Factors]] = {}
    replaced: dict[str, dict[Slot, np.ndarray]] = {}
    found: dict[tuple[str, Slot], dict[str, np.ndarray]] = {}
    for name in source.keys():  # noqa: SIM118
        component, _, rest = name.partition(".")
        rest, _, role = rest.rpartition(".")
        target, _, last = rest.rpartition(".")
        slot = Slot(target, int(last)) if last.isdecimal() else Slot(rest)
        if component not in _TABLES or role not in ("lora_a", "lora_b", "scale", "bias", "value"):
            raise CheckpointError(f"{path}: {name!r} is not part of a LoRA; convert checkpoints with `convert`")
        found.setdefault((component, slot), {})[role] = np.array(source.view(name))
    for (component, slot), roles in found.items():
        if roles.keys() == {"value"}:
            replaced.setdefault(component, {})[slot] = roles["value"]
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
    return Lora(factors, replaced, path.name)


# -- writing -------------------------------------------------------------------------------------------------------


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
        rows = dict(_TABLES[component]).get(layout)
        if rows is None and dialect == "kohya":
            rows = dict(_TABLES[component])["diffusers"]
        left = dict(slots)
        for row in rows or ():
            if row.source.endswith(".weight") and "transpose" in row.ops:
                _express_row(row, component, left, dialect, tensors)
        homeless += [f"{component}: {slot.path}{'' if slot.index is None else [slot.index]}" for slot in left]
    for component, values in lora.replaced.items():
        for slot, value in values.items():
            name = _norm_name(slot, layout) if dialect in ("bfl", "diffusers", "ai-toolkit") else None
            if name is None:
                homeless.append(f"{component}: replaced {slot.path}{[slot.index]}")
            else:
                tensors[name] = value
    if homeless:
        shown = "\n  ".join(homeless[:20]) + ("\n  ..." if len(homeless) > 20 else "")
        raise CheckpointError(f"{lora.name}: {len(homeless)} changes have no name in the {dialect} dialect:\n  {shown}")
    return tensors


def _norm_name(slot: Slot, layout: str) -> str | None:
    rows = {"bfl": flux.BFL, "diffusers": flux.DIFFUSERS}[layout]
    prefix = "transformer." if layout == "diffusers" else ""
    for row in rows:
        if isinstance(row.targets, str) and row.targets.replace("[{i}]", "") == slot.path:
            return prefix + row.source.replace("{i}", str(slot.index))
    return None


def _express_row(row: Row, component: str, left: dict[Slot, Factors], dialect: str, out: dict[str, np.ndarray]) -> None:
    """Writes every layer of a row that the LoRA changes, taking its slots out of ``left``."""
    targets = {slot.path for slot in _slots(row, 0)}
    for index in sorted({slot.index for slot in left if slot.path in targets}, key=lambda i: -1 if i is None else i):
        slots = [Slot(slot.path, index if slot.index is not None else None) for slot in _slots(row, index or 0)]
        parts = [left.pop(slot, None) for slot in slots]
        present = [part for part in parts if part is not None]
        if not present:
            continue
        inputs = present[0].a.shape[1]
        whole = sum(part.b.shape[0] for part in present)
        sizes = [whole] if not row.sizes else [evaluate(s, {"width": inputs, "mlp": 4 * inputs}) for s in row.sizes]
        sizes = [size if part is None else part.b.shape[0] for part, size in zip(parts, sizes, strict=True)]
        factors = combine(parts, sizes) if len(parts) > 1 else present[0]
        if dialect in ("bfl", "ai-toolkit", "xlabs"):
            factors = fold(factors)
        _name(row, component, index, factors, dialect, out)


def _name(
    row: Row, component: str, index: int | None, factors: Factors, dialect: str, out: dict[str, np.ndarray]
) -> None:
    module = row.source.removesuffix(".weight").replace("{i}", str(index))
    if component == "text_encoder":
        module = f"text_model.{module}"
    b = np.ascontiguousarray(inverse_rows(row.ops, factors.b))
    a = np.ascontiguousarray(factors.a)
    if factors.bias is not None and dialect in ("kohya", "xlabs"):
        raise CheckpointError(f"{module}: the {dialect} dialect has no name for the change of a bias")
    match dialect:
        case "kohya":
            prefix = {"transformer": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te3_"}[
                component
            ]
            stem = prefix + module.replace(".", "_")
            out[f"{stem}.lora_down.weight"], out[f"{stem}.lora_up.weight"] = a, b
            out[f"{stem}.alpha"] = np.array(factors.scale * factors.rank, np.float32)
        case "xlabs":
            out[f"{module}.down.weight"], out[f"{module}.up.weight"] = a, b
        case _:
            stem = module if dialect == "bfl" else f"{component}.{module}"
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
    for component, values in lora.replaced.items():
        for slot, value in values.items():
            tensors[f"{component}.{slot.path}" + ("" if slot.index is None else f".{slot.index}") + ".value"] = value
    return tensors


def convert_lora(
    source: str | Path, destination: str | Path, *, to: str, overwrite: bool = False, ignore_unknown: bool = False
) -> dict[str, Any]:
    """Reads a LoRA in any dialect and writes it in another; the output appears whole or not at all.

    Returns:
        Counts for people: changed weights per component, largest rank.

    Raises:
        CheckpointError: as `read_lora` and `express`, or the destination cannot be written.
        ValueError: an unknown dialect.
    """
    destination = Path(destination)
    check_destination(destination, [source], overwrite)
    lora = read_lora(source, ignore_unknown=ignore_unknown)
    tensors = express(lora, to)
    outputs = [Output(name, value.shape, value.dtype, lambda value=value: [value]) for name, value in tensors.items()]
    with staged(destination, overwrite=overwrite) as stage:
        product = stage / destination.name
        with Progress(sum(output.nbytes for output in outputs), "convert", False) as bar:
            try:
                if to == "orbax":
                    product.mkdir()
                    write_orbax(product, outputs, 1, bar)
                else:
                    write_safetensors(product, outputs, {"format": "pt"}, 1, bar)
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
