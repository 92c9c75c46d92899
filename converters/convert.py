"""From any checkpoint layout to any other: `convert`."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters.components import CONFIG_KEY, Checkpoint, Part, open_checkpoint
from converters.errors import CheckpointError, naming
from converters.files import flush, staged
from converters.keymap import OPERATIONS, Tensor
from converters.lora import Lora, fitting, merge, parse_lora, read_lora
from converters.reading.formats import inside, read_json, read_pipeline
from converters.reading.quantised import DEQUANTISED_KEY, FORMATS, Format, quantised
from converters.reading.sources import is_float, kept_type
from converters.report import REPORT_FILE, report_path, tool_version
from converters.stream import (
    Output,
    Progress,
    default_workers,
    write_orbax,
    write_safetensors,
    write_sharded,
    write_text,
)
from converters.targets import check_destination, foreign_files
from converters.verify import values as verification
from converters.verify.digest import file_hashes

TARGETS = ("orbax", "diffusers", "bfl")
DTYPES: dict[str, np.dtype] = {
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
    "float16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "float32": np.dtype(np.float32),
}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_FILES_NOTED = 5000  # files of the source named in the report (an Orbax source has one per array)
_SPARE = 64 << 20  # bytes that a conversion leaves free on the disk


def parse_size(text: str | int) -> int:
    """Bytes from ``"5GB"``, ``"500MB"`` or a number.

    Raises:
        ValueError: anything else, or less than one byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", str(text).strip().upper())
    unit = match and (match[2] if match[2] in _UNITS else f"{match[2]}B")
    if not match or unit not in (*_UNITS, "B") or float(match[1]) <= 0:
        raise ValueError(f"size {text!r}: expected a positive number of bytes such as 10GB or 500MB")
    return max(1, int(float(match[1]) * _UNITS.get(unit, 1)))


def _layout_of(part: Part, target: str) -> str:
    if target == "bfl":
        return "bfl" if "bfl" in part.family.signatures else "diffusers"
    if target == "diffusers":
        return part.origin if part.origin.startswith("diffusers") else "diffusers"
    return target


def outputs_for(part: Part, layout: str, dtype: np.dtype | None) -> list[Output]:
    """What to write for a component in a layout: each tensor as views of the source, through the slots."""
    slots = part.slots()
    rename = part.names_for(layout)
    outputs = []
    for tensor in part.family.tensors(part.config, layout):
        origin = [slots[slot] for slot in tensor.slots]
        stored = {kept_type(part.source, source.source) for source, _ in origin}
        kind = _common(stored, dtype, tensor.source)
        for name in rename(tensor.source):
            outputs.append(Output(name, tensor.shape, kind, _reader(part, tensor, origin)))
    return outputs


def _common(stored: set[np.dtype], dtype: np.dtype | None, name: str) -> np.dtype:
    if len(stored) == 1:
        (kind,) = stored
        return dtype if dtype is not None and is_float(kind) else kind
    if dtype is None or not all(is_float(kind) for kind in stored):
        kinds = ", ".join(sorted(kind.name for kind in stored))
        raise CheckpointError(f"{name} is fused from tensors of different types ({kinds}); pass --dtype to choose one")
    return dtype


def _reader(part: Part, tensor: Tensor, origin: Sequence[tuple[Tensor, int]]):
    def pieces() -> list[np.ndarray]:
        parts = [source.pieces(part.source.view(source.source))[i] for source, i in origin]
        for op in reversed(tensor.ops):
            parts = [OPERATIONS[op][1](piece) for piece in parts]
        return parts

    return pieces


def _copy_small(folder: Path, to: Path, skip: Sequence[str] = ()) -> None:
    """The files of a folder that are not weights: configurations, vocabularies, licences."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() or entry.name in skip or entry.name.startswith("."):
            continue
        if entry.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".gguf", ".onnx"):
            continue
        if entry.name.endswith(".index.json") or entry.name in (REPORT_FILE, "_METADATA", "_CHECKPOINT_METADATA"):
            continue
        shutil.copyfile(inside(folder, entry.name, f"the folder {folder}"), to / entry.name)


def _write_part(
    part: Part, target: str, folder: Path, dtype: np.dtype | None, shard: int, workers: int, bar: Progress
) -> None:
    """A component as a folder."""
    folder.mkdir()
    if part.folder is not None:
        _copy_small(part.folder, folder)
    if not (folder / "config.json").exists():
        write_text(folder / "config.json", json.dumps(part.config, indent=2, sort_keys=True))
    outputs = outputs_for(part, _layout_of(part, target), dtype)
    if target == "orbax":
        write_orbax(folder, outputs, workers, bar)
    else:
        write_sharded(folder, part.family.stem, outputs, shard, workers, bar)


def _outputs(part: Part, target: str, dtype: np.dtype | None, form: Format | None) -> list[Output]:
    outputs = outputs_for(part, _layout_of(part, target), dtype)
    return outputs if form is None else quantised(outputs, part.family.name, form)


def _write_single(
    part: Part, path: Path, dtype: np.dtype | None, form: Format | None, workers: int, bar: Progress
) -> None:
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(part.config, sort_keys=True)}
    write_safetensors(path, _outputs(part, "bfl", dtype, form), metadata, workers, bar)


def _write(
    checkpoint: Checkpoint,
    target: str,
    product: Path,
    base: Path | None,
    dtype: np.dtype | None,
    form: Format | None,
    shard: int,
    workers: int,
    bar: Progress,
) -> None:
    parts = checkpoint.parts
    whole = checkpoint.pipeline is not None or len(parts) > 1
    if target == "bfl":
        if not whole:
            _write_single(next(iter(parts.values())), product, dtype, form, workers, bar)
            return
        product.mkdir()
        for part in parts.values():
            _write_single(part, product / part.family.single, dtype, form, workers, bar)
        return
    if not whole:
        _write_part(next(iter(parts.values())), target, product, dtype, shard, workers, bar)
        return
    product.mkdir()
    for name, part in parts.items():
        _write_part(part, target, product / name, dtype, shard, workers, bar)
    if base is not None:
        _copy_rest(base, product, parts)


def _copy_rest(base: Path, product: Path, parts: Mapping[str, Part]) -> None:
    """What a pipeline has besides weights: its index, scheduler, tokenisers."""
    _copy_small(base, product)
    for name in read_pipeline(base) if (base / "model_index.json").is_file() else ():
        if name not in parts:
            folder = base / name
            if not folder.is_dir():
                raise CheckpointError(f"{folder}: named by {base / 'model_index.json'} but missing; download it")
            (product / name).mkdir()
            _copy_small(folder, product / name)


def _check_room(needed: int, destination: Path) -> None:
    try:
        free = shutil.disk_usage(destination.parent).free
    except OSError as exc:
        raise CheckpointError(f"{destination.parent}: cannot be written to ({exc.strerror})") from exc
    if needed + _SPARE > free:
        raise CheckpointError(
            f"{destination}: needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free; "
            "free some space or write elsewhere"
        )


def _size(checkpoint: Checkpoint, target: str, dtype: np.dtype | None, form: Format | None) -> int:
    """Bytes of all tensors as they will be written."""
    parts = checkpoint.parts.values()
    return sum(output.nbytes for part in parts for output in _outputs(part, target, dtype, form))


def _kept(checkpoint: Checkpoint) -> str:
    """What is written where no type is asked for, in words."""
    dequantised = {
        kind for part in checkpoint.parts.values() if (kind := part.source.metadata.get(DEQUANTISED_KEY)) is not None
    }
    return f"kept ({', '.join(sorted(dequantised))} as bfloat16)" if dequantised else "kept"


def _component_record(part: Part, target: str) -> dict[str, Any]:
    return {
        "family": part.family.name,
        "layout_in": part.layout,
        "layout_out": _layout_of(part, target),
        "origin": part.origin,
        "config_from": part.config_from,
        "tensors": len(part.tensors),
        "slots": len(part.slots()),
        "bytes": part.nbytes,
        "left_out": list(part.ignored),
        "names": {known: list(given) for known, given in part.names.items() if given != (known,)},
    }


def _choose_base(checkpoint: Checkpoint, base: str | Path | None, target: str) -> Path | None:
    if base is None:
        return checkpoint.pipeline
    base = Path(base)
    if target == "bfl":
        raise ValueError("--base gives configurations and tokenisers; the bfl layout has neither")
    if not (base / "model_index.json").is_file():
        raise CheckpointError(f"{base}: no model_index.json; --base takes a diffusers pipeline folder")
    read_json(base / "model_index.json")
    return base


def _checked(
    to: str, dtype: str | None, verify: str | None, allow_nonfinite: bool, workers: int | None
) -> Format | None:
    """The format of eight bits that is asked for, if any; raises ValueError for arguments that do not go together."""
    if to not in TARGETS:
        raise ValueError(f"to={to!r}: expected one of {', '.join(TARGETS)}")
    if dtype is not None and dtype not in DTYPES and dtype not in FORMATS:
        raise ValueError(
            f"dtype={dtype!r}: expected one of bf16, f16, f32, fp8, int8, or nothing to keep each tensor's own"
        )
    form = FORMATS.get(dtype or "")
    if form is not None and to != "bfl":
        raise ValueError(
            f"dtype={dtype!r}, to={to!r}: a {to} checkpoint has no weights of eight bits with scales; single files "
            "have, as ComfyUI reads them (to='bfl')"
        )
    if form is not None and verify == "forward":
        raise ValueError(f"dtype={dtype!r}, verify='forward': rounded weights compute something else; use 'exact'")
    if verify not in (None, "exact", "forward"):
        raise ValueError(f"verify={verify!r}: expected 'exact' or 'forward'")
    if allow_nonfinite and verify is None:
        raise ValueError("allow_nonfinite: only verification looks for NaN and infinity; ask for it too (--verify)")
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: at least one is needed")
    return form


def _lora_records(loras: Sequence[tuple[Lora, float]], left_out: Mapping[int, list[str]]) -> list[dict[str, Any]]:
    return [
        {"name": lora.name, "weight": weight} | ({"left_out": left_out[number]} if left_out.get(number) else {})
        for number, (lora, weight) in enumerate(loras)
    ]


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str,
    dtype: str | None = None,
    verify: str | None = None,
    overwrite: bool = False,
    base: str | Path | None = None,
    loras: Sequence[str] = (),
    ignore_unknown: bool = False,
    max_shard_size: str | int = "10GB",
    allow_nonfinite: bool = False,
    workers: int | None = None,
    progress: bool = True,
    trust_pickle: bool = False,
) -> dict[str, Any]:
    """Converts a checkpoint and returns the report that is stored beside it.

    Args:
        source: a diffusers pipeline or component folder, a BFL or ComfyUI single file, an Orbax folder.
        destination: a folder (``orbax``, ``diffusers``, or ``bfl`` of several components) or a file (``bfl`` of
            one component).  It appears complete or not at all.
        to: ``orbax``, ``diffusers`` or ``bfl``.
        dtype: ``bf16``, ``f16`` or ``f32`` for all floating-point tensors; None keeps each tensor's own, and
            writes those that were dequantised as bf16.  With ``bfl``, ``fp8`` and ``int8`` store the matrices of the
            transformer's and T5's blocks in eight bits with scales, as ComfyUI reads them, and keep the rest.
        verify: ``exact`` reads the output back and compares every parameter with the source; ``forward`` also
            compares every block's output with the reference modules (needs torch, diffusers, transformers).
        overwrite: replace an existing destination.
        base: a pipeline folder to take the model index, scheduler and tokenisers from, for sources without them.
        loras: LoRA files to merge into the weights, each as ``path`` or ``path:weight``.
        ignore_unknown: leave out what of a LoRA fits nothing: unknown keys, components and layers the checkpoint lacks.
        max_shard_size: largest file of a ``diffusers`` component.
        allow_nonfinite: with ``verify``, report NaN and infinity instead of refusing them.
        workers: threads; default up to four.
        progress: show a bar where there is a terminal.
        trust_pickle: read ``.pt`` and ``.ckpt`` through torch's weights-only loader.

    Raises:
        CheckpointError: the source cannot be used, the destination cannot be written, or verification failed.
        ValueError: an argument out of range.
    """
    form = _checked(to, dtype, verify, allow_nonfinite, workers)
    shard, threads = parse_size(max_shard_size), workers or default_workers()
    destination = Path(os.path.normpath(destination))
    if not destination.name:
        raise ValueError("destination: expected a path that ends in a name")
    given = [source, *([base] if base is not None else []), *(parse_lora(lora)[0] for lora in loras)]
    check_destination(destination, given, overwrite)
    merged = [(read_lora(path, ignore_unknown=ignore_unknown), weight) for path, weight in map(parse_lora, loras)]
    with naming(source, destination), open_checkpoint(source, trust_pickle=trust_pickle) as opened:
        # A sum is rounded once: to the type asked for, or from float32 to eight bits.
        summed = DTYPES["f32"] if form is not None else DTYPES[dtype] if dtype else None
        merged, left_out = _fitted(merged, opened) if ignore_unknown else (merged, {})
        checkpoint = merge(opened, merged, summed) if merged else opened
        if verify == "forward":
            import converters.verify.forward  # noqa: F401  before any work, so that a missing torch is said at once
        kind = DTYPES[dtype] if dtype and form is None else None
        rest = _choose_base(checkpoint, base, to)
        needed = _size(checkpoint, to, kind, form)
        _check_room(needed, destination)
        types = form.name if form is not None else kind.name if kind is not None else _kept(checkpoint)
        report: dict[str, Any] = {
            "tool": "sega-jax converters",
            "version": tool_version(),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "source": {"name": Path(source).name, "layout": checkpoint.layout},
            "loras": _lora_records(merged, left_out),
            "to": to,
            "dtype": types,
            "bytes": needed,
            "components": {name: _component_record(part, to) for name, part in checkpoint.parts.items()},
        }
        with staged(destination, overwrite=overwrite) as stage:
            product = stage / destination.name
            started = time.perf_counter()
            with Progress(needed, "convert", progress) as bar:
                _write(checkpoint, to, product, rest, kind, form, shard, threads, bar)
            written = time.perf_counter()
            report["source"]["files"] = _hash_while_flushing(checkpoint.files, product, threads, progress)
            report["seconds"] = {"write": written - started, "flush": time.perf_counter() - written}
            report["copied"] = foreign_files(product) if product.is_dir() else []
            if verify:
                report["seconds"]["verify"] = _verify(
                    checkpoint, product, report, verify, kind, allow_nonfinite, threads, progress
                )
            beside = report_path(product)
            write_text(beside, json.dumps(report, indent=1))
            flush(beside)
    return report


def _fitted(
    loras: Sequence[tuple[Lora, float]], checkpoint: Checkpoint
) -> tuple[list[tuple[Lora, float]], dict[int, list[str]]]:
    """LoRAs without what the checkpoint has no place for, and what that is by the LoRA's number."""
    found = [fitting(lora, checkpoint.parts, checkpoint.path) for lora, _ in loras]
    kept = [(lora, weight) for (lora, _), (_, weight) in zip(found, loras, strict=True)]
    return kept, {number: left_out for number, (_, left_out) in enumerate(found)}


def _hash_while_flushing(files: Sequence[Path], product: Path, threads: int, progress: bool) -> list[dict[str, Any]]:
    """Name, size and SHA-256 of the source's files, computed while the output goes to the disk."""
    sizes = {file: file.stat().st_size for file in files[:_FILES_NOTED]}
    with ThreadPoolExecutor(1) as pool, Progress(sum(sizes.values()), "hash", progress) as bar:
        flushed = pool.submit(flush, product)
        hashes = file_hashes(list(sizes), threads, bar)
        flushed.result()
    return [{"name": file.name, "bytes": sizes[file], "sha256": hashes[file]} for file in sizes]


def _verify(
    checkpoint: Checkpoint,
    product: Path,
    report: dict[str, Any],
    level: str,
    dtype: np.dtype | None,
    allow_nonfinite: bool,
    threads: int,
    progress: bool,
) -> float:
    started = time.perf_counter()
    hashes: list[tuple[str, str]] = []
    total = sum(part.nbytes for part in checkpoint.parts.values())
    with open_checkpoint(product) as output, Progress(total, "verify", progress) as bar:
        for name, part in checkpoint.parts.items():
            if name not in output.parts:
                raise CheckpointError(f"{product}: the {name} is not in the output")
            findings = verification.compare(part, output.parts[name], threads, bar, dtype)
            verification.check(findings, name, allow_nonfinite=allow_nonfinite)
            report["components"][name]["verify"] = asdict(findings)
            hashes += [(f"{name}/{slot}", value) for slot, value in findings.hashes.items()]
        report["source"]["fingerprint"] = verification.combine(hashes)
        if level == "forward":
            from converters.verify import forward

            for name, part in checkpoint.parts.items():
                report["components"][name]["forward"] = forward.compare(part, output.parts[name])
    return time.perf_counter() - started
